"""The layouts in which a checkpoint is one file."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, NoStateDictError
from ckptavg.formats import plugins, safetensors, torchlegacy, torchzip
from ckptavg.formats.dcpfiles import METADATA
from ckptavg.formats.parts import open_source
from ckptavg.formats.words import parse_shard_name

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.statedict import Key

_HEAD_BYTES = 512
_LFS = b"version https://git-lfs"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_ZIP_MAGIC = b"PK\3\4"
_TEXT = string.printable.encode()


FILES: tuple[ModuleType, ...] = (safetensors, torchzip, torchlegacy)
"""Each has `SUFFIXES`, `matches(path, head)` with the first 512 bytes, and `open_checkpoint(file,
key)`. The first that matches a file reads it."""
SUFFIXES: tuple[str, ...] = tuple(
    dict.fromkeys(suffix for module in FILES for suffix in module.SUFFIXES)
)


def is_suffix(suffix: str) -> bool:
    """Whether files with this suffix may be checkpoints: we, or another package, read them."""
    return suffix in SUFFIXES or plugins.has_reader(suffix)


def open_file(path: Path, key: Key) -> Checkpoint:
    """Describe the checkpoint in a file.

    Raises:
        FormatError: the file is damaged, has pieces of tensors, or no format matches it.
        SelectionError: it is unclear which of its state dicts is wanted.
    """
    if path.suffix == ".distcp" or path.name == METADATA:
        what = "is a part of a directory of torch.distributed.checkpoint"
        raise FormatError(what, path=path, remedy="name the directory")
    checkpoint = open_shard(path, key)
    if not checkpoint.shard_places:
        return checkpoint
    name, place = next(iter(checkpoint.shard_places.items()))
    ranks, usual = "several", "shard-00001-model-00001-of-00001.safetensors"
    if place.ranks is not None:
        ranks, usual = str(place.ranks), f"model_world_size_{place.ranks}_rank_0.pt"
    remedy = "name the directory, with the files of all ranks"
    if not parse_shard_name(path.name):
        remedy = f"rename the files of all ranks to {usual} and so on, and name their directory"
    what = f"holds the part of one rank of {ranks}, not whole tensors"
    raise FormatError(what, path=path, tensor=name, remedy=remedy)


def open_shard(path: Path, key: Key) -> Checkpoint:
    """Describe what a file has, pieces of tensors among it; errors as for `open_file`."""
    file = open_source(path)
    if path.suffix not in SUFFIXES and plugins.has_reader(path.suffix):
        return plugins.open_with_plugin(file, key)
    head = file.read(0, min(_HEAD_BYTES, file.size))
    if head.startswith(_LFS):  # whatever its name
        problem = "is a pointer of Git LFS, without the file itself"
        raise FormatError(problem, path=path, remedy="`git lfs pull` downloads it")
    for module in FILES:
        if module.matches(path, head):
            checkpoint: Checkpoint = module.open_checkpoint(file, key)
            return checkpoint
    if not head:
        problem = "is empty: was the disk full when it was written?"
    elif not head.translate(None, _TEXT) and not _ZIP_MAGIC.startswith(head):
        raise NoStateDictError("is a text file, not a checkpoint", path=path)
    elif head[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        problem = "is a tar archive, not a torch file"
    else:
        problem = "is neither safetensors nor a torch file (or is damaged at its start)"
    raise FormatError(problem, path=path)
