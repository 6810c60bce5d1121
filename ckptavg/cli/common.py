"""What all commands share: configuration, notices, JSON, progress."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tqdm import tqdm

Command = TypeVar("Command", bound=Callable[..., Any])
Progress = Callable[[int, int | None], None]
"""Called with what was done since the last call, and with the total, None if it is not known."""

# What a table that all commands share cannot mean: a model and a loader make `average` refresh as
# well, the loader of the training is not the one to evaluate with, and the metric that chooses
# checkpoints is one that the training has recorded.
_NOT_SHARED = {
    "average": {"model", "loader"},
    "bn-refresh": {"metric", "mode"},
    "evaluate": {"loader", "metric"},
    "soup": {"loader", "metric"},
}


def common_options(command: Command) -> Command:
    """`--config`, `--json` and `--quiet`, which every command has."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors."),
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            help="Print one JSON document on stdout, and nothing else there.",
        ),
        click.option(
            "--config",
            type=click.Path(dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_load_defaults,
            help="Read defaults from this TOML file, not from the pyproject.toml that is here.",
        ),
    ):
        command = option(command)
    return command


threads_option = click.option(
    "-j",
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Threads that work at once.  [default: the processors]",
)


def _load_defaults(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take `[tool.ckptavg]` as defaults: keys for all commands, and a table for each."""
    table = _read_config(path)
    own_context, group = context, context.parent
    while group is not None and group.parent is not None:  # `landscape rays`
        own_context, group = group, group.parent
    root = group.command if group is not None else None
    commands = root.commands if isinstance(root, click.Group) else {}
    known = {name: _option_names(command) for name, command in commands.items()}
    own = own_context.info_name or ""
    command = context.command
    defaults: dict[str, object] = {}
    for key, value in table.items():
        if key in known:
            for inner, setting in _as_table(key, value).items():
                if inner not in known[key]:
                    raise click.UsageError(f"configuration: {key} has no option {inner!r}")
                if key == own:
                    defaults[known[key][inner]] = _as_default(command, inner, setting)
        elif not any(key in options for options in known.values()):
            raise click.UsageError(f"configuration: no command has an option {key!r}")
        elif key in known.get(own, {}) and key not in _NOT_SHARED.get(own, ()):
            defaults.setdefault(known[own][key], _as_default(command, key, value))
    context.default_map = {**(context.default_map or {}), **defaults}


def _as_default(command: click.Command, option: str, value: object) -> object:
    """A value as click wants it: an option that may be repeated takes a list."""
    repeated = any(
        parameter.multiple and f"--{option}" in parameter.opts
        for parameter in command.params
        if isinstance(parameter, click.Option)
    )
    return [value] if repeated and not isinstance(value, list) else value


def _as_table(key: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise click.UsageError(f"configuration: {key} must be a table")
    return value


def _read_config(path: Path | None) -> dict[str, Any]:
    source = path or Path("pyproject.toml")
    if path is None and not source.is_file():
        return {}
    try:
        whole = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"configuration: {source}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"configuration: {source}: {error}") from error
    tool = _as_table("tool", whole.get("tool", {}))
    if path is not None and "ckptavg" not in tool:
        raise click.UsageError(f"configuration: {source} has no table [tool.ckptavg]")
    return _as_table("tool.ckptavg", tool.get("ckptavg", {}))


def _option_names(command: click.Command) -> dict[str, str]:
    """Names of a command's long options, as a configuration has them, to parameter names."""
    if isinstance(command, click.Group):
        inner = [_option_names(one) for one in command.commands.values()]
        return {name: parameter for names in inner for name, parameter in names.items()}
    return {
        name.removeprefix("--"): parameter.name or ""
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
        if name.startswith("--") and name not in ("--config", "--help")
    }


class OutputType(click.Path):
    """The name of an output, as it was typed: a slash at its end says that it is a directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Take the name unless it is empty: that is a variable that was not set."""
        if value in {"", b""}:
            self.fail("the path is empty", param, ctx)
        return os.fspath(super().convert(value, param, ctx))


class PathType(OutputType):
    """A path, or a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Take the path unless it is empty."""
        from ckptavg.formats.paths import as_path

        return as_path(super().convert(value, param, ctx))


_LARGEST_SIZE = 1 << 63


class SizeType(click.ParamType[int]):
    """A number of bytes: `5GB`, `500 MB`, `2GiB`, `1000`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Read the number and its unit."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(value), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is no size such as 5GB", param, ctx)
        number, unit, binary = found.groups()
        count = float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " ")
        if not 1 <= count < _LARGEST_SIZE:
            self.fail(f"{value!r} is no possible size", param, ctx)
        return int(count)


class Console:
    """Where a command's words go: results to stdout, everything else to stderr."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet, self._is_mute = as_json, quiet, False
        self.notices: list[str] = []
        log = logging.getLogger("ckptavg")
        log.setLevel(logging.INFO)
        log.propagate = False
        log.handlers = [_Notices(self)]

    def mute(self) -> None:
        """Leave the word to another process: say nothing, not even warnings."""
        self.quiet = self._is_mute = True
        logging.getLogger("ckptavg").handlers = [logging.NullHandler()]

    def say(self, text: str) -> None:
        """A line of the result, for people."""
        if not self.as_json and not self.quiet:
            click.echo(text)

    def say_table(self, rows: Sequence[Sequence[str]]) -> None:
        """Rows of cells in aligned columns."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.say("  ".join(cells).rstrip())

    def result(self, value: Any) -> None:  # noqa: ANN401 - any dataclass
        """The result, for machines."""
        from ckptavg.formats.jsontext import to_text

        if self.as_json and not self._is_mute:
            fields = value if isinstance(value, dict) else vars(value)
            click.echo(to_text({**fields, "notices": self.notices}))

    @contextlib.contextmanager
    def others_to_stderr(self) -> Iterator[None]:
        """With `--json`, keep what the user's code prints away from stdout."""
        if not self.as_json:
            yield
            return
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)

    @contextlib.contextmanager
    def progress(self, label: str, unit: str) -> Iterator[Progress | None]:
        """A progress bar on a terminal: yields what advances it, or None where there is no bar.

        Args:
            label: what is being done, such as `averaging`.
            unit: what is counted; `B` for bytes.
        """
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        bar = _Bar(label, unit)
        try:
            yield bar.advance
        finally:
            bar.close()


