"""One pass of training data through a model, to reset its BatchNorm statistics.

The model is touched only when the pass has ended well: until then each layer writes into buffers
of its own that are thrown away, and every flag, momentum, buffer and hook is put back whatever
happens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ckptavg.errors import RefreshError, printable
from ckptavg.factories import user_code
from ckptavg.norm.batches import default_forward, leading_size, moved
from ckptavg.norm.estimators import CallStatistics, Estimator, EstimatorName, make_estimator
from ckptavg.norm.statistics import input_statistics, native_statistics

log = logging.getLogger("ckptavg")

Forward = Callable[[torch.nn.Module, Any], object]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
TrainMode = Literal["norm", "full"]
Progress = Callable[[int, int | None], None]
"""Called with the batches done since the last call, and with how many there are, if known."""


@dataclass(frozen=True)
class LayerReport:
    """What the pass changed in a layer.

    Attributes:
        name: the layer's name in the model.
        calls: how often it was called.
        mean_change: largest change of a channel's mean, in its (new) standard deviations.
        variance_ratio: largest ratio of a channel's new and old variance, either way round.
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
        skipped: batches that were left out, having one value per channel somewhere.
        layers: one for each layer that was refreshed, in the model's order.
        unused: names of the layers that were never called and keep what they had.
    """

    estimator: str
    batches: int
    samples: int
    skipped: int
    layers: tuple[LayerReport, ...]
    unused: tuple[str, ...]


def refresh_norm(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    estimator: EstimatorName = "paper",
    forward: Forward | None = None,
    memory_format: MemoryFormat = "auto",
    train_mode: TrainMode = "norm",
    max_samples: int | None = None,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> RefreshReport:
    """Reset the running statistics of a model's BatchNorm layers with one pass over `batches`.

    Izmailov et al. 2018, section 3.2. Unlike `torch.optim.swa_utils.update_bn`, only the norm
    layers are in training mode (dropout rests), a smaller last batch counts for less, and an
    exception leaves the model as it was.

    Args:
        model: on its device, with its weights. Only its running statistics change.
        batches: of training data; a tensor, or a list or tuple that begins with one, unless
            `forward` says otherwise.
        estimator: `paper`, `torch` or `exact`; see `ckptavg.norm.estimators`.
        forward: called with model and batch in place of `model(batch)`.
        memory_format: `auto` gives convolutional models their images in channels_last, which is
            faster and rounds otherwise; `contiguous` gives torch's own bits.
        train_mode: `full` puts the whole model into training mode, as `update_bn` does.
        max_samples: stop with the batch that reaches so many examples.
        max_batches: stop after so many batches.
        device: where batches are moved; None for the model's.
        progress: hears of each batch.

    Returns:
        What changed.

    Raises:
        RefreshError: there were no usable batches, or the statistics are NaN or Inf.
        UserCodeError: the model, the loader or `forward` raised.
    """
    layers = norm_layers(model)
    if not layers:
        return RefreshReport(estimator, 0, 0, 0, (), ())
    estimators = {name: make_estimator(estimator) for name in layers}
    place = torch.device(device) if device is not None else _device_of(model)
    layout = _memory_formats(model, memory_format)
    done = samples = skipped = 0
    with torch.no_grad(), _observed(model, layers, estimator, train_mode) as staged:
        for batch in _limited(batches, max_batches):
            with user_code("moving a batch"):
                here = moved(batch, place, layout)
            staged.clear()
            try:
                with user_code("the forward pass"):
                    (forward or default_forward)(model, here)
            except _OneValueError:
                skipped += 1
                continue
            for name, seen in staged:
                estimators[name].update(seen)
            done, samples = done + 1, samples + leading_size(batch)
            if progress is not None:
                progress(1, _length(batches, max_batches))
            if max_samples is not None and samples >= max_samples:
                break
    if skipped:
        log.warning("left out %d batches with one value per channel in a norm layer", skipped)
    if not done:
        raise RefreshError(
            "the loader gave no batch that can be used", remedy="statistics are left as they were"
        )
    return _store(layers, estimators, estimator, done, samples, skipped)


def norm_layers(model: torch.nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that track statistics, by name; shared ones once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
        and module.running_var is not None
    }


class _OneValueError(RefreshError):
    """A layer was given one value per channel, which has no variance; torch would raise."""


def _limited(batches: Iterable[Any], most: int | None) -> Iterator[Any]:
    """The batches, with the loader's exceptions told from ours."""
    with user_code("the loader"):
        iterator = iter(batches)
    for _ in itertools.count() if most is None else range(most):
        with user_code("the loader"):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def _length(batches: Iterable[Any], most: int | None) -> int | None:
    try:
        known = len(batches)  # type: ignore[arg-type]
    except TypeError:
        return most
    return known if most is None else min(known, most)


