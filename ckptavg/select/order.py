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
from ckptavg.formats.paths import absolute, is_remote

if TYPE_CHECKING:
    from collections.abc import Sequence
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


def timeline(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], unit: str | None = None
) -> Timeline:
    """The place of each checkpoint in the training, as recorded, else by the numbers in the names.

    Args:
        checkpoints: the checkpoints.
        names: their names, from which steps are read if none are recorded.
        unit: the unit to count in; None for the first one that all checkpoints record.

    Raises:
        SelectionError: not all checkpoints have that unit.
    """
    restarts = _steps_restart(checkpoints)
    recorded = {
        fact: tuple(int(checkpoint.facts[fact]) for checkpoint in checkpoints)
        for fact in STEP_FACTS
        if all(fact in checkpoint.facts for checkpoint in checkpoints)
        and not (fact == "step" and restarts)
    }
    if unit is None:
        unit = next(iter(recorded), "number")
    if unit in recorded:
        steps = recorded.pop(unit)
    elif unit == "number":
        return Timeline(unit, steps_in_names(names) or ())
    else:
        named = steps_in_names(names, "epoch" if unit == "epoch" else "step")
        if named is None or (unit == "step" and restarts):
            lacking = [n for n, c in zip(names, checkpoints, strict=True) if unit not in c.facts]
            why = f"{printable(lacking[0])} does not" if lacking else "it begins anew in each epoch"
            raise SelectionError(f"not all checkpoints record the {unit}: {why}")
        steps, recorded = named, {}
    from_zero = unit == "epoch" and (
        0 in steps or any(checkpoint.training.epochs_from_zero for checkpoint in checkpoints)
    )
    return Timeline(unit, steps, from_zero, tuple(recorded))


def sort_checkpoints(
    checkpoints: Sequence[Checkpoint], names: Sequence[str]
) -> tuple[list[tuple[Checkpoint, str]], bool]:
    """Sort by training step: as recorded, else by the numbers in the names.

    Returns:
        The checkpoints with their names, and whether the order is known. It is unknown if only some
        of them have a step. If none has one, any order will do.
    """
    named = sorted(zip(checkpoints, names, strict=True), key=lambda pair: natural_key(pair[1]))
    names = [name for _, name in named]
    steps = _recorded_steps([checkpoint for checkpoint, _ in named])
    if steps is None:
        steps = [(number,) for number in steps_in_names(names) or ()]
    if steps:
        places = sorted(range(len(named)), key=steps.__getitem__)
        known = len(set(steps)) == len(steps)
        named = [named[place] for place in places]
    else:
        recorded = any(checkpoint.step is not None for checkpoint in checkpoints)
        known = not recorded and not _have_numbers_apart(names)
    return named, known or _differ_in_numbers_only(names)


def _recorded_steps(checkpoints: Sequence[Checkpoint]) -> list[tuple[float, ...]] | None:
    """A sort key of recorded steps for each checkpoint; None if not all record the same ones."""
    orders: list[tuple[str, ...]] = [(fact,) for fact in STEP_FACTS]
    if _steps_restart(checkpoints):
        orders = [("global_step",), ("epoch", "step")]
    for facts in orders:
        if all(set(facts) <= checkpoint.facts.keys() for checkpoint in checkpoints):
            return [tuple(each.facts[fact] for fact in facts) for each in checkpoints]
    return None


def _steps_restart(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether the recorded `step` starts again in each epoch."""
    facts = [checkpoint.facts for checkpoint in checkpoints]
    if not all({"epoch", "step"} <= each.keys() for each in facts):
        return False
    pairs = sorted((each["epoch"], each["step"]) for each in facts)
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


def relative_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """The paths relative to the deepest folder that all have in common.

    URLs have a common folder of their own, apart from that of the paths on this machine.
    """
    names: dict[Path, str] = {}
    for remote in (False, True):
        group = {path: absolute(path) for path in paths if is_remote(path) is remote}
        parents = [path.parent for path in group.values()]
        folder = os.path.commonpath(parents) if parents else ""
        names |= {path: full.relative_to(folder).as_posix() for path, full in group.items()}
    return tuple(names[path] for path in paths)
