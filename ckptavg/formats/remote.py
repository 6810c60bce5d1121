"""Files behind URLs, read by ranges through fsspec; and a function that opens any file."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats.parts import ByteSource, File
from ckptavg.formats.paths import file_system, is_remote

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator
    from pathlib import Path


class RemoteFile(ByteSource):
    """A file behind a URL, read by ranges through fsspec.

    Raises:
        CkptAvgError: it is missing, or cannot be reached.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files, self._name = file_system(path)
        self._info = self._look()

    def _look(self) -> dict[str, Any]:
        with self._explained():
            info: dict[str, Any] = self._files.info(self._name)
        if info.get("type") != "file" or not isinstance(info.get("size"), int):
            raise FormatError("is no file of a known size", path=self.path)
        return info

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CkptAvgError:
            raise
        except FileNotFoundError as error:
            raise CkptAvgError("does not exist", path=self.path) from error
        # Each file system has exceptions of its own, and none is a fault of this program.
        except Exception as error:
            what = printable(error) or type(error).__name__
            raise CkptAvgError(f"cannot read it: {what}", path=self.path) from error

    @property
    def size(self) -> int:
        """Bytes it held when it was opened."""
        return int(self._info["size"])

    @property
    def identity(self) -> Hashable:
        """Its address, and what the store says of its content."""
        return str(self.path), *_version(self._info)

    def read_many(self, places: Iterable[tuple[int, int]]) -> list[bytes]:
        """Small pieces, by offset and size, many at once where the file system can."""
        spans = [(offset, offset + size) for offset, size in places]
        if not spans:
            return []
        with self._explained():
            pieces: list[bytes] = self._files.cat_ranges(
                [self._name] * len(spans), *map(list, zip(*spans, strict=True)), on_error="raise"
            )
        for (start, end), piece in zip(spans, pieces, strict=True):
            self._check(piece, start, end)
        return pieces

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
        if not len(out):
            return
        with self._explained():
            # By name: not every file system has them in this order.
            piece = self._files.cat_file(self._name, start=offset, end=offset + len(out))
        self._check(piece, offset, offset + len(out))
        out[:] = piece

    def _check(self, piece: bytes, start: int, end: int) -> None:
        if len(piece) > end - start:
            raise CkptAvgError(
                "is sent whole when a piece of it is asked for",
                path=self.path,
                remedy="download it, or serve it with a server that knows ranges",
            )
        if len(piece) != end - start:
            raise self._truncated(start + len(piece), end - start - len(piece))

    def check_unchanged(self) -> None:
        """Raise if the store now has another content under that name."""
        self._files.invalidate_cache()
        if _version(self._look()) != _version(self._info):
            raise self._changed()


_VERSION_FACTS = ("size", "ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "created")


def _version(info: dict[str, Any]) -> tuple[str, ...]:
    """What a file system says of a file that another content would change."""
    return tuple(str(info.get(fact)) for fact in _VERSION_FACTS)


def open_source(path: Path) -> ByteSource:
    """Open a file for reading, whether it is on this machine or behind a URL.

    Raises:
        CkptAvgError: it is missing, not a regular file, or cannot be read.
    """
    return RemoteFile(path) if is_remote(path) else File(path)
