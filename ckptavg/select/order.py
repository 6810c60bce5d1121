"""The order of checkpoints, and how much of the training was done at each of them."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, printable
from ckptavg.formats import SUFFIXES
from ckptavg.formats.checkpoint import STEP_FACTS
from ckptavg.formats.parts import absolute, is_remote

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

DIGITS = re.compile(r"(\d+)")
# Words before the step in names: `epoch=3-step=400`, `checkpoint-500`, `iter_0001000`.
_LABELS = {
    "step": r"(?:global_?step|steps?|iter(?:ation)?s?|it|updates?)",
    "checkpoint": r"(?:checkpoint|ckpt)",
    "epoch": r"(?:epochs?|ep)",
}


@dataclass(frozen=True)
class Timeline:
    """The place of each checkpoint in the training.

    Attributes:
        unit: the unit of the steps: `global_step`, `step`, `epoch`, or `number` (in the names).
        steps: the step of each checkpoint; empty if some of them have none.
        from_zero: whether steps count from 0, so that `step + 1` units were done. Epochs of
            Lightning, of timm, and of loops whose first epoch is 0 do.
        other_units: further units that all checkpoints record.
    """

    unit: str
    steps: tuple[int, ...]
    from_zero: bool = False
    other_units: tuple[str, ...] = ()

    @property
    def done(self) -> tuple[int, ...]:
        """The number of units that were done at each checkpoint; empty if unknown."""
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
    units = [fact for fact in STEP_FACTS if all(fact in each.facts for each in checkpoints)]
    restarts = "step" in units and "epoch" in units and _steps_restart(checkpoints)
    if restarts:
        units.remove("step")
    unit = unit or next(iter(units), "number")
    if unit in units:
        steps = tuple(int(each.facts[unit]) for each in checkpoints)
        units.remove(unit)
    elif unit == "number":
        return Timeline(unit, steps_in_names(names) or ())
    else:
        named = steps_in_names(names, "epoch" if unit == "epoch" else "step")
        if named is None or (unit == "step" and restarts):
            lacking = [each.name for each in checkpoints if unit not in each.facts]
            why = f"{printable(lacking[0])} does not" if lacking else "it begins anew in each epoch"
            raise SelectionError(f"not all checkpoints record the {unit}: {why}")
        steps, units = named, []
    from_zero = unit == "epoch" and (
        0 in steps or any(checkpoint.training.epochs_from_zero for checkpoint in checkpoints)
    )
    return Timeline(unit, steps, from_zero, tuple(units))


def sort_checkpoints(checkpoints: Iterable[Checkpoint]) -> tuple[list[Checkpoint], bool]:
    """Sort by training step: as recorded, else by the numbers in the names.

    Returns:
        The checkpoints, and whether the order is known. It is unknown if only some of them have a
        step. If none has one, any order will do.
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: natural_key(checkpoint.name))
    times = timeline(ordered)
    if times.steps:
        # Where all record epochs and steps and count in epochs, the steps begin anew in each.
        restarts = times.unit == "epoch" and all("step" in each.facts for each in ordered)
        places = {
            each: (step, each.facts["step"] if restarts else 0)
            for each, step in zip(ordered, times.steps, strict=True)
        }
        ordered.sort(key=places.__getitem__)
        known = len(set(places.values())) == len(ordered)
    else:
        recorded = any(each.step is not None for each in ordered)
        known = not recorded and not _have_numbers_apart([each.name for each in ordered])
    return ordered, known or _differ_in_numbers_only([each.name for each in ordered])


def _steps_restart(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether the recorded `step` starts again in each epoch."""
    pairs = sorted((each.facts["epoch"], each.facts["step"]) for each in checkpoints)
    return any(a[0] < b[0] and a[1] >= b[1] for a, b in itertools.pairwise(pairs))


def steps_in_names(names: Sequence[str], label: str | None = None) -> tuple[int, ...] | None:
    """The step in each name; None if not all names have one.

    It is the number behind `step` in all names, else behind `checkpoint`, else behind `epoch`. If
    the names differ in numbers only, it is else the first number that differs.

    Args:
        names: the checkpoints' names.
        label: `step` or `epoch`, to look for numbers behind this word only.
    """
    for pattern in _LABELS.values() if label is None else (_LABELS[label],):
        labelled = re.compile(rf"(?<![a-z]){pattern}[=_-]?(\d+)", re.IGNORECASE)
        matches = [labelled.findall(name) for name in names]
        if all(matches):
            numbers = tuple(int(numbers[-1]) for numbers in matches)
            if len(set(numbers)) > 1 or len(names) == 1 or label is not None:
                return numbers
    if label is not None or not _differ_in_numbers_only(names):
        return None
    columns = zip(*(map(int, DIGITS.findall(_stem(name))) for name in names), strict=True)
    return next((column for column in columns if len(set(column)) > 1 or len(names) == 1), None)


def _differ_in_numbers_only(names: Sequence[str]) -> bool:
    return len({DIGITS.sub("#", _stem(name)) for name in names}) <= 1


def _have_numbers_apart(names: Sequence[str]) -> bool:
    """Whether a name has a number that another lacks, unlike `resnet50` and `resnet50_best`."""
    numbers = [set(DIGITS.findall(_stem(name))) for name in names]
    return any(each - set.intersection(*numbers) for each in numbers)


def _stem(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def natural_key(text: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key with `step_100` before `step_1000` and after `step_20`."""
    return tuple(
        (0, int(piece)) if piece.isdecimal() else (1, piece)
        for piece in DIGITS.split(text)
        if piece
    )


def relative_names(paths: Collection[Path]) -> dict[Path, str]:
    """For each path the one relative to the deepest folder that all have in common.

    URLs have a common folder of their own, apart from that of the paths on this machine.
    """
    names: dict[Path, str] = {}
    for remote in (False, True):
        group = {path: absolute(path) for path in paths if is_remote(path) is remote}
        parents = [path.parent for path in group.values()]
        folder = os.path.commonpath(parents) if parents else ""
        names |= {path: full.relative_to(folder).as_posix() for path, full in group.items()}
    return names
