"""One pass of training data through a model, to reset its BatchNorm statistics.

The statistics are written when the pass has ended well. Until then each call of a layer has buffers
of its own, and all that the pass changes is put back whatever happens.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptavg.batchnorm.capture import UnfitBatchError, capture
from ckptavg.batchnorm.layers import chosen_layers, unwrapped
from ckptavg.batchnorm.moments import Channels, EstimatorName, Moments, Observation, observe
from ckptavg.batchnorm.report import RefreshReport
from ckptavg.batchnorm.setting import CONTIGUOUS, Formats, TrainMode, prepared
from ckptavg.batchnorm.storing import stored
from ckptavg.batchnorm.totals import LEAST_BATCHES, PassTotals
from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import RefreshError, UserCodeError, printable
from ckptavg.model.batches import cloned, default_forward, leading_size, moved, on_device
from ckptavg.model.factories import user_code
from ckptavg.model.feeding import Feed, check_loader, cuts, known_length

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from ckptavg.batchnorm.capture import Capture
    from ckptavg.batchnorm.layers import NormLayer

__all__ = ["RefreshReport", "refresh_norm"]

log = logging.getLogger("ckptavg")

Forward = Callable[[torch.nn.Module, Any], object]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
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
        formats = _memory_formats(model, memory_format, place, amp)
        channels = _channels(refreshed, estimator)
        with (
            torch.no_grad(),
            prepared(model, refreshed, train_mode, formats) as laid_out,
            capture(refreshed, model) as captured,
        ):
            the_pass = _Pass(
                model, forward or default_forward, captured, channels, list(refreshed),
                estimator=estimator, device=place, formats=formats, bf16=amp is not None,
                fall_back=laid_out.close if memory_format == "auto" and formats else None,
                strict=strict,
            )  # fmt: skip
            totals = the_pass.run(feed, ranks, tol, _each(progress, known_length(batches), ranks))
        totals.check()
        new = stored(model, refreshed, totals.moments)
    return RefreshReport(
        estimator, totals.batches, totals.samples, totals.unfit.total(), new.layers, new.unused,
        nonfinite=len(totals.nonfinite), processes=ranks.size, tol=tol,
        converged=None if tol is None else totals.largest_error() <= tol,
    )  # fmt: skip


class _Pass:
    """A pass of batches through a model whose norm layers are captured."""

    def __init__(
        self,
        model: torch.nn.Module,
        forward: Forward,
        captured: Capture,
        channels: Channels,
        names: Sequence[str],
        *,
        estimator: EstimatorName,
        device: torch.device,
        formats: Formats,
        bf16: bool,
        fall_back: Callable[[], None] | None,
        strict: bool,
    ) -> None:
        self._model, self._forward, self._captured = model, forward, captured
        self._channels, self._names, self._estimator = channels, names, estimator
        self._device, self._formats, self._bf16 = device, formats, bf16
        # Gives the filters back their memory format; None where the images keep theirs.
        self._fall_back, self._is_contiguous, self._strict = fall_back, False, strict

    def run(
        self, feed: Feed, ranks: Ranks, tol: float | None, progress: Callable[[], None] | None
    ) -> PassTotals:
        """Run this process's share of the batches, and add up the totals of all processes.

        Args:
            feed: the batches.
            ranks: the processes.
            tol: stop when each layer's errors are below this.
            progress: called after each batch.

        Raises:
            RefreshError: a batch gives NaN or Inf, if `strict`.
        """
        own = PassTotals(Moments.empty(self._channels))
        batches = on_device(iter(feed), self._device, self._formats)
        most = None if tol is None else _share(LEAST_BATCHES, ranks)
        while True:
            drawn = 0
            for number, batch in itertools.islice(batches, most):
                drawn += 1
                self._add(number, batch, own)
                if progress is not None:
                    progress()
                if ranks.has_failed_peer():
                    break  # `gather` raises
            own.has_ended = most is None or drawn < most
            own.fingerprint = feed.fingerprint()
            everyone = ranks.gather(replace(own, moments=own.moments.on_cpu()))
            totals = reduce(PassTotals.merged, everyone)
            if totals.has_ended or (tol is not None and totals.largest_error() <= tol):
                return totals
            most = _share(totals.next_look() - totals.batches, ranks)

    def _add(self, number: int, batch: Any, totals: PassTotals) -> None:  # noqa: ANN401
        try:
            seen = self._see(batch)
        except UnfitBatchError as error:
            totals.unfit[error.message] += 1
            return
        odd = ~torch.isfinite(torch.stack([seen.mean, seen.variance])).all(0)
        if not bool(odd.any()):
            if not totals.batches:
                totals.moments = Moments.empty(self._channels, seen.mean.device)
            totals.moments.add(seen)
            totals.batches += 1
            totals.samples += leading_size(batch)
            return
        by_layer = self._channels.split(odd.cpu())
        pairs = zip(self._names, by_layer, strict=True)
        culprit = next(name for name, channels in pairs if bool(channels.any()))
        if self._strict:
            raise RefreshError(
                f"batch number {number}: the statistics of layer {printable(repr(culprit))} came "
                "out NaN or Inf",
                remedy="look for NaN in the data, or for weights that overflow",
            )
        totals.nonfinite.append(number)
        totals.culprit = totals.culprit or culprit

    def _see(self, batch: Any) -> Observation:  # noqa: ANN401 - whatever the loader yields
        """Run a batch through the model.

        `view` and custom kernels do not take all memory formats: if `auto` chose one and the first
        batch fails, it is tried again with contiguous images.
        """
        untouched = cloned(batch) if self._fall_back is not None else batch
        self._captured.take()
        try:
            with user_code("the forward pass"), self._precision():
                self._forward(
                    self._model,
                    moved(batch, self._device, CONTIGUOUS) if self._is_contiguous else batch,
                )
        except UserCodeError as error:
            if self._fall_back is None or not isinstance(error.__cause__, RuntimeError):
                raise
            log.info("trying contiguous images: %s", str(error.__cause__).splitlines()[0])
            self._fall_back()
            self._fall_back, self._is_contiguous = None, True
            return self._see(untouched)
        self._fall_back = None
        return observe(self._captured.take(), self._channels, self._estimator)

    def _precision(self) -> AbstractContextManager[object]:
        if not self._bf16:
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)


def _share(batches: int, ranks: Ranks) -> int:
    return max(1, -(-batches // ranks.size))


def _check_choices(*given: str | None) -> None:
    kinds = (EstimatorName, MemoryFormat, TrainMode, Precision)
    for value, choices in zip(given, kinds, strict=True):
        if value is not None and value not in get_args(choices):
            raise RefreshError(f"{value!r} is none of {', '.join(get_args(choices))}")


def _channels(layers: Mapping[str, NormLayer], estimator: EstimatorName) -> Channels:
    means = [layer.running_mean for layer in layers.values()]
    return Channels(
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


def _each(progress: Progress | None, total: int | None, ranks: Ranks) -> Callable[[], None] | None:
    """Report a batch of this process, which has its share of all of them."""
    if progress is None:
        return None
    own = None if total is None else -(-total // ranks.size)
    return lambda: progress(1, own)


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model, by its first tensor."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _memory_formats(
    model: torch.nn.Module, wanted: MemoryFormat, device: torch.device, amp: Precision | None
) -> Formats:
    """Memory format of the inputs by their number of dimensions; empty to leave them alone."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    # In float32 GPUs gain little by it, and lose where channels come in groups.
    if wanted == "contiguous" or (wanted == "auto" and device.type != "cpu" and amp is None):
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
