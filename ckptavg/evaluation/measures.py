"""What is measured of a model on held-out batches: loss, accuracy, or what a function returns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from ckptavg.batchnorm.moments import in_float64
from ckptavg.errors import CkptAvgError, printable
from ckptavg.model.factories import load_object, name_of, user_code

if TYPE_CHECKING:
    from ckptavg.batchnorm.refresh import Forward
    from ckptavg.model.factories import Function

Measure = Callable[[torch.nn.Module, Iterable[Any]], dict[str, float]]
"""Called with the model in eval mode and the batches; returns metrics by name."""

BUILT_IN = (None, "loss", "accuracy")
_IGNORED = -100  # torch's own mark of targets that do not count
_OTHER_KEYS = ("checkpoint", "path", "step")


def metric_name(metric: Function) -> str:
    """What a metric is called: a function's own name."""
    return name_of(metric).rpartition(":")[2].rpartition(".")[2]


def measure_of(metric: Function | None, forward: Forward) -> Measure:
    """What computes the metrics.

    Raises:
        CkptAvgError: the metric is no function.
    """
    if metric in BUILT_IN:
        names = ("loss", "accuracy") if metric is None else (str(metric),)

        def measure(model: torch.nn.Module, batches: Iterable[Any]) -> dict[str, float]:
            found = classification(model, batches, forward)
            return {name: found[name] for name in names}

        return measure
    own = load_object(metric)
    if not callable(own):
        raise CkptAvgError(f"{name_of(metric)} is a {type(own).__name__}, not a function")
    own_name = metric_name(metric)

    def call(model: torch.nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        with user_code(name_of(metric)):
            returned = own(model, batches)
        named = dict(returned) if isinstance(returned, Mapping) else {own_name: returned}
        return {_name(metric, name): _number(metric, value) for name, value in named.items()}

    return call


def _name(metric: Function, name: object) -> str:
    if not isinstance(name, str) or not name or name in _OTHER_KEYS:
        raise CkptAvgError(
            f"{name_of(metric)} returned a metric with the name {printable(repr(name))}"
        )
    return name


def _number(metric: Function, value: Any) -> float:  # noqa: ANN401 - what the user's function returns
    """A number of Python's, numpy's or torch's.

    Raises:
        CkptAvgError: it is something else.
    """
    shape = getattr(value, "shape", ())
    shape = tuple(shape) if isinstance(shape, tuple) else ()
    if not shape and not isinstance(value, str | bytes):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return float(value)
    what = f"a {type(value).__name__}" + (f" of shape {shape}" if shape else "")
    raise CkptAvgError(f"{name_of(metric)} returned {what}, not a number or a dict of numbers")


def classification(
    model: torch.nn.Module, batches: Iterable[Any], forward: Forward
) -> dict[str, float]:
    """Mean cross-entropy, and the share of targets that the largest output names.

    Every target counts alike, whatever batch it is in; those of -100 do not count, as in torch.

    Args:
        model: in eval mode.
        batches: each begins with inputs and targets; these are classes, `[batch, ...]`.
        forward: called with model and batch, returns `[batch, classes, ...]`.

    Returns:
        `loss` in nats, and `accuracy` from 0 to 1. Both are NaN if an output is.

    Raises:
        CkptAvgError: outputs and targets are none of a classification, or there are none.
    """
    loss, right, count = 0.0, 0.0, 0
    for batch in batches:
        with user_code("the forward pass"):
            outputs = forward(model, batch)
        outputs, targets = _checked(outputs, batch)
        counted = targets != _IGNORED
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        losses = cross_entropy(wide, targets, reduction="none", ignore_index=_IGNORED)
        hits = (wide.argmax(1) == targets).float()
        hits[wide.isnan().any(1)] = math.nan
        loss += float(in_float64(losses[counted]).sum())
        right += float(in_float64(hits[counted]).sum())
        count += int(counted.sum())
    if not count:
        raise CkptAvgError(
            "the loader gave no examples to evaluate with",
            remedy="if it was used up before, name a callable that makes it anew",
        )
    return {"loss": loss / count, "accuracy": right / count}


def _checked(outputs: object, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    """The outputs and the targets, which are found to fit each other.

    Raises:
        CkptAvgError: they do not.
    """
    remedy = "compute another metric with --metric FILE.py:FUNCTION"
    targets = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(targets, torch.Tensor):
        raise CkptAvgError("the loader's batches are not (inputs, targets)", remedy=remedy)
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        what = outputs.dtype if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise CkptAvgError(
            f"the model gave {what}, not one tensor with a score for each class",
            remedy="say how it is called with --forward FILE.py:FUNCTION",
        )
    shapes = f"targets are {tuple(targets.shape)} and outputs {tuple(outputs.shape)}"
    fit = outputs.dim() > 1 and (outputs.shape[:1] + outputs.shape[2:]) == targets.shape
    if not fit or targets.is_floating_point() or targets.is_complex():
        raise CkptAvgError(
            f"{shapes}, not [batch, ...] classes and [batch, classes, ...]", remedy=remedy
        )
    targets = targets.long()
    classes = outputs.shape[1]
    if bool(((targets != _IGNORED) & ((targets < 0) | (targets >= classes))).any()):
        low, high = int(targets.min()), int(targets.max())
        raise CkptAvgError(
            f"targets are from {low} to {high}, and the model has {classes} classes", remedy=remedy
        )
    return outputs, targets
