"""Points that have been evaluated, kept as they come: a run that was killed goes on from there."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from ckptavg.errors import OutputError
from ckptavg.scratch import hold

if TYPE_CHECKING:
    from pathlib import Path

Values = dict[str, float]
"""Metrics by name, `train loss` and so on."""


class Journal:
    """A directory's points: in it each process appends to a file of its own.

    Args:
        folder: the directory, which is there.
        task: what is evaluated: points of another one do not count.
        rank: number of this process.
        force: forget the points of another task.

    Raises:
        OutputError: the directory has points of another task, or another run is at work in it.
    """

    def __init__(self, folder: Path, task: dict[str, Any], *, rank: int, force: bool) -> None:
        self._folder, self._task, self._force = folder, task, force
        self._path = folder / f"points-{rank}.jsonl"
        self.done = self._read_all()

    def _read_all(self) -> dict[str, Values]:
        found: dict[str, Values] = {}
        for path in sorted(self._folder.glob("points-*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            entries = []
            for line in lines:
                with contextlib.suppress(ValueError):  # the last one, if it was cut off
                    entries.append(json.loads(line))
            if not entries:
                continue
            if entries[0] != self._task:
                if not self._force:
                    raise OutputError(
                        "has points of another landscape",
                        path=self._folder,
                        remedy="name another directory, or --force replaces them",
                    )
                continue
            found |= {entry["place"]: entry["values"] for entry in entries[1:]}
        return found

    def open(self) -> None:
        """Begin to write, with what this process's file has of this task."""
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"cannot write it: {error.strerror}", path=self._path) from error
        if not hold(self._fd):
            os.close(self._fd)
            raise OutputError("another run is at work here", path=self._folder)
        text = self._path.read_text(encoding="utf-8")
        head = json.dumps(self._task) + "\n"
        if not text.startswith(head):
            text = head
        # Without a line that was cut off.
        text = text[: text.rindex("\n") + 1]
        os.ftruncate(self._fd, len(text.encode()))
        os.pwrite(self._fd, text.encode(), 0)
        os.lseek(self._fd, 0, os.SEEK_END)

    def add(self, place: str, values: Values) -> None:
        """Keep a point's values, on the disk before the next point begins."""
        line = json.dumps({"place": place, "values": values}) + "\n"
        try:
            os.write(self._fd, line.encode())
            os.fsync(self._fd)
        except OSError as error:
            raise OutputError(f"cannot write it: {error.strerror}", path=self._path) from error
        self.done[place] = values

    def close(self) -> None:
        """Let the next run in."""
        os.close(self._fd)
