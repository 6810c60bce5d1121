"""What is measured of a model on held-out batches: loss, accuracy, or what a function returns."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ckptavg.batchnorm.moments import in_float64
from ckptavg.errors import CkptAvgError, SelectionError, listed, printable
from ckptavg.model.arguments import called
from ckptavg.model.batches import attribute_of, moved
from ckptavg.model.factories import load_function, name_of, user_code
from ckptavg.model.feeding import limited
from ckptavg.select.metrics import certain_mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ckptavg.batchnorm.refresh import Forward
    from ckptavg.model.factories import Function
    from ckptavg.select.metrics import Mode

    Floats = npt.NDArray[np.float64]

log = logging.getLogger("ckptavg")

Measure = Callable[[torch.nn.Module, Iterable[Any]], dict[str, float]]
"""Called with the model in eval mode and the batches; returns metrics by name."""
MeasureUnits = Callable[[torch.nn.Module, Iterable[Any]], dict[str, "Units"]]
"""Called likewise; returns the metrics' values in each example or batch, by name."""

BUILT_IN = (None, "loss", "accuracy")
_IGNORED = -100  # torch's own mark of targets that do not count
_OTHER_METRIC = "compute another metric with --metric FILE.py:FUNCTION"
_ENTRY = re.compile(r"(.+:[\w.]+):([^:]+)")  # of the dict that a function returns
_OTHER_KEYS = ("checkpoint", "path", "step")


def function_and_entry(metric: Function | None) -> tuple[Function | None, str]:
    """The function of a metric, and the entry of its dict: `train.py:evaluate:mIoU` names both."""
    if isinstance(metric, str) and (names := _ENTRY.fullmatch(metric)):
        return names[1], names[2]
    return metric, ""


def metric_name(metric: Function | None) -> str:
    """What a metric is called: an entry's or a function's own name, and `loss` for None."""
    function, entry = function_and_entry(metric)
    return entry or name_of(function or "loss").rpartition(":")[2].rpartition(".")[2]


def metric_mode(metric: Function | None, mode: Mode | None) -> Mode:
    """Whether a metric is good when low or when high: as given, else by its name.

    Raises:
        SelectionError: neither is certain.
    """
    try:
        return certain_mode(metric_name(metric), mode)
    except SelectionError as error:
        if not isinstance(metric, str) or function_and_entry(metric)[1]:
            raise
        raise SelectionError(
            error.message,
            remedy="set `mode` to min or to max; if the function returns a dict, name the entry "
            f"that chooses: `metric` {metric}:NAME",
        ) from None


def chosen_value(metrics: Mapping[str, float], metric: Function | None) -> float:
    """The value of a metric among those that were computed.

    Raises:
        SelectionError: it is none of them.
    """
    name, (function, _) = metric_name(metric), function_and_entry(metric)
    if name in metrics:
        return metrics[name]
    remedy = "let the function return a number"
    if isinstance(function, str):
        remedy = f"name one of them: `metric` {function}:{next(iter(metrics))}"
    raise SelectionError(
        f"{printable(name)} is none of the metrics that were returned: {listed(metrics, 20)}",
        remedy=printable(remedy),
    )


