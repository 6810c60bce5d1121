"""Options, declared in the words of the help, and the types of their values."""

from __future__ import annotations

import ast
import copy
import datetime as dt
import math
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.errors import CkptAvgError, SelectionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.merge.schemes import Scheme


_LARGEST_SIZE = 1 << 63


def path_text(text: str) -> str:
    """A path or a URL as it was typed: a slash at its end says that it is a directory."""
    if not text:
        raise click.BadParameter("the path is empty")  # a variable that was not set
    return text


def path_or_url(text: str) -> Path:
    """A path, or a URL that behaves like one."""
    from ckptavg.formats.paths import as_path

    return as_path(path_text(text))


def check_exists(param: click.Parameter, value: object) -> None:
    """Check that the inputs, and the files of code, of a parameter exist.

    It takes no time, and importing the libraries takes seconds.

    Raises:
        CkptAvgError: one does not exist.
    """
    from ckptavg.formats import paths

    if isinstance(param, click.Option):
        file = Path(value.rpartition(":")[0]) if isinstance(value, str) else Path()
        if str(param.metavar).endswith("SPEC") and file.suffix == ".py" and not file.is_file():
            raise CkptAvgError("there is no such file", path=file)
        return
    for each in value if isinstance(value, tuple) else (value,):
        path = Path(str(each))
        if "://" in str(each) or os.path.lexists(path):
            continue
        # A run that was killed may have moved a directory aside, which `bn-refresh` puts back.
        if not any(path.parent.glob(".ckptavg-*.old")):
            paths.check_exists(path)


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


def _counts(text: str) -> tuple[int | None, ...]:
    """Positive numbers, each once: `5`, or `3,5,10`; None for `all`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,17}|all", part) for part in parts):
        raise click.BadParameter(f"{text!r} is neither a positive number nor a list such as 3,5,10")
    return tuple(dict.fromkeys(None if part == "all" else int(part) for part in parts))


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers: `0,0.5,1`, or `FIRST:LAST:COUNT`."""
    try:
        if ":" in text:
            import numpy as np

            first, last, count = text.split(":")
            with np.errstate(all="ignore"):  # of infinite ends
                values = tuple(map(float, np.linspace(float(first), float(last), int(count))))
        else:
            values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise click.BadParameter(f"{text!r} is neither numbers (0,0.5,1) nor FIRST:LAST:COUNT")
    return values


def _picture(text: str) -> Path:
    """The path of a picture that can be drawn."""
    path = Path(text)
    if path.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise click.BadParameter(f"{text!r} does not end with .png, .svg or .pdf")
    return path


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
    "N|all,...": {"type": _counts},
    "NUMBERS": {"type": _numbers},
    "POINTS": {"type": click.IntRange(2)},
    "SEED": {"type": click.IntRange(0)},
    "TOL": {"type": click.FloatRange(0, min_open=True)},
    "SIZE": {"type": _size},
    "SCHEME": {"type": _weights},
    "FILE": {"type": click.Path(dir_okay=False, exists=True, path_type=Path)},
    "PATH": {"type": path_text},
    "OUT": {"type": click.Path(dir_okay=False, path_type=Path)},
    "DIR": {"type": click.Path(file_okay=False, path_type=Path)},
    "PICTURE": {"type": _picture},
    "GLOB": {"multiple": True},
    "REGEX": {"multiple": True},
    "KEY": {"multiple": True},
    "SPEC": {"type": _spec},
    "loss|accuracy|SPEC": {"type": _metric},
    "KEY=VALUE": {"type": _key_value, "multiple": True, "callback": _as_dict},
}


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
    if value.islower() and value not in _SETTINGS:
        settings |= {"type": click.Choice(value.split("|"))}
    elif value:
        settings |= {"metavar": value, **_SETTINGS.get(value, {})}
    else:
        settings |= {"is_flag": True}
    field = names[-1].strip("-").replace("-", "_")
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
