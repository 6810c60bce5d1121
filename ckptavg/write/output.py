"""Write one file so that it is there whole or not at all.

It is written without a name where the system can (`O_TMPFILE`), else under a temporary one beside
its destination, and gets its name when it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ckptavg.errors import OutputError
from ckptavg.write import scratch
from ckptavg.write.vacancy import identify, refuse_another

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from ckptavg.merge.layout import Checksum, FileLayout

_SYNC_EVERY = 128 << 20
_PIECE = 1 << 20
_MODE = 0o666


def write_all(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data`, which the system may take in pieces."""
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


class OutputFile:
    """The output while it is being written: a context that leaves nothing behind unless committed.

    Args:
        path: its destination.
        layout: its size, and what stands around the tensors.
        force: replace what is there.
        fsync: have it on the disk before it gets its name.
        shared: other processes write to it as well, which find it by its temporary name.

    Raises:
        OutputError: there is no room, or the disk fails.
    """

    def __init__(
        self, path: Path, layout: FileLayout, *, force: bool, fsync: bool, shared: bool = False
    ) -> None:
        self.path, self._layout, self._force, self._fsync = path, layout, force, fsync
        self._shared = shared
        self._replaced = identify(path)
        self._temporary: Path | None = None
        self._syncer: _Syncer | None = None

    def __enter__(self) -> Self:
        with self._explained():
            self._fd = self._create()
        try:
            with self._explained():
                self._reserve()
            for offset, blob in self._layout.blobs:
                self.write(offset, memoryview(blob))
        except BaseException:
            self._discard()
            raise
        if self._fsync:
            self._syncer = _Syncer(self._fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()

    def _reserve(self) -> None:
        """Have the room for all of it, or fail now; not every system and file system can tell."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, self._layout.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
            else:
                return
        os.truncate(self._fd, self._layout.size)

    def _create(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        if not self._shared and hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
            # Not every file system knows it; NFS does not.
            with contextlib.suppress(OSError):
                fd = os.open(self.path.parent, flags | os.O_TMPFILE, _MODE)
                scratch.hold(fd)
                return fd
        self._temporary, fd = scratch.make(
            self.path, lambda name: os.open(name, flags | os.O_CREAT | os.O_EXCL, _MODE)
        )
        return fd

    @property
    def temporary(self) -> tuple[Path, ...]:
        """Where other processes find it, while it is written."""
        assert self._temporary is not None, "a file that is not shared has no name"  # noqa: S101
        return (self._temporary,)

    def _discard(self) -> None:
        """Close it, and take away a temporary name that was not used up."""
        if self._syncer is not None:
            self._syncer.stop()
        os.close(self._fd)
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.unlink()

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`. Safe from several threads at once."""
        size = len(data)
        with self._explained():
            write_all(self._fd, offset, data)
        if self._syncer is not None:
            self._syncer.written(size)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with what was written from `offset`."""
        with self._explained():
            while len(out):
                count = os.preadv(self._fd, [out], offset)
                out, offset = out[count:], offset + count

    def commit(self) -> None:
        """Fill in the checksums, bring it to the disk, and give it its name."""
        for checksum in self._layout.checksums:
            crc = self._crc(checksum).to_bytes(4, "little")
            for target in checksum.targets:
                self.write(target, memoryview(crc))
        with self._explained():
            if self._syncer is not None:
                self._syncer.stop()
                self._syncer.raise_failure()
                os.fsync(self._fd)
            self._publish()
        if self._fsync:
            # It is in its place already, and some file systems cannot sync a directory.
            with contextlib.suppress(OSError):
                self._sync_directory()

    def _crc(self, checksum: Checksum) -> int:
        crc, start, end = 0, checksum.start, checksum.start + checksum.size
        with self._explained():
            while start < end:
                data = os.pread(self._fd, min(_PIECE, end - start), start)
                crc, start = zlib.crc32(data, crc), start + len(data)
        return crc

    def _publish(self) -> None:
        """Give it its name: in one step, and never over a file that was not there before."""
        if self._force:
            if self._temporary is None:
                self._temporary = scratch.name_beside(self.path)
                self._name_nameless(self._temporary)
            self._keep_mode()
            with scratch.alone_in(self.path.parent):
                refuse_another(self.path, self._replaced)
                self._temporary.replace(self.path)
                self._temporary = None
        elif self._temporary is None:
            self._name_nameless(self.path)
        else:
            self._name_named(self._temporary)

    def _keep_mode(self) -> None:
        """Whoever could not read the file that is replaced cannot read this one."""
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(self._fd, stat.S_IMODE(self.path.stat().st_mode))

    def _name_nameless(self, name: Path) -> None:
        # Given a directory, Python calls linkat, which follows the link in /proc to the file.
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{self._fd}", name, src_dir_fd=directory)
        finally:
            os.close(directory)

    def _name_named(self, temporary: Path) -> None:
        try:
            os.link(temporary, self.path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            # A file system without hard links: look before the rename, which would replace.
            with scratch.alone_in(self.path.parent):
                if os.path.lexists(self.path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
                temporary.rename(self.path)
        else:
            try:
                temporary.unlink()  # now: a directory around it may get another name
            except OSError:
                self.path.unlink()
                raise
        self._temporary = None

    def _sync_directory(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise OutputError(
                "exists already: somebody else wrote it meanwhile",
                path=self.path,
                remedy="--force replaces it",
            ) from error
        except OSError as error:
            need = f" ({self._layout.size} bytes are needed)" if error.errno == errno.ENOSPC else ""
            raise OutputError(f"cannot write it: {error.strerror}{need}", path=self.path) from error


class _Syncer:
    """A thread that brings the file to the disk while the rest is still being made.

    Waiting for the whole of it at the end takes half as long again.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._pending, self._stopping = fd, 0, False
        self._failure: OSError | None = None
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def written(self, count: int) -> None:
        """Note that so many more bytes wait in the page cache."""
        with self._wake:
            self._pending += count
            if self._pending < _SYNC_EVERY:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            self._wake.notify()

    def stop(self) -> None:
        """Let the thread end; what is pending then is the caller's."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._pending >= _SYNC_EVERY)
                if self._stopping:
                    return
                self._pending = 0
            try:
                getattr(os, "fdatasync", os.fsync)(self._fd)
            except OSError as error:
                self._failure = error
                return

    def raise_failure(self) -> None:
        """Raise what the disk said; the kernel tells each failure but once."""
        if self._failure is not None:
            raise self._failure
