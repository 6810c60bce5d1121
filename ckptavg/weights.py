"""Weights of an average: a number for each checkpoint, and what their sum is divided by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Weights:
    """The average is `sum(values[i] * x[i]) / divisor`.

    Attributes:
        scheme: what made them, for the provenance.
        values: one for each checkpoint, `[num_checkpoints]`.
        divisor: what the sum is divided by, once.
    """

    scheme: str
    values: tuple[float, ...]
    divisor: float

    @property
    def uniform(self) -> bool:
        """Whether the order of the checkpoints does not matter."""
        return len(set(self.values)) <= 1


def uniform(count: int) -> Weights:
    """The mean: `(x_1 + ... + x_K) / K` (Izmailov et al. 2018, equation in Algorithm 1)."""
    return Weights("uniform", (1.0,) * count, float(count))


def explicit(values: Sequence[float], count: int) -> Weights:
    """Any column of numbers, normalised to sum 1. Negative ones are allowed.

    Raises:
        SelectionError: not one finite number for each checkpoint, or they sum to zero.
    """
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise SelectionError(f"weights must be numbers: {error}") from error
    total = math.fsum(numbers)
    if len(numbers) != count:
        raise SelectionError(f"{len(numbers)} weights for {count} checkpoints")
    if not all(math.isfinite(number) for number in numbers) or not math.isfinite(total):
        raise SelectionError("weights must be finite numbers")
    if total == 0:
        raise SelectionError("weights sum to zero, so there is nothing to divide by")
    return Weights("explicit", numbers, total)
