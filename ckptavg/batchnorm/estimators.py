"""From the statistics of single calls to those of the whole pass, in float64 per channel.

Each estimator is a weighted mean over the calls of a layer. n_b is the number of elements per
channel in a call's input, B_b its leading dimension:

- `paper`: mean and unbiased variance with the weight B_b, as the code of Izmailov et al. does with
  momentum `b / (n + b)`;
- `torch`: mean and unbiased variance with the weight 1, as `torch.optim.swa_utils.update_bn`;
- `exact`: mean and biased variance with the weight n_b, and the variance of the means added to
  that of the calls: the population statistics of the layer's inputs (correction 0), as they come
  out of merging count, mean and M2 (Chan, Golub & LeVeque 1979).

How far the calls scatter says how far their mean may still be from that of endless data.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

EstimatorName = Literal["paper", "torch", "exact"]

_QUANTILE = 1.645  # of the normal distribution, for 95 %
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """What one call of a norm layer saw.

    Attributes:
        mean: `[channels]`.
        variance: `[channels]`, biased for `exact` and unbiased for the others.
        count: elements per channel, n_b.
        batch: leading dimension of the input, B_b.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    count: int
    batch: int

    def weight(self, estimator: EstimatorName) -> int:
        """How much the call counts for."""
        return {"paper": self.batch, "torch": 1, "exact": self.count}[estimator]


