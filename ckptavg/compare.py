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

    from ckptavg.sources import Collection, Source
    from ckptavg.tensors import Tensor

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
        chosen = np.linspace(0, len(tensors) - 1, min(_SAMPLES, len(tensors)))
        self._chosen: list[int] = chosen.astype(int).tolist()
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
                for piece in self._pieces(source, index, whole=whole):
                    digest.update(piece)
            self._digests[key] = digest.digest()
        return self._digests[key]

    def _pieces(self, source: Source, index: int, *, whole: bool) -> Iterator[memoryview]:
        tensor = source.tensor(index, self._tensors[index])
        if tensor.strides is not None:
            part = source.checkpoint.parts[tensor.part]
            yield bytes_of(np.ascontiguousarray(read_view(part, tensor)))
            return
        end = tensor.nbytes if whole else min(_SAMPLE_BYTES, tensor.nbytes)
        for start in range(0, end, _PIECE):
            yield _read(source, index, start, min(_PIECE, end - start)).data


def fingerprint(collection: Collection, source: Source) -> str:
    """What tells a checkpoint's weights from others', from samples of some of its tensors.

    It does not depend on the container, or on the order of the tensors in it.
    """
    described = dict(zip(collection.names, enumerate(collection.described), strict=True))
    names = sorted(name for name, (_, tensor) in described.items() if tensor.count)
    digest = hashlib.sha256()
    for place in np.linspace(0, len(names) - 1, min(_FINGERS, len(names))).astype(int):
        index, like = described[names[place]]
        tensor = source.tensor(index, like)
        part = source.checkpoint.parts[tensor.part]
        digest.update(names[place].encode("utf-8", "surrogatepass"))
        if tensor.strides is None:
            out = np.empty(min(_SAMPLE_BYTES, tensor.nbytes), np.uint8)
            part.read_into(tensor.offset, bytes_of(out))
        else:
            out = np.ascontiguousarray(read_view(part, tensor)).reshape(-1).view(np.uint8)
        digest.update(out[:_SAMPLE_BYTES].tobytes())
    return digest.hexdigest()[:32]


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
