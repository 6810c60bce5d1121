"""Defaults of the options, from the table `[tool.ckptavg]` of a TOML file."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

# Options that mean something else in these commands than in the table for all commands: with a
# model and a loader `average` would refresh, `evaluate` and `soup` need held-out batches and not
# those of the training, and the metric of a selection is recorded, not computed.
_NOT_SHARED = {
    "average": {"model", "loader"},
    "bn-refresh": {"metric", "mode"},
    "evaluate": {"loader", "metric"},
    "soup": {"loader", "metric"},
    "sweep": {"loader", "metric"},
}

_LARGEST = 1 << 20


def load_defaults(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Set a command's defaults: from the table for all commands, and from its own.

    Raises:
        click.UsageError: the file cannot be read, or names an option that does not exist.
    """
    table = _read(path)
    if not table:
        return
    root, own = context.find_root(), context
    while own.parent is not None and own.parent is not root:  # from `landscape rays` to `landscape`
        own = own.parent
    name = own.info_name or ""
    commands = root.command.commands if isinstance(root.command, click.Group) else {}
    known = {name: _options_of(command) for name, command in commands.items()}
    _check_keys(table, known)
    skipped = known.keys() | _NOT_SHARED.get(name, set())
    shared = {key: value for key, value in table.items() if key not in skipped}
    options = known.get(name, {})
    context.default_map = {
        str(options[key].name): _as_default(options[key], value)
        for key, value in {**shared, **table.get(name, {})}.items()
        if key in options
    }


def _check_keys(table: Mapping[str, Any], known: Mapping[str, Mapping[str, click.Option]]) -> None:
    """Check that each key is an option of its command or, outside their tables, of any command.

    Raises:
        click.UsageError: it is not.
    """
    for key, value in table.items():
        if key in known:
            for option in _as_table(key, value).keys() - known[key].keys():
                raise click.UsageError(f"configuration: {key} has no option {option!r}")
        elif not any(key in options for options in known.values()):
            raise click.UsageError(f"configuration: no command has an option {key!r}")


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
        if not stat.S_ISREG(file.stat().st_mode) or file.stat().st_size > _LARGEST:
            raise click.UsageError(
                f"configuration: {file}: is not a file of at most {_LARGEST} bytes"
            )
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"configuration: {file}: {error.strerror}") from error
    except RecursionError as error:
        raise click.UsageError(f"configuration: {file}: is nested too deeply") from error
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise click.UsageError(f"configuration: {file}: {error}") from error
    tool = _as_table("tool", content.get("tool", {}))
    if path is not None and "ckptavg" not in tool:
        raise click.UsageError(f"configuration: {file} has no table [tool.ckptavg]")
    return _as_table("tool.ckptavg", tool.get("ckptavg", {}))


def _as_table(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise click.UsageError(f"configuration: {key} must be a table")
    return value
