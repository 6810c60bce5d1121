"""The order of checkpoints: by training step as recorded, else by the numbers in their names."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ckptavg.checkpoint import STEP_FACTS
from ckptavg.formats import SUFFIXES
from ckptavg.paths import absolute, is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptavg.sources import Source

DIGITS = re.compile(r"(\d+)")


def in_order(sources: Sequence[Source]) -> tuple[list[Source], bool]:
    """Sort by training step: as recorded, else by the numbers in the names.

    Returns:
        The sources, and whether that order is sure: not where only some of them have a step.
    """
    own = dict(zip(sources, labels([source.path for source in sources]), strict=True))
    by_name = sorted(sources, key=lambda source: natural(own[source]))
    names_tell = _numbers_tell(list(own.values()))
    for fact in STEP_FACTS:
        if all(fact in source.checkpoint.facts for source in sources):
            steps = [source.checkpoint.facts[fact] for source in sources]
            by_step = sorted(by_name, key=lambda source: source.checkpoint.facts[fact])
            return by_step, names_tell or len(set(steps)) == len(steps)
    recorded = any(source.checkpoint.step is not None for source in sources)
    stepless = not recorded and not any(map(DIGITS.search, _without_common_numbers(own.values())))
    return by_name, names_tell or stepless


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
