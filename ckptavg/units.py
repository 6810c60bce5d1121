"""How much of what a scheduler counts was done at each checkpoint: updates, or epochs.

The rules are those of `rates`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.training import TrainingRecord

# What counts the units, and whether it may count them from 0.
_COUNTERS = (("global_step", False), ("step", True), ("epoch", True))


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
    for fact, may_begin_at_zero in _COUNTERS:
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
        if {"global_step", "epoch"} <= record.facts.keys() and record.facts["global_step"] > 0
    }
    if len({epoch for _, epoch in pairs}) < 2:  # noqa: PLR2004 - one is in any proportion
        return None
    for first in (0, 1):
        done = [(step, epoch + 1 - first) for step, epoch in pairs]
        if all(a * d == c * b for (a, b), (c, d) in itertools.pairwise(done)):
            return first
    return None
