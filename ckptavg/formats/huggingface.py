"""Read the directories that Hugging Face's libraries write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptavg.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.checkpoint import Checkpoint

SUFFIXES = ()


def matches(path: Path, head: bytes) -> bool:
    """Whether it is a directory with weights by the names of these libraries."""
    return not head and (path / "model.safetensors").is_file()


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:  # noqa: ARG001
    """Describe its weights."""
    raise FormatError("is a Hugging Face directory", path=path)
