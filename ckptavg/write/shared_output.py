"""An output that several processes write, each its share; the first of them has made it."""

from __future__ import annotations

import bisect
import os
from typing import TYPE_CHECKING, Self

from ckptavg.errors import OutputError
from ckptavg.write.output import write_all

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.merge.layout import Layout


class JoinedOutput:
    """The files of an output that another process has begun and will give its name.

    Args:
        path: its destination, for messages.
        layout: its files.
        temporary: where these are meanwhile, in the same order.
        fsync: have this process's share on the disk when it is done.

    Raises:
        OutputError: they cannot be reached from here, or not be written.
    """

    def __init__(
        self, path: Path, layout: Layout, temporary: Sequence[Path], *, fsync: bool
    ) -> None:
        self.path, self._bases, self._fsync = path, layout.bases, fsync
        self._temporary = temporary
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        try:
            for path in self._temporary:
                self._fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            self._close()
            raise OutputError(
                f"the first process has made {path.name}, which cannot be opened here: "
                f"{error.strerror}",
                path=self.path,
                remedy="all processes must see the same file system",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`. Safe from several threads at once."""
        number = bisect.bisect_right(self._bases, offset) - 1
        try:
            write_all(self._fds[number], offset - self._bases[number], data)
        except OSError as error:
            raise OutputError(f"cannot write it: {error.strerror}", path=self.path) from error

    def finish(self) -> None:
        """Bring this process's share to where the others see it.

        Raises:
            OutputError: the disk failed.
        """
        try:
            for fd in self._fds:
                if self._fsync:
                    os.fsync(fd)
        except OSError as error:
            raise OutputError(f"cannot write it: {error.strerror}", path=self.path) from error
        self._close()  # a network file system shows others what is closed
