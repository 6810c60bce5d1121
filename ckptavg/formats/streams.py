"""A `ByteSource` as the stream that `zipfile` and the pickle machine read."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from ckptavg.formats.parts import ByteSource


class SourceStream(io.RawIOBase):
    """Reads a file from its start, and no more of it than it should.

    Args:
        file: what is read.
        most: bytes that may be read in all; a file can claim to need any number of them.
        what: they are, for the message.
    """

    def __init__(self, file: ByteSource, most: int, what: str) -> None:
        super().__init__()
        self._file, self._position = file, 0
        self._most, self._left, self._what = most, most, what

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere.

        Raises:
            OSError: that is before the start of the file.
        """
        position = (0, self._position, self._file.size)[whence] + offset
        if position < 0:
            raise OSError("before the start of the file")
        self._position = position
        return position

    def readinto(self, out: WriteableBuffer) -> int:
        """Read what there is.

        Raises:
            FormatError: it is more than may be read.
        """
        view = memoryview(out).cast("B")
        count = min(len(view), max(0, self._file.size - self._position))
        self._left -= count
        if self._left < 0:
            raise FormatError(
                f"its {self._what} has more than {self._most} bytes", path=self._file.path
            )
        self._file.read_into(self._position, view[:count])
        self._position += count
        return count
