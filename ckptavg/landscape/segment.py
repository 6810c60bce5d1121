"""A segment: loss and error along the line between two weights, and past both of them.

Izmailov et al. 2018, figure 5: from the last iterate of SGD to the average.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import SelectionError
from ckptavg.landscape import spaced
from ckptavg.landscape.explore import ExploreOptions, Explorer
from ckptavg.landscape.places import Place
from ckptavg.model.making import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.options import Progress

_FIRST, _LAST, _STEPS = -0.5, 1.5, 21


@dataclass(frozen=True)
class Segment:
    """What came out.

    Attributes:
        checkpoints: the names of the two weights.
        dimension: number of parameters.
        apart: the distance of their parameters.
        positions: along the line: 0 is the first, 1 the second.
        refreshed: whether the norm statistics were refreshed at each point.
        curves: metric to a value for each position.
    """

    checkpoints: tuple[str, ...]
    dimension: int
    apart: float
    positions: tuple[float, ...]
    refreshed: bool
    curves: dict[str, list[float]] = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point, for CSV."""
        return [
            {
                "position": position,
                "distance": position * self.apart,
                **{metric: values[place] for metric, values in self.curves.items()},
            }
            for place, position in enumerate(self.positions)
        ]


@random_state_kept()
def segment(
    paths: Sequence[Path],
    folder: Path,
    options: ExploreOptions,
    *,
    positions: Sequence[float] | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> Segment:
    """Evaluate along the line through two weights.

    Args:
        paths: two checkpoints of one model.
        folder: where points are kept, so that a run that was killed goes on.
        options: how points are evaluated.
        positions: 0 is the first of the weights, 1 the second; None for 21 from -0.5 to 1.5.
        ranks: the processes that share the points.
        progress: hears of each point.

    Raises:
        CkptAvgError: the checkpoints do not fit the model or each other, or evaluating failed.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    if len(paths) != 2:  # noqa: PLR2004
        raise SelectionError(f"a segment is between 2 checkpoints, not {len(paths)}")
    along = tuple(dict.fromkeys(positions or spaced(_FIRST, _LAST, _STEPS)))
    with ranks.together():
        explorer = Explorer(paths, folder, options, ranks)
        space = explorer.space
        places = [Place((1 - position, position)) for position in along]
        found = explorer.run("segment", places, progress)
        apart = space.distance()
    return Segment(
        explorer.names, space.dimension, apart, along, options.evaluation.refresh is not None,
        {metric: [values[place] for place in places] for metric, values in found.items()},
    )  # fmt: skip
