"""Many small pieces of files as one: where tensors stand in another order than in the output."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ckptavg.formats.parts import Part
    from ckptavg.formats.runs import Integers

SMALL = 64 << 10
"""Bytes of a piece below which it is not worth a read of its own, let alone a job."""

_GAP = 16 << 10
"""Bytes that are read in vain sooner than that another read is begun."""
_BLOCK = 1 << 20
"""Bytes in which neighbouring pieces are read together."""

_own = threading.local()


class Gathered:
    """Pieces of a checkpoint's files, read as if they stood one after the other.

    Args:
        parts: the checkpoint's.
        numbers: which of them each piece is in, `[num_pieces]`.
        offsets: where it begins there, in bytes, `[num_pieces]`.
        extents: where it begins and where it ends among the pieces, `[num_pieces]` both.
        path: of the checkpoint.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        numbers: Integers,
        offsets: Integers,
        extents: tuple[Integers, Integers],
        path: Path,
    ) -> None:
        self._parts, self._numbers, self._offsets = parts, numbers, offsets
        self._begins, self._ends = extents
        self.size, self.identity = int(self._ends[-1]), None
        self.path = parts[int(numbers[0])].path if (numbers == numbers[0]).all() else path

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`: the pieces in the order of the files, neighbours at once."""
        end = offset + len(out)
        first = int(np.searchsorted(self._ends, offset, "right"))
        last = int(np.searchsorted(self._begins, end, "left"))
        begins = np.maximum(self._begins[first:last], offset)
        sizes = np.minimum(self._ends[first:last], end) - begins
        numbers = self._numbers[first:last]
        starts = self._offsets[first:last] + begins - self._begins[first:last]
        order = np.lexsort((starts, numbers))
        numbers, starts, sizes = numbers[order], starts[order], sizes[order]
        targets = (begins - offset)[order]
        for one, other in _neighbours(numbers, starts, sizes):
            self._read(
                int(numbers[one]), starts[one:other], sizes[one:other], targets[one:other], out
            )

    def _read(
        self, number: int, starts: Integers, sizes: Integers, targets: Integers, out: memoryview
    ) -> None:
        part, begin = self._parts[number], int(starts[0])
        if len(starts) == 1:
            target = int(targets[0])
            part.read_into(begin, out[target : target + int(sizes[0])])
            return
        span = int((starts + sizes).max()) - begin
        block = _block(span)
        part.read_into(begin, block)
        places = (starts - begin).tolist(), targets.tolist(), sizes.tolist()
        for start, target, size in zip(*places, strict=True):
            out[target : target + size] = block[start : start + size]

    def check_unchanged(self) -> None:
        """The files themselves are asked."""


def _neighbours(numbers: Integers, starts: Integers, sizes: Integers) -> Iterator[tuple[int, int]]:
    """Half-open ranges of pieces, in the order of the files, that are read together."""
    apart = (
        (numbers[1:] != numbers[:-1])
        | (starts[1:] - (starts[:-1] + sizes[:-1]) > _GAP)
        | (starts[1:] // _BLOCK != starts[:-1] // _BLOCK)
    )
    edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(numbers)]
    yield from itertools.pairwise(edges)


def _block(size: int) -> memoryview:
    """Memory of this thread's, the same every time."""
    held: memoryview | None = getattr(_own, "block", None)
    if held is None or len(held) < size:
        held = _own.block = memoryview(bytearray(max(size, _BLOCK)))
    return held[:size]
