"""How much of what a scheduler counts was done at each checkpoint: updates, or epochs.

The rules are those of `rates`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.formats.training import TrainingRecord

# What counts the units.
_COUNTERS = ("global_step", "step", "epoch")


class Record(Protocol):
    """What is asked of a checkpoint."""

    @property
    def facts(self) -> Mapping[str, int | float]:
        """`global_step`, `step`, `epoch`, as recorded."""

    @property
    def training(self) -> TrainingRecord:
        """Its rate and its scheduler."""


def steps_taken(scheduler: Mapping[str, Any] | None) -> int | None:
    """How often a scheduler has stepped."""
    steps = (scheduler or {}).get("last_epoch")
    return steps if type(steps) is int and steps >= 0 else None


def units_done(records: Sequence[Record]) -> list[int | None]:
    """How many of the units that its scheduler counts were done, for each checkpoint."""
    for fact in _COUNTERS:
        counts = [record.facts.get(fact) for record in records]
        ahead = {
            position - count
            for record, count in zip(records, counts, strict=True)
            if (position := steps_taken(record.training.scheduler)) is not None
            and count is not None
        }
        complete = all(
            count is not None or steps_taken(record.training.scheduler) is None
            for record, count in zip(records, counts, strict=True)
        )
        if not ahead or not complete or not ahead <= {-1, 0, 1} or ahead >= {-1, 1}:
            continue
        first = _first_unit(records, fact, ahead)
        if first is None:
            return [None] * len(records)
        if (first == 1 and 1 not in ahead) or (first == 0 and -1 not in ahead):
            return [None if count is None else int(count) + 1 - first for count in counts]
    return _updates_done(records)


def _updates_done(records: Sequence[Record]) -> list[int | None]:
    """Updates that were done, where a scheduler steps with each and only epochs are recorded.

    Then its position is in proportion to the epochs, or one less is.
    """
    positions = [steps_taken(record.training.scheduler) for record in records]
    pairs = {
        (position, int(record.facts["epoch"]))
        for position, record in zip(positions, records, strict=True)
        if position is not None and "epoch" in record.facts
    }
    if len({epoch for _, epoch in pairs}) > 1:
        for missing in (0, 1):
            done = {(position + missing, epoch) for position, epoch in pairs}
            if _first_of(done) is not None:
                return [None if position is None else position + missing for position in positions]
    return [None] * len(records)


def _first_unit(  # noqa: PLR0911 - a table of rules
    records: Sequence[Record], fact: str, ahead: set[int | float]
) -> int | None:
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
    counts = {record.facts.get(fact) for record in records}
    if fact != "epoch":
        return 0 if 0 in counts else 1 if fact == "global_step" else None
    if any(record.training.epochs_from_zero for record in records):
        return 0
    proportional = _first_epoch(records)
    if proportional is not None:
        return proportional
    if 0 in counts:
        return 0
    # Every epoch is there, and none is 0.
    return 1 if len(counts) > 1 and counts == set(range(1, len(counts) + 1)) else None


def _first_epoch(records: Sequence[Record]) -> int | None:
    """The first epoch's number, if updates are in proportion to epochs counted from there."""
    pairs = {
        (int(record.facts["global_step"]), int(record.facts["epoch"]))
        for record in records
        if {"global_step", "epoch"} <= record.facts.keys() and record.facts["global_step"] > 0
    }
    return _first_of(pairs)


def _first_of(pairs: set[tuple[int, int]]) -> int | None:
    """The first epoch's number, if steps are in proportion to the epochs counted from there."""
    if len({epoch for _, epoch in pairs}) < 2:  # noqa: PLR2004 - one is in any proportion
        return None
    for first in (0, 1):
        done = [(step, epoch + 1 - first) for step, epoch in pairs]
        if all(a * d == c * b for (a, b), (c, d) in itertools.pairwise(done)):
            return first
    return None
