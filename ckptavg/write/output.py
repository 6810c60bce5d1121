"""Write an output, a file or a directory, so that it is there whole or not at all.

It is written under a temporary name beside its destination, brought to the disk, and renamed.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import stat
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ckptavg.errors import OutputError
from ckptavg.write.replacement import replace_directory
from ckptavg.write.temporary import locked, temporary_beside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from io import FileIO

    from ckptavg.merge.jobs import Checksum, Layout

_SYNC_EVERY = 128 << 20
_PIECE = 1 << 20


class Output:
    """An output while it is being written: a context that leaves nothing behind unless published.

    Args:
        layout: its destination, its files, and what stands around the tensors in them. If the
            destination is a link, what the link leads to is written.
        force: replace what is there.
        fsync: have it on the disk before it gets its name.
        temporary: its temporary name, if another process has begun it and will publish it.

    Attributes:
        path: its destination.
        temporary: the file or directory under its temporary name.

    Raises:
        OutputError: there is no room, or the disk fails.
    """

    temporary: Path

    def __init__(
        self, layout: Layout, *, force: bool, fsync: bool, temporary: Path | None = None
    ) -> None:
        self.path, self._layout = followed(layout.path), layout
        self._force, self._fsync = force, fsync
        self._begun = temporary
        self._replaced = _identify(self.path)
        self._names, self._bases = list(layout.files), layout.bases
        self._fds: dict[str, int] = {}
        self._syncer = _Syncer()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if self._begun is None:
                folder = self._layout.is_directory
                self.temporary = stack.enter_context(temporary_beside(self.path, folder=folder))
                stack.callback(self._close)
                self._create_files()
            else:
                self.temporary = self._begun
                stack.callback(self._close)
                self._join_files()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _create_files(self) -> None:
        for name, file in self._layout.files.items():
            with self._explained(name):
                (self.temporary / name).parent.mkdir(parents=True, exist_ok=True)
                self._open(name, os.O_CREAT)
                _reserve(self._fds[name], file.size)
                for offset, blob in file.blobs:
                    _write(self._fds[name], offset, memoryview(blob))

    def _join_files(self) -> None:
        try:
            for name in self._names:
                self._open(name, 0)
        except OSError as error:
            raise OutputError(
                f"the first process has made {self.temporary.name}, which cannot be opened here: "
                f"{error.strerror}",
                path=self.path,
                remedy="all processes must see the same file system",
            ) from error

    def _open(self, name: str, flags: int) -> None:
        flags |= os.O_RDWR | os.O_CLOEXEC
        self._fds[name] = os.open(self.temporary / name, flags, 0o666)

    def _close(self) -> None:
        self._syncer.stop()
        while self._fds:
            os.close(self._fds.popitem()[1])

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`, which counts through all files, from any thread."""
        # The last of the files that begin there: those before it are empty.
        number = bisect.bisect_right(self._bases, offset) - 1
        self._write(self._names[number], offset - self._bases[number], data)

    def _write(self, name: str, offset: int, data: memoryview) -> None:
        with self._explained(name):
            _write(self._fds[name], offset, data)
        if self._fsync:
            self._syncer.add(self._fds[name], len(data))

    def finish(self) -> None:
        """Bring the files to the disk and close them.

        On a network file system, other processes see what was written only when it is closed.
        """
        with self._explained():
            self._syncer.stop()
            self._syncer.raise_failure()
        for name, fd in self._fds.items() if self._fsync else ():
            with self._explained(name):
                os.fsync(fd)
        with self._explained():
            self._close()

    def publish(self) -> None:
        """Fill in the checksums, bring the output to the disk, and give it its name.

        Raises:
            OutputError: the disk fails, or something else has got the name meanwhile.
        """
        for name, file in self._layout.files.items():
            if file.checksums:
                with self._explained(name), (self.temporary / name).open("rb", buffering=0) as made:
                    for checksum in file.checksums:
                        crc = memoryview(_crc(made, checksum).to_bytes(4, "little"))
                        for target in checksum.targets:
                            _write(self._fds[name], target, crc)
        self.finish()
        with self._explained():
            self._rename()
        if self._fsync:
            _sync_folder(self.path.parent)

    def _rename(self) -> None:
        if self._fsync and self._layout.is_directory:
            for folder in {folder for name in self._names for folder in Path(name).parents}:
                _sync_folder(self.temporary / folder)
        if not self._force and self._layout.is_directory:
            self.temporary.rename(self.path)  # fails unless an empty directory or nothing is there
        elif not self._force:
            _link(self.temporary, self.path)
        else:
            self._keep_modes()
            with locked(self.path.parent):
                _refuse_another(self.path, self._replaced)
                if self._layout.is_directory and self.path.exists():
                    replace_directory(self.path, self.temporary)
                else:
                    self.temporary.rename(self.path)

    def _keep_modes(self) -> None:
        """Whoever could not read the files that are replaced cannot read the new ones."""
        for name in {"", *self._names}:
            with contextlib.suppress(FileNotFoundError):
                mode = stat.S_IMODE((self.path / name).stat().st_mode)
                (self.temporary / name).chmod(mode)

    @contextlib.contextmanager
    def _explained(self, name: str = "") -> Iterator[None]:
        """Turn the system's errors into OutputErrors that name the destination, or its file."""
        try:
            yield
        except OSError as error:
            message, remedy = f"cannot write it: {error.strerror}", None
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                message = "exists already: another process wrote it meanwhile"
                remedy = "`force` replaces it"
            elif error.errno == errno.ENOSPC:
                size = self._layout.files.get(name, self._layout).size
                message += f" ({size} bytes are needed)"
            elif error.errno == errno.EMFILE and self._layout.is_directory:
                remedy = "a larger `max_shard_size` makes fewer files"
            raise OutputError(message, path=self.path / name, remedy=remedy) from error


