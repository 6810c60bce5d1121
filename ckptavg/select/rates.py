"""The learning rates that checkpoints were made with, and where those have their minima.

A checkpoint records the rate that stands in the optimizer when it is saved. A trainer that saves
after `scheduler.step()` so records the rate of the *next* update: at a warm restart the checkpoint
at the minimum shows the restart's high rate. What counts is the rate of the last update before
the checkpoint. Which of the two was recorded follows from the scheduler's own count of its steps:

- its position p (`last_epoch`) is how often it has stepped. n is how many units are done: updates,
  if p is `global_step` or one less in all checkpoints; else `step`, else epochs, in the same way.
- Where units are counted from 0, a checkpoint of epoch e has n = e + 1, else n = e. Epochs are
  counted from 0 by Lightning and timm, where p is e + 1 somewhere in the run (it cannot exceed n),
  where a checkpoint has epoch 0, or where `global_step` is in proportion to e + 1; and from 1 where
  p is e - 1 somewhere, or `global_step` is in proportion to e.
- p = n: saved after the step, the next rate was recorded. p = n - 1: the one that was used.
- If nothing tells from what is counted and the choice depends on it, the user has to say it.

Where the next rate was recorded, the used one is what the trainer logged at that step, if it did;
else what an earlier checkpoint recorded at p - 1; else it is computed from the scheduler's state
for the classes that can be told by their attributes. If none of these gives it, the recorded rate
stands, with a notice.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ckptavg.errors import SelectionError, printable
from ckptavg.select.schedules import close, schedule, value_at
from ckptavg.select.units import steps_taken, units_done

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ckptavg.formats.training import TrainingRecord
    from ckptavg.select.schedules import Form
    from ckptavg.select.units import Record

log = logging.getLogger("ckptavg")

Reading = Literal["used", "next"]
"""What a trainer records: the rate of the last update, or that of the next one."""

_ALTERNATIVES = "choose by --cycle, --steps or --every instead"
_MOST_NAMED = 5


@dataclass(frozen=True)
class _Point:
    """A checkpoint in the schedule.

    Attributes:
        rate: with which its weights were last updated.
        position: of the scheduler at that update; None where it is not known.
        form: the schedule, where its state tells it.
        doubt: why the rate may be another one; empty where it is sure.
    """

    rate: float
    position: int | None = None
    form: Form | None = None
    doubt: str = ""


def at_minima(
    records: Sequence[Record], *, names: Sequence[str], reading: Reading | None = None
) -> tuple[list[float], list[bool]]:
    """The rates with which weights were last updated, and which of them are local minima.

    Args:
        records: the checkpoints in the order of training.
        names: what they are called, for messages.
        reading: what was recorded: the rate that was `used`, or the `next` one; None to find out.

    Raises:
        SelectionError: some of them record no rate, it cannot be told which was recorded and the
            choice depends on it, or the rate that changes is not the first one.
    """
    points = _points(records, reading)
    if reading is None and any(point is not None and point.doubt == _UNSURE for point in points):
        used, following = (_minima_of(_points(records, one))[0] for one in get_args(Reading))
        if used != following:
            doubtful = [n for n, p in zip(names, points, strict=True) if p and p.doubt == _UNSURE]
            raise SelectionError(
                f"it cannot be told whether the learning rate in {_few(doubtful)} is the one used "
                "or the next one, and the choice depends on it",
                remedy="say --lr-recorded used if the trainer saves before scheduler.step(), or "
                "--lr-recorded next if after it",
            )
    rates = _rates_of(points, names)
    _check_first_group(records, rates)
    return rates, minima(rates, [point is not None and _turns(point) for point in points])


def _minima_of(points: Sequence[_Point | None]) -> tuple[list[bool], bool]:
    known = [point for point in points if point is not None]
    return _find_minima([point.rate for point in known], [_turns(point) for point in known])


def _check_first_group(records: Sequence[Record], rates: Sequence[float]) -> None:
    """Refuse a constant first rate beside others that change: a group that is held back."""
    if not all(close(rate, rates[0], max(rates)) for rate in rates):
        return
    groups = zip(*(record.training.other_rates for record in records), strict=False)
    if any(len(set(group)) > 1 for group in groups):
        raise SelectionError(
            "the learning rate of the first parameter group is constant, that of another is not",
            remedy=_ALTERNATIVES,
        )


def used_rates(
    records: Sequence[Record], *, names: Sequence[str], reading: Reading | None = None
) -> list[float]:
    """The rate with which the weights of each checkpoint were last updated.

    Args:
        records: the checkpoints in the order of training.
        names: what they are called, for messages.
        reading: what was recorded; None to find out.

    Raises:
        SelectionError: some of them record no rate.
    """
    return _rates_of(_points(records, reading), names)


def _rates_of(points: Sequence[_Point | None], names: Sequence[str]) -> list[float]:
    """What `used_rates` gives, of checkpoints that are placed in the schedule."""
    missing = [name for name, point in zip(names, points, strict=True) if point is None]
    if missing:
        what = (
            "none of the checkpoints records a learning rate"
            if len(missing) == len(points)
            else f"{_few(missing)} record no learning rate"
        )
        raise SelectionError(what, remedy=_ALTERNATIVES)
    found = [point for point in points if point is not None]
    rates = [point.rate for point in found]
    # If all are equal, so are their predecessors: then the doubt changes nothing in the choice.
    if not all(close(rate, rates[0], max(rates)) for rate in rates):
        _tell_doubts(names, found)
    return rates


def turning_points(records: Sequence[Record]) -> list[bool]:
    """Whether each checkpoint is at a minimum by its scheduler's own state.

    Where only the ends of cycles were kept, and these are of unlike lengths, the neighbours do not
    show it.

    Args:
        records: the checkpoints in the order of training.
    """
    return [point is not None and _turns(point) for point in _points(records)]


def minima(rates: Sequence[float], turns: Sequence[bool] = ()) -> list[bool]:
    """Which of the checkpoints are at a local minimum of the rate.

    Checkpoints of one rate that follow each other count as one point, and count whole: under a
    constant rate all are taken. A point is a minimum if the rate is higher on both sides of it.
    The first point is none, unless it is the only one: low rates at the beginning are a warm-up.
    A last point that is lower than the one before it is taken, with a notice if it is but one
    checkpoint.

    Args:
        rates: of the checkpoints in the order of training.
        turns: those that are known to be minima (`turning_points`); none if left out.
    """
    chosen, falling = _find_minima(rates, list(turns) or [False] * len(rates))
    if falling:
        log.info("the learning rate was still falling at the last checkpoint: taken as a minimum")
    return chosen


def _find_minima(rates: Sequence[float], known: Sequence[bool]) -> tuple[list[bool], bool]:
    """The minima, and whether the rate was still falling at the last of them."""
    flat = list(_flat(rates))
    levels = [rates[part.start] for part in flat]
    chosen = list(known)
    for index, part in enumerate(flat):
        low = [level > levels[index] for level in levels[max(index - 1, 0) : index + 2]]
        if len(flat) == 1 or (index > 0 and sum(low) == len(low) - 1):
            chosen[part.start : part.stop] = [True] * len(part)
    # Where earlier minima were as low, it ends at one, and not on its way to it.
    as_low = any(close(levels[-1], level, max(levels)) for level in levels[:-1])
    ends_falling = len(flat) > 1 and len(flat[-1]) == 1 and chosen[-1]
    return chosen, ends_falling and not (known[-1] or as_low)


def _flat(rates: Sequence[float]) -> Iterator[range]:
    """The stretches of equal rates, as ranges of indices."""
    highest = max(map(abs, rates), default=0.0)
    start = 0
    for index, rate in enumerate(rates):
        if not close(rate, rates[start], highest):
            yield range(start, index)
            start = index
    if rates:
        yield range(start, len(rates))


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:_MOST_NAMED]))
    return f"{shown} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else shown


_UNSURE = (
    "whether the learning rate in %s is the one used or the next one cannot be told: "
    "taken as the one used"
)
_NEXT = "the learning rate in %s is the next one, and the one used is not recorded: taken instead"


def _tell_doubts(names: Sequence[str], points: Sequence[_Point]) -> None:
    for doubt, say in ((_UNSURE, log.warning), (_NEXT, log.info)):
        doubtful = [name for name, point in zip(names, points, strict=True) if point.doubt == doubt]
        if doubtful:
            say(doubt, _few(doubtful))


def _points(records: Sequence[Record], reading: Reading | None = None) -> list[_Point | None]:
    """Each checkpoint in the schedule; None where it records no rate."""
    done = units_done(records) if reading is None else _as_read(records, reading)
    logs_used = _logs_used(records)
    seen: dict[int, float] = {}
    points = []
    for record, count in zip(records, done, strict=True):
        points.append(_point(record.training, count, seen, logs_used=logs_used))
        position, rate = steps_taken(record.training.scheduler), record.training.learning_rate
        if position is not None and rate is not None:
            seen[position] = rate
    return points


def _as_read(records: Sequence[Record], reading: Reading) -> list[int | None]:
    """The units done, if that is what was recorded."""
    positions = [steps_taken(record.training.scheduler) for record in records]
    return [None if p is None else p + (reading == "used") for p in positions]


def _point(
    training: TrainingRecord, done: int | None, seen: Mapping[int, float], *, logs_used: bool
) -> _Point | None:
    """A checkpoint in the schedule.

    Args:
        training: what it records.
        done: how many of the scheduler's units were done; None if that is not known.
        seen: what earlier checkpoints recorded, by the scheduler's position.
        logs_used: whether the trainer logs the rate that it used.
    """
    logged = training.logged_rate if logs_used else training.logged_before
    recorded = training.learning_rate
    if logged is not None or recorded is None:
        known = recorded if logged is None else logged
        return None if known is None else _Point(known)
    position = steps_taken(training.scheduler)
    if not position or not _is_set_by_scheduler(training):
        return _Point(recorded)
    if done is None:
        return _Point(recorded, doubt=_UNSURE)
    form = schedule(training.scheduler, position, recorded)
    if position < done:
        return _Point(recorded, position, form)
    before = seen.get(position - 1, None if form is None else form(position - 1))
    if before is None:
        return _Point(recorded, doubt=_NEXT)
    return _Point(before, position - 1, form)


def _logs_used(records: Sequence[Record]) -> bool:
    """Whether what the trainer logged is the rate used; older Trainers logged the next one.

    transformers did until the spring of 2025 (its issue 35942). Then it is the one in the
    scheduler's file.
    """
    pairs = [
        (record.training.logged_rate, record.training.learning_rate)
        for record in records
        if record.training.logged_rate is not None and steps_taken(record.training.scheduler)
    ]
    highest = max((abs(rate) for _, rate in pairs if rate is not None), default=0.0)
    same = all(rate is not None and close(rate, logged or 0.0, highest) for logged, rate in pairs)
    return not same or len({rate for _, rate in pairs}) <= 1


def _is_set_by_scheduler(training: TrainingRecord) -> bool:
    """Whether the recorded rate is what the scheduler has set, and not another's."""
    recorded = training.learning_rate or 0.0
    match training.scheduler:
        case {"_last_lr": [float() | int() as rate, *_]}:
            return close(rate, recorded, recorded)
    return True


def _turns(point: _Point) -> bool:
    """Whether the schedule is higher both before and after a checkpoint's last update."""
    if point.form is None or not point.position:
        return False
    around = [value_at(point.form, point.position + offset) for offset in (-1, 0, 1)]
    before, here, after = (math.nan if rate is None else rate for rate in around)
    highest = max(before, after)
    return before > here and after > here and not close(min(before, after), here, highest)
