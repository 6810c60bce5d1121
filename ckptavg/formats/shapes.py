"""Which shapes a tensor can have."""

from __future__ import annotations

import math

_MOST_DIMENSIONS = 64  # numpy's limit; torch computes with no more either
_MOST_BYTES = 1 << 63


def is_possible(shape: tuple[int, ...], bits: int) -> bool:
    """Whether a machine could hold such a tensor, whatever file claims to have one.

    Dimensions of no extent do not count: numpy takes no `(2**62, 4, 0)`, though it has no element.

    Args:
        shape: its dimensions, none of them negative.
        bits: size of an element.
    """
    if len(shape) > _MOST_DIMENSIONS:
        return False
    return math.prod(size for size in shape if size) * bits < 8 * _MOST_BYTES
