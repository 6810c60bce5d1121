"""Read what a checkpoint records of the training: steps, learning rates, schedules, metrics.

From pickles come the values that are in them as data, and a few tensors of one element (metrics);
no tensor of an optimizer is ever read. From the Trainer's directories comes what its JSON says. A
value that is not as trainers write it is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ckptavg.formats.checkpoint import STEP_NAMES, TrainingRecord
from ckptavg.formats.pickled import PickledTensor, Placeholder
from ckptavg.formats.statedict import is_deepspeed

if TYPE_CHECKING:
    from collections.abc import Iterator

ReadScalars = Callable[[Mapping[str, PickledTensor]], Mapping[str, float]]
"""Reads tensors of one element, by name; leaves out what cannot be read."""

_LARGEST_COUNT = 1 << 63
# How much is looked at of what a hostile file may have without end.
_MOST_GROUPS = 64
_MOST_METRICS = 1_000
_MOST_SCALARS = 32
_MOST_METRICS_DICTS = 10
_MOST_CALLBACKS = 10
_MOST_STATES = 10
_MOST_SCORES = 100_000
_MOST_VALUES = 1_000
_MOST_LEVELS = 5
_LONGEST_NAME = 200
# A scheduler's state has one of these.
_SCHEDULER_FACTS = ("last_epoch", "_last_lr", "_schedulers")
# Entries of the Trainer's log that are no metrics.
_NO_METRICS = ("epoch", "step", "learning_rate", "total_flos")
# Dtypes of numpy's numbers, as their pickles name them.
_NUMPY_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1")


def training_record(
    root: object, name: str, read_scalars: ReadScalars, *, whole: bool
) -> TrainingRecord:
    """What a torch file's pickle records of the training.

    Lightning has a file's score under its name. A file that is whole is nothing but a state dict,
    whose tensors are no metrics.
    """
    if not isinstance(root, Mapping):
        return TrainingRecord()
    values = dict(islice(_metrics(root, name, whole=whole), _MOST_METRICS))
    tensors = ((key, value) for key, value in values.items() if isinstance(value, PickledTensor))
    scalars = read_scalars(dict(islice(tensors, _MOST_SCALARS)))
    rates, groups = _rates(root), _groups(root)
    return TrainingRecord(
        steps=_steps(root),
        # Lightning and timm record the epoch that is done, not how many are.
        epochs_from_zero="pytorch-lightning_version" in root
        or {"arch", "version", "epoch"} <= root.keys(),
        learning_rate=rates[0] if rates else None,
        other_rates=rates[1:],
        initial_rate=_finite(groups[0].get("initial_lr")) if groups else None,
        scheduler=_scheduler(root),
        metrics=_numbers({**values, **scalars}),
        has_optimizer_state=_has_optimizer_state(root),
        averaged=_averaged(root, read_scalars),
        hyper_parameters=_hyper_parameters(root),
        data_hyper_parameters=_hyper_parameters(root, "datamodule_"),
    )


def _steps(root: Mapping[Any, object]) -> dict[str, int]:
    values = {name: root.get(name) for name in STEP_NAMES}
    if values["global_step"] is None:
        values["global_step"] = root.get("global_steps") if is_deepspeed(root) else _updates(root)
    counts = {name: _count(value) for name, value in values.items()}
    # A negative one, as in ultralytics' final files, is no step.
    return {name: count for name, count in counts.items() if count is not None and count >= 0}


def _updates(root: Mapping[Any, object]) -> object:
    """The number of updates in fairseq's files; None in others."""
    match root.get("optimizer_history"):
        case [*_, {"num_updates": updates}]:
            return updates
    return root.get("num_updates")


def _hyper_parameters(root: Mapping[Any, object], prefix: str = "") -> Mapping[Any, object]:
    """What Lightning's `save_hyperparameters` has saved: keywords, or one argument that has all."""
    values, name = root.get(f"{prefix}hyper_parameters"), root.get(f"{prefix}hparams_name")
    if values is not None and isinstance(name, str) and name != "kwargs":
        return {name: values}
    return values if isinstance(values, dict) else {}


