"""Where bytes come from: files, pieces of files, and memory, read by offset."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ckptavg.errors import CkptAvgError, FormatError
from ckptavg.formats.paths import is_remote

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable
    from pathlib import Path

# Files beyond this many are opened for each read: 200 checkpoints pass under `ulimit -n 128`.
_MOST_OPEN = 64


class Readable(Protocol):
    """What bytes are read from by offset."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes, writable) from `offset`. Safe from several threads at once."""


class Part(Readable, Protocol):
    """A piece of a checkpoint that is read by offset."""

    @property
    def path(self) -> Path:
        """The file, or the checkpoint that it belongs to."""

    @property
    def size(self) -> int:
        """Bytes on the disk that no other part has."""

    @property
    def identity(self) -> Hashable:
        """What tells one file from all others, under whatever name; None where it is no file."""

    def check_unchanged(self) -> None:
        """Raise if what was planned with is no longer what is there."""


class ByteSource(ABC):
    """Bytes that a reader of a format reads by offset.

    Attributes:
        path: where they are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes it held when it was opened."""

    @property
    @abstractmethod
    def identity(self) -> Hashable:
        """What tells the file from all others, under whatever name."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        out = bytearray(size)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def read_many(self, places: Iterable[tuple[int, int]]) -> list[bytes]:
        """Small pieces, by offset and size."""
        return [self.read(offset, size) for offset, size in places]

    @abstractmethod
    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`.

        Raises:
            CkptAvgError: the file ends before, or it cannot be read.
        """

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise if the file was rewritten, replaced or removed since it was opened."""

    def _truncated(self, offset: int, missing: int) -> CkptAvgError:
        return CkptAvgError(
            f"ends at byte {offset}, {missing} bytes too early: was it truncated?", path=self.path
        )

    def _changed(self) -> CkptAvgError:
        return CkptAvgError(
            "changed while it was being read",
            path=self.path,
            remedy="wait until the training has finished writing, and start again",
        )


def any_remote(parts: Iterable[Part]) -> bool:
    """Whether some of the bytes have to come over a network."""
    return any(is_remote(part.path) for part in parts)


@dataclass(frozen=True)
class Identity:
    """What a file was when it was opened: a rewrite of it changes one of these."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class File(ByteSource):
    """A regular file on this machine, opened once.

    Raises:
        CkptAvgError: it is missing, no regular file, or not to be read.
    """

    _open_files = 0
    _lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._fd: int | None = None
        fd = self._open()
        try:
            self._identity = self._identify(fd)
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
        return self._identity.size

    @property
    def identity(self) -> Identity:
        """Device and inode, and what a rewrite changes."""
        return self._identity

    def _open(self) -> int:
        try:
            # O_NONBLOCK: a FIFO in the way must not hang us; a regular file does not mind.
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CkptAvgError(f"cannot read it: {error.strerror}", path=self.path) from error
        except ValueError as error:
            raise CkptAvgError("has a name that no file can have", path=self.path) from error

    def _identify(self, fd: int) -> Identity:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("not a regular file", path=self.path)
        return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        fd = self._fd
        if fd is not None:
            # Into memory that need not be cleared first.
            with contextlib.suppress(OSError):
                found = os.pread(fd, size, offset)
                if len(found) == size:
                    return found
        return super().read(offset, size)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
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
                raise self._truncated(offset, len(out))
            out, offset = out[count:], offset + count

    def check_unchanged(self) -> None:
        """Raise if the file was rewritten, replaced or removed since it was opened."""
        fd = self._open()
        try:
            if self._identify(fd) != self._identity:
                raise self._changed()
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


class Section(ByteSource):
    """A piece of a file that is read like a file: an archive within another.

    Args:
        whole: the file.
        offset: where the piece begins in it.
        size: bytes of the piece.
    """

    def __init__(self, whole: ByteSource, offset: int, size: int) -> None:
        super().__init__(whole.path)
        self._whole, self._offset, self._size = whole, offset, size

    @property
    def size(self) -> int:
        """Bytes of the piece."""
        return self._size

    @property
    def identity(self) -> Hashable:
        """The file's, and the place in it."""
        return self._whole.identity, self._offset

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`, of the piece."""
        if offset + len(out) > self._size:
            raise self._truncated(self._size, offset + len(out) - self._size)
        self._whole.read_into(self._offset + offset, out)

    def check_unchanged(self) -> None:
        """Raise if the file changed."""
        self._whole.check_unchanged()


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

    @property
    def identity(self) -> None:
        """It is no file."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
        out[:] = memoryview(self.data)[offset : offset + len(out)]

    def check_unchanged(self) -> None:
        """Nobody else holds it."""
