"""JSON that is printed or written, and JSON that comes from a file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Any

from ckptavg.errors import printable

_MOST_VALUES = 3_000_000


def to_text(value: Any) -> str:  # noqa: ANN401
    """JSON, indented; null stands for NaN and Infinity, which it does not have."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Dataclasses, and containers of them, as what JSON knows."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({one.name: getattr(value, one.name) for one in dataclasses.fields(value)})
    return value


def from_text(text: str) -> Any:  # noqa: ANN401
    """What a file says in JSON: each key once, and no more of it than fits into memory.

    Raises:
        ValueError: it is not so. (RecursionError: it is nested without end.)
    """
    # Two bytes, `[]`, become an object of 64.
    if sum(map(text.count, "[{,")) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES:,} values")
    return json.loads(text, object_pairs_hook=unique)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict; ValueError where a key comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the same key twice: {printable(key)}")
    return found
