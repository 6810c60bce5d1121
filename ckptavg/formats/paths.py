"""Paths on this machine, and URLs that behave like them."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from ckptavg.errors import CkptAvgError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

PathLike = str | os.PathLike[str]
"""A path on this machine, or a URL."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def as_path(text: str | os.PathLike[str]) -> Path:
    """A path, or what fsspec knows behind a URL (`s3://bucket/run`) as something like one.

    Raises:
        CkptAvgError: no file system is known for the URL, or its package is not installed.
    """
    if is_remote(text):
        return cast("Path", text)
    spelled = os.fspath(text)
    scheme, mark, _ = spelled.partition("://")
    if not mark:
        return Path(spelled)
    from upath import UPath  # noqa: PLC0415 - fsspec takes longer than all else

    try:
        with warnings.catch_warnings(action="ignore"):  # of schemes that it does not know well
            path = UPath(spelled)
            _ = path.fs  # the file system's package is looked for only now
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'ckptavg[{extra}]'" if extra else None
        raise CkptAvgError(str(error), path=spelled, remedy=remedy) from error
    # Whatever a file system of somebody else's raises on an address that it does not like.
    except Exception as error:
        raise CkptAvgError(f"cannot be reached: {error}", path=spelled) from error
    return Path(os.fspath(path)) if isinstance(path, os.PathLike) else cast("Path", path)


def is_remote(path: object) -> bool:
    """Whether it is something like a path, behind a URL."""
    return not isinstance(path, str | bytes | os.PathLike) and hasattr(path, "fs")


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Say in one line what a file system behind a URL raises: each has exceptions of its own.

    Raises:
        CkptAvgError: it raised one.
    """
    try:
        yield
    except CkptAvgError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        what = printable(error) or type(error).__name__
        raise CkptAvgError(f"cannot be reached: {what}", path=path) from error


def shown(path: Path) -> str:
    """The path for a report: of an address without user, password and query."""
    return printable(path) if is_remote(path) else str(path)


def absolute(path: Path) -> PurePosixPath | Path:
    """The whole path, links in it left as they are; of a URL what stands behind the scheme."""
    if is_remote(path):
        address = str(path).partition("://")[2].partition("?")[0].lstrip("/")
        host, slash, rest = address.partition("/")
        return PurePosixPath("/", host.rpartition("@")[2] + slash + rest)
    return Path(os.path.abspath(path))  # noqa: PTH100 - links stay links


def file_system(path: Any) -> tuple[Any, str]:  # noqa: ANN401 - a universal_pathlib path
    """The fsspec file system behind a URL, and the path in it."""
    return path.fs, path.path
