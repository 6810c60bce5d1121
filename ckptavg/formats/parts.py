"""The files of a checkpoint, here or behind URLs, and other bytes that stand for files."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ckptavg.errors import CkptAvgError, FormatError
from ckptavg.formats.paths import is_remote, remote_errors

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator
    from pathlib import Path

    from _typeshed import WriteableBuffer

# Files beyond this many are opened for each read: 200 checkpoints pass under `ulimit -n 128`.
_MOST_OPEN = 64


class Part(ABC):
    """Bytes of a checkpoint, read by offset: one of its files, or what stands for a file.

    Attributes:
        path: the file, or the checkpoint that the bytes belong to.
        size: bytes on the disk that no other part has.
        identity: what a rewrite or a replacement of the file changes; equal for two paths of the
            same file only. None where the part is not a file.
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

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        out = bytearray(size)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def read_many(self, places: Iterable[tuple[int, int]]) -> list[bytes]:
        """Small pieces, each given by its offset and size."""
        return [self.read(offset, size) for offset, size in places]

    def next_data(self, offset: int) -> int:
        """The first offset from this one on where there are bytes on the disk, and no hole."""
        return offset

    def identity_now(self) -> Hashable:
        """What `identity` would be if the part was opened now."""
        return self.identity

    def _truncated(self, end: int, missing: int) -> CkptAvgError:
        return CkptAvgError(
            f"ends at byte {end}, {missing} bytes too early: was it truncated?", path=self.path
        )


class File(Part):
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
            raise CkptAvgError("is not a possible file name", path=self.path) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _identify(self, descriptor: int) -> Hashable:
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

    def next_data(self, offset: int) -> int:
        """The first offset from this one on where the file has no hole; its size if there is none.

        Holes are not looked for where the file is opened for each read, or the system has no way.
        """
        if self._descriptor is None or not hasattr(os, "SEEK_DATA"):
            return offset
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            return self.size if error.errno == errno.ENXIO else offset

    def _read(self, descriptor: int, offset: int, out: memoryview) -> None:
        while out:
            try:
                count = os.preadv(descriptor, [out], offset)
            except OSError as error:
                raise CkptAvgError(f"cannot read it: {error.strerror}", path=self.path) from error
            if not count:
                raise self._truncated(offset, len(out))
            out, offset = out[count:], offset + count

    def identity_now(self) -> Hashable:
        """What `identity` would be if the file was opened now."""
        with self._opened() as descriptor:
            return self._identify(descriptor)

    def __del__(self) -> None:
        if self._descriptor is not None:
            self._kept_open.discard(self._descriptor)
            os.close(self._descriptor)


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


def check_unchanged(parts: Iterable[Part]) -> None:
    """Raise a CkptAvgError if one of the files was rewritten, replaced or removed."""
    different = [*dict.fromkeys(parts)]
    for part in different:
        if isinstance(part, RemoteFile):
            part.forget_listing()
    for part in different:
        if part.identity_now() != part.identity:
            raise CkptAvgError(
                "changed while it was being read",
                path=part.path,
                remedy="wait until the training has finished writing, and start again",
            )


