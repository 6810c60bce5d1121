"""Temporary files and directories beside an output, and the removal of what killed runs have left.

A process locks each temporary file or directory that it creates, and the lock goes when the process
ends, however it ends. The next run beside it removes what nobody has locked. What a signal leaves
behind, by interrupting the clean-up, is removed when the process exits.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ckptavg.errors import OutputError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("ckptavg")

_NAME = re.compile(r"\.ckptavg-[0-9a-f]{8}\.tmp")
_TRIES = 10
_LOCK_TIMEOUT = 10  # seconds


@contextlib.contextmanager
def temporary_beside(path: Path, *, folder: bool) -> Iterator[Path]:
    """An empty file or directory beside a path, which is removed at the end if it is still there.

    Args:
        path: what it stands beside.
        folder: make a directory.

    Raises:
        OutputError: it cannot be made.
    """
    _clear_beside(path)
    try:
        name, fd = _create_locked(path, folder=folder)
    except OSError as error:
        raise OutputError(f"cannot write it: {error.strerror}", path=path) from error
    try:
        yield name
    finally:
        with contextlib.suppress(OSError):
            remove(name)
        os.close(fd)


def _create_locked(path: Path, *, folder: bool) -> tuple[Path, int]:
    """Its name, and the descriptor that holds the lock as long as it is open."""
    for _ in range(_TRIES):
        name = path.with_name(f".ckptavg-{secrets.token_hex(4)}.tmp")
        atexit.register(_remove_at_exit, Path(os.path.abspath(name)), os.getpid())  # noqa: PTH100 - links stay links
        try:
            if folder:
                name.mkdir()
            flags = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
            fd = os.open(name, flags | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if path.parent.is_dir():
                continue  # another run has removed it, see below
            raise
        # Until it is locked another run may take it for a dead run's and remove it.
        if try_lock(fd) and _is_open_as(name, fd):
            return name, fd
        os.close(fd)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))


def _remove_at_exit(name: Path, process: int) -> None:
    if os.getpid() == process:  # and no child that it has forked
        with contextlib.suppress(OSError):
            remove(name)


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def try_lock(fd: int) -> bool:
    """Lock an open file or directory; False if another process has locked it.

    It counts as locked where the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def wait_for_lock(fd: int) -> bool:
    """Lock an open file or directory; False if another process still has the lock after 10 s."""
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while not (is_ours := try_lock(fd)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_ours


def _is_open_as(name: Path, fd: int) -> bool:
    try:
        return os.path.samestat(name.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _clear_beside(path: Path) -> None:
    """Remove what killed runs have left beside a path."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if _NAME.fullmatch(entry.name) and not entry.is_symlink():
                _clear(Path(entry.path))


def _clear(name: Path) -> None:
    """Remove it if no process has locked it, and if the file system has locks."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_open_as(name, fd):
            remove(name)
            log.info("removed what a killed run left: %s", printable(name))
    except OSError:
        pass  # its process is alive, or it is another user's
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock under which runs rename their outputs in a directory.

    After ten seconds, or where the file system has no locks, it goes on without.
    """
    if _NAME.fullmatch(folder.name):  # this run's own, and locked already
        yield
        return
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        wait_for_lock(fd)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that gets the name of a path at the end, unless there is an error.

    Raises:
        OutputError: it cannot be made, or have that name.
    """
    with temporary_beside(path, folder=False) as made:
        yield made
        try:
            made.replace(path)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", path=path) from error
