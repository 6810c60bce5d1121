"""Read directories that DeepSpeed's engine writes: the weights are in `mp_rank_00_model_states.pt`.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError
from ckptavg.formats.files import open_file

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

_ENDING = "model_states.pt"
# Where accelerate and Lightning have the engine write, in checkpoints of their own.
_INNER = ("pytorch_model", "checkpoint")


def matches(path: Path) -> bool:
    """Whether it is a directory with the files that the engine writes."""
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    entries = list(path.iterdir())
    inner = [entry for entry in entries if entry.name in _INNER and entry.is_dir()]
    if len(inner) == 1:
        entries += inner[0].iterdir()
    files = [entry for entry in entries if entry.name.endswith(_ENDING)]
    return sorted(files, key=lambda entry: entry.name)


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe the weights.

    Raises:
        FormatError: they are spread over several files, which DeepSpeed itself can put together.
    """
    files = _files(path)
    opened = open_file(files[0], key)
    if len(files) > 1:
        raise FormatError(
            f"has the weights in {len(files)} pieces ({files[0].name}, ...)",
            path=path,
            remedy="put them together with the tools of the trainer that wrote them",
        )
    return replace(opened, path=path)
