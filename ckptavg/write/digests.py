"""SHA-256 of inputs' files, and of outputs' tensors."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.formats.checkpoint import read_view
from ckptavg.formats.pauses import signals_waiting
from ckptavg.formats.remote import open_source
from ckptavg.formats.tensors import bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.parts import ByteSource, Readable
    from ckptavg.formats.tensors import DType, Tensor
    from ckptavg.merge.layout import Layout
    from ckptavg.select.sources import Source

_PIECE = 1 << 20


def of_files(
    checkpoints: Iterable[Checkpoint],
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Path, str]:
    """The digests of all files that checkpoints' tensors are in, as `sha256sum` has them.

    Args:
        checkpoints: the checkpoints.
        threads: how many work at once.
        progress: hears of the bytes read, and how many there are.
    """
    paths = sorted({path for checkpoint in checkpoints for path in files(checkpoint)}, key=str)
    sources = [open_source(path) for path in paths]
    total, stopping, turn = sum(source.size for source in sources), Event(), Lock()

    def digest(source: ByteSource) -> str:
        found = hashlib.sha256()
        for piece in read_pieces(source, 0, source.size):
            if stopping.is_set():
                break
            found.update(piece)
            if progress is not None:
                with turn:
                    progress(len(piece), total)
        return found.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        try:
            with signals_waiting():
                found = pool.map(digest, sources)
            return dict(zip(paths, found, strict=True))
        except BaseException:
            stopping.set()  # else the others would be waited for
            raise


def files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The files that a checkpoint's tensors are in."""
    return (part.path for part in checkpoint.parts if part.identity is not None)


def told(checkpoint: Checkpoint, digests: Mapping[Path, str]) -> str | dict[str, str]:
    """What a provenance says of a checkpoint's files: one digest, or those of each by its name."""
    own = {path: digests[path] for path in files(checkpoint)}
    if checkpoint.path in own:
        return own[checkpoint.path]
    return {path.relative_to(checkpoint.path).as_posix(): found for path, found in own.items()}


def of_tensors(tensors: Iterable[tuple[str, DType, tuple[int, ...], Iterable[memoryview]]]) -> str:
    """The digest of a model: of each tensor's name, dtype, shape and bytes, in the names' order.

    It does not depend on the container. `docs/reliability.md` has it in a few lines of Python.

    Args:
        tensors: name, dtype, shape, and its bytes in C order, in pieces.
    """
    digest = hashlib.sha256()
    for name, dtype, shape, pieces in tensors:
        digest.update(json.dumps([name, dtype.name, list(shape)]).encode())
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def of_checkpoint(checkpoint: Checkpoint) -> str:
    """The digest of a checkpoint's tensors."""
    return of_tensors(
        (name, tensor.dtype, tensor.shape, _pieces(checkpoint.parts[tensor.part], tensor))
        for name, tensor in sorted(checkpoint.tensors.items())
    )


def of_output(written: Readable, layout: Layout) -> str:
    """The digest of an output's tensors, which have been written."""
    places = {
        name: layout.place(position)
        for position, tensor in enumerate(layout.tensors)
        for name in tensor.names
    }
    return of_tensors(
        (name, place.dtype, place.shape, _pieces(written, place))
        for name, place in sorted(places.items())
    )


def _pieces(source: Readable, tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in C order. One that is strided comes whole."""
    if tensor.strides is not None:
        yield bytes_of(np.ascontiguousarray(read_view(source, tensor)))
        return
    yield from read_pieces(source, tensor.offset, tensor.nbytes)


def read_pieces(source: Readable, offset: int, size: int) -> Iterator[memoryview]:
    """Bytes in pieces that are good until the next one."""
    room = memoryview(bytearray(min(_PIECE, size)))
    for start in range(0, size, _PIECE):
        piece = room[: min(_PIECE, size - start)]
        source.read_into(offset + start, piece)
        yield piece


def unknown(sources: Iterable[Source]) -> str:
    """What stands in an output's metadata until its tensors are written.

    It depends on what describes the inputs, so that none of them can have it in a name.
    """
    digest = hashlib.sha256(b"unknown")
    for source in sources:
        digest.update(repr((source.checkpoint.digest, source.checkpoint.size)).encode())
    return digest.hexdigest()


def marks(layout: Layout) -> list[int]:
    """Where an output is waiting for the digest of its tensors."""
    found: list[int] = []
    if layout.unknown is None:
        return found
    for base, file in zip(layout.bases, layout.files.values(), strict=True):
        for offset, blob in file.blobs:
            at = -1
            while (at := blob.find(layout.unknown.encode(), at + 1)) >= 0:
                found.append(base + offset + at)
    return found
