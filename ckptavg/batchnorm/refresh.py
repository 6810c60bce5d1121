"""One pass of training data through a model, which recomputes its BatchNorm statistics.

During the pass each call of a norm layer writes to temporary buffers. Modes, hooks and buffers are
put back whatever happens; the new statistics are written when the whole pass has succeeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptavg.batchnorm.capture import UnfitBatchError, capture
from ckptavg.batchnorm.images import ImageFormat, MemoryFormat
from ckptavg.batchnorm.layers import (
    KeptLayer,
    layers_to_refresh,
    nothing_refreshed,
    speak_of,
)
from ckptavg.batchnorm.moments import Channels, EstimatorName, Moments, observe
from ckptavg.batchnorm.report import RefreshReport
from ckptavg.batchnorm.setting import TrainMode, kept_in_eval, training_mode
from ckptavg.batchnorm.storing import store
from ckptavg.batchnorm.totals import PassTotals, until_converged
from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import RefreshError
from ckptavg.model.arguments import called
from ckptavg.model.batches import count_examples, default_forward, device_of, on_device
from ckptavg.model.factories import user_code
from ckptavg.model.feeding import Feed, known_length
from ckptavg.model.loading import unwrapped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from ckptavg.batchnorm.layers import NormLayer
    from ckptavg.options import Progress

__all__ = ["RefreshReport", "refresh_norm"]

Forward = Callable[[torch.nn.Module, Any], object]
Precision = Literal["bf16"]


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
    kept: Sequence[KeptLayer] = (),
) -> RefreshReport:
    """Recompute the running statistics of a model's norm layers with one pass over `batches`.

    Izmailov et al. 2018, section 3.2. Unlike `torch.optim.swa_utils.update_bn`, only the norm
    layers are in training mode (dropout is off), a smaller last batch counts for less, and an
    exception leaves the model as it was. `BatchNorm` and `InstanceNorm` layers that track
    statistics are refreshed, subclasses among them. Layers that are frozen, by their class or by
    the model's own `train()`, are not. A batch with fewer than two values per channel in a layer is
    left out.

    Args:
        model: on its device, with its weights. Only its running statistics change.
        batches: an iterable of training batches. Each is a tensor, or a list or tuple whose first
            element is the model's input; anything if `forward` is given.
        estimator: `paper`, `torch` or `exact`; see `ckptavg.batchnorm.moments`.
        forward: called with model and batch in place of `model(batch)`.
        layers: regular expressions that are searched in the names of layers, which alone are
            refreshed, frozen ones too; empty for all.
        skip_layers: likewise, layers that keep their statistics and are in eval mode.
        memory_format: `auto` gives convolutional models their images in channels_last on the CPU,
            and with `amp`, where that is faster. Results differ in their last bits: those of
            `contiguous` are torch's own.
        amp: `bf16` runs the model in bfloat16 by `torch.autocast`; statistics stay in float32.
        train_mode: `full` puts the whole model into training mode, as `update_bn` does.
        max_samples: stop after the batch that reaches this number of examples, of all processes.
        tol: stop once the estimates are precise enough: in every layer twice the standard error,
            of the mean in standard deviations and of the logarithm of the standard deviation, is
            at most this. None for all batches. See `Moments.errors`.
        strict: raise an error at a batch that gives NaN or Inf, instead of leaving it out.
        device: where batches are moved; None for the model's.
        ranks: the processes that share the pass, each of which calls this with a loader of the
            whole data. Each takes its share of the batches, and all get the same statistics.
        progress: called after each batch with 1 and this process's number of batches, or None.
        kept: layers that must keep their statistics, with the reason.

    Returns:
        A report of each refreshed layer, and of the layers that keep their statistics. None is
        refreshed if the model has no norm layers, or only such as are meant to keep theirs.

    Raises:
        SelectionError: an expression of `layers` or `skip_layers` matches no layer.
        RefreshError: another argument is wrong, there were no usable batches, no layer could be
            refreshed, or the statistics are NaN or Inf.
        PeerError: another process has failed.
        UserCodeError: the model, the loader or `forward` raised.
    """
    model = unwrapped(model)
    with ranks.together():
        _check_choices(estimator, memory_format, train_mode, amp)
        if tol is not None and not 0 < tol < math.inf:
            raise RefreshError(f"the tolerance cannot be {tol}", remedy="0.01 is usual")
        if max_samples is not None and max_samples < 1:
            raise RefreshError(f"`max_samples` must be at least 1, not {max_samples}")
        kept = (*kept_in_eval(model), *kept)
        chosen, kept = layers_to_refresh(model, layers=layers, skip_layers=skip_layers, kept=kept)
        if not chosen:
            speak_of(kept)
            return _checked(RefreshReport(estimator, 0, 0, 0, (), kept, processes=ranks.size))
        speak_of(kept)
        feed = Feed(batches, ranks, max_samples=max_samples, ends_early=tol is not None)
        target_device = _device(device) or device_of(model)
        channels = _channels(chosen, estimator)
        local = PassTotals(Moments.empty(channels))  # of this process
        progress = progress or (lambda _, __: None)
        length = known_length(batches)
        local_length = None if length is None else ranks.share(length)
        with (
            torch.no_grad(),
            training_mode(model, chosen, kept, train_mode),
            capture(chosen, model) as captured,
            ImageFormat(model, memory_format, target_device, is_amp=amp is not None) as images,
        ):

            def run_model(batch: Any) -> None:  # noqa: ANN401 - whatever the loader yields
                captured.take()  # what is left of a batch that failed
                with user_code("the forward pass"), _precision(amp, target_device):
                    called(forward or default_forward, "the forward pass", model=model, batch=batch)

            share = on_device(iter(feed), target_device)
            for number, batch in until_converged(share, local, ranks, tol):
                try:
                    images.call(run_model, batch)
                except UnfitBatchError as error:
                    local.unfit[error.message] += 1
                else:
                    observation = observe(captured.take(), channels, estimator)
                    local.add(number, observation, count_examples(batch), strict=strict)
                progress(1, local_length)
                if ranks.has_failed_peer():
                    break  # `gathered` raises PeerError
        local.fingerprint = feed.fingerprint()
        totals = local.gathered(ranks)
        totals.check()
        reports = store(model, chosen, totals.moments)
        unheard = captured.unheard({report.name for report in reports})
        report = RefreshReport(
            estimator, totals.batches, totals.samples, totals.unfit.total(), reports,
            (*kept, *unheard), nonfinite=len(totals.nonfinite), processes=ranks.size, tol=tol,
            converged=None if tol is None else totals.largest_error() <= tol,
        )  # fmt: skip
        speak_of(unheard)
        return _checked(report)


def _checked(report: RefreshReport) -> RefreshReport:
    """The report.

    Raises:
        RefreshError: no layer was refreshed, and at least one has stale statistics.
    """
    if report.stale and not report.layers:
        raise nothing_refreshed(report.kept)
    return report


def _check_choices(estimator: str, memory_format: str, train_mode: str, amp: str | None) -> None:
    for name, value, choices in (
        ("estimator", estimator, get_args(EstimatorName)),
        ("memory_format", memory_format, get_args(MemoryFormat)),
        ("train_mode", train_mode, get_args(TrainMode)),
        ("amp", amp, (*get_args(Precision), None)),
    ):
        if value not in choices:
            raise RefreshError(
                f"`{name}` must be one of {', '.join(map(str, choices))}, not {value!r}"
            )


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
