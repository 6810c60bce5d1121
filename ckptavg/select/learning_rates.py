"""The learning rate of each checkpoint's last update, and where that rate has local minima.

1. A checkpoint is at a minimum if its last update had a lower rate than those before and after it.
2. A checkpoint that is saved before `scheduler.step()` records that rate; after it, the next one.
3. The scheduler's count tells which: after its step it equals the updates (or epochs) done.
4. If the next rate is recorded, the used one is looked up: in the log, in the checkpoint one step
   earlier, or by torch's formula.
5. Without a scheduler's state, it is the next one if epoch 0 recorded less than `initial_lr`, and
   the rate falls until it restarts from there. A notice says so.
6. If it is unknown which one is recorded, it counts as used. If the choice depends on it, that is
   an error, or without a scheduler's state a notice.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from ckptavg.errors import SelectionError, listed, printable
from ckptavg.formats.checkpoint import STEP_NAMES
from ckptavg.select.names import steps_in_names
from ckptavg.select.schedules import follows_formula, is_minimum, nearly_equal, rate_at, steps_taken

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint, TrainingRecord
    from ckptavg.select.schedules import State

log = logging.getLogger("ckptavg")

Reading = Literal["used", "next"]
"""The rate that a trainer records: the one used in the last update, or the next one."""

_ALTERNATIVES = "choose by `cycle`, `steps` or `every` instead"
_UNSURE = "it is unknown whether the learning rate in %s is the one used or the next one"
_NEXT = "the learning rate in %s is the next one, and the one used is not recorded"
_UNKNOWN = "the learning rate of the last update of %s is recorded nowhere"


class _Rate(NamedTuple):
    """The rate of a checkpoint's last update.

    Attributes:
        value: the rate.
        is_minimum: whether the scheduler's formula has a minimum there.
        doubt: a message with a place for names, if the rate is uncertain.
    """

    value: float
    is_minimum: bool = False
    doubt: str = ""


def rates_and_minima(
    checkpoints: Sequence[Checkpoint], recorded: Reading | None = None
) -> tuple[list[float], list[bool]]:
    """The rate of each checkpoint's last update, and whether it is a local minimum.

    Args:
        checkpoints: the checkpoints in the order of training.
        recorded: the rate that the checkpoints record; None to find out.

    Raises:
        SelectionError: a checkpoint records no rate; only another parameter group's rate changes;
            or which rate was recorded is unknown, and the choice depends on it.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    if recorded is None:
        if assumption := assumed_reading(checkpoints):
            log.info(assumption)
        recorded = "next" if _restarts_show_next(checkpoints) else None
    rates = _last_rates(checkpoints, recorded)
    unsure = [name for name, rate in zip(names, rates, strict=True) if rate.doubt == _UNSURE]
    if unsure:
        used, following = (_last_rates(checkpoints, which) for which in get_args(Reading))
        if _chosen(used) != _chosen(following):
            raise SelectionError(
                f"{_UNSURE % listed(unsure)}, and the choice depends on it",
                remedy="set `lr_recorded` to 'used' if the trainer saves before scheduler.step(), "
                "or to 'next' if after it",
            )
    values = [rate.value for rate in rates]
    other_groups = zip(*(each.training.other_rates for each in checkpoints), strict=False)
    if not all(nearly_equal(value, values[0], max(values)) for value in values):
        _report_doubts(names, rates)
    elif any(len(set(group)) > 1 for group in other_groups):
        raise SelectionError(
            "the learning rate of the first parameter group is constant, but not that of another",
            remedy=_ALTERNATIVES,
        )
    chosen = _chosen(rates)
    _check_first(names, rates)
    # If an earlier rate was as low, the run ends at a minimum, not on the way to one.
    lowest = not any(nearly_equal(values[-1], value, max(values)) for value in values[:-1])
    if len(values) > 1 and chosen[-1] and lowest and not rates[-1].is_minimum:
        log.info("the rate was still falling at the last checkpoint, which counts as a minimum")
    return values, chosen


def assumed_reading(checkpoints: Sequence[Checkpoint]) -> str:
    """What is assumed of the recorded rates, and what else they may be; empty if it is all one.

    Without the state of a scheduler, only the rates themselves tell which ones are recorded.
    """
    if _is_known(checkpoints):
        return ""
    used, following = _last_rates(checkpoints, "used"), list[_Rate]()
    with contextlib.suppress(SelectionError):
        following = _last_rates(checkpoints, "next")
    if _restarts_show_next(checkpoints):
        return (
            "the learning rates show that checkpoints were saved after scheduler.step(): the rate "
            f"of {printable(checkpoints[0].name)} is below the initial one. If that is wrong, add "
            f"`lr_recorded` used: the minima are then {_lowest(checkpoints, used)}"
        )
    if _chosen(used) == (_chosen(following) if following else [True] * len(used)):
        return ""
    return (
        "the recorded learning rates count as those that were used before saving. If your training "
        "loop calls scheduler.step() once an epoch and then saves, "
        + (
            f"add `lr_recorded` next: the minima are then {_lowest(checkpoints, following)}"
            if following
            else "they are the next ones, and the minima cannot be known: " + _ALTERNATIVES
        )
    )


