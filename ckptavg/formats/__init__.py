"""The layouts that can be read: one module each, with `matches` and `open_checkpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from ckptavg.errors import FormatError
from ckptavg.formats import dcp, deepspeed, huggingface, safetensors, torchlegacy, torchzip
from ckptavg.formats.parts import open_source
from ckptavg.formats.paths import reaching

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

_HEAD = 512
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


class Format(Protocol):
    """What a module of this package offers.

    Attributes:
        SUFFIXES: how names of such files end; none where a checkpoint is a directory.
    """

    SUFFIXES: tuple[str, ...]

    def matches(self, path: Path, head: bytes) -> bool:
        """Whether it is of this kind: a file by its first bytes (none of a directory)."""

    def open_checkpoint(self, path: Path, key: str | None) -> Checkpoint:
        """Describe what it holds, from headers alone."""


FORMATS = cast(
    "tuple[Format, ...]",
    # Directories first, then files; of two that match, the first is taken.
    (dcp, huggingface, deepspeed, safetensors, torchzip, torchlegacy),
)
SUFFIXES = tuple(dict.fromkeys(suffix for found in FORMATS for suffix in found.SUFFIXES))


def open_checkpoint(path: Path, *, key: str | None = None) -> Checkpoint:
    """Open a checkpoint and describe it; no tensor is read, nothing in it is run.

    Args:
        path: the file or directory.
        key: which state dict to take of several, such as `state_dict_ema`.

    Raises:
        FormatError: it is damaged, or of no kind that is known here.
        SelectionError: it holds several state dicts and none of them is the plain one.
    """
    with reaching(path):
        head = b"" if path.is_dir() else _head(path)
        found = _format_of(path, head)
        if found is None:
            raise FormatError(_unknown(path, head), path=path)
        return found.open_checkpoint(path, key)


def is_checkpoint_directory(path: Path) -> bool:
    """Whether a directory is itself a checkpoint, and does not only hold some."""
    return path.is_dir() and _format_of(path, b"") is not None


def _format_of(path: Path, head: bytes) -> Format | None:
    return next((found for found in FORMATS if found.matches(path, head)), None)


def _head(path: Path) -> bytes:
    file = open_source(path)
    return file.read(0, min(_HEAD, file.size))


def _unknown(path: Path, head: bytes) -> str:
    """Why something is of no kind that is known here."""
    if path.is_dir():
        return "is a directory without weights of a kind that is known here"
    if not head:
        return "is empty: was the disk full when it was written?"
    if head[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        return "is a tar archive, not a torch file"
    return "is neither safetensors nor a torch file (or is damaged at its start)"
