"""Types of options and arguments: functions that read the text."""

from __future__ import annotations

import ast
import math
import re
from typing import TYPE_CHECKING

import click

from ckptavg.errors import SelectionError
from ckptavg.landscape import spaced

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.merge.schemes import Scheme

_LARGEST_SIZE = 1 << 63


def path_text(text: str) -> str:
    """A path or a URL as it was typed: a slash at its end says that it is a directory."""
    if not text:
        raise click.BadParameter("the path is empty")  # a variable that was not set
    return text


def path(text: str) -> Path:
    """A path, or a URL that behaves like one."""
    from ckptavg.formats.paths import as_path

    return as_path(path_text(text))


def size(text: str) -> int:
    """A number of bytes: `5GB`, `500 MB`, `2GiB`, `1000`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size such as 5GB")
    number, unit, binary = match.groups()
    count = float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " ")
    if not 1 <= count < _LARGEST_SIZE:
        raise click.BadParameter(f"{text!r} is not a possible size")
    return int(count)


def counts(text: str) -> tuple[int, ...]:
    """Positive numbers, each once: `5`, or `3,5,10`."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9][0-9]{0,17}\s*", part) for part in parts):
        raise click.BadParameter(f"{text!r} is not a positive number, or several such as 3,5,10")
    return tuple(dict.fromkeys(int(part) for part in parts))


def numbers(text: str) -> tuple[float, ...]:
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


def weights(text: str) -> tuple[Scheme, ...]:
    """The schemes that a text names, such as `uniform,ema:0.9`."""
    from ckptavg.merge.schemes import parse

    try:
        return parse(text)
    except SelectionError as error:
        raise click.BadParameter(str(error)) from error


def spec(text: str) -> str:
    """The name of an object in the user's code."""
    if ":" not in text.strip(":"):
        raise click.BadParameter(f"{text!r} is not of the form package.module:attr or file.py:attr")
    return text


def metric(text: str) -> str:
    """`loss`, `accuracy`, or the name of a function in the user's code."""
    return text if text in {"loss", "accuracy"} else spec(text)


def key_value(text: str) -> tuple[str, object]:
    """A keyword argument: `KEY=VALUE`, the value a Python literal where it is one."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise click.BadParameter(f"{text!r} is not of the form KEY=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def as_dict(
    _context: click.Context, _option: click.Parameter, pairs: Sequence[tuple[str, object]]
) -> dict[str, object]:
    """The callback that makes a dict of the pairs that `key_value` has read."""
    return dict(pairs)
