"""The structure of checkpoints: the names, shapes and dtypes of their tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptavg.errors import MismatchError, printable
from ckptavg.formats.names import has_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptavg.formats.checkpoint import Checkpoint


def differences(first: Checkpoint, other: Checkpoint, *, any_rank: bool = False) -> Iterator[str]:
    """Every difference in names, shapes and dtypes, one line each.

    Args:
        first: the first checkpoint.
        other: the second checkpoint.
        any_rank: let the ranks of LoRA factors differ.
    """
    if other.tensors is first.tensors:
        return
    here, there = printable(first.path), printable(other.path)
    for name, tensor in first.tensors.items():
        label, twin = printable(name), other.tensors.get(name)
        if twin is None:
            yield f"{label}: in {here}, missing in {there}"
            continue
        if twin.shape != tensor.shape and not (any_rank and has_rank(name)):
            yield f"{label}: shape {tensor.shape} in {here}, {twin.shape} in {there}"
        if twin.dtype is not tensor.dtype:
            yield f"{label}: {tensor.dtype.name} in {here}, {twin.dtype.name} in {there}"
    for name in sorted(other.tensors.keys() - first.tensors.keys()):
        yield f"{printable(name)}: in {there}, missing in {here}"


def check_one_model(checkpoints: Sequence[Checkpoint], *, any_rank: bool = False) -> None:
    """Refuse checkpoints that are not of one model.

    Args:
        checkpoints: at least one.
        any_rank: let the ranks of LoRA factors differ.

    Raises:
        MismatchError: their names, shapes or dtypes differ; it lists all differences.
    """
    first, *others = checkpoints
    lines = [line for other in others for line in differences(first, other, any_rank=any_rank)]
    if lines:
        raise MismatchError("the checkpoints are not of one model:", lines)
