"""The order of checkpoints, and how much of the training was done when each was saved."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, listed, printable
from ckptavg.formats.checkpoint import STEP_NAMES
from ckptavg.select.names import (
    Step,
    is_one_series,
    natural_key,
    order_in_names,
    parse_name,
    steps_in_names,
    whole_steps,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptavg.formats.checkpoint import Checkpoint

_STEPS_PER_CHECKPOINT = 10  # fewer may count epochs or stages


@dataclass(frozen=True)
class Timeline:
    """The place of each checkpoint in the training.

    Attributes:
        unit: the unit of the steps: `global_step`, `step`, `epoch`, or `number` (in the names).
        steps: the step of each checkpoint; empty if some of them have none.
        places: the sort key of each checkpoint: the step, or the epoch and the step where steps
            begin anew in each epoch; empty if some of them have neither.
        from_zero: whether steps are counted from 0, so that `step + 1` units were done. Lightning,
            timm, and loops whose first epoch is 0 count epochs so.
        other_units: the other units that all checkpoints record, if none was asked for.
    """

    unit: str
    steps: tuple[int, ...]
    places: tuple[tuple[Step, ...], ...] = ()
    from_zero: bool = False
    other_units: tuple[str, ...] = ()

    @property
    def done(self) -> tuple[int, ...]:
        """The number of units that were done when each was saved; empty if unknown."""
        return tuple(step + self.from_zero for step in self.steps)


def timeline(checkpoints: Sequence[Checkpoint], unit: str | None = None) -> Timeline:
    """The place of each checkpoint in the training, as recorded, else by the numbers in the names.

    Args:
        checkpoints: the checkpoints.
        unit: the unit to count in; None for the first one that all checkpoints record.

    Raises:
        SelectionError: not all checkpoints have that unit.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    units = [
        name for name in STEP_NAMES if all(name in each.training.steps for each in checkpoints)
    ]
    restarts = "step" in units and "epoch" in units and _steps_restart(checkpoints)
    if restarts:
        units.remove("step")
    is_given = unit is not None
    unit = unit or next(iter(units), "number")
    if unit in units:
        steps = tuple(each.training.steps[unit] for each in checkpoints)
        units.remove(unit)
    elif unit == "number":
        # Where the steps begin anew in each epoch, they do not tell how much was done.
        places = order_in_names(names)
        steps = whole_steps([place[0] for place in places if len(place) == 1])
        return Timeline(unit, steps, places)
    else:
        named = steps_in_names(names, "epoch" if unit == "epoch" else "step")
        if named is None or (unit == "step" and restarts):
            lacking = [each.name for each in checkpoints if unit not in each.training.steps]
            why = f"{printable(lacking[0])} does not" if lacking else "it begins anew in each epoch"
            raise SelectionError(f"not all checkpoints record the {unit}: {why}")
        steps, units = whole_steps(named), []
    starts = saved_before_training(checkpoints, steps)
    from_zero = unit == "epoch" and (
        any(step == 0 and c not in starts for c, step in zip(checkpoints, steps, strict=True))
        or any(checkpoint.training.epochs_from_zero for checkpoint in checkpoints)
    )
    places = tuple(
        (step, each.training.steps["step"]) if restarts and unit == "epoch" else (step,)
        for each, step in zip(checkpoints, steps, strict=False)
    )
    return Timeline(unit, steps, places, from_zero, () if is_given else tuple(units))


def sort_checkpoints(checkpoints: Iterable[Checkpoint]) -> tuple[list[Checkpoint], bool]:
    """Sort by training step: as recorded, else by the numbers in the names.

    Returns:
        The checkpoints, and whether the order is known. It is unknown if only some of them have a
        step. If none has one, any order will do.
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: natural_key(checkpoint.name))
    names = [checkpoint.name for checkpoint in ordered]
    places = timeline(ordered).places
    if places:
        by_checkpoint = dict(zip(ordered, places, strict=True))
        ordered.sort(key=by_checkpoint.__getitem__)
        known = len(set(places)) == len(ordered)
    else:
        recorded = any(each.step is not None for each in ordered)
        known = not recorded and not _have_numbers_apart(names)
    return ordered, known or is_one_series(names)


def remedy_without_order(checkpoints: Sequence[Checkpoint]) -> str:
    """Why checkpoints have no order and what to do: the remedy of an error."""
    names = [each.name for each in checkpoints]
    without = [
        each.name for each in checkpoints if not each.step and not parse_name(each.name).numbers
    ]
    if len(without) == len(checkpoints):
        return "no step is recorded, and none is in the names: choose with `include`"
    if without:
        return f"leave out {listed(without)}: no step is recorded, and none is in the name"
    if is_one_series(names):
        return (
            "their steps begin anew in each epoch, or are equal: count in epochs with `unit` epoch"
        )
    example = listed(names, 2)
    return f"the names are not of one series, such as {example}: name one run, or use `include`"


def saved_before_training(
    checkpoints: Sequence[Checkpoint], steps: Sequence[Step]
) -> frozenset[Checkpoint]:
    """The checkpoints of step 0 that no update has changed.

    Their optimizer has no state, where that of another has; or they have none, where all of several
    others have; or one is `step0` by its name, where there are many more steps than checkpoints.
    """
    pairs = [*zip(checkpoints, steps, strict=False)]
    later = [each.training.has_optimizer_state for each, step in pairs if step != 0]
    is_start = {True: False, False: any(later), None: len(later) > 1 and all(later)}
    starts = {c for c, step in pairs if step == 0 and is_start[c.training.has_optimizer_state]}
    updates = steps_in_names([each.name for each in checkpoints], "step") or ()
    # Where several are 0, steps begin anew in each epoch.
    if updates.count(0) == 1 and max(updates) >= _STEPS_PER_CHECKPOINT * len(updates):
        starts.add(checkpoints[updates.index(0)])
    return frozenset(starts)


def _steps_restart(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether the recorded `step` starts again in each epoch."""
    pairs = sorted(
        (each.training.steps["epoch"], each.training.steps["step"]) for each in checkpoints
    )
    return any(a[0] < b[0] and a[1] >= b[1] for a, b in itertools.pairwise(pairs))


def _have_numbers_apart(names: Sequence[str]) -> bool:
    """Whether a name has a number that another lacks, unlike `resnet50` and `resnet50_best`."""
    numbers = [frozenset(number.text for number in parse_name(name).numbers) for name in names]
    return any(each - frozenset.intersection(*numbers) for each in numbers)
