"""What a refresh did, for people and machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm

    from ckptavg.norm.estimators import Estimator


@dataclass(frozen=True)
class LayerReport:
    """What the pass changed in a layer.

    Attributes:
        name: the layer's name in the model.
        calls: how often it was called.
        mean_change: largest change of a channel's mean, in its (new) standard deviations; inf
            where the old statistics were no numbers.
        variance_ratio: largest ratio of a channel's new and old variance, either way round; inf
            likewise.
    """

    name: str
    calls: int
    mean_change: float
    variance_ratio: float


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh did.

    Attributes:
        estimator: which statistics were computed.
        batches: batches that were used.
        samples: examples in them.
        skipped: batches that were left out, having less than two values per channel somewhere.
        layers: one for each layer that was refreshed, in the model's order.
        unused: names of the layers that were never called and keep what they had.
    """

    estimator: str
    batches: int
    samples: int
    skipped: int
    layers: tuple[LayerReport, ...]
    unused: tuple[str, ...]


def layer_report(name: str, layer: _BatchNorm, found: Estimator) -> LayerReport:
    """Compare what the pass has found with what the layer still holds."""
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    mean, variance = found.mean, found.variance + layer.eps
    changes = (mean - layer.running_mean.to(mean)).abs() / variance.sqrt()
    ratios = variance / (layer.running_var.to(mean) + layer.eps)
    # A variance that was negative is as wrong as one that was NaN.
    ratios = torch.where(ratios > 0, torch.maximum(ratios, 1 / ratios), torch.inf)
    return LayerReport(
        name,
        found.calls,
        float(torch.nan_to_num(changes, nan=torch.inf, posinf=torch.inf).max()),
        float(ratios.max()),
    )
