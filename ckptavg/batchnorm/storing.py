"""Write the statistics of a pass into the model: all of them, or none."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptavg.batchnorm.layers import aggregating, norm_layers
from ckptavg.batchnorm.report import LayerReport, changes, statistics_of
from ckptavg.batchnorm.setting import keep_buffers
from ckptavg.errors import RefreshError, printable
from ckptavg.model.factories import user_code

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptavg.batchnorm.layers import NormLayer
    from ckptavg.batchnorm.moments import Moments


def store(
    model: torch.nn.Module, layers: Mapping[str, NormLayer], moments: Moments
) -> tuple[LayerReport, ...]:
    """Write the statistics into the model; on an exception the old ones come back.

    Args:
        model: the model.
        layers: those of its layers that were captured, by name.
        moments: their statistics.

    Returns:
        A report of each layer that has new statistics, in the model's order. Layers that were not
        called have none.

    Raises:
        RefreshError: a statistic is too large for a layer's dtype.
    """
    calls = dict(zip(layers, moments.calls.tolist(), strict=True))
    used = {name: layer for name, layer in layers.items() if calls[name]}
    joining = aggregating(model, used)
    joined = {id(part) for module in joining.values() for part in module.modules()}
    refreshed = {
        name: layer
        for name, layer in norm_layers(model).items()
        if name in used or id(layer) in joined
    }
    old = statistics_of(refreshed.values())
    with ExitStack() as undo, torch.no_grad():
        keep_buffers(model.modules() if joining else used.values(), undo)
        _store(layers, calls, moments)
        _aggregate(joining)
        undo.pop_all()
    new = statistics_of(refreshed.values())
    changed = changes(old, new, [layer.eps for layer in refreshed.values()])
    errors = zip(*(each.tolist() for each in moments.errors()), strict=True)
    errors_by_name = dict(zip(layers, errors, strict=True))
    reports = []
    for name, (change, ratio), before, now in zip(refreshed, changed, old, new, strict=True):
        mean_error, log_std_error = errors_by_name.get(name, (math.inf, math.inf))
        reports.append(
            LayerReport(
                name, calls.get(name, 0), change, ratio, mean_error, log_std_error,
                old=before, new=now,
            )
        )  # fmt: skip
    return tuple(reports)


def _store(layers: Mapping[str, NormLayer], calls: Mapping[str, int], moments: Moments) -> None:
    """Write into each layer that was called."""
    means = moments.channels.split(moments.mean.cpu())
    variances = moments.channels.split(moments.pooled_variance())
    for (name, layer), mean, variance in zip(layers.items(), means, variances, strict=True):
        if not calls[name]:
            continue
        assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
        for buffer, values in ((layer.running_mean, mean), (layer.running_var, variance)):
            if not bool(torch.isfinite(values.to(buffer.dtype)).all()):
                raise RefreshError(
                    f"the statistics of layer {printable(repr(name))} are too large for "
                    f"{buffer.dtype}",
                    remedy="look for weights that overflow, and keep norm layers in float32",
                )
            buffer.copy_(values)
        if layer.num_batches_tracked is not None and not isinstance(layer, _InstanceNorm):
            layer.num_batches_tracked.fill_(calls[name])  # torch's InstanceNorm does not count


def _aggregate(joining: Mapping[str, torch.nn.Module]) -> None:
    """Let modules join the statistics of layers below them."""
    for name, module in joining.items():
        with user_code(f"{printable(repr(name))}.aggregate_stats()"):
            module.aggregate_stats()  # type: ignore[operator]
