"""Whether an output can be written: checked before the work starts, and again at its end."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from ckptavg.errors import OutputError, printable
from ckptavg.formats import huggingface
from ckptavg.formats.paths import is_remote
from ckptavg.write.replacement import put_back

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ckptavg.merge.jobs import Layout

_SHOWN = 3
"""Names that a message lists of many."""


def followed(path: Path) -> Path:
    """Where writing to a path goes: if it is a link, the file or directory that it leads to."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_output(path: Path, layout: Layout, *, force: bool) -> None:
    """Check that an output can be written where it is to go.

    Raises:
        OutputError: it cannot.
    """
    if layout.is_directory:
        _check_directory(path, layout.files, force=force)
    else:
        check_file(path, force=force)
    check_room([(path, layout.size)])


def check_file(path: Path, *, force: bool) -> None:
    """Check that a file can be written.

    Raises:
        OutputError: it exists already, or its directory does not, or is not to be written to.
    """
    if path.is_dir():
        raise OutputError("is a directory", path=path, remedy="name a file")
    if path.exists() and not path.is_file():
        raise OutputError("is no regular file", path=path, remedy="name a file")
    check_vacant(path, force=force)


def _check_directory(path: Path, names: Collection[str], *, force: bool) -> None:
    """Check that a directory with these files can be written, and replaces no others."""
    folder = followed(path)
    put_back(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError("is no directory", path=path, remedy="choose another output")
    check_vacant(path, force=force)
    present = _entries(folder)
    if strangers := _strangers(folder, names) if present else []:
        shown = ", ".join(map(printable, strangers[:_SHOWN]))
        more = f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
        raise OutputError(
            f"holds what the output would not bring ({shown}{more}), and would be replaced",
            path=path,
            remedy="choose another output",
        )
    if folder.is_dir() and os.path.ismount(folder):
        raise OutputError(
            "is a mount point, which cannot be replaced", path=path, remedy="name a directory in it"
        )
    if present and not os.access(folder, os.W_OK | os.X_OK) and folder.exists():
        raise OutputError("is not to be written to", path=path, remedy="choose another output")


def _entries(folder: Path) -> list[str]:
    """The names in a directory; none if there is none, or if another run is replacing it."""
    try:
        return os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def _strangers(folder: Path, names: Collection[str]) -> list[str]:
    """The files in a directory, weights aside, that the directory replacing it would not have."""
    weights = huggingface.weight_files(folder) if huggingface.matches(folder) else ()
    strangers = []
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        folder_is_kept = entry.is_dir() and any(kept.startswith(f"{name}/") for kept in names)
        if name not in names and name not in weights and not folder_is_kept:
            strangers.append(name)
    return strangers


def check_vacant(path: Path, *, force: bool) -> None:
    """Check that nothing is in the place of an output, be it a file or a directory.

    Raises:
        OutputError: it exists and is no empty directory, or nothing can be written beside it.
    """
    is_empty_directory = path.is_dir() and not _entries(path)
    if os.path.lexists(path) and not force and not is_empty_directory:
        raise OutputError("exists already", path=path, remedy="`force` replaces it")
    check_parent(followed(path))


def check_parent(path: Path) -> None:
    """Check that something can be written beside a path.

    Raises:
        OutputError: there is no such directory, or it is not to be written to.
    """
    if not path.parent.is_dir():
        raise OutputError(f"there is no directory {printable(path.parent)}", path=path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(path.parent)} is not to be written to", path=path)


def check_room(outputs: Iterable[tuple[Path, int]]) -> None:
    """Check that each file system has room for all outputs on it, given by path and size in bytes.

    Raises:
        OutputError: a file system has not.
    """
    by_device: defaultdict[int, list[tuple[Path, int]]] = defaultdict(list)
    for path, size in outputs:
        with contextlib.suppress(OSError):
            by_device[followed(path).parent.stat().st_dev].append((path, size))
    for group in by_device.values():
        path, needed = group[0][0], sum(size for _, size in group)
        free = _free_bytes(followed(path).parent)
        if free is not None and free < needed:
            what = "" if len(group) == 1 else f" for {len(group)} outputs"
            raise OutputError(
                f"cannot write it: {os.strerror(errno.ENOSPC)} "
                f"({needed} bytes are needed{what}, {free} are free)",
                path=path,
            )


def _free_bytes(folder: Path) -> int | None:
    """Bytes that are free on a file system; None if it does not tell."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    blocks = status.f_bavail if os.geteuid() else status.f_bfree  # some are kept for root
    return blocks * status.f_frsize if status.f_blocks else None


def refuse_own_input(output: Path, files: Iterable[Path]) -> None:
    """Refuse an output that would replace one of the inputs' files.

    Raises:
        OutputError: it would.
    """
    within = output.resolve() if output.is_dir() else None
    for path in files:
        if is_remote(path):
            continue
        places = (path.parent.resolve() / path.name, path.resolve())
        if within and any(place.is_relative_to(within) for place in places):
            raise OutputError(
                "is the directory of the checkpoints", path=output, remedy="choose another output"
            )
        if output.exists() and path.exists() and output.samefile(path):
            raise OutputError(
                "is itself one of the checkpoints", path=output, remedy="choose another output"
            )


def identify(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or a directory replaced; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode):
        return status.st_dev, status.st_ino
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def refuse_another(path: Path, identity: tuple[int, ...] | None) -> None:
    """Refuse to replace what was not there when the work started.

    Raises:
        OutputError: another run has written it.
    """
    if identify(path) not in (None, identity):
        raise OutputError(
            "somebody else wrote it meanwhile", path=path, remedy="start again, or name another"
        )
