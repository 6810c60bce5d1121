"""Paths and URLs of checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from ckptavg.errors import CkptAvgError, SelectionError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


PathLike = str | os.PathLike[str]
"""A path on this machine, or a URL."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def as_path(text: str | os.PathLike[str]) -> Path:
    """A path; for a URL (`s3://bucket/run`) a `UPath`, which has the methods of a path.

    Raises:
        CkptAvgError: fsspec has no file system for the URL, or its package is not installed.
    """
    if is_remote(text):
        return cast("Path", text)
    address = os.fspath(text)
    scheme, is_url, _ = address.partition("://")
    if not is_url:
        return Path(address)
    from upath import UPath  # noqa: PLC0415 - importing fsspec takes longer than all else

    try:
        with warnings.catch_warnings(action="ignore"):  # about schemes that upath does not test
            path = UPath(address)
            _ = path.fs  # imports the package of the file system
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'ckptavg[{extra}]'" if extra else None
        raise CkptAvgError(str(error), path=address, remedy=remedy) from error
    except Exception as error:  # file systems raise exceptions of their own
        raise CkptAvgError(f"cannot be reached: {error}", path=address) from error
    return Path(os.fspath(path)) if isinstance(path, os.PathLike) else cast("Path", path)


def as_paths(inputs: PathLike | Iterable[PathLike]) -> list[Path]:
    """The paths of one input or of several; see `as_path`.

    A URL of the Hugging Face hub may name several revisions: `hf://org/repo@{step1,step2}`.
    """
    is_one = isinstance(inputs, str | os.PathLike) or is_remote(inputs)
    several = cast("Iterable[PathLike]", [inputs] if is_one else inputs)
    return [as_path(each) for text in several for each in _expanded(text)]


def _expanded(text: PathLike) -> Iterator[PathLike]:
    """The URLs that a shell would make of one with braces, if it was not quoted."""
    if not isinstance(text, str) or not text.startswith("hf://"):
        yield text
        return
    pieces = _BRACES.split(text)  # fixed texts and choices in turn
    choices = [piece.split(",") if place % 2 else [piece] for place, piece in enumerate(pieces)]
    yield from map("".join, itertools.product(*choices))


def is_remote(path: object) -> bool:
    """Whether it is a path behind a URL."""
    return not isinstance(path, str | bytes | os.PathLike) and hasattr(path, "fs")


@contextlib.contextmanager
def remote_errors(path: Path) -> Iterator[None]:
    """Raise a CkptAvgError for whatever exception the file system behind a URL raises."""
    try:
        yield
    except CkptAvgError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        reason = printable(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            is_path = str(path).endswith(reason.lstrip("/"))
            what = "does not exist" if is_path else f"does not exist: {reason}"
            raise CkptAvgError(what, path=path, remedy=_hint(path)) from error
        raise CkptAvgError(f"cannot read it: {reason}", path=path) from error


def check_exists(path: Path) -> None:
    """Raise a SelectionError if nothing is at a path of this machine.

    Its remedy counts what the path matches if it is a pattern, as in `ckpts/*.pt`.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SelectionError("does not exist", path=path, remedy=_hint(path)) from error
    except OSError:
        return  # it cannot be read, as whoever reads it says


def _hint(path: Path) -> str | None:
    """A remedy for a path that does not exist and looks like a pattern."""
    if not has_magic(str(path)):
        return None
    if is_remote(path):
        return "patterns in URLs are not expanded: name the directory, or each checkpoint"
    count = len(glob(str(path), recursive=True))  # noqa: PTH207 - as shells do, without hidden ones
    if not count:
        return "as a pattern it matches nothing"
    remedy = f"as a pattern it matches {count}: leave out the quotes, and the shell expands it"
    return remedy if has_magic(str(path.parent)) else f"{remedy}; or name {printable(path.parent)}/"


def shown(path: Path) -> str:
    """The path for a report; of a URL without user, password and query."""
    return printable(path) if is_remote(path) else str(path)


def absolute(path: Path) -> PurePosixPath | Path:
    """The absolute path, with its links; of a URL the part behind the scheme, without secrets."""
    if is_remote(path):
        address = str(path).partition("://")[2].partition("?")[0].lstrip("/")
        host, slash, rest = address.partition("/")
        return PurePosixPath("/", host.rpartition("@")[2] + slash + rest)
    return Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow links


def is_inside(name: str) -> bool:
    """Whether a relative path that a file names stays in the directory that it starts from."""
    return not ({"\\", "\0"} & set(name) or {"", ".", ".."} & set(name.split("/")))
