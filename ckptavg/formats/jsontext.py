"""JSON: text that is printed or written, and text from files, which may be hostile."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, printable
from ckptavg.formats.parts import open_source

if TYPE_CHECKING:
    from pathlib import Path

_LARGEST_FILE = 64 << 20
_MOST_VALUES = 1_500_000  # names and texts take 200 bytes of memory for each


def to_text(value: Any) -> str:  # noqa: ANN401
    """Indented JSON of plain values, dataclasses and tensors; null stands for NaN and Inf."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    return value


def from_text(text: str) -> Any:  # noqa: ANN401
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, has a key twice, or more values than memory should hold.
        RecursionError: it is nested too deeply.
    """
    if sum(map(text.count, "[{,")) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES:,} values")
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the same key twice: {printable(key)}")
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: the file holds something else.
    """
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise FormatError("is not a JSON object", path=path)
    return content


def read_any_json(path: Path) -> Any:  # noqa: ANN401
    """What a file of JSON holds.

    Raises:
        FormatError: the file is not valid JSON.
    """
    file = open_source(path)
    if file.size > _LARGEST_FILE:
        raise FormatError(f"is {file.size} bytes long", path=path)
    try:
        return from_text(file.read(0, file.size).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not valid JSON: {printable(error)}", path=path) from error
