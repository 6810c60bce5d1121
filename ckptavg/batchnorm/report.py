"""What a refresh did, for people and machines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ckptavg.batchnorm.layers import KeptLayer, NormLayer


@dataclass(frozen=True)
class Statistics:
    """What a layer holds.

    Attributes:
        mean: running mean of each channel.
        variance: running variance of each channel.
        batches: its counter of batches; None if it has none.
    """

    mean: tuple[float, ...]
    variance: tuple[float, ...]
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
        skipped: batches that were left out, having less than two values per channel somewhere.
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


def statistics_of(layer: NormLayer) -> Statistics:
    """What the layer holds."""
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    counter = layer.num_batches_tracked
    return Statistics(
        tuple(layer.running_mean.double().tolist()),
        tuple(layer.running_var.double().tolist()),
        None if counter is None else int(counter),
    )


def changes(old: Statistics, new: Statistics, eps: float) -> tuple[float, float]:
    """Largest change of a mean, in new standard deviations, and largest ratio of variances."""
    mean, variance = _tensor(new.mean), _tensor(new.variance) + eps
    change = (mean - _tensor(old.mean)).abs() / variance.sqrt()
    ratio = variance / (_tensor(old.variance) + eps)
    # A variance that was negative is as wrong as one that was NaN.
    ratio = torch.where(ratio > 0, torch.maximum(ratio, 1 / ratio), torch.inf)
    change = torch.nan_to_num(change, nan=torch.inf, posinf=torch.inf)
    return float(change.max()), float(ratio.max())


def _tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
