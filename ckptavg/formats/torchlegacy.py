"""Read what `torch.save` wrote before 1.6: a stream of pickles, and the storages after them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptavg.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.checkpoint import Checkpoint

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled


def matches(path: Path, head: bytes) -> bool:  # noqa: ARG001 - the formats' common signature
    """Whether the file begins with the magic number's pickle, of whatever protocol."""
    return head.startswith(b"\x80") and head[2:].startswith(_MAGIC)


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:  # noqa: ARG001
    """Describe one state dict of the file."""
    raise FormatError("was saved by torch older than 1.6", path=path)
