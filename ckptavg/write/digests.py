"""SHA-256 of the files that checkpoints are read from."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import TYPE_CHECKING

from ckptavg.distributed import ALONE, Ranks
from ckptavg.formats.parts import open_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.parts import Part
    from ckptavg.options import Progress
    from ckptavg.write.provenance import Digests

_PIECE = 1 << 20


def hash_checkpoints(
    checkpoints: Sequence[Checkpoint],
    threads: int,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[Checkpoint, Digests]:
    """SHA-256 of each checkpoint's file with tensors, or of each of its files by name.

    Args:
        checkpoints: the checkpoints.
        threads: how many threads share the work.
        progress: called with the bytes read since the last call, and with those of all files.
        ranks: the processes that share the work; each returns the digests of all files.
    """
    share = [path for each in checkpoints[ranks.rank :: ranks.size] for path in _files(each)]
    hashes: dict[Path, str] = {}
    for part in ranks.gather(_hash_files(sorted(set(share), key=str), threads, progress)):
        hashes |= part
    digests: dict[Checkpoint, Digests] = {}
    for checkpoint in checkpoints:
        path = checkpoint.path
        names = {file.relative_to(path).as_posix(): file for file in _files(checkpoint)}
        by_name = {name: hashes[file] for name, file in names.items()}
        digests[checkpoint] = hashes.get(path, by_name)
    return digests


def _hash_files(paths: Sequence[Path], threads: int, progress: Progress | None) -> dict[Path, str]:
    """SHA-256 of files in hex, as `sha256sum` prints it."""
    files = [open_source(path) for path in paths]
    total, stopping, turn = sum(file.size for file in files), Event(), Lock()

    def digest(file: Part) -> str:
        sha256, room = hashlib.sha256(), memoryview(bytearray(min(_PIECE, file.size)))
        for start in range(0, file.size, _PIECE):
            if stopping.is_set():
                break
            piece = room[: file.size - start]
            file.read_into(start, piece)
            sha256.update(piece)
            if progress is not None:
                with turn:
                    progress(len(piece), total)
        return sha256.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        try:
            return dict(zip(paths, pool.map(digest, files), strict=True))
        except BaseException:
            stopping.set()  # else the other threads would be waited for
            raise


def _files(checkpoint: Checkpoint) -> list[Path]:
    return [part.path for part in checkpoint.parts if part.identity is not None]
