"""A `ByteSource` as the stream that `zipfile` and the unpickler read."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from ckptavg.formats.parts import ByteSource


class SourceStream(io.RawIOBase):
    """Reads a file from its start, and no more than `limit` bytes of it: files claim anything.

    `content` says what these bytes are, for the message.
    """

    def __init__(self, file: ByteSource, limit: int, content: str) -> None:
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
