"""Commands: groups of options in their help, defaults from `[tool.ckptavg]`, and dataclasses."""

from __future__ import annotations

import ast
import copy
import dataclasses
import datetime as dt
import math
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from ckptavg.cli.console import Console
from ckptavg.errors import SelectionError
from ckptavg.landscape import spaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ckptavg.merge.schemes import Scheme


RUNNING = "Running"
"""Title of the group that every command has; it shows `--help` as well."""


class NoEffect(NamedTuple):
    """A combination in which some options have no effect.

    Attributes:
        where: completes `--OPTION has no effect ...`, and names the other option.
        applies: called with the command's parameters: whether they are such a combination.
        options: the names of the options' parameters.
    """

    where: str
    applies: Callable[[Mapping[str, Any]], bool]
    options: Sequence[str]


def without(other: str, *options: str) -> NoEffect:
    """The rule for options that have no effect unless another is given."""
    where = f"without --{other.replace('_', '-')}"
    return NoEffect(where, lambda params: not params.get(other), options)


class Command(click.Command):
    """A command that shows its options in groups and refuses those without effect.

    Its function is called with a `console`, and without the options of that.

    Args:
        groups: the options by the title above them.
        no_effect: the combinations in which an option has no effect.
        params: the arguments.
        settings: what `click.Command` takes.
    """

    def __init__(
        self,
        name: str | None,
        *,
        groups: Mapping[str, Sequence[click.Option]],
        no_effect: Iterable[NoEffect] = (),
        params: Iterable[click.Parameter],
        **settings: Any,  # noqa: ANN401
    ) -> None:
        options = [option for group in groups.values() for option in group]
        super().__init__(name, params=[*params, *options], **settings)
        self._groups, self._no_effect = groups, no_effect

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options into the help, a section for each group."""
        for title, options in self._groups.items():
            shown = [*options, self.get_help_option(ctx) if title == RUNNING else None]
            records = [option.get_help_record(ctx) for option in shown if option is not None]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        """Run the command; an option without effect that the configuration set is dropped.

        Raises:
            click.UsageError: an option on the command line has no effect.
        """
        for where, applies, options in self._no_effect:
            for name in options:
                source = ctx.get_parameter_source(name)
                if source in (None, ParameterSource.DEFAULT) or not applies(ctx.params):
                    continue
                if source is ParameterSource.COMMANDLINE:
                    [spelled] = [param.opts[-1] for param in self.params if param.name == name]
                    raise click.UsageError(f"{spelled} has no effect {where}", ctx)
                ctx.params.pop(name, None)
        as_json, quiet = ctx.params.pop("as_json"), ctx.params.pop("quiet")
        ctx.params["console"] = Console(as_json=as_json, quiet=quiet)
        return super().invoke(ctx)


def fields_of(kind: type, params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass that a command's parameters have, by name.

    Args:
        kind: the dataclass.
        params: the command's parameters.
        prefix: the field `loader` is the parameter `PREFIXloader`, if there is one.
    """
    fields = {}
    for field in dataclasses.fields(kind):
        for name in (field.name, prefix + field.name):
            if name in params:
                fields[field.name] = params[name]
    return fields


# Options that mean something else in these commands than in the table for all commands: with a
# model and a loader `average` would refresh, `evaluate` and `soup` need held-out batches and not
# those of the training, and the metric of a selection is recorded, not computed.
_NOT_SHARED = {
    "average": {"model", "loader"},
    "bn-refresh": {"metric", "mode"},
    "evaluate": {"loader", "metric"},
    "soup": {"loader", "metric"},
}


