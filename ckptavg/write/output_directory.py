"""Write a directory so that it is there whole or not at all.

Its files are written into a temporary directory beside its destination, which then takes its name:
by a rename, or, where a directory is replaced, by one exchange of the two names.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ckptavg.errors import OutputError, printable
from ckptavg.formats import huggingface
from ckptavg.write.output import OutputFile
from ckptavg.write.scratch import alone_in, folder_beside, place_aside, put_back
from ckptavg.write.vacancy import check_parent, identify, refuse_another

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import TracebackType

    from ckptavg.merge.layout import Layout

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE, and RENAME_SWAP of macOS
_SHOWN = 3


def check_directory_destination(path: Path, names: Collection[str], *, force: bool) -> None:
    """Find out before the work starts whether a directory can be put there.

    Args:
        path: where it goes.
        names: what will be in it.
        force: replace a directory, if it holds nothing that the new one does not bring.

    Raises:
        OutputError: it cannot.
    """
    put_back(path)
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError("is no directory", path=path, remedy="choose another output")
    try:
        present = sorted(os.listdir(path)) if path.is_dir() else []  # noqa: PTH208
        strangers = _strangers(path, names) if present and force else []
    except FileNotFoundError:  # another run moves it aside at this moment
        present, strangers = [], []
    if present and not force:
        raise OutputError("exists already", path=path, remedy="--force replaces it")
    if strangers:
        shown = ", ".join(map(printable, strangers[:_SHOWN]))
        more = f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
        raise OutputError(
            f"holds what the output would not bring ({shown}{more}), and would be replaced",
            path=path,
            remedy="choose another output with -o",
        )
    if path.is_dir() and os.path.ismount(path):
        raise OutputError(
            "is a mount point, which cannot be replaced", path=path, remedy="name a directory in it"
        )
    if present and not os.access(path, os.W_OK | os.X_OK) and os.path.lexists(path):
        raise OutputError("is not to be written to", path=path, remedy="choose another output")
    check_parent(path)


def _strangers(path: Path, names: Collection[str]) -> list[str]:
    """What is in a directory and would not be in the new one, but for the weights themselves."""
    known = {*names, *huggingface.weight_files(path)}
    strangers = []
    for entry in sorted(path.rglob("*")):
        name = entry.relative_to(path).as_posix()
        folder_is_kept = entry.is_dir() and any(one.startswith(f"{name}/") for one in names)
        if name not in known and not folder_is_kept:
            strangers.append(name)
    return strangers


class OutputDirectory:
    """The output while it is being written: a context that leaves nothing behind unless committed.

    Args:
        path: its destination.
        layout: its files.
        force: replace what is there.
        fsync: have it on the disk before it gets its name.
        shared: other processes write to it as well, which find its files by their names.

    Raises:
        OutputError: there is no room, or the disk fails.
    """

    def __init__(
        self, path: Path, layout: Layout, *, force: bool, fsync: bool, shared: bool = False
    ) -> None:
        self.path = path.resolve() if path.is_symlink() else path
        self._layout, self._force, self._fsync = layout, force, fsync
        self._bases, self._shared = layout.bases, shared
        self._replaced = identify(self.path)
        self._files: list[OutputFile] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(folder_beside(self.path))
            with self._explained():
                for name, layout in self._layout.files.items():
                    path = self._folder / name
                    path.parent.mkdir(exist_ok=True)
                    file = OutputFile(
                        path, layout, force=False, fsync=self._fsync, shared=self._shared
                    )
                    self._files.append(stack.enter_context(file))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def temporary(self) -> tuple[Path, ...]:
        """Where other processes find its files, while they are written."""
        return tuple(path for file in self._files for path in file.temporary)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`. Safe from several threads at once."""
        # Of files without a byte, which have one base, the last is no empty one.
        number = bisect.bisect_right(self._bases, offset) - 1
        with self._explained():
            self._files[number].write(offset - self._bases[number], data)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with what was written from `offset`; it does not reach over a file's end."""
        number = bisect.bisect_right(self._bases, offset) - 1
        self._files[number].read_into(offset - self._bases[number], out)

    def commit(self) -> None:
        """Bring all files to the disk, and give the directory its name."""
        with self._explained():
            for file in self._files:
                file.commit()
            if self._fsync:
                for folder in {(self._folder / name).parent for name in self._layout.files}:
                    _sync(folder)
            self._publish()
            if self._fsync:
                with contextlib.suppress(OSError):
                    _sync(self.path.parent)

    def _publish(self) -> None:
        if not self._force:
            self._folder.rename(self.path)  # over an empty directory, and over no other
            return
        for name in ("", *self._layout.files):
            with contextlib.suppress(FileNotFoundError):  # a rival may move it aside just now
                (self._folder / name).chmod(stat.S_IMODE((self.path / name).stat().st_mode))
        with alone_in(self.path.parent):
            if not self.path.exists():
                self._folder.rename(self.path)
                return
            refuse_another(self.path, self._replaced)
            try:
                exchange(self._folder, self.path)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._replace_in_two_steps()

    def _replace_in_two_steps(self) -> None:
        """For file systems that cannot exchange two names. The next run mends it, if need be."""
        aside = place_aside(self.path)
        try:
            self.path.rename(aside)
            self._folder.rename(self.path)
        finally:  # after a signal's exception, too
            if os.path.lexists(self.path):
                try:
                    aside.rename(self._folder)  # which goes away
                except OSError:
                    shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(self.path)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OutputError as error:
            if isinstance(error.path, Path) and error.path.is_relative_to(self._folder):
                error.path = self.path / error.path.relative_to(self._folder)
            error.remedy = error.remedy or _remedy(error.__cause__)
            raise
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputError(
                    "exists already: somebody else wrote it meanwhile",
                    path=self.path,
                    remedy="--force replaces it",
                ) from error
            raise OutputError(
                f"cannot write it: {error.strerror}", path=self.path, remedy=_remedy(error)
            ) from error


def _remedy(error: BaseException | None) -> str | None:
    many = isinstance(error, OSError) and error.errno == errno.EMFILE
    return "a larger --max-shard-size makes fewer files" if many else None


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


def _sync(path: Path) -> None:
    """Bring the names in a directory to the disk; not every file system can."""
    directory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(directory)
    finally:
        os.close(directory)
