"""Formats of other packages: each entry point of the group `ckptavg.formats` reads one suffix."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ckptavg.errors import CkptAvgError, FormatError, listed, printable
from ckptavg.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

    from ckptavg.formats.parts import Part
    from ckptavg.formats.statedict import Key

_GROUP = "ckptavg.formats"


def has_reader(suffix: str) -> bool:
    """Whether an installed package reads files with this suffix."""
    # `epoch=3-loss=0.5` has no suffix, and packages are not looked through for it.
    return suffix[1:2].isalpha() and bool(_entry_points(suffix))


def open_with_plugin(file: Part, key: Key) -> Checkpoint:
    """Have the package that reads files with this suffix describe one.

    Raises:
        FormatError: the file is damaged, two packages read such files, or the package is at fault.
    """
    suffix = file.path.suffix
    [entry_point, *others] = _entry_points(suffix)
    if others:
        names = listed(sorted(map(_package, (entry_point, *others))))
        problem = f"several packages read {suffix}: {names}"
        raise FormatError(problem, path=file.path, remedy="uninstall all but one")
    try:
        checkpoint = entry_point.load()(file, key)
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"{entry_point.value} returns no Checkpoint")  # noqa: TRY301
    except CkptAvgError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise FormatError(
            f"the package {_package(entry_point)} failed to read it: {kind}: {printable(error)}",
            path=file.path,
            remedy="this is a bug of that package",
        ) from error
    return checkpoint


def _entry_points(suffix: str) -> list[EntryPoint]:
    """The entry points that read files with this suffix."""
    return [each for each in _all_entry_points() if each.name == suffix[1:]]


@functools.cache
def _all_entry_points() -> EntryPoints:
    """The entry points of the group; this reads the metadata of all installed packages."""
    from importlib.metadata import entry_points  # noqa: PLC0415 - 20 ms that most commands save

    return entry_points(group=_GROUP)


def _package(entry_point: EntryPoint) -> str:
    """The package of an entry point, with its version."""
    return f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else "unknown"