def load_defaults(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Set a command's defaults: from the table for all commands, and from its own.

    Raises:
        click.UsageError: the file cannot be read, or names an option that does not exist.
    """
    table, root, own = _read(path), context.find_root(), context
    if not table:
        return
    while own.parent is not None and own.parent is not root:  # from `landscape rays` to `landscape`
        own = own.parent
    name = own.info_name or ""
    commands = root.command.commands if isinstance(root.command, click.Group) else {}
    known = {name: _options_of(command) for name, command in commands.items()}
    for key, value in table.items():
        for option in _as_table(key, value) if key in known else ():
            if option not in known[key]:
                raise click.UsageError(f"configuration: {key} has no option {option!r}")
        if key not in known and not any(key in options for options in known.values()):
            raise click.UsageError(f"configuration: no command has an option {key!r}")
    skipped = known.keys() | _NOT_SHARED.get(name, set())
    values = {key: value for key, value in table.items() if key not in skipped}
    options = known.get(name, {})
    context.default_map = {
        str(options[key].name): _as_default(options[key], value)
        for key, value in {**values, **table.get(name, {})}.items()
        if key in options
    }


def _options_of(command: click.Command) -> dict[str, click.Option]:
    """A command's options by their keys in the configuration."""
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    params = [*command.params, *(param for each in inner for param in each.params)]
    return {
        option.opts[-1].removeprefix("--"): option
        for option in params
        if isinstance(option, click.Option) and option.name != "config"
    }


def _as_default(option: click.Option, value: object) -> object:
    """A value as click takes it: text, as on the command line, but for flags."""
    if option.is_flag:
        return not value if option.flag_value is False else value  # False of --no-fsync
    texts = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return texts if option.multiple else ",".join(texts)


def _read(path: Path | None) -> dict[str, Any]:
    """The table `[tool.ckptavg]`; empty if no file is named and there is none here."""
    file = path or Path("pyproject.toml")
    if path is None and not file.is_file():
        return {}
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"configuration: {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"configuration: {file}: {error}") from error
    tool = _as_table("tool", content.get("tool", {}))
    if path is not None and "ckptavg" not in tool:
        raise click.UsageError(f"configuration: {file} has no table [tool.ckptavg]")
    return _as_table("tool.ckptavg", tool.get("ckptavg", {}))


def _as_table(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise click.UsageError(f"configuration: {key} must be a table")
    return value


_LARGEST_SIZE = 1 << 63


def path_text(text: str) -> str:
    """A path or a URL as it was typed: a slash at its end says that it is a directory."""
    if not text:
        raise click.BadParameter("the path is empty")  # a variable that was not set
    return text


def path_or_url(text: str) -> Path:
    """A path, or a URL that behaves like one."""
    from ckptavg.formats.parts import as_path

    return as_path(path_text(text))


def _size(text: str) -> int:
    """A number of bytes: `5GB`, `500 MB`, `2GiB`, `1000`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size such as 5GB")
    number, unit, binary = match.groups()
    count = float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " ")
    if not 1 <= count < _LARGEST_SIZE:
        raise click.BadParameter(f"{text!r} is not a possible size")
    return int(count)


def _counts(text: str) -> tuple[int, ...]:
    """Positive numbers, each once: `5`, or `3,5,10`."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9][0-9]{0,17}\s*", part) for part in parts):
        raise click.BadParameter(f"{text!r} is not a positive number, or several such as 3,5,10")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers: `0,0.5,1`, or `FIRST:LAST:COUNT`."""
    try:
        if ":" in text:
            first, last, count = text.split(":")
            values = spaced(float(first), float(last), int(count))
        else:
            values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise click.BadParameter(f"{text!r} is neither numbers (0,0.5,1) nor FIRST:LAST:COUNT")
    return values


def _weights(text: str) -> tuple[Scheme, ...]:
    """The schemes that a text names, such as `uniform,ema:0.9`."""
    from ckptavg.merge import schemes

    try:
        return schemes.parse(text)
    except SelectionError as error:
        raise click.BadParameter(str(error)) from error


def _spec(text: str) -> str:
    """The name of an object in the user's code."""
    if ":" not in text.strip(":"):
        raise click.BadParameter(f"{text!r} is not of the form package.module:attr or file.py:attr")
    return text


