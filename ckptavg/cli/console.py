"""What the command line says: results on stdout; messages and progress bars on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import click

from ckptavg.errors import escaped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tqdm import tqdm

    from ckptavg.distributed import Ranks
    from ckptavg.options import Progress

_LOG = logging.getLogger("ckptavg")
_DELAY = 0.5  # seconds until a progress bar is drawn
_NARROW = 60  # columns of a terminal that has no room for a bar beside the numbers
_NUMBERS = "{desc}: {percentage:3.0f}%, {remaining} left, {rate_fmt}"


class Console:
    """Where the words of a command go.

    Args:
        as_json: print the result as one JSON document, and nothing else on stdout.
        quiet: print nothing but warnings and errors.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json, self._quiet, self._is_mute = as_json, quiet, False
        self._notices: list[str] = []
        _LOG.setLevel(logging.INFO)
        _LOG.propagate = False
        _LOG.handlers = [_Notices(self._notices, quiet=quiet)]

    @contextlib.contextmanager
    def ranks(self, *, only_torchrun: bool = False) -> Iterator[Ranks]:
        """The processes that share the work, of which the first one prints."""
        from ckptavg.distributed import launched_ranks

        with launched_ranks(only_torchrun=only_torchrun) as ranks:
            if ranks.rank:
                self._quiet = self._is_mute = True
                _LOG.handlers = [logging.NullHandler()]
            yield ranks

    def say(self, text: str) -> None:
        """Print a line of the result, for people."""
        if not self._as_json and not self._quiet:
            click.echo(shown(text))

    def say_table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows of cells in aligned columns."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.say("  ".join(cells).rstrip())

    def result(self, value: Any) -> None:  # noqa: ANN401
        """Print the result, a dict or a dataclass, for machines."""
        if self._as_json and not self._is_mute:
            from ckptavg.formats.jsontext import to_text

            fields = value if isinstance(value, dict) else vars(value)
            click.echo(to_text({**fields, "notices": self._notices}))

    @contextlib.contextmanager
    def others_to_stderr(self) -> Iterator[None]:
        """Keep what the user's code prints away from a JSON document on stdout."""
        if not self._as_json:
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
        """Show a progress bar on a terminal: yields what advances it, or None if there is none.

        The bar appears after a moment, and disappears when the work is done.

        Args:
            label: what is being done, such as `averaging`.
            unit: what is counted; `B` for bytes.
        """
        if self._quiet or not sys.stderr.isatty():
            yield None
            return
        begin, done = time.monotonic(), 0
        bar: tqdm[None] | None = None
        with contextlib.ExitStack() as bars:

            def advance(count: int, total: int | None) -> None:
                nonlocal done, bar
                done += count
                if bar is not None:
                    bar.update(count)
                elif done != total and time.monotonic() - begin > _DELAY:
                    bar = bars.enter_context(_draw(label, unit, done, total))
                if done == total:
                    bars.close()

            yield advance


def _draw(label: str, unit: str, done: int, total: int | None) -> tqdm[None]:
    """Draw a progress bar: on a narrow terminal the numbers alone."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    tqdm.set_lock(threading.RLock())  # nor a lock between processes
    is_narrow = os.get_terminal_size(sys.stderr.fileno()).columns < _NARROW
    form = _NUMBERS if total and is_narrow else None
    in_bytes = unit == "B"
    return tqdm(
        desc=label, initial=done, total=total, unit=unit if in_bytes else f" {unit}",
        unit_scale=in_bytes, miniters=1, leave=False, dynamic_ncols=True, bar_format=form,
    )  # fmt: skip


class _Notices(logging.Handler):
    """Prints what the library logs, and collects it for the JSON document."""

    def __init__(self, notices: list[str], *, quiet: bool) -> None:
        super().__init__()
        self._notices, self._quiet = notices, quiet

    def emit(self, record: logging.LogRecord) -> None:
        text = with_options(record.getMessage())
        self._notices.append(text)
        if record.levelno >= logging.WARNING:
            say_on_stderr(f"warning: {text}")
        elif not self._quiet:
            say_on_stderr(text)


def with_options(text: str) -> str:
    """A message of the library with its arguments (`dry_run`, `lora=exact`) spelled as options."""
    return re.sub(r"`([a-z_]+)(?:=(\w+))?`", _option, text)


def _option(argument: re.Match[str]) -> str:
    name, value = argument[1].replace("_", "-"), argument[2]
    if value == "False":
        return f"--no-{name}"
    return f"--{name}" if value in (None, "True") else f"--{name} {value}"


def shown(text: str) -> str:
    """Lines of text as a terminal can show them, whatever they quote from files and user code."""
    return "\n".join(map(escaped, text.split("\n")))


def say_on_stderr(text: str) -> None:
    """Print a message on stderr, above the progress bar if there is one."""
    line = shown(f"ckptavg: {with_options(text)}")
    if "tqdm" in sys.modules and sys.stderr.isatty():
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
    else:
        click.echo(line, err=True)


def cell(value: float | None, form: str = ",") -> str:
    """A number as a table shows it: `-` for one that is not known."""
    return "-" if value is None else format(value, form)


def size(count: float | None) -> str:
    """Bytes for people: `97.8 MB`."""
    if count is None:
        return "-"
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
