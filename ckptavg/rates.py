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
- If nothing tells from what is counted, the recorded rate is taken as the one used, with a warning.

Where the next rate was recorded, the used one is what the trainer logged at that step, if it did;
else what an earlier checkpoint recorded at p - 1; else it is computed from the scheduler's state
for the classes that can be told by their attributes. If none of these gives it, the recorded rate
stands, with a notice.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ckptavg.errors import SelectionError, printable
from ckptavg.schedules import close, schedule, value_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ckptavg.schedules import Form
    from ckptavg.training import TrainingRecord

log = logging.getLogger("ckptavg")

# What counts the units, and whether it may count them from 0.
_COUNTERS = (("global_step", False), ("step", True), ("epoch", True))
_ALTERNATIVES = "choose by --cycle, --steps or --every instead"
_MOST_NAMED = 5


class Record(Protocol):
    """What is asked of a checkpoint."""

    @property
    def facts(self) -> Mapping[str, int | float]:
        """`global_step`, `step`, `epoch`, as recorded."""

    @property
    def training(self) -> TrainingRecord:
        """Its rate and its scheduler."""


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


def used_rates(records: Sequence[Record], *, names: Sequence[str]) -> list[float]:
    """The rate with which the weights of each checkpoint were last updated.

    Args:
        records: the checkpoints in the order of training.
        names: what they are called, for messages.

    Raises:
        SelectionError: some of them record no rate.
    """
    points = _points(records)
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
    known = list(turns) or [False] * len(rates)
    flat = list(_flat(rates))
    levels = [rates[part.start] for part in flat]
    chosen = list(known)
    for index, part in enumerate(flat):
        low = [level > levels[index] for level in levels[max(index - 1, 0) : index + 2]]
        if len(flat) == 1 or (index > 0 and sum(low) == len(low) - 1):
            chosen[part.start : part.stop] = [True] * len(part)
    if len(flat) > 1 and len(flat[-1]) == 1 and chosen[-1] and not known[-1]:
        log.info("the learning rate was still falling at the last checkpoint: taken as a minimum")
    return chosen


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


def _points(records: Sequence[Record]) -> list[_Point | None]:
    """Each checkpoint in the schedule; None where it records no rate."""
    done = _units_done(records)
    logs_used = _logs_used(records)
    seen: dict[int, float] = {}
    points = []
    for record, count in zip(records, done, strict=True):
        points.append(_point(record.training, count, seen, logs_used=logs_used))
        position, rate = _position(record), record.training.learning_rate
        if position is not None and rate is not None:
            seen[position] = rate
    return points


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
    position = _steps(training.scheduler)
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
    return _Point(before, position, form)


def _logs_used(records: Sequence[Record]) -> bool:
    """Whether what the trainer logged is the rate used; older Trainers logged the next one.

    transformers before 4.51 did (issue 35942). Then it is always the one that the scheduler's
    file has.
    """
    pairs = [
        (record.training.logged_rate, record.training.learning_rate)
        for record in records
        if record.training.logged_rate is not None and _steps(record.training.scheduler)
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


def _position(record: Record) -> int | None:
    return _steps(record.training.scheduler)


def _steps(scheduler: Mapping[str, Any] | None) -> int | None:
    """How often a scheduler has stepped."""
    steps = (scheduler or {}).get("last_epoch")
    return steps if type(steps) is int and steps >= 0 else None


def _units_done(records: Sequence[Record]) -> list[int | None]:
    """How many of the units that its scheduler counts were done, for each checkpoint."""
    for fact, may_begin_at_zero in _COUNTERS:
        counts = [record.facts.get(fact) for record in records]
        ahead = {
            position - count
            for record, count in zip(records, counts, strict=True)
            if (position := _position(record)) is not None and count is not None
        }
        complete = all(
            count is not None or _position(record) is None
            for record, count in zip(records, counts, strict=True)
        )
        if not ahead or not complete or not ahead <= {-1, 0, 1} or ahead >= {-1, 1}:
            continue
        first = _first_unit(records, fact, ahead) if may_begin_at_zero else 1
        if first is None:
            return [None] * len(records)
        if (first == 1 and 1 not in ahead) or (first == 0 and -1 not in ahead):
            return [None if count is None else int(count) + 1 - first for count in counts]
    return [None] * len(records)


def _first_unit(records: Sequence[Record], fact: str, ahead: set[int | float]) -> int | None:
    """Whether units are counted from 0 or from 1; None where nothing tells it.

    Args:
        records: the checkpoints.
        fact: what counts the units.
        ahead: by how much the scheduler is ahead of that, over all checkpoints.
    """
    if 1 in ahead:
        return 0
    if -1 in ahead:
        return 1
    if fact != "epoch":
        return None
    if any(record.training.epochs_from_zero for record in records):
        return 0
    proportional = _first_epoch(records)
    if proportional is None and any(record.facts.get("epoch") == 0 for record in records):
        return 0
    return proportional


def _first_epoch(records: Sequence[Record]) -> int | None:
    """The first epoch's number, if updates are in proportion to epochs counted from there."""
    pairs = {
        (int(record.facts["global_step"]), int(record.facts["epoch"]))
        for record in records
        if {"global_step", "epoch"} <= record.facts.keys()
    }
    if len({epoch for _, epoch in pairs}) < 2 or not any(step for step, _ in pairs):  # noqa: PLR2004
        return None
    for first in (0, 1):
        done = [(step, epoch + 1 - first) for step, epoch in pairs]
        if all(a * d == c * b for (a, b), (c, d) in itertools.pairwise(done)):
            return first
    return None


def _turns(point: _Point) -> bool:
    """Whether the schedule is higher both before and after a checkpoint's last update."""
    if point.form is None or not point.position:
        return False
    around = [value_at(point.form, point.position + offset) for offset in (-1, 0, 1)]
    before, here, after = (math.nan if rate is None else rate for rate in around)
    highest = max(before, after)
    return before > here and after > here and not close(min(before, after), here, highest)
