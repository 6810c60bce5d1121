"""Whether bytes are equal: of whole checkpoints (copies), and of integers (never averaged)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.checkpoint import read_view
from ckptavg.runs import Integers, runs
from ckptavg.tensors import bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptavg.collect import Source
    from ckptavg.tensors import Tensor

_PIECE = 1 << 20
_SAMPLES = 16
_SAMPLE_BYTES = 4096


class Contents:
    """Compares whole checkpoints; samples of each are read once.

    Checkpoints that differ do so nearly everywhere, so that samples tell most of them apart.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._samples: dict[int, bytes] = {}

    def same(self, one: Source, other: Source) -> bool:
        """Whether two checkpoints have the same bytes in every tensor."""
        if self._sample(one) != self._sample(other):
            return False
        everything = range(len(self._tensors))
        return next(differing(self._tensors, everything, one, other), None) is None

    def _sample(self, source: Source) -> bytes:
        """A digest of the first bytes of some tensors."""
        if id(source) not in self._samples:
            chosen = np.linspace(0, len(self._tensors) - 1, min(_SAMPLES, len(self._tensors)))
            digest = hashlib.sha256()
            for index in chosen.astype(int).tolist():
                if index not in source.strides:
                    size = min(_SAMPLE_BYTES, self._tensors[index].nbytes)
                    digest.update(_read(source, index, 0, size).data)
            self._samples[id(source)] = digest.digest()
        return self._samples[id(source)]


def differing(
    tensors: Sequence[Tensor], indices: Sequence[int], one: Source, other: Source
) -> Iterator[int]:
    """Indices of the tensors whose bytes differ between two checkpoints, among `indices`."""
    unlike = one.strides.keys() | other.strides.keys()
    for index in indices:
        if index in unlike and not _same_strided(tensors[index], index, one, other):
            yield index
    flat = np.array([index for index in indices if index not in unlike], int)
    nbytes = np.array([tensors[index].nbytes for index in flat], np.int64)
    places = [(source.parts[flat], source.offsets[flat]) for source in (one, other)]
    for first, last in runs(nbytes, places):
        yield from _differing_in_run(flat[first:last], nbytes[first:last], one, other)


def _differing_in_run(
    indices: Integers, nbytes: Integers, one: Source, other: Source
) -> Iterator[int]:
    ends = np.cumsum(nbytes)
    found = -1
    for start in range(0, int(ends[-1]), _PIECE):
        size = min(_PIECE, int(ends[-1]) - start)
        unequal = _read(one, indices[0], start, size) != _read(other, indices[0], start, size)
        where = np.flatnonzero(unequal) + start
        for position in np.unique(np.searchsorted(ends, where, side="right")):
            if position > found:
                found = int(position)
                yield int(indices[position])


def _read(source: Source, index: int, start: int, size: int) -> Integers:
    """Bytes of a run that begins at a tensor."""
    out = np.empty(size, np.uint8)
    part = source.checkpoint.parts[source.parts[index]]
    part.read_into(int(source.offsets[index]) + start, bytes_of(out))
    return out


def _same_strided(like: Tensor, index: int, one: Source, other: Source) -> bool:
    mine, theirs = (
        np.ascontiguousarray(
            read_view(source.checkpoint.parts[source.parts[index]], source.tensor(index, like))
        ).view(np.uint8)
        for source in (one, other)
    )
    return bool(np.array_equal(mine, theirs))
