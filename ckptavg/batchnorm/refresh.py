"""One pass of training data through a model, to reset its BatchNorm statistics.

The model is touched only when the pass has ended well: until then each layer writes into buffers
of its own that are thrown away, and every flag, momentum, buffer and hook is put back whatever
happens.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptavg.batchnorm.estimators import Channels, EstimatorName, WeightedMoments
from ckptavg.batchnorm.layers import chosen_layers, norm_layers, unwrapped
from ckptavg.batchnorm.observer import heard_in_eval, observed
from ckptavg.batchnorm.passing import Pass, Runner
from ckptavg.batchnorm.report import Gap, RefreshReport, gap_between
from ckptavg.batchnorm.setting import Formats, TrainMode
from ckptavg.batchnorm.storing import Stored, stored
from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import RefreshError
from ckptavg.model.batches import default_forward, on_device
from ckptavg.model.feeding import Feed, check_loader, cuts, known_length

if TYPE_CHECKING:
    from ckptavg.batchnorm.layers import NormLayer

__all__ = ["RefreshReport", "refresh_norm"]

log = logging.getLogger("ckptavg")

Forward = Callable[[torch.nn.Module, Any], object]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
Precision = Literal["bf16"]
Progress = Callable[[int, int | None], None]
"""Called with the batches done since the last call, and with how many there are, if known."""


def refresh_norm(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    estimator: EstimatorName = "paper",
    forward: Forward | None = None,
    layers: Sequence[str] = (),
    skip_layers: Sequence[str] = (),
    skip_frozen: bool = False,
    memory_format: MemoryFormat = "auto",
    amp: Precision | None = None,
    train_mode: TrainMode = "norm",
    max_samples: int | None = None,
    max_batches: int | None = None,
    tol: float | None = None,
    strict: bool = False,
    held_back: int = 0,
    device: torch.device | str | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> RefreshReport:
    """Reset the running statistics of a model's norm layers with one pass over `batches`.

    Izmailov et al. 2018, section 3.2. Unlike `torch.optim.swa_utils.update_bn`, only the norm
    layers are in training mode (dropout rests), a smaller last batch counts for less, and an
    exception leaves the model as it was. `BatchNorm` and `InstanceNorm` layers that track
    statistics are refreshed, subclasses among them.

    Args:
        model: on its device, with its weights. Only its running statistics change.
        batches: of training data; a tensor, or a list or tuple that begins with one, unless
            `forward` says otherwise.
        estimator: `paper`, `torch` or `exact`; see `ckptavg.batchnorm.estimators`.
        forward: called with model and batch in place of `model(batch)`.
        layers: regular expressions; refresh only layers in whose names one of them is found.
        skip_layers: likewise, layers that keep their statistics and are in eval mode.
        skip_frozen: let those keep them that have weights, none of which require a gradient.
        memory_format: `auto` gives convolutional models their images in channels_last where that
            is faster, on the CPU and with `amp`; it rounds otherwise. `contiguous` gives torch's
            own bits.
        amp: `bf16` runs the model in bfloat16 by `torch.autocast`; statistics stay in float32.
        train_mode: `full` puts the whole model into training mode, as `update_bn` does.
        max_samples: stop with the batch that reaches so many examples.
        max_batches: stop after so many batches.
        tol: stop when in every layer the mean and the logarithm of the standard deviation are
            known to so many standard deviations; see `WeightedMoments.errors`.
        strict: let NaN and Inf be an error, and not a reason to leave out a batch.
        held_back: so many batches, the first, do not count (a quarter of all at most). After the
            pass they go through the model in eval mode, and the report says how far what the layers
            then see is from what they hold. They are kept in memory until then.
        device: where batches are moved; None for the model's.
        ranks: the processes that share the pass.
        progress: hears of each batch.

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
    if min(held_back, *(0 if one is None else one - 1 for one in (max_samples, max_batches))) < 0:
        raise RefreshError("limits begin at 1, and what is held back at 0")
    model = unwrapped(model)
    with ranks.together():
        taken = chosen_layers(
            model, layers=layers, skip_layers=skip_layers, skip_frozen=skip_frozen
        )
        if not taken:
            return RefreshReport(estimator, 0, 0, 0, (), ())
        ends_early = tol is not None or cuts(batches, max_batches, max_samples)
        is_limited = max_batches is not None or max_samples is not None
        check_loader(batches, ranks, is_limited=is_limited, ends_early=ends_early)
        feed = Feed(
            batches, ranks, max_batches=max_batches, max_samples=max_samples,
            held_back=_possible(held_back, batches),
        )  # fmt: skip
        place = _device(device) or device_of(model)
        formats = _memory_formats(model, memory_format, place, amp)
        run = Runner(model, forward or default_forward, place, formats, bf16=amp is not None)
        setting = observed(
            model, taken, estimator=estimator, train_mode=train_mode, formats=formats
        )
        with torch.no_grad(), setting as seen:
            the_pass = Pass(
                run, seen, _channels(taken, estimator), list(taken),
                strict=strict, may_change_format=memory_format == "auto",
            )  # fmt: skip
            total = known_length(batches)
            total = None if total is None else total - feed.held_back
            if max_batches is not None:
                total = max_batches if total is None else min(total, max_batches)
            the_pass.go(feed, ranks, tol=tol, progress=_each(progress, total, ranks))
        found = the_pass.found
        if feed.held_back and not (found.batches or found.unfit or found.nonfinite):
            raise RefreshError(
                "all of the loader's batches were held back, and none is left for the refresh",
                remedy="hold back fewer (--verify-batches)",
            )
        found.check()
        with stored(model, taken, found.moments) as new:
            gaps = _gaps(run, new, the_pass.held_back, ranks, strict=strict) if held_back else {}
        return RefreshReport(
            estimator, found.batches, found.samples, found.unfit.total(),
            tuple(replace(layer, gap=gaps.get(layer.name)) for layer in new.layers()),
            new.unused,
            nonfinite=len(found.nonfinite), processes=ranks.size, tol=tol,
            converged=None if tol is None else the_pass.converged,
            held_back=feed.held_back, statistics=new.statistics,
        )  # fmt: skip


