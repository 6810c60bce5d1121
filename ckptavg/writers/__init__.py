"""The containers that can be written: each lays out a file from descriptions alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptavg.errors import OutputError
from ckptavg.writers.safetensors import lay_out_safetensors
from ckptavg.writers.torchzip import lay_out_torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ckptavg.layout import Layout, OutputTensor

_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def container_for(path: Path) -> str:
    """Which container an output's extension stands for: `safetensors` or `torch`.

    Raises:
        OutputError: it stands for none.
    """
    if path.is_dir():
        raise OutputError("is a directory", path=path, remedy="name a file in it")
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in _TORCH:
        return "torch"
    raise OutputError(
        f"cannot tell a container from the ending {path.suffix!r}",
        path=path,
        remedy=f"let it end with .safetensors or one of {' '.join(_TORCH)}",
    )


def lay_out(
    path: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    module_versions: Mapping[str, Any] | None,
) -> Layout:
    """Lay out the file that the path's ending asks for.

    Args:
        path: the output.
        tensors: in the order in which they are to stand.
        metadata: strings that describe it.
        module_versions: torch's `_metadata`, which only a torch file can carry.
    """
    if container_for(path) == "safetensors":
        return lay_out_safetensors(path, tensors, metadata)
    return lay_out_torch(tensors, metadata, module_versions)
