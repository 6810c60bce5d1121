"""What a checkpoint holds, from its headers alone, for `inspect`."""

from __future__ import annotations

import dataclasses
from collections import Counter
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
    """A state dict in a checkpoint.

    Attributes:
        path: the file or directory.
        container: `safetensors`, `torch`, `huggingface` or `dcp`.
        file_bytes: size of its files.
        state_dict: name of the state dict; empty where it is the whole file.
        other_state_dicts: names of the others in the file.
        tensors: number of tensors.
        elements: number of elements of all tensors.
        tensor_bytes: bytes of all tensors.
        dtypes: number of tensors of each dtype.
        facts: `global_step`, `step`, `epoch`, `learning_rate`, where recorded.
        norm_layers: number of layers with running statistics.
        provenance: what ckptavg recorded in an average of its own; None for other files.
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

    @staticmethod
    def of(checkpoint: Checkpoint) -> Description:
        """Describe an opened checkpoint."""
        names, tensors = checkpoint.tensors.keys(), checkpoint.tensors.values()
        return Description(
            path=shown(checkpoint.path),
            container=checkpoint.container,
            file_bytes=checkpoint.size,
            state_dict=checkpoint.key,
            other_state_dicts=checkpoint.other_keys,
            tensors=len(tensors),
            elements=sum(tensor.count for tensor in tensors),
            tensor_bytes=sum(tensor.nbytes for tensor in tensors),
            dtypes=dict(Counter(tensor.dtype.name for tensor in tensors)),
            facts=dict(checkpoint.facts),
            norm_layers=sum(is_norm_statistic(name) and name.endswith("mean") for name in names),
            provenance=checkpoint.provenance,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def describe(path: Path, *, key: str | None = None) -> list[Description]:
    """Describe the state dict that `average` would take, or all where that is unclear.

    Raises:
        FormatError: the file is damaged, or its layout is unknown.
        SelectionError: it has no state dict, or none with the name `key`.
    """
    try:
        return [Description.of(open_checkpoint(path, key=key))]
    except SelectionError as error:
        if not error.choices:
            raise
        return [Description.of(open_checkpoint(path, key=choice)) for choice in error.choices]
