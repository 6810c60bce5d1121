"""The containers that can be read: one module each, with `matches` and `open_checkpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from ckptavg.errors import FormatError
from ckptavg.formats import safetensors, torchzip
from ckptavg.parts import File

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.checkpoint import Checkpoint

_HEAD = 16
_TAR_MAGIC = b"ustar"
_TAR_MAGIC_END = 262


class Format(Protocol):
    """What a module of this package offers."""

    SUFFIXES: tuple[str, ...]

    def matches(self, file: File, head: bytes) -> bool:
        """Whether the file is of this kind, by its first bytes."""

    def open_checkpoint(self, file: File, key: str | None) -> Checkpoint:
        """Describe what it holds, from headers alone."""


FORMATS = cast("tuple[Format, ...]", (safetensors, torchzip))
SUFFIXES = tuple(suffix for container in FORMATS for suffix in container.SUFFIXES)


def open_checkpoint(path: Path, *, key: str | None = None) -> Checkpoint:
    """Open a checkpoint and describe it; no tensor is read, nothing in it is run.

    Args:
        path: the file.
        key: which state dict to take of several, such as `state_dict_ema`.

    Raises:
        FormatError: it is damaged, or of no kind that is known here.
        SelectionError: it holds several state dicts and none of them is the plain one.
    """
    file = File(path)
    head = file.read(0, min(_HEAD, file.size))
    for container in FORMATS if file.size else ():
        if container.matches(file, head):
            return container.open_checkpoint(file, key)
    raise FormatError(unknown(file, head), path=path)


def unknown(file: File, head: bytes) -> str:
    """Why a file is of no kind that is known here."""
    if not file.size:
        return "is empty: was the disk full when it was written?"
    if torchzip.is_legacy(head):
        return "was saved by torch older than 1.6; load it and save it again with a newer torch"
    if file.size >= _TAR_MAGIC_END and file.read(0, _TAR_MAGIC_END).endswith(_TAR_MAGIC):
        return "is a tar archive, not a torch file"
    return "is neither safetensors nor a torch file (or is damaged at its start)"
