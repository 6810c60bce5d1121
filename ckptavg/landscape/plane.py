"""A plane: loss and error on a grid in the plane through three weights.

Izmailov et al. 2018, section 3.1 and figures 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import SelectionError
from ckptavg.landscape.explore import ExploreOptions, Explorer
from ckptavg.landscape.places import Place
from ckptavg.model.making import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.landscape.places import Floats
    from ckptavg.landscape.result import Landscape

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
        """Whether the three are on a line, two of them the same, or one of them not finite."""
        first, second = float(self.gram[0, 0]), float(self.gram[1, 1])
        if not first or not np.isfinite(self.gram).all():
            return True
        return min(first, second, self._height**2) <= _FLAT * max(first, second)

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        """The combination of the three weights that is at a point of the plane."""
        _, (length, _), (along, height) = self.corners
        third = y / height
        second = (x - third * along) / length
        return 1 - second - third, second, third


@random_state_kept()
def plane(
    paths: Sequence[Path],
    folder: Path,
    options: ExploreOptions,
    *,
    size: int = _SIZE,
) -> Landscape:
    """Evaluate on a grid in the plane through three weights.

    Args:
        paths: three checkpoints of one model.
        folder: where points are kept, so that a run that was killed goes on.
        options: how points are evaluated.
        size: points of the grid along each axis.

    Raises:
        CkptAvgError: the checkpoints do not fit the model or each other, or evaluating failed.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    if len(paths) != 3:  # noqa: PLR2004
        raise SelectionError(f"a plane needs 3 checkpoints, not {len(paths)}")
    if size < 2:  # noqa: PLR2004
        raise SelectionError(f"a grid needs at least 2 points along each axis, not {size}")
    with options.ranks.together():
        explorer = Explorer(paths, folder, options)
        space = explorer.space
        basis = Plane(space.gram())
        if basis.is_flat:
            problem = (
                "the three checkpoints make no plane: they are on one line, or have NaN or Inf"
            )
            raise SelectionError(problem)
        xs = _axis([x for x, _ in basis.corners], size)
        ys = _axis([y for _, y in basis.corners], size)
        places = [space.place(number) for number in range(3)]
        places += [Place(basis.coefficients(x, y)) for y in ys for x in xs]
        values = explorer.evaluate("plane", places)
        corners = [
            {"checkpoint": name, "x": x, "y": y}
            | {metric: numbers[place] for metric, numbers in values.items()}
            for place, (name, (x, y)) in enumerate(zip(explorer.names, basis.corners, strict=True))
        ]
        grid = {metric: numbers[3:] for metric, numbers in values.items()}
        return explorer.landscape("plane", {"y": ys, "x": xs}, grid, corners)


def _axis(values: Sequence[float], size: int) -> list[float]:
    margin = _MARGIN * (max(values) - min(values))
    return [*map(float, np.linspace(min(values) - margin, max(values) + margin, size))]
