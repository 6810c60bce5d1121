"""Read `torch.distributed.checkpoint` directories."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptavg.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.checkpoint import Checkpoint

SUFFIXES = ()


def matches(path: Path, head: bytes) -> bool:
    """Whether it is a directory with DCP's metadata."""
    return not head and (path / ".metadata").is_file()


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:  # noqa: ARG001
    """Describe the model's part."""
    raise FormatError("is a DCP directory", path=path)