def _device_of(model: torch.nn.Module) -> torch.device:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _memory_formats(
    model: torch.nn.Module, wanted: MemoryFormat
) -> Mapping[int, torch.memory_format]:
    """Memory format of the inputs by their number of dimensions; empty to leave them alone."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if wanted == "contiguous":
        return {}
    if wanted == "channels_last":
        return formats
    kinds = {4: torch.nn.Conv2d, 5: torch.nn.Conv3d}
    used = {
        dims
        for dims, kind in kinds.items()
        if any(isinstance(module, kind) for module in model.modules())
    }
    return {dims: formats[dims] for dims in used}


@contextmanager
def _observed(
    model: torch.nn.Module,
    layers: Mapping[str, _BatchNorm],
    estimator: EstimatorName,
    train_mode: TrainMode,
) -> Iterator[list[tuple[str, CallStatistics]]]:
    """Set the model up for the pass, and put everything back at the end.

    Yields:
        The list to which each call of a layer adds its name and statistics.
    """
    staged: list[tuple[str, CallStatistics]] = []
    with ExitStack() as undo:
        for module in list(model.modules()):
            undo.callback(setattr, module, "training", module.training)
        model.train(train_mode == "full")
        for name, layer in layers.items():
            undo.callback(_restore, layer, dict(layer._buffers), layer.momentum)  # noqa: SLF001
            layer.training = True
            layer.momentum = 1.0
            observer = _Observer(name, staged, from_input=estimator == "exact")
            _give_fresh_buffers(layer)
            undo.callback(layer.register_forward_pre_hook(_refuse_one_value).remove)
            undo.callback(layer.register_forward_hook(observer).remove)
        yield staged


def _restore(
    layer: _BatchNorm, buffers: dict[str, torch.Tensor | None], momentum: float | None
) -> None:
    layer._buffers.update(buffers)  # noqa: SLF001
    layer.momentum = momentum


def _give_fresh_buffers(layer: _BatchNorm) -> None:
    """Buffers for one call: with momentum 1 the layer leaves that call's statistics in them.

    The layer's own may hold NaN, which no momentum forgets.
    """
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    layer._buffers["running_mean"] = torch.zeros_like(layer.running_mean)  # noqa: SLF001
    layer._buffers["running_var"] = torch.ones_like(layer.running_var)  # noqa: SLF001
    if layer.num_batches_tracked is not None:
        layer._buffers["num_batches_tracked"] = torch.zeros_like(layer.num_batches_tracked)  # noqa: SLF001


def _refuse_one_value(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    values = inputs[0]
    if values.numel() <= values.shape[1]:
        raise _OneValueError("one value per channel")


class _Observer:
    """The hook of a layer: hands over what each call saw.

    torch's kernel has computed the statistics anyway, and left them in the buffers. They are
    computed here from the input where that is not good enough (`exact`, buffers of 16 bits), or
    did not happen (checkpoint wrappers that stop the layer from tracking while gradients are off).
    """

    def __init__(
        self, name: str, staged: list[tuple[str, CallStatistics]], *, from_input: bool
    ) -> None:
        self._name, self._staged, self._from_input = name, staged, from_input
        self._first = True

    def __call__(self, layer: torch.nn.Module, inputs: tuple[Any, ...], _: object) -> None:
        assert isinstance(layer, _BatchNorm)  # noqa: S101 - it was registered with one
        values = inputs[0]
        mean, variance = layer.running_mean, layer.running_var
        assert mean is not None and variance is not None  # noqa: S101, PT018
        if self._first:
            self._first = False
            untouched = not bool(mean.any()) and bool((variance == 1).all())
            self._from_input |= untouched or mean.dtype not in (torch.float32, torch.float64)
        if self._from_input:
            seen = input_statistics(values)
        else:
            seen = native_statistics(mean, variance, values)
        self._staged.append((self._name, seen))
        _give_fresh_buffers(layer)


def _store(
    layers: Mapping[str, _BatchNorm],
    estimators: Mapping[str, Estimator],
    estimator: str,
    batches: int,
    samples: int,
    skipped: int,
) -> RefreshReport:
    """Write the statistics into the model, all or none of them."""
    used = {name: layer for name, layer in layers.items() if estimators[name].calls}
    for name in used:
        found = estimators[name]
        if not bool(torch.isfinite(found.mean).all() & torch.isfinite(found.variance).all()):
            raise RefreshError(
                f"the statistics of layer {printable(name)!r} came out NaN or Inf",
                remedy="look for NaN in the data, or for weights that overflow",
            )
    unused = tuple(name for name in layers if name not in used)
    if unused:
        log.warning(
            "%d norm layers were never called and keep their old statistics: %s",
            len(unused),
            ", ".join(printable(name) for name in unused),
        )
    reports = tuple(_report(name, layer, estimators[name]) for name, layer in used.items())
    with torch.no_grad():
        for name, layer in used.items():
            _store_in(layer, estimators[name])
    return RefreshReport(estimator, batches, samples, skipped, reports, unused)


def _store_in(layer: _BatchNorm, found: Estimator) -> None:
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    layer.running_mean.copy_(found.mean)
    layer.running_var.copy_(found.variance)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(found.calls)


def _report(name: str, layer: _BatchNorm, found: Estimator) -> LayerReport:
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    mean, variance = found.mean, found.variance + layer.eps
    old_mean = layer.running_mean.to(mean)
    ratio = variance / (layer.running_var.to(mean) + layer.eps)
    return LayerReport(
        name,
        found.calls,
        float(((mean - old_mean).abs() / variance.sqrt()).max()),
        float(torch.maximum(ratio, 1 / ratio).max()),
    )
