"""Readers of checkpoints: one module for each layout, with `matches` and `open_checkpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, SelectionError
from ckptavg.formats import dcp, deepspeed, huggingface, shards
from ckptavg.formats.files import SUFFIXES, is_suffix, open_file
from ckptavg.formats.paths import check_exists, is_remote, remote_errors

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.statedict import Key

__all__ = ["DIRECTORIES", "SUFFIXES", "is_checkpoint_directory", "is_suffix", "open_checkpoint"]


DIRECTORIES: tuple[ModuleType, ...] = (dcp, huggingface, deepspeed, shards)
"""Each has `matches(path)` and `open_checkpoint(path, key)`. The first that matches a directory
reads it. The formats of single files are in `files`."""


def open_checkpoint(path: Path, *, key: Key = None) -> Checkpoint:
    """Open a checkpoint and describe it. No tensor is read, and nothing in it is run.

    Args:
        path: the file or directory.
        key: name of the state dict to take where there are several, such as `state_dict_ema`. Those
            of several names in a torch file are one checkpoint.

    Raises:
        FormatError: it is damaged, or its layout is unknown.
        SelectionError: it holds several state dicts, and it is unclear which one is wanted.
    """
    with remote_errors(path):
        if not path.is_dir():
            if not is_remote(path):
                check_exists(path)
            return open_file(path, key)
        if isinstance(key, tuple):
            raise SelectionError(
                "is a directory: only a torch file holds several state dicts",
                path=path,
                remedy="choose one with `key`",
            )
        for module in DIRECTORIES:
            if module.matches(path):
                checkpoint: Checkpoint = module.open_checkpoint(path, key)
                return checkpoint
        raise FormatError("is a directory without weights in a known layout", path=path)


def is_checkpoint_directory(path: Path) -> bool:
    """Whether a directory is itself a checkpoint; one that merely contains some is not."""
    return path.is_dir() and any(module.matches(path) for module in DIRECTORIES)
