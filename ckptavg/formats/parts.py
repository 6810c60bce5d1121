"""The files of a checkpoint, and other bytes that stand for files."""

from __future__ import annotations

import contextlib
import os
import stat
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ckptavg.errors import CkptAvgError, FormatError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator
    from pathlib import Path

# Files beyond this many are opened for each read: 200 checkpoints pass under `ulimit -n 128`.
_MOST_OPEN = 64


class Part(ABC):
    """Bytes of a checkpoint, read by offset: one of its files, or what stands for a file.

    Attributes:
        path: the file, or the checkpoint that the bytes belong to.
        size: bytes on the disk that no other part has.
        identity: equal for two paths of the same file only; None where the part is not a file.
    """

    path: Path
    size: int
    identity: Hashable = None

    @abstractmethod
    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out`, writable bytes, from `offset`. Several threads may do so at once.

        Raises:
            CkptAvgError: the bytes end too early, or cannot be read.
        """

    def check_unchanged(self) -> None:  # noqa: B027 - what is not a file does not change
        """Raise a CkptAvgError if the file was rewritten, replaced or removed."""


class ByteSource(Part):
    """A file, or a section of one, with what the readers of formats need."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        out = bytearray(size)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def read_many(self, places: Iterable[tuple[int, int]]) -> list[bytes]:
        """Small pieces, each given by its offset and size."""
        return [self.read(offset, size) for offset, size in places]

    def _truncated(self, end: int, missing: int) -> CkptAvgError:
        return CkptAvgError(
            f"ends at byte {end}, {missing} bytes too early: was it truncated?", path=self.path
        )

    def _changed(self) -> CkptAvgError:
        return CkptAvgError(
            "changed while it was being read",
            path=self.path,
            remedy="wait until the training has finished writing, and start again",
        )


class File(ByteSource):
    """A regular file on this machine.

    Raises:
        CkptAvgError: it is missing, not a regular file, or cannot be read.
    """

    _kept_open: ClassVar[set[int]] = set()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        with self._opened() as descriptor:
            self.identity = self._identify(descriptor)
            self.size = os.fstat(descriptor).st_size
            if len(self._kept_open) < _MOST_OPEN:
                with contextlib.suppress(OSError):  # where only a few files may be open at once
                    self._descriptor = os.dup(descriptor)
                    self._kept_open.add(self._descriptor)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Open what is at the path now."""
        try:
            # O_NONBLOCK: a FIFO in its place must not make us wait; files ignore it.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CkptAvgError(f"cannot read it: {error.strerror}", path=self.path) from error
        except ValueError as error:
            raise CkptAvgError("has a name that no file can have", path=self.path) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _identify(self, descriptor: int) -> Hashable:
        """What a rewrite or a replacement of the file changes."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("is not a regular file", path=self.path)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, held in memory only once."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # raised again below
                data = os.pread(self._descriptor, size, offset)
                if len(data) == size:
                    return data
        return super().read(offset, size)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
        if self._descriptor is not None:
            self._read(self._descriptor, offset, out)
            return
        with self._opened() as descriptor:
            self._read(descriptor, offset, out)

    def _read(self, descriptor: int, offset: int, out: memoryview) -> None:
        while out:
            try:
                count = os.preadv(descriptor, [out], offset)
            except OSError as error:
                raise CkptAvgError(f"cannot read it: {error.strerror}", path=self.path) from error
            if not count:
                raise self._truncated(offset, len(out))
            out, offset = out[count:], offset + count

    def check_unchanged(self) -> None:
        """Raise a CkptAvgError if the file was rewritten, replaced or removed."""
        with self._opened() as descriptor:
            if self._identify(descriptor) != self.identity:
                raise self._changed()

    def __del__(self) -> None:
        if self._descriptor is not None:
            self._kept_open.discard(self._descriptor)
            os.close(self._descriptor)


class Section(ByteSource):
    """A section of a file, as a file of its own: an archive within another file.

    Args:
        file: the whole file.
        offset: first byte of the section.
        size: bytes of the section.
    """

    def __init__(self, file: ByteSource, offset: int, size: int) -> None:
        self.path, self.size, self.identity = file.path, size, (file.identity, offset)
        self._file, self._offset = file, offset

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` in the section."""
        if offset + len(out) > self.size:
            raise self._truncated(self.size, offset + len(out) - self.size)
        self._file.read_into(self._offset + offset, out)

    def check_unchanged(self) -> None:
        """Raise a CkptAvgError if the file changed."""
        self._file.check_unchanged()


class Memory(Part):
    """Bytes in memory that stand for a file.

    Attributes:
        data: the bytes.
    """

    def __init__(self, path: Path, data: bytearray) -> None:
        self.path, self.data, self.size = path, data, len(data)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
        out[:] = memoryview(self.data)[offset : offset + len(out)]
