"""Rays: loss and error at distances along random directions, from each of some weights.

Izmailov et al. 2018, section 3.2 and figure 4: ten directions drawn uniformly from the unit sphere,
the same ones from each of the weights.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import SelectionError
from ckptavg.landscape.explore import ExploreOptions, Explorer
from ckptavg.model.making import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.landscape.places import Space
    from ckptavg.landscape.result import Landscape

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


def rises(landscape: Landscape) -> list[Rise]:
    """How each metric has risen at the largest distance of some rays."""
    distance, directions = landscape.axes["distance"][-1], len(landscape.axes["direction"])
    found = []
    for metric, values in landscape.values.items():
        risen = values[:, :, -1] - values[:, :, 0]  # [checkpoints, directions]
        lower = int((risen[-1] < risen[0]).sum())
        means = tuple(risen.mean(axis=1).tolist())
        found.append(Rise(metric, distance, means, lower, directions))
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
) -> Landscape:
    """Evaluate along random directions from each of some weights.

    Args:
        paths: checkpoints of one model.
        folder: where points are kept, so that a run that was killed goes on.
        options: how points are evaluated. Its seed is that of the directions as well.
        directions: how many.
        distances: along them, 0 first; None for `steps`, up to twice the distance of the first two
            weights, or half of the norm of the parameters of one.
        steps: how many distances there are then.

    Raises:
        CkptAvgError: the checkpoints do not fit the model or each other, or evaluating failed.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    if directions < 1:
        raise SelectionError(f"at least 1 direction is needed, not {directions}")
    with options.ranks.together():
        explorer = Explorer(paths, folder, options)
        space = explorer.space
        along = tuple(distances or _distances(space, steps))
        _check(along)
        numbers = range(len(paths)), range(directions)
        places = [space.place(*each) for each in itertools.product(*numbers, along)]
        values = explorer.evaluate("rays", places)
        axes = {"checkpoint": explorer.names, "direction": range(directions), "distance": along}
        return explorer.landscape("rays", axes, values)


def _distances(space: Space, count: int) -> list[float]:
    """Distances up to twice that of the first two checkpoints.

    Raises:
        SelectionError: that is 0, or not finite.
    """
    farthest = 2 * space.apart if space.apart else _BY_ITSELF * space.norm()
    if not 0 < farthest < math.inf:
        raise SelectionError(
            f"there are no default distances: twice that of the parameters is {farthest:g}",
            remedy="set them with `distances`",
        )
    return [*map(float, np.linspace(0.0, farthest, count))]


def _check(distances: Sequence[float]) -> None:
    if distances[0] != 0 or not all(0 <= each < math.inf for each in distances):
        raise SelectionError(
            "`distances` must begin with 0, the weights themselves, and be positive"
        )
    if len(set(distances)) < len(distances) or list(distances) != sorted(distances):
        raise SelectionError("`distances` must increase")
