"""Neighbours in every file become one long run, so that loops over bytes stay few."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterable

Integers = npt.NDArray[np.integer]


def run_edges(
    nbytes: Integers,
    places: Iterable[tuple[Integers, Integers]],
    keys: Iterable[Integers] = (),
) -> Integers:
    """Split a sequence of tensors where they stop being neighbours.

    Args:
        nbytes: bytes of each tensor, `[num_tensors]`.
        places: for each file set, the part and the byte offset of each tensor, `[num_tensors]`
            both. A run goes on where each tensor begins at the last one's end in all of them.
        keys: further arrays, `[num_tensors]`; a run goes on where they do not change.

    Returns:
        Where each of the runs begins, and where the last one ends; one number if there is none.
    """
    if not len(nbytes):
        return np.zeros(1, np.int64)
    starts = np.zeros(len(nbytes), bool)
    starts[0] = True
    for parts, offsets in places:
        starts[1:] |= (parts[1:] != parts[:-1]) | (offsets[1:] != offsets[:-1] + nbytes[:-1])
    for key in keys:
        starts[1:] |= key[1:] != key[:-1]
    return np.append(np.flatnonzero(starts), len(nbytes))
