"""The order of checkpoints: by training step as recorded, else by the numbers in their names."""

from __future__ import annotations

import itertools
import os
import re
from typing import TYPE_CHECKING

from ckptavg.formats import SUFFIXES
from ckptavg.formats.checkpoint import STEP_FACTS
from ckptavg.formats.paths import absolute, is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

DIGITS = re.compile(r"(\d+)")
# What numbers in names are called: `epoch=3-step=400`, `checkpoint-500`, `iter_0001000`.
_LABELS = {
    "step": r"(?:global_?step|steps?|iter(?:ation)?s?|it|updates?)",
    "checkpoint": r"(?:checkpoint|ckpt)",
    "epoch": r"(?:epochs?|ep)",
}


def in_order(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], bool]:
    """Sort by training step: as recorded, else by the numbers in the names.

    Returns:
        The checkpoints, and whether that order is sure: not where only some of them have a step.
    """
    own = dict(
        zip(checkpoints, labels([checkpoint.path for checkpoint in checkpoints]), strict=True)
    )
    by_name = sorted(checkpoints, key=lambda checkpoint: natural(own[checkpoint]))
    names = [own[checkpoint] for checkpoint in by_name]
    for facts in _orders(checkpoints):
        if all(facts <= checkpoint.facts.keys() for checkpoint in checkpoints):
            steps = [
                tuple(checkpoint.facts[fact] for fact in sorted(facts)) for checkpoint in by_name
            ]
            break
    else:
        steps = [(number,) for number in numbers_in(names) or ()]
    tell = _numbers_tell(names)
    if steps:
        ordered = sorted(zip(steps, range(len(by_name)), by_name, strict=True))
        return [checkpoint for *_, checkpoint in ordered], tell or len(set(steps)) == len(steps)
    recorded = any(checkpoint.step is not None for checkpoint in checkpoints)
    stepless = not recorded and not any(map(DIGITS.search, _without_common_numbers(names)))
    return by_name, tell or stepless


def _orders(checkpoints: Sequence[Checkpoint]) -> list[set[str]]:
    """What may tell the order: one fact, or where steps begin anew in each epoch, both."""
    if restarts(checkpoints):
        return [{"global_step"}, {"epoch", "step"}]
    return [{fact} for fact in STEP_FACTS]


def restarts(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether what is recorded as `step` is counted anew in each epoch."""
    facts = [checkpoint.facts for checkpoint in checkpoints]
    if not all({"epoch", "step"} <= recorded.keys() for recorded in facts):
        return False
    rows = sorted((recorded["epoch"], recorded["step"]) for recorded in facts)
    return any(one[0] < other[0] and one[1] >= other[1] for one, other in itertools.pairwise(rows))


def numbers_in(names: Sequence[str], label: str | None = None) -> tuple[int, ...] | None:
    """The step that each name tells; None where not all of them do.

    It is a number that all of them call a step (else a checkpoint, else an epoch), or, where the
    names are alike but for numbers, the first that differs.

    Args:
        names: of the checkpoints.
        label: `step` or `epoch`, to look for that alone.
    """
    for pattern in _LABELS.values() if label is None else (_LABELS[label],):
        found = [
            re.findall(rf"(?<![a-z]){pattern}[=_-]?(\d+)", name, re.IGNORECASE) for name in names
        ]
        if all(found):
            numbers = tuple(int(several[-1]) for several in found)
            if len(set(numbers)) > 1 or len(names) == 1 or label is not None:
                return numbers
    if label is not None or not _numbers_tell(names):
        return None
    columns = zip(*(map(int, DIGITS.findall(_stem(name))) for name in names), strict=True)
    return next((column for column in columns if len(set(column)) > 1 or len(names) == 1), None)


def _numbers_tell(names: Sequence[str]) -> bool:
    """Whether names differ in their numbers and in nothing else, but for the ending."""
    return len({DIGITS.sub("#", _stem(name)) for name in names}) <= 1


def _without_common_numbers(names: Iterable[str]) -> list[str]:
    """Names without the numbers that all of them have: `resnet50_best` has no step."""
    found = [_stem(name) for name in names]
    common = set.intersection(*(set(DIGITS.findall(name)) for name in found))
    return [
        DIGITS.sub(lambda number: "" if number[0] in common else number[0], name) for name in found
    ]


def _stem(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def natural(text: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key with `step_100` before `step_1000` and after `step_20`."""
    return tuple(
        (0, int(piece)) if piece.isdecimal() else (1, piece)
        for piece in DIGITS.split(text)
        if piece
    )


def labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """What tells the paths apart: each below the folder that its kind have in common.

    Those on this machine and those behind URLs have none in common.
    """
    common: dict[bool, str] = {}
    whole = [absolute(path) for path in paths]
    for remote in (False, True):
        parents = [
            one.parent for one, p in zip(whole, paths, strict=True) if is_remote(p) is remote
        ]
        common[remote] = os.path.commonpath(parents) if parents else ""
    return tuple(
        one.relative_to(common[is_remote(path)]).as_posix()
        for one, path in zip(whole, paths, strict=True)
    )