def _metric(text: str) -> str:
    """`loss`, `accuracy`, or the name of a function in the user's code."""
    return text if text in {"loss", "accuracy"} else _spec(text)


def _key_value(text: str) -> tuple[str, object]:
    """A keyword argument: `KEY=VALUE`, the value one of Python or TOML (`false`), else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise click.BadParameter(f"{text!r} is not of the form KEY=VALUE")
    for parse_value in (ast.literal_eval, _toml_value):
        try:
            parsed = parse_value(value)
        except (ValueError, SyntaxError):
            continue
        if not isinstance(parsed, dt.date | dt.time):
            return name, parsed
    return name, value


def _toml_value(text: str) -> object:
    [value] = tomllib.loads(f"value = {text}").values()
    return value


def _as_dict(
    _context: click.Context, _option: click.Parameter, pairs: Sequence[tuple[str, object]]
) -> dict[str, object]:
    """The callback that makes a dict of the pairs that `_key_value` has read."""
    return dict(pairs)


# What `click.Option` is told of a value, by its placeholder.
_SETTINGS: dict[str, dict[str, Any]] = {
    "N": {"type": click.IntRange(1)},
    "N,...": {"type": _counts},
    "NUMBERS": {"type": _numbers},
    "POINTS": {"type": click.IntRange(2)},
    "SEED": {"type": click.IntRange(0)},
    "TOL": {"type": click.FloatRange(0, min_open=True)},
    "SIZE": {"type": _size},
    "SCHEME": {"type": _weights},
    "FILE": {"type": click.Path(dir_okay=False, exists=True, path_type=Path)},
    "PATH": {"type": path_text},
    "GLOB": {"multiple": True},
    "REGEX": {"multiple": True},
    "SPEC": {"type": _spec},
    "loss|accuracy|SPEC": {"type": _metric},
    "KEY=VALUE": {"type": _key_value, "multiple": True, "callback": _as_dict},
}
# The fields that are not named like their options.
_FIELDS = {"--json": "as_json"}


def parse(text: str) -> tuple[click.Option, ...]:
    """Options written as the help shows them: names, value, two spaces, and what it is.

    A value in small letters lists the choices; the table above has the others. An option without a
    value is a flag, and `--no-plots` sets `plots` to False. A default in one word is a value.
    """
    entries = re.split(r"\n(?=-)", text.strip())
    return tuple(_option(*re.split(r"\s{2,}", entry, maxsplit=1)) for entry in entries)


def _option(spelled: str, text: str) -> click.Option:
    names = re.findall(r"(?<!\S)-\S+", spelled)
    value = spelled.removeprefix(" ".join(names)).strip()
    text, is_required = re.subn(r" \[required\]$", "", " ".join(text.split()))
    settings: dict[str, Any] = {"required": bool(is_required)}
    if value.islower():
        settings |= {"type": click.Choice(value.split("|"))}
    elif value:
        settings |= {"metavar": value, **_SETTINGS.get(value, {})}
    else:
        settings |= {"is_flag": True}
    field = _FIELDS.get(names[-1], names[-1].strip("-").replace("-", "_"))
    if not value and field.startswith("no_"):
        field = field.removeprefix("no_")
        settings = {"flag_value": False, "default": True}
    elif value == "KEY=VALUE":
        field += "s"
    elif default := re.search(r" \[default: (\S+)\]$", text):
        text = text.removesuffix(default[0])
        settings |= {"default": default[1], "show_default": True}
    return click.Option([*names, field], help=text.replace(" [default:", "  [default:"), **settings)


def variant(other: click.Option, **changes: Any) -> click.Option:  # noqa: ANN401
    """An option with other attributes."""
    changed = copy.copy(other)
    vars(changed).update(changes)
    return changed


def names_of(options: Iterable[click.Option]) -> list[str]:
    """The names of the options' parameters."""
    return [str(option.name) for option in options]
