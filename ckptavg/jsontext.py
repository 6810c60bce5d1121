"""What is printed or written as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any


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
