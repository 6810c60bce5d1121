"""One pass of training data through a model, to reset its BatchNorm statistics.

The statistics are written when the pass has ended well. Until then each call of a layer has buffers
of its own, and all that the pass changes is put back whatever happens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptavg.batchnorm.capture import UnfitBatchError, capture
from ckptavg.batchnorm.images import ImageFormat, MemoryFormat
from ckptavg.batchnorm.layers import chosen_layers, unwrapped
from ckptavg.batchnorm.moments import Channels, EstimatorName, Moments, observe
from ckptavg.batchnorm.report import RefreshReport
from ckptavg.batchnorm.setting import TrainMode, prepared
from ckptavg.batchnorm.storing import stored
from ckptavg.batchnorm.totals import PassTotals, until_converged
from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import RefreshError
from ckptavg.model.batches import default_forward, leading_size, on_device
from ckptavg.model.factories import user_code
from ckptavg.model.feeding import Feed, check_loader, cuts, known_length

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from ckptavg.batchnorm.layers import NormLayer

__all__ = ["RefreshReport", "refresh_norm"]

Forward = Callable[[torch.nn.Module, Any], object]
Precision = Literal["bf16"]
Progress = Callable[[int, int | None], None]
"""Called with the batches since the last call, and with the batches in all, None if unknown."""


def refresh_norm(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    estimator: EstimatorName = "paper",
    forward: Forward | None = None,
    layers: Sequence[str] = (),
    skip_layers: Sequence[str] = (),
    memory_format: MemoryFormat = "auto",
    amp: Precision | None = None,
    train_mode: TrainMode = "norm",
    max_samples: int | None = None,
    tol: float | None = None,
    strict: bool = False,
    device: torch.device | str | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> RefreshReport:
    """Reset the running statistics of a model's norm layers with one pass over `batches`.

    Izmailov et al. 2018, section 3.2. Unlike `torch.optim.swa_utils.update_bn`, only the norm
    layers are in training mode (dropout is off), a smaller last batch counts for less, and an
    exception leaves the model as it was. `BatchNorm` and `InstanceNorm` layers that track
    statistics are refreshed, subclasses among them.

    Args:
        model: on its device, with its weights. Only its running statistics change.
        batches: of training data; a tensor, or a list or tuple that begins with one, unless
            `forward` is given.
        estimator: `paper`, `torch` or `exact`; see `ckptavg.batchnorm.moments`.
        forward: called with model and batch in place of `model(batch)`.
        layers: regular expressions; refresh only layers in whose names one of them is found.
        skip_layers: likewise, layers that keep their statistics and are in eval mode.
        memory_format: `auto` gives convolutional models their images in channels_last on the CPU,
            and with `amp`; that rounds otherwise. `contiguous` gives torch's own bits.
        amp: `bf16` runs the model in bfloat16 by `torch.autocast`; statistics stay in float32.
        train_mode: `full` puts the whole model into training mode, as `update_bn` does.
        max_samples: stop after the batch that reaches this number of examples.
        tol: stop when in every layer two standard errors of the mean and of the logarithm of the
            standard deviation are below this; see `Moments.errors`.
        strict: raise an error at a batch that gives NaN or Inf, instead of leaving it out.
        device: where batches are moved; None for the model's.
        ranks: the processes that share the pass.
        progress: called after each batch.

    Returns:
        What changed.

    Raises:
        RefreshError: there were no usable batches, or the statistics are NaN or Inf.
        PeerError: another process has failed.
        UserCodeError: the model, the loader or `forward` raised.
    """
    _check_choices(estimator, memory_format, train_mode, amp)
    if tol is not None and not 0 < tol < math.inf:
        raise RefreshError(f"the tolerance cannot be {tol}", remedy="0.01 is usual")
    if max_samples is not None and max_samples < 1:
        raise RefreshError(f"`max_samples` is at least 1, not {max_samples}")
    model = unwrapped(model)
    with ranks.together():
        refreshed = chosen_layers(model, layers=layers, skip_layers=skip_layers)
        if not refreshed:
            return RefreshReport(estimator, 0, 0, 0, (), ())
        check_loader(
            batches, ranks, is_limited=max_samples is not None,
            ends_early=tol is not None or cuts(batches, max_samples),
        )  # fmt: skip
        feed = Feed(batches, ranks, max_samples=max_samples)
        place = _device(device) or device_of(model)
        channels = _channels(refreshed, estimator)
        local = PassTotals(Moments.empty(channels))  # of this process
        progress = progress or (lambda _, __: None)
        length = known_length(batches)
        local_length = None if length is None else ranks.share(length)
        with (
            torch.no_grad(),
            prepared(model, refreshed, train_mode),
            capture(refreshed, model) as captured,
            ImageFormat(model, memory_format, place, is_amp=amp is not None) as images,
        ):

            def run(batch: Any) -> None:  # noqa: ANN401 - whatever the loader yields
                captured.take()
                with user_code("the forward pass"), _precision(amp, place):
                    (forward or default_forward)(model, batch)

            for number, batch in until_converged(on_device(iter(feed), place), local, ranks, tol):
                try:
                    images.run(run, batch)
                except UnfitBatchError as error:
                    local.unfit[error.message] += 1
                else:
                    observation = observe(captured.take(), channels, estimator)
                    local.add(number, observation, leading_size(batch), strict=strict)
                progress(1, local_length)
                if ranks.has_failed_peer():
                    break  # `gathered` raises
        local.fingerprint = feed.fingerprint()
        totals = local.gathered(ranks)
        totals.check()
        new = stored(model, refreshed, totals.moments)
    return RefreshReport(
        estimator, totals.batches, totals.samples, totals.unfit.total(), new.layers, new.unused,
        nonfinite=len(totals.nonfinite), processes=ranks.size, tol=tol,
        converged=None if tol is None else totals.largest_error() <= tol,
    )  # fmt: skip


def _check_choices(*given: str | None) -> None:
    kinds = (EstimatorName, MemoryFormat, TrainMode, Precision)
    for value, choices in zip(given, kinds, strict=True):
        if value is not None and value not in get_args(choices):
            raise RefreshError(f"{value!r} is none of {', '.join(get_args(choices))}")


def _channels(layers: Mapping[str, NormLayer], estimator: EstimatorName) -> Channels:
    means = [layer.running_mean for layer in layers.values()]
    return Channels(
        tuple(layers),
        tuple(mean.numel() for mean in means if mean is not None),
        tuple(
            estimator == "exact" and not isinstance(layer, _InstanceNorm)
            for layer in layers.values()
        ),
        tuple(layer.eps for layer in layers.values()),
    )


def _device(wanted: torch.device | str | None) -> torch.device | None:
    try:
        return None if wanted is None else torch.device(wanted)
    except RuntimeError as error:
        raise RefreshError(f"there is no device {wanted!r}") from error


def _precision(amp: Precision | None, device: torch.device) -> AbstractContextManager[object]:
    if amp is None:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model, by its first tensor."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")