def measure_of(metric: Function | None, forward: Forward) -> Measure:
    """What computes the metrics.

    Raises:
        CkptAvgError: the metric is no function.
    """
    if metric in BUILT_IN:

        def measure(model: torch.nn.Module, batches: Iterable[Any]) -> dict[str, float]:
            metrics, misfit = classification(model, batches, forward)
            if misfit is not None and metric == "accuracy":
                raise misfit
            if misfit is not None and metric is None:
                log.info("accuracy is not computed, as of language models: %s", misfit.message)
            return {name: each.mean for name, each in metrics.items() if metric in (None, name)}

        return measure
    function = load_function(function_and_entry(metric)[0])
    own_name = metric_name(metric)

    def call(model: torch.nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        what = f"{name_of(metric)}(model, batches)"
        returned = called(function, what, model=model, batches=batches)
        named = dict(returned) if isinstance(returned, Mapping) else {own_name: returned}
        if not named:
            raise CkptAvgError(f"{name_of(metric)} returned a dict without metrics")
        return {_name(metric, name): _number(metric, value) for name, value in named.items()}

    return call


def _name(metric: Function, name: object) -> str:
    # Names are written into files and tables.
    if isinstance(name, str) and name and name.isprintable() and name not in _OTHER_KEYS:
        return name
    raise CkptAvgError(f"{name_of(metric)} returned a metric with the name {printable(repr(name))}")


def _number(metric: Function, value: Any) -> float:  # noqa: ANN401 - what the user's function returns
    """A number of Python's, numpy's or torch's; one in an array of one element, too.

    Raises:
        CkptAvgError: it is something else.
    """
    shape = getattr(value, "shape", ())
    shape = tuple(shape) if isinstance(shape, tuple) else ()
    if math.prod(shape) == 1 and not isinstance(value, str | bytes):
        value = value.item() if shape else value
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return float(value)
    what = f"a {type(value).__name__}" + (f" of shape {shape}" if shape else "")
    raise CkptAvgError(f"{name_of(metric)} returned {what}, not a number or a dict of numbers")


class Batches:
    """A loader's batches on the model's device, up to a limit."""

    def __init__(
        self,
        batches: Iterable[Any],
        device: torch.device,
        *,
        max_samples: int | None,
    ) -> None:
        self._batches, self._device = batches, device
        self._max_samples = max_samples

    def __len__(self) -> int:
        """The number of batches; TypeError where the loader has no length, or there is a limit."""
        if self._max_samples is not None:
            raise TypeError("with a limit on the examples the number of batches is not known")
        return len(self._batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the loader's own
        """What the loader has beside its batches: its `dataset`, say."""
        return getattr(self._batches, name)

    def __iter__(self) -> Iterator[Any]:
        for batch in limited(self._batches, self._max_samples):
            with user_code("moving a batch"):
                here = moved(batch, self._device)
            yield here


@dataclass(frozen=True)
class Units:
    """A metric that is a mean, by what it is the mean of: examples, or batches.

    Attributes:
        totals: the sum of the values in each unit, `[units]`, float64.
        counts: how many values that are, `[units]`, float64; an image may have many targets.
    """

    totals: Floats
    counts: Floats

    @property
    def mean(self) -> float:
        """The metric."""
        return float(self.totals.sum() / self.counts.sum())

    @staticmethod
    def joined(units: Sequence[Units]) -> Units:
        """Units of several batches."""
        return Units(
            np.concatenate([each.totals for each in units]),
            np.concatenate([each.counts for each in units]),
        )


def units_of(metric: Function | None, forward: Forward) -> MeasureUnits:
    """What computes metrics, each with its values in units that can be drawn again.

    Loss and accuracy come by example, a loss of the model's own and the numbers that a function
    returns by batch: it is called with one batch at a time.

    Raises:
        CkptAvgError: the metric is no function.
    """
    if metric in BUILT_IN:
        return lambda model, batches: {
            name: units
            for name, units in classification(model, batches, forward)[0].items()
            if metric in (None, name)
        }
    measure = measure_of(metric, forward)

    def call(model: torch.nn.Module, batches: Iterable[Any]) -> dict[str, Units]:
        rows = [measure(model, [batch]) for batch in batches]
        return {
            name: Units(np.array([row[name] for row in rows]), np.ones(len(rows)))
            for name in (rows[0] if rows else ())
            if all(name in row for row in rows)
        }

    return call


def classification(
    model: torch.nn.Module, batches: Iterable[Any], forward: Forward
) -> tuple[dict[str, Units], CkptAvgError | None]:
    """Mean cross-entropy, and the share of targets that the largest output names, by example.

    Every target counts alike, whatever batch it is in; those of -100 do not count, as in torch.
    Where the model returns a loss of its own, as those of transformers do, that is the loss, by
    batch. Their `logits` may then be none of a plain classification, and there is no accuracy.

    Args:
        model: in eval mode.
        batches: each begins with inputs and targets, or is a dict with `labels`, or a batch of
            graphs with `y`. These are classes, `[batch, ...]`, unless the model has a loss.
        forward: called with model and batch; returns scores `[batch, classes, ...]`, or what has
            them as `logits`.

    Returns:
        `loss` in nats, and `accuracy` from 0 to 1; both are NaN if an output is. And the reason why
        there is no accuracy, or None.

    Raises:
        CkptAvgError: outputs and targets are none of a classification, or there are none.
    """
    losses, hits = list[Units](), list[Units]()
    misfit = None
    for batch in batches:
        outputs = called(forward, "the forward pass", model=model, batch=batch)
        targets = _targets(batch)
        counted = targets != _IGNORED
        own_loss = attribute_of(outputs, "loss")
        has_loss = isinstance(own_loss, torch.Tensor) and own_loss.numel() == 1
        if has_loss and (count := int(counted.sum())):
            losses.append(Units(np.array([float(own_loss.detach()) * count]), np.array([count])))
        try:
            scores, targets = _checked(outputs, targets)
        except CkptAvgError as error:
            if not has_loss:
                raise
            misfit = error
            continue
        right = (scores.argmax(1) == targets).float()
        right[scores.isnan().any(1)] = math.nan
        hits.append(_by_example(right, counted))
        if not has_loss:
            each = cross_entropy(scores, targets, reduction="none", ignore_index=_IGNORED)
            losses.append(_by_example(each, counted))
    if not sum(each.counts.sum() for each in losses):
        raise CkptAvgError(
            "the loader returned no examples to evaluate",
            remedy="if it can be iterated only once, name a callable that returns a new one",
        )
    loss = {"loss": Units.joined(losses)}
    return loss if misfit else loss | {"accuracy": Units.joined(hits)}, misfit


def _by_example(values: torch.Tensor, counted: torch.Tensor) -> Units:
    """Values of targets, `[batch, ...]`, of which some do not count, by example."""
    shape = len(values), math.prod(values.shape[1:])
    totals = in_float64(values.masked_fill(~counted, 0.0)).reshape(shape).sum(1)
    counts = counted.reshape(shape).sum(1)
    return Units(totals.cpu().numpy(), counts.cpu().double().numpy())


def _targets(batch: Any) -> torch.Tensor:  # noqa: ANN401
    """What comes behind the inputs in a batch, the labels of a dict, or the `y` of graphs.

    Raises:
        CkptAvgError: there is nothing.
    """
    if isinstance(batch, list | tuple):
        targets = batch[1] if len(batch) > 1 else None
    else:
        targets = batch.get("labels") if isinstance(batch, Mapping) else attribute_of(batch, "y")
    if not isinstance(targets, torch.Tensor):
        raise CkptAvgError(
            "the loader's batches are neither (inputs, targets) nor dicts with labels",
            remedy=_OTHER_METRIC,
        )
    return targets


def _checked(
    outputs: Any,  # noqa: ANN401 - what the user's model returns
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores and the classes, which are found to fit each other.

    Raises:
        CkptAvgError: they do not.
    """
    scores = outputs if isinstance(outputs, torch.Tensor) else attribute_of(outputs, "logits")
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        what = scores.dtype if isinstance(scores, torch.Tensor) else type(outputs).__name__
        raise CkptAvgError(
            f"the model gave {what}, not one tensor with a score for each class",
            remedy="say how it is called with --forward FILE.py:FUNCTION",
        )
    fit = scores.dim() > 1 and (scores.shape[:1] + scores.shape[2:]) == targets.shape
    if not fit or targets.is_floating_point() or targets.is_complex():
        raise CkptAvgError(
            f"targets are {tuple(targets.shape)} and outputs {tuple(scores.shape)}, not "
            "[batch, ...] classes and [batch, classes, ...]",
            remedy=_OTHER_METRIC,
        )
    targets = targets.long()
    classes = scores.shape[1]
    if bool(((targets != _IGNORED) & ((targets < 0) | (targets >= classes))).any()):
        low, high = int(targets.min()), int(targets.max())
        raise CkptAvgError(
            f"targets are from {low} to {high}, and the model has {classes} classes",
            remedy=_OTHER_METRIC,
        )
    return (scores if scores.dtype == torch.float64 else scores.float()), targets
