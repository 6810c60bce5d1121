"""A segment: loss and error along the line between two weights, and past both of them.

Izmailov et al. 2018, figure 5: from the last iterate of SGD to the average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import SelectionError
from ckptavg.landscape.explore import ExploreOptions, Explorer
from ckptavg.landscape.places import Place
from ckptavg.model.making import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.landscape.result import Landscape

_POSITIONS = tuple(map(float, np.linspace(-0.5, 1.5, 21)))


@random_state_kept()
def segment(
    paths: Sequence[Path],
    folder: Path,
    options: ExploreOptions,
    *,
    positions: Sequence[float] = _POSITIONS,
) -> Landscape:
    """Evaluate along the line through two weights.

    Args:
        paths: two checkpoints of one model.
        folder: where points are kept, so that a run that was killed goes on.
        options: how points are evaluated.
        positions: 0 is the first of the weights, 1 the second.

    Raises:
        CkptAvgError: the checkpoints do not fit the model or each other, or evaluating failed.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    if len(paths) != 2:  # noqa: PLR2004
        raise SelectionError(f"a segment needs 2 checkpoints, not {len(paths)}")
    along = tuple(dict.fromkeys(positions))
    with options.ranks.together():
        explorer = Explorer(paths, folder, options)
        places = [Place((1 - position, position)) for position in along]
        values = explorer.evaluate("segment", places)
        return explorer.landscape("segment", {"position": along}, values)
