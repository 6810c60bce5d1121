"""Read directories that DeepSpeed's engine writes: the weights are in `mp_rank_00_model_states.pt`.

With ZeRO they are in float32 in files of all ranks, which `zero` reads.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError
from ckptavg.formats.files import is_suffix, open_file
from ckptavg.formats.zero import is_partitioned, open_groups, open_partitions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

# Folders for the engine's files in checkpoints of accelerate and Lightning.
_FOLDERS = ("pytorch_model", "checkpoint")


def matches(path: Path) -> bool:
    """Whether the directory has files as the engine names them, or partitions and nothing else."""
    entries = list(path.iterdir())
    if _files(entries):
        return True
    others = [entry for entry in entries if is_suffix(entry.suffix)]
    return is_partitioned(others) and all(each.name.endswith("_states.pt") for each in others)


def _files(entries: Sequence[Path]) -> list[Path]:
    """The files with weights among the entries of a directory, and in the engine's own folder."""
    folders = [entry for entry in entries if entry.name in _FOLDERS and entry.is_dir()]
    if len(folders) == 1:
        entries = [*entries, *folders[0].iterdir()]
    files = [entry for entry in entries if entry.name.endswith("model_states.pt")]
    return sorted(files, key=lambda entry: entry.name)


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe the weights; FormatError if they are spread over several files, or missing."""
    files = _files(list(path.iterdir()))
    if not files:
        what = "is missing, which says where the weights are"
        raise FormatError(what, path=path / "*_model_states.pt")
    if is_partitioned(files):
        return open_partitions(path, files[0].parent, key)
    joined = open_groups(path, files[0], key) if len(files) == 1 else None
    if joined is not None:
        return joined
    checkpoint = open_file(files[0], key)
    if len(files) > 1:
        raise FormatError(
            f"has the weights in {len(files)} pieces ({files[0].name}, ...)",
            path=path,
            remedy="join them with the tools of the trainer that wrote them",
        )
    return replace(checkpoint, path=path)