def _averaged(
    root: Mapping[Any, object], read_scalars: ReadScalars
) -> tuple[int, int | None] | None:
    """The counter of Lightning's `StochasticWeightAveraging`, and the epoch of its last update."""
    match root.get("callbacks"):
        case {"StochasticWeightAveraging": {"n_averaged": counter, **others}}:
            if isinstance(counter, PickledTensor):
                counter = read_scalars({"n_averaged": counter}).get("n_averaged")
            return int(_number(counter) or 0), _count(others.get("latest_update_epoch"))
    return None


def _has_optimizer_state(root: Mapping[Any, object]) -> bool | None:
    """Whether an optimizer has taken a step, by its state; None without an optimizer."""
    states = [
        optimizer["state"]
        for optimizer in islice(_first_states(root, "optim"), _MOST_STATES)
        if isinstance(optimizer, Mapping) and isinstance(optimizer.get("state"), Mapping)
    ]
    return any(states) if states else None


def trainer_record(state: Mapping[str, Any], scheduler: object) -> TrainingRecord:
    """What Hugging Face's Trainer records in `trainer_state.json` and the pickle of `scheduler.pt`.

    The optimizer's file is not read: the scheduler's has the learning rate as well.
    """
    step, history = state.get("global_step"), state.get("log_history")
    logged = _logged(history, step) if _is_count(step) else {}
    before = _logged(history, step - 1) if _is_count(step) else {}
    logged_rate = _finite(logged.get("learning_rate"))
    schedule = _schedule(scheduler)
    rate = _last_rate(schedule)
    metrics = {name: value for name, value in logged.items() if name not in _NO_METRICS}
    return TrainingRecord(
        steps={"global_step": step} if _is_count(step) and step >= 0 else {},
        learning_rate=logged_rate if rate is None else _finite(rate),
        scheduler=schedule,
        logged_rate=logged_rate,
        logged_before=_finite(before.get("learning_rate")),
        metrics=_numbers(dict(islice(metrics.items(), _MOST_METRICS))),
    )


def _logged(history: object, step: int) -> dict[str, object]:
    """All that the Trainer logged at a step: one entry of the training, others of evaluations."""
    logged: dict[str, object] = {}
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, dict) and _is_count(entry.get("step")) and entry["step"] == step:
            logged |= entry
    return logged


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) < _LARGEST_COUNT


def _count(value: object) -> int | None:
    """The value of an integer, or of a whole number of numpy's."""
    number = _number(value) if isinstance(value, Placeholder) else None
    value = int(number) if number is not None and number.is_integer() else value
    return value if _is_count(value) else None


