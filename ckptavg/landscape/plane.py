"""A plane: loss and error on a grid in the plane through three weights.

Izmailov et al. 2018, section 3.1 and figures 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import SelectionError
from ckptavg.landscape import places as places_of
from ckptavg.landscape import spaced
from ckptavg.landscape.explore import ExploreOptions, Explorer, Progress
from ckptavg.landscape.places import Place
from ckptavg.model.making import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SIZE = 21
_MARGIN = 0.2  # of the grid beyond the three weights, relative to their extent


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
        space = explorer.space()
        found_plane = places_of.Plane(space.gram())
        if found_plane.is_flat:
            raise SelectionError("the three checkpoints are on one line, and make no plane")
        corners = found_plane.corners
        xs = _axis([x for x, _ in corners], size)
        ys = _axis([y for _, y in corners], size)
        places = {
            f"w{number}": Place(tuple(float(number == other) for other in range(3)))
            for number in range(3)
        }
        places |= {f"{x!r} {y!r}": Place(found_plane.coefficients(x, y)) for y in ys for x in xs}
        found = explorer.run({"kind": "plane"}, space, places, progress)
    metrics = next(iter(found.values()))
    return PlaneResult(
        tuple(
            Mark(name, *corner, dict(found[f"w{number}"]))
            for number, (name, corner) in enumerate(zip(explorer.names, corners, strict=True))
        ),
        space.dimension, xs, ys, options.evaluation.refresh is not None,
        {
            metric: [[found[f"{x!r} {y!r}"][metric] for x in xs] for y in ys]
            for metric in metrics
        },
    )  # fmt: skip


def _axis(values: Sequence[float], size: int) -> tuple[float, ...]:
    margin = _MARGIN * (max(values) - min(values))
    return spaced(min(values) - margin, max(values) + margin, size)