@dataclass(frozen=True)
class Channels:
    """The channels of all layers, one layer after the other.

    Attributes:
        sizes: how many each layer has.
        pooled: whether a layer's variance is that of all inputs, and so has that of the means in it
            (`exact`).
        eps: what each layer adds to its variance.
    """

    sizes: tuple[int, ...]
    pooled: tuple[bool, ...]
    eps: tuple[float, ...]

    def spread(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """What each layer has, for each of its channels, in float64."""
        given = torch.as_tensor(values, dtype=torch.float64)
        return given.repeat_interleave(torch.tensor(self.sizes))

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each channel has, by layer."""
        return torch.split(values, list(self.sizes))


@dataclass
class WeightedMoments:
    """Weighted means of what the calls saw, and how that scatters.

    Attributes:
        channels: of the layers.
        calls: of each layer, `[layers]`.
        weight: sum of the calls' weights, `[layers]`, float64 like all that follows.
        weight_squares: sum of the squares of the weights, `[layers]`.
        mean: weighted mean of the means, `[channels of all layers]`.
        mean_scatter: weighted sum of their squared deviations from that, likewise.
        variance: weighted mean of the variances, likewise.
        variance_scatter: weighted sum of their squared deviations from that, likewise.
        overlaps: how much the channels of a layer have in common, `[2, 2, layers]`: for means and
            variances the sums of `(d_b . d_b-1)^2` and of `|d_b|^2 |d_b-1|^2` over the batches'
            deviations d_b from what was known before, in standard deviations.
    """

    channels: Channels
    calls: torch.Tensor
    weight: torch.Tensor
    weight_squares: torch.Tensor
    mean: torch.Tensor
    mean_scatter: torch.Tensor
    variance: torch.Tensor
    variance_scatter: torch.Tensor
    overlaps: torch.Tensor
    _last: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False, repr=False)

    @classmethod
    def empty(cls, channels: Channels, device: torch.device | None = None) -> WeightedMoments:
        """Of no calls, with what is per channel on a device."""
        layers, count = len(channels.sizes), sum(channels.sizes)
        weights = [torch.zeros(layers, dtype=torch.float64) for _ in range(2)]
        values = [torch.zeros(count, dtype=torch.float64, device=device) for _ in range(4)]
        values.append(torch.zeros(2, 2, layers, dtype=torch.float64, device=device))
        return cls(channels, torch.zeros(layers, dtype=torch.int64), *weights, *values)

    def update(
        self,
        weights: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        calls: torch.Tensor | None = None,
    ) -> None:
        """Take in what each layer saw of a batch (West 1979).

        Args:
            weights: of each layer's calls together, `[layers]`, float64; 0 for layers without any.
            mean: of them, `[channels of all layers]`, float64; finite.
            variance: likewise.
            calls: how many calls that were, `[layers]`; None for one each.
        """
        self.calls += weights > 0 if calls is None else calls
        self.weight += weights
        self.weight_squares += weights.square()
        share = self._per_channel(weights / self.weight.clamp(min=_TINY))
        own = self._per_channel(weights)
        means, variances = mean - self.mean, variance - self.variance
        for values, scatter, delta in (
            (self.mean, self.mean_scatter, means),
            (self.variance, self.variance_scatter, variances),
        ):
            values.add_(delta * share)
            scatter.add_(delta * delta * (1 - share) * own)
        self._compare(means, variances, (1 - share) * (own > 0))

    def _compare(self, means: torch.Tensor, variances: torch.Tensor, scale: torch.Tensor) -> None:
        """Hold a batch's deviations against those of the batch before."""
        places = _places(self.channels.sizes, self.mean.device)
        total = self.variance + self.channels.spread(self.channels.eps).to(self.mean.device)
        now = means * (scale / total).sqrt(), variances * scale.sqrt() / total
        for sums, own, before in zip(self.overlaps, now, self._last or now, strict=True):
            if self._last is not None:
                dots = torch.zeros(3, len(self.channels.sizes), dtype=own.dtype, device=own.device)
                dots.index_add_(1, places, torch.stack([own * before, own**2, before**2]))
                sums.add_(torch.stack([dots[0] ** 2, dots[1] * dots[2]]))
        self._last = now

    def merged(self, other: WeightedMoments) -> WeightedMoments:
        """Those of both sets of calls together (Chan, Golub & LeVeque 1979, equation 2.1)."""
        weight = self.weight + other.weight
        share = other.weight / weight.clamp(min=_TINY)
        part, product = self._per_channel(share), self._per_channel(self.weight * share)
        means, variances = other.mean - self.mean, other.variance - self.variance
        return WeightedMoments(
            self.channels,
            self.calls + other.calls,
            weight,
            self.weight_squares + other.weight_squares,
            self.mean + means * part,
            self.mean_scatter + other.mean_scatter + means.square() * product,
            self.variance + variances * part,
            self.variance_scatter + other.variance_scatter + variances.square() * product,
            self.overlaps + other.overlaps,
        )

    def on_cpu(self) -> WeightedMoments:
        """A copy for the other processes."""
        values = self.mean, self.mean_scatter, self.variance, self.variance_scatter, self.overlaps
        weights = (self.calls.clone(), self.weight.clone(), self.weight_squares.clone())
        copies = (torch.empty_like(one, device="cpu").copy_(one) for one in values)
        return WeightedMoments(self.channels, *weights, *copies)

    def pooled_variance(self) -> torch.Tensor:
        """The variance of each channel, `[channels of all layers]`, float64, on the CPU."""
        return self.variance.cpu() + self._between()

    def _between(self) -> torch.Tensor:
        """The variance of the means, where it is part of the whole."""
        between = self.mean_scatter.cpu() / self.channels.spread(self.weight.clamp(min=_TINY))
        return torch.where(self.channels.spread(self.channels.pooled) > 0, between, 0)

    def errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the estimates may still be from those of endless data like these.

        A weighted mean over batches x_b that are drawn alike has the variance
        `s2 * sum(w_b^2) / sum(w_b)^2`, where `s2` is that of the x_b; it is taken from their
        scatter. What several calls of a layer saw of one batch is one x_b. That of a variance of
        means, B, which `exact` adds, is `2 * B^2` in place of `s2`. The root mean square over a
        layer's channels is raised to the upper end of its 95 % interval: its square is that of a
        chi-squared distribution with as many degrees of freedom as there are independent channels
        (Satterthwaite 1946), of which the quantile is taken as in Wilson & Hilferty 1931.

        Returns:
            The error of the mean, in standard deviations, and that of the logarithm of the standard
            deviation, both `[layers]`; inf for a layer that saw less than two batches.
        """
        scale = self.pooled_variance() + self.channels.spread(self.channels.eps)
        freedom = self.weight - self.weight_squares / self.weight.clamp(min=_TINY)
        share = self.weight_squares / self.weight.square()
        factor = torch.where(freedom > self.weight * 1e-9, share / freedom, torch.inf)
        of_means = self.mean_scatter.cpu() * self.channels.spread(factor)
        of_variances = self.variance_scatter.cpu() * self.channels.spread(factor)
        of_variances += 2 * self._between().square() * self.channels.spread(share)
        bound = self._bounds()
        return self._by_layer(of_means / scale, bound[0]), (
            self._by_layer(of_variances / (2 * scale).square(), bound[1])
        )

    def _by_layer(self, squares: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        means = torch.stack([part.mean() for part in self.channels.split(squares)])
        return (means * bound).nan_to_num(torch.inf).sqrt()

    def _bounds(self) -> torch.Tensor:
        """The quantile over the mean, `[2, layers]`, for means and variances.

        The trace of the squared covariance over the square of its trace is the inverse of the
        number of independent channels; deviations of two batches that are independent give both.
        """
        common, all_of_it = self.overlaps.cpu().unbind(1)
        least = 1 / torch.tensor(self.channels.sizes, dtype=torch.float64)
        part = torch.where(all_of_it > 0, common / all_of_it, least).clamp(max=1)
        ninth = 2 / 9 * torch.maximum(part, least)
        return (1 - ninth + _QUANTILE * ninth.sqrt()) ** 3

    def _per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """What each layer has, for each of its channels; one number where all layers agree."""
        if bool((values == values[0]).all()):
            return values[0]  # on the CPU: as a number, it goes with tensors of any device
        device = self.mean.device
        return values.to(device)[_places(self.channels.sizes, device)]


@functools.lru_cache(maxsize=8)
def _places(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The layer of each channel, on a device."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)


Round = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Weights, means and variances of a call of each layer."""


def joined(rounds: Sequence[Round], channels: Channels) -> tuple[torch.Tensor, ...]:
    """What `WeightedMoments.update` takes, out of all calls that the layers had in a batch."""
    if len(rounds) == 1:
        return *rounds[0], (rounds[0][0] > 0).long()
    one_batch = WeightedMoments.empty(channels, rounds[0][1].device)
    for one in rounds:
        one_batch.update(*one)
    variance = one_batch.pooled_variance().to(rounds[0][1].device)
    return one_batch.weight, one_batch.mean, variance, one_batch.calls