def _check_choices(*given: str | None) -> None:
    kinds = (EstimatorName, MemoryFormat, TrainMode, Precision)
    for value, choices in zip(given, kinds, strict=True):
        if value is not None and value not in get_args(choices):
            raise RefreshError(f"{value!r} is none of {', '.join(get_args(choices))}")


def _possible(held_back: int, batches: Iterable[Any]) -> int:
    """How many batches can be held back: a quarter of those there are at most.

    Raises:
        RefreshError: none.
    """
    known = known_length(batches)
    if not held_back or known is None:
        return held_back
    if known == 1:
        raise RefreshError(
            "the loader has one batch, which cannot be held back", remedy="make its batches smaller"
        )
    return max(1, min(held_back, known // 4))


def _channels(layers: Mapping[str, NormLayer], estimator: EstimatorName) -> Channels:
    instances = [isinstance(layer, _InstanceNorm) for layer in layers.values()]
    return Channels(
        tuple(_size(layer) for layer in layers.values()),
        tuple(estimator == "exact" and not one for one in instances),
        tuple(layer.eps for layer in layers.values()),
    )


def _size(layer: NormLayer) -> int:
    assert layer.running_mean is not None  # noqa: S101 - only such layers are refreshed
    return layer.running_mean.numel()


def _device(wanted: torch.device | str | None) -> torch.device | None:
    try:
        return None if wanted is None else torch.device(wanted)
    except RuntimeError as error:
        raise RefreshError(f"there is no device {wanted!r}") from error


def _each(progress: Progress | None, total: int | None, ranks: Ranks) -> Callable[[], None] | None:
    """Tell of a batch of this process, which has its share of all of them."""
    if progress is None:
        return None
    own = None if total is None else -(-total // ranks.size)
    return lambda: progress(1, own)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model is, by its first tensor."""
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


def _gaps(
    run: Runner, new: Stored, held_back: Sequence[Any], ranks: Ranks, *, strict: bool
) -> dict[str, Gap]:
    """How far what the refreshed layers see in eval mode is from what they hold, by name.

    Raises:
        RefreshError: they see NaN or Inf, if `strict`.
    """
    layers = {
        name: layer for name, layer in norm_layers(run.model).items() if name in new.refreshed
    }
    own = {
        name: WeightedMoments.empty(_channels({name: layer}, "exact"))
        for name, layer in layers.items()
    }
    left_out = 0
    with torch.no_grad(), heard_in_eval(run.model, layers, run.formats) as heard:
        for _, batch in on_device(enumerate(held_back), run.device, run.formats):
            heard.clear()
            run(batch)
            if all(bool(torch.isfinite(call.mean + call.variance).all()) for _, call in heard):
                for name, call in heard:
                    weight = torch.tensor([call.weight("exact")], dtype=torch.float64)
                    own[name].update(weight, call.mean.cpu(), call.variance.cpu())
            else:
                left_out += 1
    if left_out and strict:
        raise RefreshError(f"{left_out} batches that were held back gave NaN or Inf in eval mode")
    if left_out:
        log.warning("left out %d batches that were held back, for NaN or Inf", left_out)
    everyone = ranks.gather(own)
    gaps = {}
    for name, layer in layers.items():
        seen = reduce(WeightedMoments.merged, (one[name] for one in everyone))
        if int(seen.calls):
            gaps[name] = gap_between(layer, seen)
    return gaps
