"""Files behind URLs, read by ranges through fsspec; and a function that opens any file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptavg.errors import CkptAvgError, FormatError
from ckptavg.formats.parts import ByteSource, File
from ckptavg.formats.paths import is_remote, remote_errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# What file systems report of a file that changes with its content.
_VERSION_FACTS = ("size", "ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "created")


def open_source(path: Path) -> ByteSource:
    """Open a file for reading, whether it is on this machine or behind a URL.

    Raises:
        CkptAvgError: it is missing, not a regular file, or cannot be read.
    """
    return RemoteFile(path) if is_remote(path) else File(path)


class RemoteFile(ByteSource):
    """A file behind a URL.

    Raises:
        CkptAvgError: it is missing, or cannot be reached.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        address: Any = path  # a UPath
        self._system, self._name = address.fs, address.path
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
        """Small pieces, each given by its offset and size; many at once where fsspec can."""
        spans = [(offset, offset + size) for offset, size in places]
        if not spans:
            return []
        starts, ends = map(list, zip(*spans, strict=True))
        with remote_errors(self.path):
            pieces: list[bytes] = self._system.cat_ranges(
                [self._name] * len(spans), starts, ends, on_error="raise"
            )
        for (start, end), piece in zip(spans, pieces, strict=True):
            self._check(piece, start, end)
        return pieces

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
        if not out:
            return
        end = offset + len(out)
        with remote_errors(self.path):
            # By keyword: not every file system takes the arguments in this order.
            piece = self._system.cat_file(self._name, start=offset, end=end)
        self._check(piece, offset, end)
        out[:] = piece

    def _check(self, piece: bytes, start: int, end: int) -> None:
        if len(piece) > end - start:
            raise CkptAvgError(
                "is sent whole when a piece of it is asked for",
                path=self.path,
                remedy="download it, or serve it with a server that supports ranges",
            )
        if len(piece) < end - start:
            raise self._truncated(start + len(piece), end - start - len(piece))

    def check_unchanged(self) -> None:
        """Raise a CkptAvgError if there is other content at the address by now."""
        self._system.invalidate_cache()
        if self._look_up() != (self.size, self.identity):
            raise self._changed()
