"""Write what a pass has found into the model: all of it, or nothing."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptavg.batchnorm.layers import aggregating, norm_layers
from ckptavg.batchnorm.report import LayerReport, Statistics, changes, statistics_of
from ckptavg.batchnorm.setting import keep_buffers
from ckptavg.errors import RefreshError, printable
from ckptavg.model.factories import user_code

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ckptavg.batchnorm.estimators import WeightedMoments
    from ckptavg.batchnorm.layers import NormLayer

log = logging.getLogger("ckptavg")


@contextmanager
def stored(
    model: torch.nn.Module, layers: Mapping[str, NormLayer], moments: WeightedMoments
) -> Iterator[Stored]:
    """The model with its new statistics; the old ones come back on an exception.

    Args:
        model: the model.
        layers: those of its layers that were observed, by name.
        moments: what they have seen.

    Raises:
        RefreshError: a statistic is too large for a layer's dtype.
    """
    every = norm_layers(model)
    old = {name: statistics_of(layer) for name, layer in every.items()}
    with ExitStack() as undo:
        keep_buffers(model, undo)
        with torch.no_grad():
            used = _store(layers, moments)
            joined = _aggregate(model, {name: layers[name] for name in used})
        new = Stored(every, layers, used + joined, old, moments)
        _speak_of_unused(new.unused)
        yield new
        undo.pop_all()


class Stored:
    """What was written.

    Attributes:
        unused: names of the layers that were not called, and have what they had.
        refreshed: names of the others, in the model's order.
    """

    def __init__(
        self,
        every: Mapping[str, NormLayer],
        observed: Mapping[str, NormLayer],
        refreshed: list[str],
        old: Mapping[str, Statistics],
        moments: WeightedMoments,
    ) -> None:
        self._every, self._old = every, old
        self.refreshed = [name for name in every if name in refreshed]
        self.unused = tuple(name for name in observed if name not in refreshed)
        self._calls = dict(zip(observed, moments.calls.tolist(), strict=True))
        errors = (one.tolist() for one in moments.errors())
        self._errors = dict(zip(observed, zip(*errors, strict=True), strict=True))

    @cached_property
    def statistics(self) -> dict[str, tuple[Statistics, Statistics]]:
        """What each refreshed layer held before, and holds now."""
        return {
            name: (self._old[name], statistics_of(self._every[name])) for name in self.refreshed
        }

    def layers(self) -> list[LayerReport]:
        """A report of each refreshed layer."""
        return [
            LayerReport(
                name,
                self._calls.get(name, 0),
                *changes(old, new, self._every[name].eps),
                *self._errors.get(name, ()),
            )
            for name, (old, new) in self.statistics.items()
        ]


def _store(layers: Mapping[str, NormLayer], moments: WeightedMoments) -> list[str]:
    """Write into each layer that was called; returns their names."""
    calls = moments.calls.tolist()
    means = moments.channels.split(moments.mean.cpu())
    variances = moments.channels.split(moments.pooled_variance())
    found = list(zip(layers.items(), calls, means, variances, strict=True))
    used = [one for one in found if one[1]]
    for (name, layer), _, mean, variance in used:
        _check_size(name, layer, mean, variance)
    for (_, layer), count, mean, variance in used:
        assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        if layer.num_batches_tracked is not None and not isinstance(layer, _InstanceNorm):
            layer.num_batches_tracked.fill_(count)  # torch's InstanceNorm does not count
    return [name for (name, _), *_ in used]


def _check_size(name: str, layer: NormLayer, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Refuse what is no number in the layer's dtype."""
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    dtypes = layer.running_mean.dtype, layer.running_var.dtype
    if not all(
        bool(torch.isfinite(values.to(dtype)).all())
        for values, dtype in zip((mean, variance), dtypes, strict=True)
    ):
        raise RefreshError(
            f"the statistics of layer {printable(repr(name))} are too large for {dtypes[1]}",
            remedy="look for weights that overflow, and keep norm layers in float32",
        )


def _aggregate(model: torch.nn.Module, used: Mapping[str, NormLayer]) -> list[str]:
    """Have layers join the statistics of those below them; returns the names of what has them."""
    joined: set[int] = set()
    for name, module in aggregating(model, used).items():
        with user_code(f"{printable(repr(name))}.aggregate_stats()"):
            module.aggregate_stats()  # type: ignore[operator]
        joined.update(id(part) for part in module.modules())
    return [
        name
        for name, layer in norm_layers(model).items()
        if id(layer) in joined and name not in used
    ]


def _speak_of_unused(unused: tuple[str, ...]) -> None:
    """Name the layers that were never called."""
    if unused:
        log.warning(
            "%d norm layers took in no batch and keep their old statistics: %s",
            len(unused),
            ", ".join(printable(name) for name in unused),
        )
