"""Read what files record of the training: steps, learning rates, schedules, metrics.

From pickles these are the values that stand in them as data, and a few tensors of one element (a
metric); no tensor of an optimizer is ever read. From the Trainer's directories it is what its JSON
says. Whatever is not as a trainer writes it is not there.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg.formats.checkpoint import STEP_FACTS
from ckptavg.formats.pickled import PickledTensor, Placeholder
from ckptavg.formats.statedict import is_deepspeed
from ckptavg.formats.training import TrainingRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

ReadScalars = Callable[[Mapping[str, PickledTensor]], Mapping[str, float]]
"""Reads tensors of one element, by name; leaves out what cannot be read."""

_LARGEST_COUNT = 1 << 63
# What is looked at, at most, of what a hostile file may have without end.
_MOST_GROUPS = 64
_MOST_METRICS = 1_000
_MOST_SCALARS = 32
_MOST_FOLDERS = 10
_MOST_CALLBACKS = 10
_MOST_KEPT = 100_000
_MOST_VALUES = 1_000
_DEEPEST = 5
_LONGEST_NAME = 200
_LONGEST_SCALAR = 8
_OF_SCHEDULERS = ("last_epoch", "_last_lr", "_schedulers")
# In the log of the Trainer, what stands beside the metrics.
_NO_METRICS = ("epoch", "step", "learning_rate", "total_flos")
# How numpy names what makes a number of its own out of a pickle, since 2.0 and before.
_NUMPY_SCALARS = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
_NUMPY_CODES = {
    "f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b",
    "u8": "<Q", "u4": "<I", "u2": "<H", "u1": "<B",
}  # fmt: skip


def training_facts(root: object) -> dict[str, int | float]:
    """What a torch file's pickle records of its place in the training: step, epoch, rate."""
    if not isinstance(root, Mapping):
        return {}
    said = {name: root.get(name) for name in STEP_FACTS}
    if is_deepspeed(root) and said["global_step"] is None:
        said["global_step"] = root.get("global_steps")
    counts = {name: _count(value) for name, value in said.items()}
    facts: dict[str, int | float] = {name: n for name, n in counts.items() if n is not None}
    rate = _learning_rate(root)
    if rate is not None:
        facts["learning_rate"] = rate
    return facts


def training_record(
    root: object, name: str, read_scalars: ReadScalars, *, whole: bool
) -> TrainingRecord:
    """What a torch file's pickle records of the schedule and of metrics.

    Args:
        root: what it describes.
        name: the file's name, by which Lightning's state knows its score.
        read_scalars: reads tensors of one element.
        whole: whether the file is nothing but a state dict, whose tensors are no metrics.
    """
    if not isinstance(root, Mapping):
        return TrainingRecord()
    found = dict(itertools.islice(_metrics(root, name, whole=whole), _MOST_METRICS))
    tensors = {key: value for key, value in found.items() if isinstance(value, PickledTensor)}
    scalars = read_scalars(dict(itertools.islice(tensors.items(), _MOST_SCALARS)))
    numbers = {key: scalars.get(key, _number(value)) for key, value in found.items()}
    return TrainingRecord(
        epochs_from_zero=_counts_from_zero(root),
        learning_rate=_learning_rate(root),
        other_rates=_other_rates(root),
        scheduler=_scheduler(root),
        metrics={key: value for key, value in numbers.items() if value is not None},
    )


def trainer_record(state: Mapping[str, Any], scheduler: object) -> TrainingRecord:
    """What Hugging Face's Trainer records beside the weights.

    The optimizer's file is left alone: the scheduler's has the rate as well.

    Args:
        state: what `trainer_state.json` holds.
        scheduler: what the pickle of `scheduler.pt` describes.
    """
    step = state.get("global_step")
    logged = _logged(state.get("log_history"), step) if _is_count(step) else {}
    before = _logged(state.get("log_history"), step - 1) if _is_count(step) else {}
    schedule = _schedule(scheduler)
    rates = (schedule or {}).get("_last_lr")
    rate = rates[0] if isinstance(rates, list) and rates else None
    return TrainingRecord(
        learning_rate=_finite(rate) if rate is not None else _finite(logged.get("learning_rate")),
        scheduler=schedule,
        logged_rate=_finite(logged.get("learning_rate")),
        logged_before=_finite(before.get("learning_rate")),
        metrics={
            name: number
            for name, value in itertools.islice(logged.items(), _MOST_METRICS)
            if name not in _NO_METRICS and (number := _number(value)) is not None
        },
    )


def _logged(history: object, step: int) -> dict[str, object]:
    """All that was logged at a step: an entry for the training, others for evaluations."""
    found: dict[str, object] = {}
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, dict) and _is_count(entry.get("step")) and entry["step"] == step:
            found |= entry
    return found


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) < _LARGEST_COUNT


def _count(value: object) -> int | None:
    """A whole number, or one of numpy's."""
    if isinstance(value, Placeholder):
        number = _numpy_number(value)
        value = int(number) if number is not None and number.is_integer() else None
    return value if _is_count(value) else None


def _number(value: object) -> float | None:
    """A plain number, or one of numpy's; not finite perhaps."""
    if isinstance(value, Placeholder):
        return _numpy_number(value)
    return float(value) if type(value) is float or _is_count(value) else None


