"""Rays: loss and error at distances along random directions, from each of some weights.

Izmailov et al. 2018, section 3.2 and figure 4: ten directions drawn uniformly from the unit sphere,
the same ones from each of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import SelectionError
from ckptavg.landscape import spaced
from ckptavg.landscape.explore import ExploreOptions, Explorer
from ckptavg.model.making import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.options import Progress

_STEPS = 11
_BY_ITSELF = 0.5
"""Of one checkpoint alone, how far rays go, relative to the norm of its parameters."""


@dataclass(frozen=True)
class Rise:
    """How one of the weights' metric rises along the rays, and how another's.

    Attributes:
        metric: its name.
        distance: the largest.
        rises: for each of the weights the mean over the directions of how much it is above its
            value at the centre.
        lower: in how many of the directions the last of the weights has risen less than the first.
        directions: how many there are.
    """

    metric: str
    distance: float
    rises: tuple[float, ...]
    lower: int
    directions: int


@dataclass(frozen=True)
class Rays:
    """What came out.

    Attributes:
        checkpoints: the weights' names.
        dimension: number of parameters.
        distances: along the rays.
        directions: how many.
        apart: the distance of the first two weights' parameters; None where there is one.
        refreshed: whether the norm statistics were refreshed at each point.
        curves: metric to `[checkpoints][directions][distances]`.
    """

    checkpoints: tuple[str, ...]
    dimension: int
    distances: tuple[float, ...]
    directions: int
    apart: float | None
    refreshed: bool
    curves: dict[str, list[list[list[float]]]] = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point, for CSV."""
        return [
            {
                "checkpoint": name,
                "direction": direction,
                "distance": distance,
                **{metric: one[place][direction][step] for metric, one in self.curves.items()},
            }
            for place, name in enumerate(self.checkpoints)
            for direction in range(self.directions)
            for step, distance in enumerate(self.distances)
        ]

    def rises(self) -> list[Rise]:
        """How each metric has risen at the largest distance."""
        found = []
        for metric, curves in self.curves.items():
            risen = [[ray[-1] - ray[0] for ray in rays] for rays in curves]
            pairs = zip(risen[0], risen[-1], strict=True)
            found.append(
                Rise(
                    metric, self.distances[-1], tuple(fmean(rises) for rises in risen),
                    sum(last < first for first, last in pairs), self.directions,
                )
            )  # fmt: skip
        return found


@random_state_kept()
def rays(
    paths: Sequence[Path],
    folder: Path,
    options: ExploreOptions,
    *,
    directions: int = 10,
    distances: Sequence[float] | None = None,
    steps: int = _STEPS,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> Rays:
    """Evaluate along random directions from each of some weights.

    Args:
        paths: checkpoints of one model.
        folder: where points are kept, so that a run that was killed goes on.
        options: how points are evaluated. Its seed is that of the directions as well.
        directions: how many.
        distances: along them, 0 first; None for `steps`, up to twice the distance of the first two
            weights, or half of the norm of the parameters of one.
        steps: how many distances there are then.
        ranks: the processes that share the points.
        progress: hears of each point.

    Raises:
        CkptAvgError: the checkpoints do not fit the model or each other, or evaluating failed.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    if directions < 1:
        raise SelectionError(f"at least 1 direction is needed, not {directions}")
    with ranks.together():
        explorer = Explorer(paths, folder, options, ranks)
        space = explorer.space
        apart = space.distance() if len(paths) > 1 else None
        farthest = 2 * apart if apart else _BY_ITSELF * space.norm()
        if not 0 < farthest < math.inf and not distances:
            raise SelectionError(
                f"how far to go is not known: the parameters are {farthest:g} apart, or long",
                remedy="say it with --distances",
            )
        along = tuple(distances or spaced(0.0, farthest, steps))
        _check(along)
        numbers = range(len(paths))
        places = [
            space.place(number, direction, distance)
            for distance in along
            for direction in range(directions)
            for number in numbers
        ]
        found = explorer.run("rays", places, progress)
    return Rays(
        explorer.names, space.dimension, along, directions, apart,
        options.evaluation.refresh is not None,
        {
            metric: [
                [
                    [values[space.place(number, direction, distance)] for distance in along]
                    for direction in range(directions)
                ]
                for number in numbers
            ]
            for metric, values in found.items()
        },
    )  # fmt: skip


def _check(distances: Sequence[float]) -> None:
    if distances[0] != 0 or not all(0 <= one < math.inf for one in distances):
        raise SelectionError("distances begin with 0, the weights themselves, and are positive")
    if len(set(distances)) < len(distances) or list(distances) != sorted(distances):
        raise SelectionError("distances increase")
