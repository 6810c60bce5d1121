"""From the statistics of single calls to those of the whole pass, in float64 per channel.

n_b is the number of elements per channel in a layer's input, B_b its leading dimension, s2_b its
unbiased variance.

- `paper`: mean and s2 weighted by B_b, as the code of Izmailov et al. does with momentum
  `b / (n + b)`;
- `torch`: mean and s2 with equal weight for every call, as `torch.optim.swa_utils.update_bn`;
- `exact`: the population statistics of the layer's inputs (correction 0), merged as in Chan,
  Golub & LeVeque 1979 from count, mean and M2 = the sum of squared deviations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

EstimatorName = Literal["paper", "torch", "exact"]


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """What one call of a norm layer saw.

    Attributes:
        mean: `[channels]`, float64.
        m2: sum of squared deviations from that mean, `[channels]`, float64.
        count: elements per channel, n_b.
        batch: leading dimension of the input, B_b.
    """

    mean: Tensor
    m2: Tensor
    count: int
    batch: int


class Estimator(Protocol):
    """Statistics of all calls so far.

    Attributes:
        calls: how many there were.
    """

    calls: int

    def update(self, seen: CallStatistics) -> None:
        """Take in another call."""

    @property
    def mean(self) -> Tensor:
        """`[channels]`, float64."""

    @property
    def variance(self) -> Tensor:
        """`[channels]`, float64."""


class WeightedMean:
    """Weighted means of the calls' means and unbiased variances."""

    def __init__(self, *, by_batch: bool) -> None:
        self.calls, self._by_batch, self._weight = 0, by_batch, 0

    def update(self, seen: CallStatistics) -> None:
        """Take in another call, of at least two elements per channel."""
        weight = seen.batch if self._by_batch else 1
        unbiased = seen.m2 / (seen.count - 1)
        self._weight += weight
        self.calls += 1
        if self.calls == 1:
            self._mean, self._variance = seen.mean.clone(), unbiased
        else:
            share = weight / self._weight
            self._mean += (seen.mean - self._mean) * share
            self._variance += (unbiased - self._variance) * share

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the means."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Weighted mean of the unbiased variances."""
        return self._variance


class Population:
    """Statistics of all elements as one population, however they came in batches."""

    def __init__(self) -> None:
        self.calls, self._count = 0, 0

    def update(self, seen: CallStatistics) -> None:
        """Take in another call."""
        self.calls += 1
        if self.calls == 1:
            self._count, self._mean, self._m2 = seen.count, seen.mean.clone(), seen.m2.clone()
        else:
            self._count, self._mean, self._m2 = merged(
                (self._count, self._mean, self._m2), (seen.count, seen.mean, seen.m2)
            )

    @property
    def mean(self) -> Tensor:
        """Population mean."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Population variance, correction 0."""
        return self._m2 / self._count


Moments = tuple[int, "Tensor", "Tensor"]


def merged(one: Moments, other: Moments) -> Moments:
    """Count, mean and M2 of two sets together (Chan, Golub & LeVeque 1979, equation 2.1)."""
    count = one[0] + other[0]
    delta = other[1] - one[1]
    mean = one[1] + delta * (other[0] / count)
    return count, mean, one[2] + other[2] + delta.square() * (one[0] * other[0] / count)


def make_estimator(name: EstimatorName) -> Estimator:
    """A fresh estimator."""
    return Population() if name == "exact" else WeightedMean(by_batch=name == "paper")