def _finite(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def _numpy_number(value: Placeholder) -> float | None:
    """A scalar of numpy: a dtype's name and the bytes, which old protocols spell as latin-1."""
    if value.origin not in _NUMPY_SCALARS or len(value.arguments) != 2:  # noqa: PLR2004
        return None
    dtype, data = value.arguments
    if isinstance(data, Placeholder) and data.origin == "_codecs.encode" and data.arguments:
        text = data.arguments[0]
        is_short = isinstance(text, str) and len(text) <= _LONGEST_SCALAR
        data = str(text).encode("latin-1", "ignore") if is_short else None
    kind = dtype.arguments[0] if isinstance(dtype, Placeholder) and dtype.arguments else None
    code = _NUMPY_CODES.get(kind) if isinstance(kind, str) else None
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(code):
        return None
    return float(struct.unpack(code, data)[0])


def _learning_rate(root: Mapping[Any, object]) -> float | None:
    """The first parameter group's rate, as any torch optimizer's state dict has it."""
    for value in _first_states(root, "optim"):
        match value:
            case {"param_groups": [{"lr": rate}, *_]}:
                number = _finite(rate)
                if number is not None:
                    return number
    rates = (_scheduler(root) or {}).get("_last_lr")
    return _finite(rates[0]) if isinstance(rates, list) and rates else None


def _other_rates(root: Mapping[Any, object]) -> tuple[float, ...]:
    """Those of the further parameter groups."""
    for value in _first_states(root, "optim"):
        match value:
            case {"param_groups": [_, *others]}:
                rates = (
                    group.get("lr") for group in others[:_MOST_GROUPS] if isinstance(group, dict)
                )
                return tuple(rate for found in rates if (rate := _finite(found)) is not None)
    return ()


def _scheduler(root: Mapping[Any, object]) -> dict[str, Any] | None:
    """The first scheduler's state; it may have been saved as a whole object."""
    found = (_schedule(value) for value in _first_states(root, "sched"))
    return next((schedule for schedule in found if schedule is not None), None)


def _first_states(root: Mapping[Any, object], word: str) -> Iterator[object]:
    """Values under names with a word in them; the first one where it is a list of several."""
    for name, value in root.items():
        if isinstance(name, str) and word in name.lower():
            yield value[0] if isinstance(value, list) and value else value


def _schedule(value: object) -> dict[str, Any] | None:
    """A scheduler's state as plain values; None where it is none."""
    state = value.state if isinstance(value, Placeholder) else value
    if not isinstance(state, dict) or not any(name in state for name in _OF_SCHEDULERS):
        return None
    plain = _Plain().value(state, _DEEPEST)
    return plain if isinstance(plain, dict) else None


class _Plain:
    """Numbers, strings, and lists and dicts of them, so many in all; None for anything else."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def value(self, value: object, depth: int) -> Any:  # noqa: ANN401
        self._left -= 1
        if self._left < 0:
            return None
        if isinstance(value, Placeholder) and value.origin == "collections.Counter":
            value = value.arguments[0] if value.arguments else {}
        if isinstance(value, str):
            return value[:_LONGEST_NAME]
        if isinstance(value, bool) or _is_count(value):
            return value
        if isinstance(value, dict) and depth:
            pairs = itertools.islice(value.items(), self._left)
            return {
                key: self.value(inner, depth - 1)
                for key, inner in pairs
                if isinstance(key, str) or _is_count(key)
            }
        if isinstance(value, list | tuple) and depth:
            return [self.value(inner, depth - 1) for inner in value[: self._left]]
        return _number(value)


def _counts_from_zero(root: Mapping[Any, object]) -> bool:
    """Whether Lightning wrote it, or timm: both say which epoch is done, not how many are."""
    return "pytorch-lightning_version" in root or {"arch", "version", "epoch"} <= root.keys()


def _metrics(root: Mapping[Any, object], name: str, *, whole: bool) -> Iterator[tuple[str, object]]:
    """Names and values of what may be metrics: numbers at the top, or in a dict of metrics."""
    yield from _scores(root.get("callbacks"), name)
    folders = 0
    for key, value in root.items():
        if isinstance(value, dict) and str(key).lower().endswith("metrics"):
            folders += 1
            if folders <= _MOST_FOLDERS:
                inner = itertools.islice(value.items(), _MOST_METRICS)
                yield from (pair for pair in inner if _is_metric(*pair))
        elif _is_metric(key, value) and not (
            # A whole number at the top is a counter, a seed, a size.
            (_is_count(value) and key != "metric") or (whole and isinstance(value, PickledTensor))
        ):
            yield key, value


def _is_metric(name: object, value: object) -> bool:
    """Whether it has a name, and is a number or a tensor of one element."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return False
    return _number(value) is not None or _is_scalar(value)


def _is_scalar(value: object) -> TypeGuard[PickledTensor]:
    return isinstance(value, PickledTensor) and value.shape == () and value.dtype.kind == "float"


def _scores(callbacks: object, name: str) -> Iterator[tuple[str, object]]:
    """What Lightning's ModelCheckpoints monitor: the score of this file.

    They know it by the file's name. `current_score` is that of the latest file that was kept for
    its score, which a `last.ckpt` or a `final.ckpt` need not be.
    """
    entries = callbacks.items() if isinstance(callbacks, Mapping) else ()
    states = [
        state
        for _, state in itertools.islice(entries, _MOST_CALLBACKS)
        if isinstance(state, dict) and isinstance(state.get("best_k_models"), dict)
    ]
    for state in states:
        score = _score(state["best_k_models"], name)
        if _is_metric(state.get("monitor"), score):
            yield state["monitor"], score


def _score(kept: Mapping[Any, object], name: str) -> object:
    """The score under a path that ends with the file's name."""
    return next(
        (
            score
            for path, score in itertools.islice(kept.items(), _MOST_KEPT)
            if isinstance(path, str) and path.replace("\\", "/").rpartition("/")[2] == name
        ),
        None,
    )
