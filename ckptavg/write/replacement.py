"""Replace a directory by another: in one step, or in two where the file system has no exchange."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import shutil
import sys
from typing import TYPE_CHECKING

from ckptavg.errors import printable
from ckptavg.write.temporary import locked, remove

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("ckptavg")

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, and RENAME_SWAP of macOS


def replace_directory(path: Path, new: Path) -> None:
    """Rename a directory to the name of an existing one, which gets the new one's name.

    Where the file system cannot exchange two names, the old directory is moved aside first. If the
    process is killed before the new one has the name, `put_back` restores the old one.

    Args:
        path: the directory that is replaced.
        new: the directory that replaces it.

    Raises:
        OSError: the directory cannot be replaced, and is as it was.
    """
    try:
        exchange(new, path)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
    else:
        return
    aside = _name_aside(path)
    try:
        path.rename(aside)
        new.rename(path)
    finally:  # after a signal's exception, too
        if not os.path.lexists(path):
            aside.rename(path)
        else:
            try:
                aside.rename(new)
            except OSError:
                shutil.rmtree(aside, ignore_errors=True)


def put_back(path: Path) -> None:
    """Put a directory back that a killed run had moved aside, or remove it if it was replaced."""
    aside = _name_aside(path)
    if os.path.lexists(aside):
        with contextlib.suppress(OSError), locked(path.parent):
            if os.path.lexists(path):
                remove(aside)
            else:
                aside.rename(path)
                name = printable(path)
                log.info("restored what a killed run had moved aside: %s", name)


def _name_aside(path: Path) -> Path:
    """Where a directory is moved that is replaced in two steps. It is the same in every run."""
    return path.parent / f".ckptavg-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}.old"


def exchange(one: Path, other: Path) -> None:
    """Exchange two names in one step.

    Raises:
        OSError: the system (ENOSYS) or the file system (EINVAL) cannot.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        result = library.renamex_np(*names, _EXCHANGE)
    elif hasattr(library, "renameat2"):
        result = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))
