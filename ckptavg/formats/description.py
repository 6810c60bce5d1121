"""What a checkpoint holds, from its headers alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.errors import SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.names import is_norm_statistic
from ckptavg.formats.paths import shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Description:
    """A state dict in a file.

    Attributes:
        path: the file.
        container: `safetensors` or `torch`.
        file_bytes: its size.
        state_dict: which state dict this is; empty where it is the whole file.
        other_state_dicts: those that are there beside it.
        tensors: how many tensors it has.
        elements: how many elements they have.
        tensor_bytes: bytes of them.
        dtypes: number of tensors of each dtype.
        facts: `global_step`, `step`, `epoch`, `learning_rate`, where recorded.
        norm_layers: number of layers with running statistics.
        provenance: what this tool wrote into it, if it did.
    """

    path: str
    container: str
    file_bytes: int
    state_dict: str
    other_state_dicts: tuple[str, ...]
    tensors: int
    elements: int
    tensor_bytes: int
    dtypes: Mapping[str, int]
    facts: Mapping[str, int | float]
    norm_layers: int
    provenance: Mapping[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def describe(path: Path, *, key: str | None = None) -> list[Description]:
    """Describe the state dict that would be averaged, or each one where that is unclear.

    Raises:
        FormatError: the file is damaged or of an unknown kind.
        SelectionError: it holds no state dict, or not the one asked for.
    """
    try:
        return [_describe(open_checkpoint(path, key=key))]
    except SelectionError as error:
        if not error.choices:
            raise
        return [_describe(open_checkpoint(path, key=choice)) for choice in error.choices]


def _describe(checkpoint: Checkpoint) -> Description:
    dtypes: defaultdict[str, int] = defaultdict(int)
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype.name] += 1
    return Description(
        path=shown(checkpoint.path),
        container=checkpoint.container,
        file_bytes=checkpoint.size,
        state_dict=checkpoint.key,
        other_state_dicts=checkpoint.other_keys,
        tensors=len(checkpoint.tensors),
        elements=sum(tensor.count for tensor in checkpoint.tensors.values()),
        tensor_bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        dtypes=dict(dtypes),
        facts=dict(checkpoint.facts),
        norm_layers=sum(
            is_norm_statistic(name) and name.endswith("mean") for name in checkpoint.tensors
        ),
        provenance=checkpoint.provenance,
    )