class _Bar:
    """A progress bar that appears after a moment, and disappears when the work is done."""

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._begin, self._done = time.monotonic(), 0
        self._bar: tqdm[None] | None = None

    def advance(self, done: int, total: int | None) -> None:
        """Add what was done since the last call; None for a total that is not known."""
        self._done += done
        if self._bar is not None:
            self._bar.update(done)
        elif self._done != total and time.monotonic() - self._begin > _DELAY:
            self._bar = self._draw(total)
        if self._done == total:
            self.close()

    def close(self) -> None:
        """Clear the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _draw(self, total: int | None) -> tqdm[None]:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread of its own
        tqdm.set_lock(threading.RLock())  # nor a lock between processes
        is_narrow = os.get_terminal_size(sys.stderr.fileno()).columns < _NARROW
        counts_bytes = self._unit == "B"
        return tqdm(
            desc=self._label,
            total=total,
            initial=self._done,
            unit=self._unit if counts_bytes else f" {self._unit}",
            unit_scale=counts_bytes,
            miniters=1,
            leave=False,
            dynamic_ncols=True,
            bar_format=_SHORT if total and is_narrow else None,
        )


_DELAY = 0.5  # seconds until a bar is drawn
_NARROW = 60  # columns, in which tqdm's own text has no room
_SHORT = "{desc}: {percentage:3.0f}%, {remaining} left, {rate_fmt}"


class _Notices(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self._console.notices.append(text)
        if record.levelno >= logging.WARNING:
            click.echo(f"ckptavg: warning: {text}", err=True)
        elif not self._console.quiet:
            click.echo(f"ckptavg: {text}", err=True)


def size(count: float) -> str:
    """Bytes for people: `97.8 MB`."""
    if count < 1000:  # noqa: PLR2004 - decimal units
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if round(count, 1) < 1000:  # noqa: PLR2004
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`, `2 batches`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('ch') else 's'}"
