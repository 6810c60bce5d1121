"""Where bytes come from: files and memory, read by offset."""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ckptavg.errors import CkptAvgError, FormatError

if TYPE_CHECKING:
    from pathlib import Path

# Files beyond this many are opened for each read: 200 checkpoints pass under `ulimit -n 128`.
_MOST_OPEN = 64


class Part(Protocol):
    """A piece of a checkpoint that is read by offset."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def size(self) -> int:
        """Bytes it holds."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes, writable) from `offset`. Safe from several threads at once."""

    def check_unchanged(self) -> None:
        """Raise if what was planned with is no longer what is there."""


@dataclass(frozen=True)
class Identity:
    """What a file was when it was opened: a rewrite of it changes one of these."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class File:
    """A regular file, opened once and read by offset.

    Attributes:
        path: where it is.
        start: what offsets count from. A reader sets it to where a header ends, so that
            checkpoints with headers of unlike lengths have equal offsets.

    Raises:
        CkptAvgError: it is missing, no regular file, or not to be read.
    """

    _open_files = 0
    _lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = 0
        self._fd: int | None = None
        fd = self._open()
        try:
            self.identity = self._identify(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        with File._lock:
            File._open_files += 1
            crowded = File._open_files > _MOST_OPEN
        if crowded:
            self.close()

    @property
    def size(self) -> int:
        """Bytes it held when it was opened."""
        return self.identity.size

    def _open(self) -> int:
        try:
            # O_NONBLOCK: a FIFO in the way must not hang us; a regular file does not mind.
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CkptAvgError(f"cannot read it: {error.strerror}", path=self.path) from error

    def _identify(self, fd: int) -> Identity:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("not a regular file", path=self.path)
        return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        out = bytearray(size)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`.

        Raises:
            CkptAvgError: the file ends before, or the disk fails.
        """
        offset += self.start
        fd = self._fd
        if fd is not None:
            self._read(fd, offset, out)
            return
        fd = self._open()
        try:
            self._read(fd, offset, out)
        finally:
            os.close(fd)

    def _read(self, fd: int, offset: int, out: memoryview) -> None:
        while len(out):
            try:
                count = os.preadv(fd, [out], offset)
            except OSError as error:
                raise CkptAvgError(f"cannot read it: {error.strerror}", path=self.path) from error
            if not count:
                raise CkptAvgError(
                    f"ends at byte {offset}, {len(out)} bytes too early: was it truncated?",
                    path=self.path,
                )
            out, offset = out[count:], offset + count

    def check_unchanged(self) -> None:
        """Raise if the file was rewritten, replaced or removed since it was opened."""
        fd = self._open()
        try:
            if self._identify(fd) != self.identity:
                raise CkptAvgError(
                    "changed while it was being read",
                    path=self.path,
                    remedy="wait until the training has finished writing, and start again",
                )
        finally:
            os.close(fd)

    def close(self) -> None:
        """Give the descriptor back; a later read opens the file anew."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with File._lock:
                File._open_files -= 1
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()


@dataclass
class Memory:
    """Bytes in memory that stand in for a piece of a file.

    Attributes:
        path: the checkpoint they belong to, for messages.
        data: the bytes.
    """

    path: Path
    data: bytearray = field(default_factory=bytearray)

    @property
    def size(self) -> int:
        """Bytes it holds."""
        return len(self.data)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
        out[:] = memoryview(self.data)[offset : offset + len(out)]

    def check_unchanged(self) -> None:
        """Nobody else holds it."""
