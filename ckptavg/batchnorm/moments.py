"""From the statistics of single calls to those of the pass, in float64 for each channel.

Each estimator is a weighted mean over the calls of a layer. n_b is the number of elements per
channel in a call's input, B_b its leading dimension:

- `paper`: mean and unbiased variance with the weight B_b, as the code of Izmailov et al. does with
  momentum `b / (n + b)`;
- `torch`: mean and unbiased variance with the weight 1, as `torch.optim.swa_utils.update_bn`;
- `exact`: mean and biased variance with the weight n_b, and the variance of the means added to
  that of the calls: the population statistics of the layer's inputs (correction 0), as they come
  out of merging count, mean and M2 (Chan, Golub & LeVeque 1979).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

EstimatorName = Literal["paper", "torch", "exact"]

_TINY = torch.finfo(torch.float64).tiny
_SLICE = 1 << 22  # elements that are held as float64 at a time


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """The statistics of one call of a norm layer.

    Attributes:
        mean: `[channels]`.
        variance: `[channels]`, unbiased.
        count: elements per channel, n_b; instances of an `InstanceNorm`.
        batch: leading dimension of the input, B_b.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    count: int
    batch: int

    @staticmethod
    def of(values: torch.Tensor) -> CallStatistics:
        """The statistics of an input, computed in float64.

        Args:
            values: `[batch, channels, ...]`, any floating dtype.
        """
        axes = [axis for axis in range(values.dim()) if axis != 1]
        rows = max(1, _SLICE // max(1, values[0].numel()))
        pieces = []
        for piece in torch.split(values.detach(), rows):
            variance, mean = torch.var_mean(in_float64(piece), axes, correction=0)
            count = piece.numel() // max(1, values.shape[1])
            variance *= count / max(1, count - 1)
            pieces.append(CallStatistics(mean, variance, count, len(piece)))
        return merged(pieces)

    def weight(self, estimator: EstimatorName) -> int:
        """How much the call counts for."""
        return {"paper": self.batch, "torch": 1, "exact": self.count}[estimator]


def instance_statistics(values: torch.Tensor) -> CallStatistics:
    """The means over a batch of each instance's own mean and unbiased variance, in float64.

    That is what `InstanceNorm` tracks.

    Args:
        values: `[batch, channels, ...]`, any floating dtype.
    """
    instances = [replace(CallStatistics.of(one[None]), count=1) for one in values.detach()]
    return merged(instances, is_instance=True)


def merged(pieces: Sequence[CallStatistics], *, is_instance: bool = False) -> CallStatistics:
    """The statistics of several pieces of a batch together (Chan, Golub & LeVeque 1979, 2.1).

    Args:
        pieces: at least one.
        is_instance: average the pieces by their leading dimensions, as `InstanceNorm` does.
    """
    return pieces[0] if len(pieces) == 1 else reduce(_by_batch if is_instance else _pooled, pieces)


def _by_batch(one: CallStatistics, other: CallStatistics) -> CallStatistics:
    batch = one.batch + other.batch
    share = other.batch / batch
    return CallStatistics(
        one.mean + (other.mean - one.mean) * share,
        one.variance + (other.variance - one.variance) * share,
        one.count + other.count,
        batch,
    )


def _pooled(one: CallStatistics, other: CallStatistics) -> CallStatistics:
    count = one.count + other.count
    mean, delta = in_float64(one.mean), in_float64(other.mean) - in_float64(one.mean)
    squares = in_float64(one.variance) * (one.count - 1)
    squares += in_float64(other.variance) * (other.count - 1)
    squares += delta.square() * (one.count * other.count / count)
    mean = mean + delta * (other.count / count)
    return CallStatistics(mean, squares / (count - 1), count, one.batch + other.batch)


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The values as float64, on the CPU where their device has no such type."""
    return (values.cpu() if values.device.type == "mps" else values).double()


@dataclass(frozen=True)
class Channels:
    """The channels of all layers, one layer after the other.

    Attributes:
        names: the name of each layer.
        sizes: the number of channels of each layer.
        pooled: for each layer, whether its variance is that of all inputs, and so has the variance
            of the means in it (`exact`).
        eps: what each layer adds to its variance.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    pooled: tuple[bool, ...]
    eps: tuple[float, ...]

    def spread(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """A value for each layer as one for each of its channels, float64."""
        given = torch.as_tensor(values, dtype=torch.float64)
        return given.repeat_interleave(torch.tensor(self.sizes))

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A value for each channel, by layer."""
        return torch.split(values, list(self.sizes))


@dataclass(frozen=True)
class Observation:
    """What all layers saw of one batch.

    Attributes:
        calls: the number of calls of each layer, `[layers]`.
        weight: the sum of their weights, `[layers]`, float64; 0 for layers that were not called.
        mean: their weighted mean, `[channels of all layers]`, float64.
        variance: likewise.
    """

    calls: torch.Tensor
    weight: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor


@dataclass
class Moments:
    """Weighted means over batches, and the scatter of the batches.

    Attributes:
        channels: of the layers.
        calls: the number of calls of each layer, `[layers]`.
        weight: sum of the weights of each layer's batches, `[layers]`, float64 as all that follows.
        weight_squares: sum of the squares of the weights, `[layers]`.
        mean: weighted mean of the batches' means, `[channels of all layers]`.
        mean_scatter: weighted sum of their squared deviations from it, likewise.
        variance: weighted mean of the batches' variances, likewise.
        variance_scatter: weighted sum of their squared deviations from it, likewise.
    """

    channels: Channels
    calls: torch.Tensor
    weight: torch.Tensor
    weight_squares: torch.Tensor
    mean: torch.Tensor
    mean_scatter: torch.Tensor
    variance: torch.Tensor
    variance_scatter: torch.Tensor

    @classmethod
    def empty(cls, channels: Channels, device: torch.device | None = None) -> Moments:
        """Moments of no batch, with what is per channel on a device."""
        layers, count = len(channels.sizes), sum(channels.sizes)
        weights = [torch.zeros(layers, dtype=torch.float64) for _ in range(2)]
        values = [torch.zeros(count, dtype=torch.float64, device=device) for _ in range(4)]
        return cls(channels, torch.zeros(layers, dtype=torch.int64), *weights, *values)

    def add(self, seen: Observation) -> None:
        """Add what the layers saw of a batch, all of it finite (West 1979)."""
        self.calls += seen.calls
        self.weight += seen.weight
        self.weight_squares += seen.weight.square()
        weight = self._per_channel(seen.weight)
        share = self._per_channel(seen.weight / self.weight.clamp(min=_TINY))
        for values, scatter, found in (
            (self.mean, self.mean_scatter, seen.mean),
            (self.variance, self.variance_scatter, seen.variance),
        ):
            delta = found - values
            values.add_(delta * share)
            scatter.add_(delta * delta * (1 - share) * weight)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of batches (Chan, Golub & LeVeque 1979, equation 2.1)."""
        weight = self.weight + other.weight
        share = other.weight / weight.clamp(min=_TINY)
        part, product = self._per_channel(share), self._per_channel(self.weight * share)
        means, variances = other.mean - self.mean, other.variance - self.variance
        return Moments(
            self.channels,
            self.calls + other.calls,
            weight,
            self.weight_squares + other.weight_squares,
            self.mean + means * part,
            self.mean_scatter + other.mean_scatter + means.square() * product,
            self.variance + variances * part,
            self.variance_scatter + other.variance_scatter + variances.square() * product,
        )

    def on_cpu(self) -> Moments:
        """A copy on the CPU."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self)[1:]}
        return replace(self, **{name: value.cpu().clone() for name, value in tensors.items()})

    def pooled_variance(self) -> torch.Tensor:
        """The variance of each channel, `[channels of all layers]`, on the CPU."""
        return self.variance.cpu() + self._between()

    def _between(self) -> torch.Tensor:
        """The variance of the means, where it is part of the estimate."""
        between = self.mean_scatter.cpu() / self.channels.spread(self.weight.clamp(min=_TINY))
        return torch.where(self.channels.spread(self.channels.pooled) > 0, between, 0)

    def errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two standard errors of the estimates: the root mean square over a layer's channels.

        A weighted mean over batches x_b that are drawn alike has the variance
        `s2 * sum(w_b^2) / sum(w_b)^2`, where `s2` is that of the x_b; it is taken from their
        scatter. That of a variance of means, B, which `exact` adds, is `2 * B^2` in place of `s2`.

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
        return self._by_layer(of_means / scale), self._by_layer(of_variances / (2 * scale).square())

    def _by_layer(self, squares: torch.Tensor) -> torch.Tensor:
        means = torch.stack([part.mean() for part in self.channels.split(squares)])
        return 2 * means.nan_to_num(torch.inf).sqrt()

    def _per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """A value for each layer as one for each channel; one number where all are equal."""
        if bool((values == values[0]).all()):
            return values[0]  # on the CPU: as a number, it goes with tensors of any device
        return self.channels.spread(values).to(self.mean.device)


def observe(
    calls: Sequence[Sequence[CallStatistics]], channels: Channels, estimator: EstimatorName
) -> Observation:
    """Combine the calls of each layer in one batch.

    Args:
        calls: for each layer its calls.
        channels: of the layers.
        estimator: tells the weights of the calls.
    """
    device = next((call.mean.device for each in calls for call in each), torch.device("cpu"))
    rounds = max(map(len, calls), default=0)
    total = Moments.empty(channels, torch.device("cpu") if device.type == "mps" else device)
    for number in range(rounds):
        weights, means, variances = [], [], []
        for each, size, pooled in zip(calls, channels.sizes, channels.pooled, strict=True):
            call = each[number] if number < len(each) else None
            weights.append(0 if call is None else call.weight(estimator))
            means.append(torch.zeros(size, device=device) if call is None else call.mean.to(device))
            biased = 1 if call is None or not pooled else (call.count - 1) / call.count
            variances.append(means[-1] if call is None else call.variance.to(device) * biased)
        weight = torch.tensor(weights, dtype=torch.float64)
        mean, variance = (in_float64(torch.cat(each)) for each in (means, variances))
        seen = Observation((weight > 0).long(), weight, mean, variance)
        if rounds == 1:
            return seen
        total.add(seen)
    variance = total.pooled_variance().to(total.mean.device)
    return Observation(total.calls, total.weight, total.mean, variance)
