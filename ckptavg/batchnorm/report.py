"""What a refresh did, for people and machines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from ckptavg.batchnorm.layers import KeptLayer, NormLayer


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a layer holds.

    Attributes:
        mean: running mean of each channel, float64 `[num_channels]`.
        variance: running variance of each channel, likewise.
        batches: its counter of batches; None if it has none.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    batches: int | None


@dataclass(frozen=True)
class LayerReport:
    """What the pass changed in a layer.

    Attributes:
        name: the layer's name in the model.
        calls: how often it was called; 0 where it has its statistics from others.
        mean_change: largest change of a channel's mean, in its (new) standard deviations; inf
            where the old statistics were no numbers.
        variance_ratio: largest ratio of a channel's new and old variance, either way round; inf
            likewise.
        mean_error: two standard errors of the means, in standard deviations; see `Moments.errors`.
            inf where there was but one batch.
        log_std_error: two standard errors of the logarithms of the standard deviations, likewise.
        old: the statistics before; None where they are not known.
        new: the statistics now, likewise.
    """

    name: str
    calls: int
    mean_change: float
    variance_ratio: float
    mean_error: float = math.inf
    log_std_error: float = math.inf
    old: Statistics | None = field(default=None, repr=False)
    new: Statistics | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Verdict:
    """Whether the refresh helped, on held-out batches.

    Attributes:
        before: metrics with the old statistics, by name.
        after: metrics with the new ones.
        metric: the one that counts.
        kept: the statistics that were written.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    metric: str
    kept: Literal["old", "new"]


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh did.

    Attributes:
        estimator: which statistics were computed.
        batches: batches that were used.
        samples: examples in them.
        skipped: batches that were left out, having fewer than two values per channel somewhere.
        layers: one for each layer that was refreshed, in the model's order.
        kept: the layers that keep their running statistics, with the reason.
        nonfinite: batches that were left out for NaN or Inf.
        processes: how many shared the pass.
        tol: the error at which the pass was to stop; None for none.
        converged: whether all layers came below that; None without `tol`.
        verdict: whether it helped; None where that was not asked for.
        written: whether the checkpoint was; the old statistics may be in place already.
    """

    estimator: str
    batches: int
    samples: int
    skipped: int
    layers: tuple[LayerReport, ...]
    kept: tuple[KeptLayer, ...]
    nonfinite: int = 0
    processes: int = 1
    tol: float | None = None
    converged: bool | None = None
    verdict: Verdict | None = None
    written: bool = True

    @property
    def state(self) -> str:
        """The state of the norm statistics: `partly refreshed` if a layer's still are stale."""
        return "partly refreshed" if self.stale else "refreshed"

    @property
    def stale(self) -> list[KeptLayer]:
        """The layers that keep statistics of other weights."""
        return [layer for layer in self.kept if not layer.is_intended]

    def largest(self, measure: Callable[[LayerReport], float]) -> LayerReport:
        """The layer that has most of something; of equals the first."""
        return max(self.layers, key=measure)


def statistics_of(layers: Collection[NormLayer]) -> list[Statistics]:
    """Copies of what layers hold."""
    means, variances = [], []
    for layer in layers:
        assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
        means.append(layer.running_mean.detach().cpu().flatten())
        variances.append(layer.running_var.detach().cpu().flatten())
    sizes = [len(mean) for mean in means]
    joined = (torch.split(torch.cat(each).double(), sizes) for each in (means, variances) if each)
    counters = [layer.num_batches_tracked for layer in layers]
    return [
        Statistics(mean, variance, None if counter is None else int(counter))
        for mean, variance, counter in zip(*joined, counters, strict=True)
    ]


def changes(
    old: Sequence[Statistics], new: Sequence[Statistics], eps: Sequence[float]
) -> list[tuple[float, float]]:
    """What changed most in each layer.

    Args:
        old: the statistics of each layer before.
        new: the statistics now.
        eps: what each layer adds to its variances.

    Returns:
        For each layer the largest change of a channel's mean, in new standard deviations, and the
        largest ratio of a channel's variances.
    """
    if not new:
        return []
    sizes = [len(each.mean) for each in new]
    added = torch.tensor(eps, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    variance = torch.cat([each.variance for each in new]) + added
    mean_change = torch.cat([each.mean for each in new]) - torch.cat([each.mean for each in old])
    change = torch.nan_to_num(mean_change.abs() / variance.sqrt(), nan=torch.inf, posinf=torch.inf)
    ratio = variance / (torch.cat([each.variance for each in old]) + added)
    # A variance that was negative is as wrong as one that was NaN.
    ratio = torch.where(ratio > 0, torch.maximum(ratio, 1 / ratio), torch.inf)
    largest = (
        torch.stack([part.max() for part in torch.split(each, sizes)]) for each in (change, ratio)
    )
    return [*zip(*(each.tolist() for each in largest), strict=True)]
