"""A plane: loss and error on a grid in the plane through three weights.

Izmailov et al. 2018, section 3.1 and figures 2 and 3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import SelectionError
from ckptavg.landscape import spaced
from ckptavg.landscape.explore import ExploreOptions, Explorer
from ckptavg.landscape.places import Place
from ckptavg.model.making import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.landscape.places import Floats
    from ckptavg.options import Progress

_FLAT = 1e-12  # of a square, relative to the largest: what is rounding
_SIZE = 21
_MARGIN = 0.2  # of the grid beyond the three weights, relative to their extent


@dataclass(frozen=True)
class Plane:
    """The plane through three weights, with an orthonormal basis.

    Izmailov et al. 2018, section 3.1: `u = (w_1 - w_0) / |w_1 - w_0|`; `v` is
    `w_2 - w_0` without its part along `u`, of unit length.

    Args:
        gram: products of `w_1 - w_0` and `w_2 - w_0`, `[2, 2]`.
    """

    gram: Floats

    @cached_property
    def corners(self) -> tuple[tuple[float, float], ...]:
        """Coordinates of the three weights."""
        length = float(np.sqrt(self.gram[0, 0]))
        along = float(self.gram[0, 1]) / length
        return (0.0, 0.0), (length, 0.0), (along, self._height)

    @property
    def _height(self) -> float:
        square = self.gram[1, 1] - self.gram[0, 1] ** 2 / self.gram[0, 0]
        return float(np.sqrt(max(square, 0.0)))

    @property
    def is_flat(self) -> bool:
        """Whether the three are on a line, or two of them the same."""
        scale = float(max(self.gram[0, 0], self.gram[1, 1]))
        least = min(float(self.gram[0, 0]), float(self.gram[1, 1]), self._height**2)
        return least <= _FLAT * scale

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        """The combination of the three weights that is at a point of the plane."""
        _, (length, _), (along, height) = self.corners
        third = y / height
        second = (x - third * along) / length
        return 1 - second - third, second, third


@dataclass(frozen=True)
class Mark:
    """A weight's place on the plane.

    Attributes:
        checkpoint: its name.
        x: its first coordinate, in the units of the parameters.
        y: its second.
        values: its metrics.
    """

    checkpoint: str
    x: float
    y: float
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlaneResult:
    """What came out.

    Attributes:
        checkpoints: the three weights: w0 at the origin, w1 on the first axis.
        dimension: number of parameters.
        xs: first coordinates of the grid.
        ys: second coordinates.
        refreshed: whether the norm statistics were refreshed at each point.
        grids: metric to `[ys][xs]`.
    """

    checkpoints: tuple[Mark, ...]
    dimension: int
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    refreshed: bool
    grids: dict[str, list[list[float]]] = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point of the grid, for CSV."""
        return [
            {"x": x, "y": y, **{metric: grid[row][column] for metric, grid in self.grids.items()}}
            for row, y in enumerate(self.ys)
            for column, x in enumerate(self.xs)
        ]


@random_state_kept()
def plane(
    paths: Sequence[Path],
    folder: Path,
    options: ExploreOptions,
    *,
    size: int = _SIZE,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> PlaneResult:
    """Evaluate on a grid in the plane through three weights.

    Args:
        paths: three checkpoints of one model.
        folder: where points are kept, so that a run that was killed goes on.
        options: how points are evaluated.
        size: points of the grid along each axis.
        ranks: the processes that share the points.
        progress: hears of each point.

    Raises:
        CkptAvgError: the checkpoints do not fit the model or each other, or evaluating failed.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    if len(paths) != 3:  # noqa: PLR2004
        raise SelectionError(f"a plane is through 3 checkpoints, not {len(paths)}")
    if size < 2:  # noqa: PLR2004
        raise SelectionError(f"a grid has at least 2 points along each axis, not {size}")
    with ranks.together():
        explorer = Explorer(paths, folder, options, ranks)
        space = explorer.space
        basis = Plane(space.gram())
        if basis.is_flat:
            raise SelectionError("the three checkpoints are on one line, and make no plane")
        xs = _axis([x for x, _ in basis.corners], size)
        ys = _axis([y for _, y in basis.corners], size)
        corners = [space.place(number) for number in range(3)]
        grid = [[Place(basis.coefficients(x, y)) for x in xs] for y in ys]
        found = explorer.run("plane", [*corners, *itertools.chain(*grid)], progress)
    return PlaneResult(
        tuple(
            Mark(name, *point, {metric: values[corner] for metric, values in found.items()})
            for name, point, corner in zip(explorer.names, basis.corners, corners, strict=True)
        ),
        space.dimension, xs, ys, options.evaluation.refresh is not None,
        {
            metric: [[values[place] for place in row] for row in grid]
            for metric, values in found.items()
        },
    )  # fmt: skip


def _axis(values: Sequence[float], size: int) -> tuple[float, ...]:
    margin = _MARGIN * (max(values) - min(values))
    return spaced(min(values) - margin, max(values) + margin, size)
