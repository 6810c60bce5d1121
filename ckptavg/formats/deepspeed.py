"""Read the directories of DeepSpeed's engine: the weights are in `mp_rank_00_model_states.pt`.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html. There they are the `module`,
with the real shapes of the parameters in `param_shapes`: a list of mappings, one for each group of
the optimizer. ZeRO's stage 3 leaves each parameter empty there, and its pieces in other files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg import formats
from ckptavg.errors import FormatError
from ckptavg.formats.pickled import PickledTensor

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

SUFFIXES = ()
_ENDING = "model_states.pt"
# Where accelerate and Lightning have the engine write, in checkpoints of their own.
_INNER = ("pytorch_model", "checkpoint")
_MARKS = ("ds_version", "ds_config", "dp_world_size")


def matches(path: Path, head: bytes) -> bool:
    """Whether it is a directory with the files that the engine writes."""
    return not head and path.is_dir() and bool(_files(path))


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
    opened = formats.open_checkpoint(files[0], key=key)
    if len(files) > 1:
        raise FormatError(
            f"has the weights in {len(files)} pieces ({files[0].name}, ...)",
            path=path,
            remedy="put them together with the tools of the trainer that wrote them",
        )
    return replace(opened, path=path)


def is_deepspeed(root: object) -> TypeGuard[Mapping[Any, object]]:
    """Whether DeepSpeed's engine wrote this, by what stands beside the weights."""
    return isinstance(root, Mapping) and "module" in root and any(mark in root for mark in _MARKS)


def is_partitioned(root: Mapping[Any, object]) -> bool:
    """Whether the weights are spread over other files: stage 3 of ZeRO."""
    match root.get("ds_config"):
        case {"zero_optimization": {"stage": 3}}:
            return True
    module = root["module"]
    if not isinstance(module, Mapping):
        return False
    return any(_is_emptied(module.get(name), shape) for name, shape in _shapes(root))


def _is_emptied(value: object, shape: object) -> bool:
    return isinstance(value, PickledTensor) and value.shape == (0,) and shape != (0,)


def _shapes(root: Mapping[Any, object]) -> Iterator[tuple[object, object]]:
    """Name and shape of each parameter, of the trained ones and of the frozen ones."""
    groups = root.get("param_shapes")
    for group in (*(groups if isinstance(groups, list) else ()), root.get("frozen_param_shapes")):
        if isinstance(group, Mapping):
            yield from group.items()
