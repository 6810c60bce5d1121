"""How certain a difference is between two models that were evaluated on the same examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ckptavg.evaluation.measures import Units

LEVEL = 0.95
_RESAMPLES = 2_000
FEWEST = 10  # with fewer units there is no interval
_MOST = 10_000  # more units are put together into so many groups, which have the same variance
_AT_ONCE = 1 << 22  # numbers


@dataclass(frozen=True)
class Difference:
    """A metric of one model less that of another, on the same examples.

    Attributes:
        value: the difference.
        low: the lower end of the 95 % interval; NaN where there is none.
        high: its upper end.
        units: how many examples, or batches, were drawn again.
    """

    value: float
    low: float
    high: float
    units: int

    @property
    def has_interval(self) -> bool:
        """Whether there are enough units, with finite values, for an interval."""
        return not math.isnan(self.low)

    @property
    def is_told_apart(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low > 0 or self.high < 0


def paired_difference(first: Units, other: Units, *, seed: int = 0) -> Difference:
    """The difference of two means over the same units, with its bootstrap interval.

    The percentile interval of 2,000 resamples of units (Efron and Tibshirani 1993, chapter 13),
    expanded for small samples (Hesterberg 2015, arXiv 1411.5279): its tails are those
    of `t * sqrt(n / (n - 1))` and not of the normal quantile.

    Args:
        first: the values of the one model.
        other: those of the other, of the same units in the same order.
        seed: of the resamples.
    """
    count = len(first.totals)
    value = first.mean - other.mean
    alike = len(other.totals) == count and np.array_equal(first.counts, other.counts)
    if count < FEWEST or not alike or not math.isfinite(value):
        return Difference(value, math.nan, math.nan, count)
    pairs = np.stack([first.totals - other.totals, first.counts])  # [2, units]
    if count > _MOST:
        groups = np.arange(count) % _MOST
        pairs = np.stack([np.bincount(groups, weights=row) for row in pairs])
    means = _resampled(pairs, seed)
    tail = _tail(pairs.shape[1])
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(value, float(low), float(high), count)


def _resampled(pairs: np.ndarray, seed: int) -> np.ndarray:
    """Means of the units drawn again: the sum of the totals over that of the counts."""
    draw, units = np.random.default_rng(seed), pairs.shape[1]
    at_once = max(1, _AT_ONCE // units)
    means = []
    for start in range(0, _RESAMPLES, at_once):
        rows = min(at_once, _RESAMPLES - start)
        totals, counts = pairs[:, draw.integers(0, units, (rows, units))].sum(axis=2)
        means.append(totals / np.maximum(counts, 1))
    return np.concatenate(means)


def _tail(count: int) -> float:
    """The share of the resamples beyond either end of the interval."""
    normal, free = NormalDist(), count - 1
    z = normal.inv_cdf((1 + LEVEL) / 2)
    # Student's quantile to the second order in 1 / free (Abramowitz and Stegun, 26.7.5).
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return normal.cdf(-t * math.sqrt(count / free))
