"""Whether bytes are equal: of whole checkpoints (copies), and of integers (never averaged)."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.formats.checkpoint import read_view
from ckptavg.formats.runs import Integers, run_edges
from ckptavg.formats.tensors import bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptavg.formats.tensors import AnyArray, Tensor
    from ckptavg.select.sources import Collection, Source

_PIECE = 1 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 512
_FINGERS = 32


class Contents:
    """Compares whole checkpoints by digests of their tensors.

    Samples are compared first: checkpoints that differ do so nearly everywhere. Only those whose
    samples agree are read whole, each once.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._chosen = _spread(len(tensors), _SAMPLES)
        self._digests: dict[tuple[int, bool], bytes] = {}

    def same(self, one: Source, other: Source) -> bool:
        """Whether two checkpoints have the same bytes in every tensor."""
        return all(
            self._digest(one, whole=whole) == self._digest(other, whole=whole)
            for whole in (False, True)
        )

    def _digest(self, source: Source, *, whole: bool) -> bytes:
        key = (id(source), whole)
        if key not in self._digests:
            digest = hashlib.sha256()
            for index in range(len(self._tensors)) if whole else self._chosen:
                for piece in _pieces(source, index, self._tensors[index], whole=whole):
                    digest.update(piece)
            self._digests[key] = digest.digest()
        return self._digests[key]


def fingerprints(collection: Collection) -> dict[Source, str]:
    """What tells each checkpoint's weights from others', from samples of some of its tensors.

    It does not depend on the container, or on the order of the tensors in it.
    """
    places = {name: index for index, name in enumerate(collection.names)}
    names = sorted(name for name, tensor in collection.tensors.items() if tensor.count)
    chosen = [names[place] for place in _spread(len(names), _FINGERS)]
    found = {}
    for source in collection.sources:
        digest = hashlib.sha256()
        for name in chosen:
            digest.update(name.encode("utf-8", "surrogatepass"))
            [sample] = _pieces(source, places[name], collection.tensors[name], whole=False)
            digest.update(sample[:_SAMPLE_BYTES])
        found[source] = digest.hexdigest()[:32]
    return found


def _spread(count: int, most: int) -> list[int]:
    """So many positions at most, spread over all of them."""
    positions: list[int] = np.linspace(0, count - 1, min(most, count)).astype(int).tolist()
    return positions


def _pieces(source: Source, index: int, like: Tensor, *, whole: bool) -> Iterator[memoryview]:
    """A tensor's bytes in C order: all of them, or the first. One that is strided comes whole."""
    if index in source.strides:
        yield bytes_of(_strided(source, index, like))
        return
    nbytes = source.tensor(index, like).nbytes
    end = nbytes if whole else min(_SAMPLE_BYTES, nbytes)
    for start in range(0, end, _PIECE):
        yield _read(source, index, start, min(_PIECE, end - start)).data


def _strided(source: Source, index: int, like: Tensor) -> AnyArray:
    tensor = source.tensor(index, like)
    return np.ascontiguousarray(read_view(source.checkpoint.parts[tensor.part], tensor))


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
    for first, last in itertools.pairwise(run_edges(nbytes, places).tolist()):
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
    mine, theirs = (_strided(source, index, like).view(np.uint8) for source in (one, other))
    return bool(np.array_equal(mine, theirs))
