"""One pass of training data through a model, to reset its BatchNorm statistics.

The model is touched only when the pass has ended well: until then each layer writes into buffers
of its own that are thrown away, and every flag, momentum, buffer and hook is put back whatever
happens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ckptavg.errors import RefreshError, printable
from ckptavg.factories import user_code
from ckptavg.norm.batches import default_forward, leading_size, moved
from ckptavg.norm.estimators import Estimator, EstimatorName, make_estimator
from ckptavg.norm.observer import OneValueError, Staged, TrainMode, observed
from ckptavg.norm.report import RefreshReport, layer_report

__all__ = ["RefreshReport", "norm_layers", "refresh_norm"]

log = logging.getLogger("ckptavg")

Forward = Callable[[torch.nn.Module, Any], object]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
Progress = Callable[[int, int | None], None]
"""Called with the batches done since the last call, and with how many there are, if known."""


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
    _check_choices(estimator, memory_format, train_mode)
    layers = norm_layers(model)
    if not layers:
        return RefreshReport(estimator, 0, 0, 0, (), ())
    _refuse_lazy(layers)
    found = _Found({name: make_estimator(estimator) for name in layers})
    place = torch.device(device) if device is not None else device_of(model)
    layout = _memory_formats(model, memory_format)
    total = _length(batches, max_batches)
    setup = observed(
        model,
        layers,
        from_input=estimator == "exact",
        train_mode=train_mode,
        formats=layout,
    )
    with torch.no_grad(), setup as staged:
        for batch in limited(batches, max_batches):
            with user_code("moving a batch"):
                here = moved(batch, place, layout)
            staged.clear()
            size = leading_size(here)
            fits = _run(model, here, forward or default_forward)
            found.take(staged if fits else None, size)
            if progress is not None:
                progress(1, total)
            if max_samples is not None and found.drawn >= max_samples:
                break
    if found.skipped:
        log.warning(
            "left out %d batches with less than two values per channel in a norm layer",
            found.skipped,
        )
    if not found.batches:
        raise _nothing_used(found.skipped)
    return _store(layers, found, estimator)


@dataclass
class _Found:
    """What the pass has found so far.

    Attributes:
        estimators: one for each layer, by name.
        batches: batches that were used.
        samples: examples in them.
        skipped: batches that were left out.
        drawn: examples in all batches.
    """

    estimators: Mapping[str, Estimator]
    batches: int = 0
    samples: int = 0
    skipped: int = 0
    drawn: int = 0

    def take(self, staged: Staged | None, size: int) -> None:
        """Fold in what a batch has shown; None where it is left out."""
        self.drawn += size
        if staged is None:
            self.skipped += 1
            return
        self.batches, self.samples = self.batches + 1, self.samples + size
        for name, seen in staged:
            self.estimators[name].update(seen)


def _run(model: torch.nn.Module, batch: Any, forward: Forward) -> bool:  # noqa: ANN401
    """Whether a forward pass came to its end, and no layer had one value per channel or none."""
    try:
        with user_code("the forward pass"):
            forward(model, batch)
    except OneValueError:
        return False
    return True


def _check_choices(*given: str) -> None:
    for value, choices in zip(given, (EstimatorName, MemoryFormat, TrainMode), strict=True):
        if value not in get_args(choices):
            raise RefreshError(f"{value!r} is none of {', '.join(get_args(choices))}")


def _refuse_lazy(layers: Mapping[str, _BatchNorm]) -> None:
    for name, layer in layers.items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            raise RefreshError(
                f"layer {printable(name)!r} is lazy and has no shape yet",
                remedy="load weights into the model, or run it once",
            )


def _nothing_used(skipped: int) -> RefreshError:
    if skipped:
        return RefreshError(
            "no batch could be used: each had less than two values per channel in a norm layer",
            remedy="make the loader's batches larger",
        )
    return RefreshError(
        "the loader gave no batches",
        remedy="if it was used up before, name a callable that makes it anew",
    )


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


def limited(batches: Iterable[Any], most: int | None) -> Iterator[Any]:
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
    except Exception:  # noqa: BLE001 - the user's own; it only goes into a progress bar
        return most
    return known if most is None else min(known, most)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model is, by its first tensor."""
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


def _store(
    layers: Mapping[str, _BatchNorm], found: _Found, estimator: EstimatorName
) -> RefreshReport:
    """Write the statistics into the model, all or none of them."""
    estimators = found.estimators
    used = {name: layer for name, layer in layers.items() if estimators[name].calls}
    for name, layer in used.items():
        _check(name, layer, estimators[name])
    unused = tuple(name for name in layers if name not in used)
    if unused:
        log.warning(
            "%d norm layers were never called and keep their old statistics: %s",
            len(unused),
            ", ".join(printable(name) for name in unused),
        )
    reports = tuple(layer_report(name, layer, estimators[name]) for name, layer in used.items())
    with torch.no_grad():
        for name, layer in used.items():
            _store_in(layer, estimators[name])
    return RefreshReport(estimator, found.batches, found.samples, found.skipped, reports, unused)


def _check(name: str, layer: _BatchNorm, found: Estimator) -> None:
    """Refuse what is no number, or is none in the layer's dtype."""
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    if not _all_finite(found.mean, found.variance):
        raise RefreshError(
            f"the statistics of layer {printable(name)!r} came out NaN or Inf",
            remedy="look for NaN in the data, or for weights that overflow",
        )
    dtype = layer.running_var.dtype
    if not _all_finite(found.mean.to(layer.running_mean.dtype), found.variance.to(dtype)):
        raise RefreshError(
            f"the statistics of layer {printable(name)!r} are too large for {dtype}",
            remedy="look for weights that overflow, and keep norm layers in float32",
        )


def _all_finite(*values: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values)


def _store_in(layer: _BatchNorm, found: Estimator) -> None:
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    layer.running_mean.copy_(found.mean)
    layer.running_var.copy_(found.variance)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(found.calls)
