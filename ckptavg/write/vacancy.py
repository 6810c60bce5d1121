"""Whether an output can be put where it is to go, and whether that is still so in the end."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from ckptavg.errors import OutputError, printable

if TYPE_CHECKING:
    from pathlib import Path


def check_destination(path: Path, *, force: bool) -> None:
    """Find out before the work starts whether the output can be put there.

    Raises:
        OutputError: it exists already, or its directory does not, or is not to be written to.
    """
    if path.is_dir():
        raise OutputError("is a directory", path=path, remedy="name a file")
    if path.exists() and not path.is_file():
        raise OutputError("is no regular file", path=path, remedy="name a file")
    if os.path.lexists(path) and not force:
        raise OutputError("exists already", path=path, remedy="--force replaces it")
    check_parent(path)


def check_vacant(path: Path, *, force: bool) -> None:
    """Refuse early what is there already, be the output a file or a directory.

    Raises:
        OutputError: it exists and is no empty directory, or nothing can be put there.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if os.path.lexists(path) and not force and not empty:
        raise OutputError("exists already", path=path, remedy="--force replaces it")
    check_parent(path)


def check_parent(path: Path) -> None:
    """Find out whether something can be put beside a path.

    Raises:
        OutputError: there is no such directory, or it is not to be written to.
    """
    if not path.parent.is_dir():
        raise OutputError(f"there is no directory {printable(path.parent)}", path=path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(path.parent)} is not to be written to", path=path)


def check_room(path: Path, size: int) -> None:
    """Find out before the work starts whether so many bytes are free beside a path.

    Raises:
        OutputError: they are not.
    """
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return
    blocks = found.f_bavail if os.geteuid() else found.f_bfree  # some are kept for root
    free = blocks * found.f_frsize
    if found.f_blocks and free < size:  # a file system that does not count has no blocks
        raise OutputError(
            f"cannot write it: {os.strerror(errno.ENOSPC)} "
            f"({size} bytes are needed, {free} are free)",
            path=path,
        )


def identify(path: Path) -> tuple[int, ...] | None:
    """What tells whether it is another file or directory now; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode):
        return status.st_dev, status.st_ino
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def refuse_another(path: Path, known: tuple[int, ...] | None) -> None:
    """Refuse to replace what has come there since `known` was found out.

    Raises:
        OutputError: somebody else has written it.
    """
    if identify(path) not in (None, known):
        raise OutputError(
            "somebody else wrote it meanwhile", path=path, remedy="start again, or name another"
        )