def _finite(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    numbers = {name: _number(value) for name, value in values.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(value: object) -> float | None:
    """The value of a plain number, or of numpy's, which may be infinite or NaN.

    A numpy number is pickled as dtype and bytes.
    """
    match value:
        case Placeholder(
            origin="numpy._core.multiarray.scalar" | "numpy.core.multiarray.scalar",
            arguments=(Placeholder(arguments=(str(kind), *_)), bytes(data)),
        ) if kind in _NUMPY_DTYPES and len(data) == int(kind[1]):
            return float(np.frombuffer(data, f"<{kind}")[0])
    return float(value) if type(value) is float or _is_count(value) else None


def _rates(root: Mapping[Any, object]) -> tuple[float, ...]:
    """Learning rates of an optimizer's parameter groups, or else the scheduler's last one."""
    groups = _groups(root)
    rates = [group.get("lr") for group in groups] or [_last_rate(_scheduler(root))]
    return tuple(rate for rate in map(_finite, rates) if rate is not None)


def _groups(root: Mapping[Any, object]) -> list[dict[Any, object]]:
    """Parameter groups of the first optimizer that records a learning rate."""
    for optimizer in _first_states(root, "optim"):
        match optimizer:
            case {"param_groups": [{"lr": rate}, *_] as groups} if _finite(rate) is not None:
                return [group for group in groups[:_MOST_GROUPS] if isinstance(group, dict)]
    return []


def _scheduler(root: Mapping[Any, object]) -> dict[str, Any] | None:
    """The first scheduler's state; it may have been saved as a whole object.

    Where torch's `SWALR` has taken over from it, both are one sequence, as in `SequentialLR`.
    """
    states = (_schedule(value) for value in islice(_first_states(root, "sched"), _MOST_STATES))
    schedules = [schedule for schedule in states if schedule is not None]
    swa = next((each for each in schedules if "anneal_epochs" in each), {})
    first = next((each for each in schedules if each is not swa), swa) or None
    match first, swa:
        case {"last_epoch": int(before)}, {"last_epoch": int(after)} if first is not swa and after:
            return {
                "_schedulers": [first, swa], "_milestones": [before],
                "last_epoch": before + after, "_last_lr": swa.get("_last_lr"),
            }  # fmt: skip
    return first


def _first_states(root: Mapping[Any, object], word: str) -> Iterator[object]:
    """Values whose name contains a word; of a list of values the first."""
    for name, value in root.items():
        if isinstance(name, str) and word in name.lower():
            yield value[0] if isinstance(value, list) and value else value


def _schedule(value: object) -> dict[str, Any] | None:
    """A scheduler's state as plain values; None where the value is no such state."""
    state = value.state if isinstance(value, Placeholder) else value
    if not isinstance(state, dict) or not any(name in state for name in _SCHEDULER_FACTS):
        return None
    values_left = _MOST_VALUES

    def plain(value: object, levels: int) -> Any:  # noqa: ANN401
        """Copy numbers, strings, lists and dicts of them; all else is None."""
        nonlocal values_left
        values_left -= 1
        if values_left < 0:
            return None
        if isinstance(value, Placeholder) and value.origin == "collections.Counter":
            value = value.arguments[0] if value.arguments else {}
        if isinstance(value, str):
            return value[:_LONGEST_NAME]
        if isinstance(value, bool) or _is_count(value):
            return value
        if isinstance(value, dict) and levels:
            return {
                key: plain(inner, levels - 1)
                for key, inner in islice(value.items(), values_left)
                if isinstance(key, str) or _is_count(key)
            }
        if isinstance(value, list | tuple) and levels:
            return [plain(inner, levels - 1) for inner in value[:values_left]]
        return _number(value)

    schedule: dict[str, Any] = plain(state, _MOST_LEVELS)
    return schedule


def _last_rate(schedule: dict[str, Any] | None) -> object:
    match schedule:
        case {"_last_lr": [rate, *_]}:
            return rate
    return None


def _metrics(root: Mapping[Any, object], name: str, *, whole: bool) -> Iterator[tuple[str, object]]:
    """Names and values of what may be metrics: numbers at the top, or in a dict of metrics."""
    yield from _scores(root.get("callbacks"), name)
    dicts_left = _MOST_METRICS_DICTS
    for key, value in root.items():
        if isinstance(value, dict) and str(key).lower().endswith("metrics"):
            if dicts_left:
                dicts_left -= 1
                inner = islice(value.items(), _MOST_METRICS)
                yield from (pair for pair in inner if _is_metric(*pair))
        elif _is_metric(key, value) and not (
            # An integer at the top is a counter, a seed, a size.
            (_is_count(value) and key != "metric") or (whole and isinstance(value, PickledTensor))
        ):
            yield key, value


def _is_metric(name: object, value: object) -> bool:
    """Whether a value is a number, or a tensor of one element, and has a name."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return False
    if isinstance(value, PickledTensor):
        return value.shape == () and value.dtype.kind == "float"
    return _number(value) is not None


def _scores(callbacks: object, name: str) -> Iterator[tuple[str, object]]:
    """What Lightning's ModelCheckpoints monitor: the score that they keep under the file's name.

    `current_score` is another file's where this one was not kept for its score: a `last.ckpt`, say.
    """
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    for state in islice(states, _MOST_CALLBACKS):
        match state:
            case {"monitor": monitor, "best_k_models": dict(scores)}:
                for path, score in islice(scores.items(), _MOST_SCORES):
                    if isinstance(path, str) and path.replace("\\", "/").rpartition("/")[2] == name:
                        if _is_metric(monitor, score):
                            yield monitor, score
                        break