def _lowest(checkpoints: Sequence[Checkpoint], rates: Sequence[_Rate]) -> str:
    pairs = zip(checkpoints, _chosen(rates), strict=True)
    return listed((each.name for each, is_lowest in pairs if is_lowest), 4) or "none"


def _is_known(checkpoints: Sequence[Checkpoint]) -> bool:
    return any(each.training.scheduler or each.training.logged_rate for each in checkpoints)


def _restarts_show_next(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether the rates alone show that each is the next one.

    A schedule of torch begins with `initial_lr`, the rate of epoch 0. If epoch 0 recorded less, and
    the rate falls until it restarts from there, that was after `scheduler.step()`. A first epoch 1
    shows nothing: it may be the first, or the second of which epoch 0 was not saved.
    """
    training = checkpoints[0].training
    initial = training.initial_rate
    if _is_known(checkpoints) or initial is None or training.steps.get("epoch") != 0:
        return False
    rates = [each.training.learning_rate or 0.0 for each in checkpoints]
    initials = (place for place, rate in enumerate(rates) if nearly_equal(rate, initial, initial))
    restart = next(initials, 0)
    falls = all(a > b for a, b in itertools.pairwise([initial, *rates[:restart]]))
    pairs = itertools.pairwise(checkpoints[: restart + 1])
    return restart > 1 and falls and all(_is_one_later(*pair) for pair in pairs)


def local_minima(rates: Sequence[float]) -> list[bool]:
    """Whether each rate is lower than the rates before and after it.

    Equal rates in a row count as one, and a rate that never changes is a minimum everywhere. The
    first rate is no minimum, since low rates at the start are a warm-up. The last one is a minimum
    if it is below the one before.

    Args:
        rates: in the order of training, `[num_checkpoints]`.
    """
    plateaus: list[list[int]] = []
    highest = max(rates, default=0.0)
    for index, rate in enumerate(rates):
        if plateaus and nearly_equal(rate, rates[plateaus[-1][0]], highest):
            plateaus[-1].append(index)
        else:
            plateaus.append([index])
    levels = [-math.inf, *(rates[plateau[0]] for plateau in plateaus), math.inf]
    chosen = [False] * len(rates)
    for place, plateau in enumerate(plateaus, 1):
        lower = levels[place - 1] > levels[place] < levels[place + 1]
        for index in plateau:
            chosen[index] = lower or len(plateaus) == 1
    return chosen


def _chosen(rates: Sequence[_Rate]) -> list[bool]:
    """Whether each rate is a minimum, among the checkpoints or by the scheduler's formula."""
    minima = local_minima([rate.value for rate in rates])
    return [rate.is_minimum or low for rate, low in zip(rates, minima, strict=True)]


def _report_doubts(names: Sequence[str], rates: Sequence[_Rate]) -> None:
    for doubt, level in ((_UNSURE, logging.WARNING), (_NEXT, logging.INFO)):
        doubtful = [name for name, rate in zip(names, rates, strict=True) if rate.doubt == doubt]
        if doubtful:
            log.log(level, "%s: the recorded one counts", doubt % listed(doubtful))


def _last_rates(checkpoints: Sequence[Checkpoint], recorded: Reading | None) -> list[_Rate]:
    """The rate of each checkpoint's last update.

    Raises:
        SelectionError: a checkpoint records no rate.
    """
    records = [checkpoint.training for checkpoint in checkpoints]
    readings = [recorded] * len(records) if recorded else _readings(records)
    # Until 2025, transformers logged the next rate, the one that it records (its issue 35942).
    logs = {
        (record.logged_rate, record.learning_rate)
        for record in records
        if record.logged_rate is not None and steps_taken(record.scheduler)
    }
    logs_next = len(logs) > 1 and all(logged == rate for logged, rate in logs)
    rates, missing = list[_Rate](), []
    earlier: dict[int, float] = {}  # recorded so far, by the steps that the scheduler had taken
    for checkpoint, reading in zip(checkpoints, readings, strict=True):
        training, steps = checkpoint.training, steps_taken(checkpoint.training.scheduler)
        logged = training.logged_before if logs_next else training.logged_rate
        if logged is not None:
            rates.append(_Rate(logged))
        elif reading == "next" and training.scheduler is None:
            rates.append(_rate_before(checkpoints, len(rates)))
        elif training.learning_rate is not None:
            rates.append(_last_rate(training.learning_rate, training.scheduler, reading, earlier))
        else:
            missing.append(checkpoint.name)
        if steps is not None and training.learning_rate is not None:
            earlier[steps] = training.learning_rate
    if missing:
        what = f"{listed(missing)} record no" if rates else "none of the checkpoints records a"
        raise SelectionError(f"{what} learning rate", remedy=_ALTERNATIVES)
    return rates


def _rate_before(checkpoints: Sequence[Checkpoint], place: int) -> _Rate:
    """The rate that the checkpoint one unit earlier recorded, or a SelectionError without that.

    The first one was updated with an unknown rate, for which the rate that it records stands.
    """
    source = checkpoints[max(place - 1, 0)]
    rate = source.training.learning_rate
    if rate is not None and (place == 0 or _is_one_later(source, checkpoints[place])):
        return _Rate(rate, doubt="" if place else _UNKNOWN)
    what = _UNKNOWN % printable(checkpoints[place].name)
    raise SelectionError(f"{what}: the step or epoch before was not saved", remedy=_ALTERNATIVES)


def _is_one_later(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether a step or an epoch, as recorded or in the names, is one more."""
    before, after = first.training.steps, second.training.steps
    numbers = steps_in_names((first.name, second.name)) or (0, 0)
    pairs = [numbers, *((before.get(name, 0), after.get(name, 0)) for name in STEP_NAMES)]
    return any(later - earlier == 1 for earlier, later in pairs)


def _check_first(names: Sequence[str], rates: Sequence[_Rate]) -> None:
    """Raise a SelectionError if the choice depends on the first rate, which is unknown."""
    values = [rate.value for rate in rates]
    higher = [v for v in values if not nearly_equal(v, values[0], max(values))]
    if rates[0].doubt == _UNKNOWN and higher and higher[0] > values[0]:
        what = f"{_UNKNOWN % printable(names[0])}, and the choice depends on it"
        raise SelectionError(what, remedy=_ALTERNATIVES)


def _last_rate(
    recorded: float,
    scheduler: State | None,
    reading: Reading | None,
    earlier: Mapping[int, float],
) -> _Rate:
    """The rate of a checkpoint's last update, if the trainer did not log it.

    Args:
        recorded: the rate that the checkpoint records.
        scheduler: state dict of the scheduler.
        reading: the rate that `recorded` is; None if unknown.
        earlier: rates that earlier checkpoints record, by the scheduler's number of steps.
    """
    steps = steps_taken(scheduler)
    match scheduler:
        case {"_last_lr": [float() | int() as rate, *_]} if not nearly_equal(
            rate, recorded, recorded
        ):
            steps = None  # the scheduler belongs to another optimizer
    if not steps:
        return _Rate(recorded)
    if reading is None:
        return _Rate(recorded, doubt=_UNSURE)
    if not follows_formula(scheduler, steps, recorded):
        scheduler = None
    if reading == "used":
        return _Rate(recorded, is_minimum(scheduler, steps))
    used = earlier.get(steps - 1, rate_at(scheduler, steps - 1))
    if used is None:
        return _Rate(recorded, doubt=_NEXT)
    return _Rate(used, is_minimum(scheduler, steps - 1))


def _readings(records: Sequence[TrainingRecord]) -> Sequence[Reading | None]:
    """The rate that each checkpoint records; None if nothing tells it.

    The scheduler counts the same thing as a recorded counter if the two differ by 1 at most.
    """
    for counter in STEP_NAMES:
        pairs = [(steps_taken(each.scheduler), each.steps.get(counter)) for each in records]
        ahead = {None if n is None else steps - n for steps, n in pairs if steps is not None}
        if ahead <= {0, 1} or ahead <= {-1, 0}:
            first = 0 if 1 in ahead else 1 if -1 in ahead else _first_count(records, counter)
            if first is None:
                return [None] * len(records)
            # If a counter starts from 0, one more unit is done than it says.
            return [
                "next" if n is not None and steps == n + 1 - first else "used" for steps, n in pairs
            ]
    # A scheduler may count updates where only epochs are recorded: then both are in proportion.
    epochs = [(steps, n) for steps, n in pairs if steps is not None and n is not None]
    if _first_epoch(epochs) is not None:
        return ["next"] * len(records)
    if _first_epoch([(steps + 1, n) for steps, n in epochs]) is not None:
        return ["used"] * len(records)
    return [None] * len(records)


def _first_count(records: Sequence[TrainingRecord], counter: str) -> int | None:
    """The number from which a counter starts, 0 or 1; None if nothing tells it."""
    counts = {record.steps.get(counter) for record in records}
    if counter == "epoch":
        if any(record.epochs_from_zero for record in records):
            return 0
        updates = [(r.steps.get("global_step", 0), r.steps.get("epoch", 0)) for r in records]
        if (first := _first_epoch([pair for pair in updates if pair[0] > 0])) is not None:
            return first
    if 0 in counts:
        return 0
    without_gap = len(counts) > 1 and counts == set(range(1, len(counts) + 1))
    return 1 if without_gap or counter == "global_step" else None


def _first_epoch(pairs: Sequence[tuple[float, float]]) -> int | None:
    """The number of the first epoch, 0 or 1, with which updates are proportional to epochs.

    Args:
        pairs: number of updates and recorded epoch of each checkpoint.
    """
    if len({epoch for _, epoch in pairs}) > 1:
        for first in (0, 1):
            done = [(updates, epoch + 1 - first) for updates, epoch in pairs]
            if all(a * d == c * b for (a, b), (c, d) in itertools.pairwise(done)):
                return first
    return None
