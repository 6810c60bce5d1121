"""Points that have been evaluated, kept as they come: a run that was killed goes on from there."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from ckptavg.errors import OutputError
from ckptavg.write.temporary import try_lock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ckptavg.distributed import Ranks

Values = dict[str, float]
"""Metrics by name, `train loss` and so on."""


class Journal:
    """What has been evaluated: each process appends to a file of its own.

    Attributes:
        done: the values of each point, by its name.
    """

    def __init__(self, path: Path, fd: int, done: dict[str, Values]) -> None:
        self._path, self._fd, self.done = path, fd, done

    def add(self, place: str, values: Values) -> None:
        """Keep a point's values, on the disk before the next point begins.

        Raises:
            OutputError: that did not work.
        """
        line = json.dumps({"place": place, "values": values}) + "\n"
        with _explained(self._path):
            left = line.encode()
            while left:
                left = left[os.write(self._fd, left) :]
            os.fsync(self._fd)
        self.done[place] = values


def files(folder: Path) -> list[Path]:
    """The files of points in a directory."""
    return sorted(folder.glob("points-*.jsonl"))


@contextlib.contextmanager
def journal(folder: Path, task: dict[str, Any], ranks: Ranks, *, force: bool) -> Iterator[Journal]:
    """A directory's points, and a file to add to, which no other run has meanwhile.

    Args:
        folder: the directory, which is there.
        task: what is evaluated: points of another one do not count.
        ranks: the processes, all of which call this.
        force: forget all points that are there.

    Raises:
        OutputError: the directory has points of another task, or another run is at work in it.
    """
    path = folder / f"points-{ranks.rank}.jsonl"
    with _explained(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not try_lock(fd):
            raise OutputError("another run is at work here", path=folder)
        ranks.gather(None)  # all hold theirs: nothing changes any more
        found = {one: _read(one) for one in files(folder)}
        foreign = [one for one, entries in found.items() if entries and entries[0] != task]
        if force:
            foreign = [*found]
        elif foreign:
            raise OutputError(
                "has points of another landscape",
                path=folder,
                remedy="name another directory, or --force replaces them",
            )
        done = {
            entry["place"]: entry["values"]
            for one, entries in found.items()
            if one not in foreign
            for entry in entries[1:]
            if isinstance(entry.get("place"), str) and _are_values(entry.get("values"))
        }
        ranks.gather(None)  # all have read them
        own = [] if path in foreign else found.get(path, [])
        with _explained(path):
            text = "".join(json.dumps(entry) + "\n" for entry in own or [task]).encode()
            os.ftruncate(fd, 0)
            os.pwrite(fd, text, 0)  # without a line that was cut off
            os.lseek(fd, 0, os.SEEK_END)
            if ranks.rank == 0:
                active = {folder / f"points-{rank}.jsonl" for rank in range(ranks.size)}
                for one in set(foreign) - active:
                    one.unlink()
        yield Journal(path, fd, done)
    finally:
        os.close(fd)


def _read(path: Path) -> list[dict[str, Any]]:
    """The objects in a file's lines; what is none was cut off."""
    entries = []
    with _explained(path):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def _are_values(found: object) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(value, float | int) for value in found.values())
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be used: {error.strerror}", path=path) from error