# What file systems report of a file that changes with its content.
_VERSION_FACTS = (
    *("size", "ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "created"),
    *("blob_id", "xet_hash"),
)
_HEAD = 1 << 16  # bytes, in which most safetensors files have their header
_REQUESTS = 16  # for small pieces, at once


def open_source(path: Path) -> Part:
    """Open a file for reading, whether it is on this machine or behind a URL.

    Raises:
        CkptAvgError: it is missing, not a regular file, or cannot be read.
    """
    return RemoteFile(path) if is_remote(path) else File(path)


class RemoteFile(Part):
    """A file behind a URL.

    Raises:
        CkptAvgError: it is missing, or cannot be reached.
    """

    def __init__(self, path: Path) -> None:
        from fsspec import AbstractFileSystem  # noqa: PLC0415 - takes long, and has been imported

        self.path = path
        address: Any = path  # a UPath
        self._system, self._name = address.fs, address.path
        # fsspec's own `cat_file` opens the file, and then reads 5 MB more than it is asked for.
        # An asynchronous file system has its own as an attribute of the object alone.
        own = getattr(self._system.cat_file, "__func__", None)
        is_general = own is AbstractFileSystem.cat_file
        self._options = {"cache_type": "none"} if is_general else {}
        self._head: bytes | None = None
        self.size, self.identity = self._look_up()

    def _look_up(self) -> tuple[int, tuple[str, ...]]:
        """Size and version of what is at the address now."""
        with remote_errors(self.path):
            info: dict[str, Any] = self._system.info(self._name)
        size = info.get("size")
        if info.get("type") != "file" or not isinstance(size, int):
            raise FormatError("is not a file of known size", path=self.path)
        return size, (str(self.path), *(str(info.get(fact)) for fact in _VERSION_FACTS))

    def read_many(self, places: Iterable[tuple[int, int]]) -> list[bytes]:
        """Small pieces, each given by its offset and size; many at once."""
        spans = [(offset, offset + size) for offset, size in places]
        if not spans:
            return []
        if self._options:  # fsspec would ask for one after the other
            with ThreadPoolExecutor(_REQUESTS) as pool:
                return [*pool.map(lambda span: self.read(span[0], span[1] - span[0]), spans)]
        starts, ends = map(list, zip(*spans, strict=True))
        with remote_errors(self.path):
            pieces: list[bytes] = self._system.cat_ranges(
                [self._name] * len(spans), starts, ends, on_error="raise"
            )
        for (start, end), piece in zip(spans, pieces, strict=True):
            self._check(piece, start, end)
        return pieces

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, held in memory only once.

        The first request brings all of a header. It is kept until other bytes are read.
        """
        if not size:
            return b""
        head = self._head
        if head is None and offset + size <= min(_HEAD, self.size):
            head = self._head = self._request(0, min(_HEAD, self.size))
        if head and offset + size <= len(head):
            return head[offset : offset + size]
        self._head = b""
        return self._request(offset, size)

    def _request(self, offset: int, size: int) -> bytes:
        with remote_errors(self.path):
            # By keyword: not every file system takes the arguments in this order.
            piece: bytes = self._system.cat_file(
                self._name, start=offset, end=offset + size, **self._options
            )
        self._check(piece, offset, offset + size)
        return piece

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
        out[:] = self.read(offset, len(out))

    def _check(self, piece: bytes, start: int, end: int) -> None:
        if len(piece) > end - start:
            raise CkptAvgError(
                "cannot be read in pieces: the server ignores ranges",
                path=self.path,
                remedy="download it, or use a server that supports ranges",
            )
        if len(piece) < end - start:
            raise self._truncated(start + len(piece), end - start - len(piece))

    def forget_listing(self) -> None:
        """Forget the listing of its directory, so that one request gets a new one for all files."""
        self._system.invalidate_cache()

    def identity_now(self) -> Hashable:
        """What `identity` would be if the file was opened now."""
        return self._look_up()[1]


class SourceStream(io.RawIOBase):
    """Reads a file from its start, and no more than `limit` bytes of it: files claim anything.

    `content` says what these bytes are, for the message.
    """

    def __init__(self, file: Part, limit: int, content: str) -> None:
        super().__init__()
        self._file, self._position = file, 0
        self._limit, self._left, self._content = limit, limit, content

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another offset; OSError if it is before the start of the file."""
        position = (0, self._position, self._file.size)[whence] + offset
        if position < 0:
            raise OSError("before the start of the file")
        self._position = position
        return position

    def readinto(self, out: WriteableBuffer) -> int:
        """Read as many bytes as there are; FormatError if they are more than may be read."""
        view = memoryview(out).cast("B")
        count = min(len(view), max(0, self._file.size - self._position))
        self._left -= count
        if self._left < 0:
            raise FormatError(
                f"its {self._content} has more than {self._limit} bytes", path=self._file.path
            )
        self._file.read_into(self._position, view[:count])
        self._position += count
        return count