def _reserve(fd: int, size: int) -> None:
    """Have room for all of a file, or fail now, where the system and the file system can tell."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return
    os.truncate(fd, size)


def _write(fd: int, offset: int, data: memoryview) -> None:
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _crc(file: FileIO, checksum: Checksum) -> int:
    crc, left = 0, checksum.size
    file.seek(checksum.start)
    while left:
        data = file.read(min(_PIECE, left))
        if not data:
            raise OSError(errno.EIO, "it was shortened meanwhile")
        crc, left = zlib.crc32(data, crc), left - len(data)
    return crc


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name, which nothing may have yet."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # The file system has no hard links: look before the rename, which would replace.
        with locked(path.parent):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
            temporary.rename(path)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a directory to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def followed(path: Path) -> Path:
    """Where writing to a path goes: if it is a link, the file or directory that it leads to."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _identify(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or a directory replaced; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode):
        return status.st_dev, status.st_ino
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_another(path: Path, identity: tuple[int, ...] | None) -> None:
    """Refuse to replace what was not there when the work started.

    Raises:
        OutputError: another run has written it.
    """
    if _identify(path) not in (None, identity):
        raise OutputError(
            "another process wrote it meanwhile",
            path=path,
            remedy="start again, or choose another output",
        )


class _Syncer:
    """Brings files to the disk while they are still being written.

    Waiting for all of it at the end takes half as long again.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []
        self._lock = threading.Lock()
        self._dirty: set[int] = set()
        self._pending = 0

    def add(self, fd: int, count: int) -> None:
        """Note that so many bytes were written to a file."""
        with self._lock:
            self._dirty.add(fd)
            self._pending += count
            is_idle = not self._syncs or self._syncs[-1].done()
            if self._pending >= _SYNC_EVERY and is_idle:
                with contextlib.suppress(RuntimeError):  # no more threads: it waits for the end
                    self._syncs.append(self._pool.submit(_sync, self._dirty))
                    self._dirty, self._pending = set(), 0

    def stop(self) -> None:
        """Wait for a sync that is under way. The rest is left to the caller."""
        self._pool.shutdown()

    def raise_failure(self) -> None:
        """Raise the error of a sync: the system reports each only once."""
        for sync in self._syncs:
            sync.result()


def _sync(fds: set[int]) -> None:
    for fd in fds:
        getattr(os, "fdatasync", os.fsync)(fd)
