"""Readers of checkpoints: one module for each layout, with `matches` and `open_checkpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptavg.errors import FormatError
from ckptavg.formats import dcp, deepspeed, huggingface, shards
from ckptavg.formats.files import SUFFIXES, open_file
from ckptavg.formats.parts import remote_errors

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from ckptavg.formats.checkpoint import Checkpoint

__all__ = ["DIRECTORIES", "SUFFIXES", "is_checkpoint_directory", "open_checkpoint"]


DIRECTORIES: tuple[ModuleType, ...] = (dcp, huggingface, deepspeed, shards)
"""Each has `matches(path)` and `open_checkpoint(path, key)`. The first that matches a directory
reads it. The formats of single files are in `files`."""


def open_checkpoint(path: Path, *, key: str | None = None) -> Checkpoint:
    """Open a checkpoint and describe it. No tensor is read, and nothing in it is run.

    Args:
        path: the file or directory.
        key: name of the state dict to take where there are several, such as `state_dict_ema`.

    Raises:
        FormatError: it is damaged, or its layout is unknown.
        SelectionError: it holds several state dicts, and it is unclear which one is wanted.
    """
    with remote_errors(path):
        if not path.is_dir():
            return open_file(path, key)
        for module in DIRECTORIES:
            if module.matches(path):
                checkpoint: Checkpoint = module.open_checkpoint(path, key)
                return checkpoint
        raise FormatError("is a directory without weights in a known layout", path=path)


def is_checkpoint_directory(path: Path) -> bool:
    """Whether a directory is itself a checkpoint; one that merely contains some is not."""
    return path.is_dir() and any(module.matches(path) for module in DIRECTORIES)
