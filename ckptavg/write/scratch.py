"""Temporary names beside an output, and what is left under them by a run that was killed.

Whoever makes one holds a lock on it, which goes with the process however that ends. So a name
without a lock is a dead run's, and the next run beside it takes it away. What a signal leaves, by
coming between two steps or into the clean-up itself, goes when the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
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
    from collections.abc import Callable, Iterator

log = logging.getLogger("ckptavg")

_NAME = re.compile(r"\.ckptavg-[0-9a-f]{8}\.tmp")
_TRIES = 10
_PATIENCE = 10  # seconds in which others give their outputs their names

_given: set[str] = set()
"""The names that this process has given, absolute."""
_owner = 0
"""The process that has given them: they are not those of its children."""


def name_beside(path: Path) -> Path:
    """A name that nothing has, in the same directory. It is free again when the process ends."""
    global _owner  # noqa: PLW0603
    name = path.with_name(f".ckptavg-{secrets.token_hex(4)}.tmp")
    if _owner != os.getpid():
        _given.clear()
        atexit.unregister(_clear_given)
        atexit.register(_clear_given)
        _owner = os.getpid()
    _given.add(os.path.abspath(name))  # noqa: PTH100 - links stay links
    return name


def _clear_given() -> None:
    for name in _given if _owner == os.getpid() else ():
        if os.path.lexists(name):
            with contextlib.suppress(OSError):
                _remove(Path(name))


def _remove(name: Path) -> None:
    shutil.rmtree(name) if name.is_dir() else name.unlink()


def make(path: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """Make something under a temporary name beside a path, and hold it.

    Args:
        path: what it stands beside.
        create: makes it; returns a descriptor of it.

    Returns:
        Its name and the descriptor, which holds it as long as it is open.

    Raises:
        OSError: it cannot be made.
    """
    for _ in range(_TRIES):
        name = name_beside(path)
        # Until it is held another run may take it for a dead one's.
        try:
            fd = create(name)
        except FileNotFoundError:
            if path.parent.is_dir():
                continue
            raise
        if hold(fd) and _is_there(name, fd):
            return name, fd
        os.close(fd)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def hold(fd: int) -> bool:
    """Lock what a descriptor is open for; False if somebody else has. Not every system can."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_there(name: Path, fd: int) -> bool:
    try:
        return os.path.samestat(name.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A directory of this run's own beside a path, which goes away in any case.

    Raises:
        OutputError: it cannot be made.
    """
    clear_beside(path)
    try:
        name, fd = make(path, _make_folder)
    except OSError as error:
        raise OutputError(f"cannot write it: {error.strerror}", path=path) from error
    try:
        yield name
    finally:
        shutil.rmtree(name, ignore_errors=True)
        os.close(fd)


def _make_folder(name: Path) -> int:
    name.mkdir()
    return os.open(name, os.O_RDONLY | os.O_CLOEXEC)


def clear_beside(path: Path) -> None:
    """Take away what runs that were killed have left beside a path."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if _NAME.fullmatch(entry.name) and not entry.is_symlink():
                _clear(Path(entry.path))


def _clear(name: Path) -> None:
    """Take it away if nobody holds it, and if the file system can tell."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_there(name, fd):
            _remove(name)
            log.info("took away what a run that was killed has left: %s", printable(name))
    except OSError:
        pass  # it is alive, or another user's
    finally:
        os.close(fd)


def place_aside(path: Path) -> Path:
    """Where a directory waits that is replaced in two steps; the same in each run."""
    return path.with_name(f".ckptavg-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}.old")


def put_back(path: Path) -> None:
    """Mend what a run has left that was killed between these two steps, or after them."""
    aside = place_aside(path)
    if os.path.lexists(aside):
        with contextlib.suppress(OSError), alone_in(path.parent):
            if not os.path.lexists(path):
                aside.rename(path)
                name = printable(path)
                log.info("put back what a run that was killed had moved aside: %s", name)
            else:
                shutil.rmtree(aside)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait while another run gives a name in this directory, as far as the system can tell."""
    if _NAME.fullmatch(folder.name):  # nobody else's, and held already
        yield
        return
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        given_up = time.monotonic() + _PATIENCE
        while not hold(fd) and time.monotonic() < given_up:
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)
