"""Checkpoints of one model, reduced to where their tensors are.

Each is held against the first one and reduced to offset arrays in the order of its tensors: twenty
checkpoints of 100,000 tensors fit into memory that way.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ckptavg.errors import printable
from ckptavg.formats.tensors import Tensor
from ckptavg.merge.lora import has_rank
from ckptavg.select.order import labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint reduced to where its tensors are, in the order of the reference's tensors.

    Attributes:
        checkpoint: what else it is; its `tensors` are left out.
        parts: the part that each tensor is in, `[num_tensors]`.
        offsets: where in its part it begins, in bytes, `[num_tensors]`.
        strides: of those tensors that are not contiguous, by index.
        shapes: of those tensors that have another shape than the reference's, by index: factors
            of LoRA adapters, whose ranks may differ.
    """

    checkpoint: Checkpoint
    parts: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    strides: Mapping[int, tuple[int, ...]]
    shapes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The checkpoint's path."""
        return self.checkpoint.path

    def tensor(self, index: int, like: Tensor) -> Tensor:
        """The tensor at an index, which is like the reference's."""
        return Tensor(
            like.dtype,
            self.shapes.get(index, like.shape),
            int(self.parts[index]),
            int(self.offsets[index]),
            self.strides.get(index),
        )

    def same_place(self, one: int, other: int) -> bool:
        """Whether two tensors of one dtype and shape have the same bytes."""
        return (
            self.parts[one] == self.parts[other]
            and self.offsets[one] == self.offsets[other]
            and self.strides.get(one) == self.strides.get(other)
        )


@dataclass(frozen=True)
class Collection:
    """Checkpoints of one model, in the order of training.

    Attributes:
        tensors: name to description, as the reference (the first one opened) has them.
        sources: one for each checkpoint.
        order_is_known: whether the order comes from steps, or is but that of the names.
        files: all files that were opened, those of copies included.
    """

    tensors: Mapping[str, Tensor]
    sources: tuple[Source, ...]
    order_is_known: bool
    files: tuple[Path, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of the arrays."""
        return tuple(self.tensors)

    @cached_property
    def described(self) -> tuple[Tensor, ...]:
        """The tensors' descriptions, in the order of the arrays."""
        return tuple(self.tensors.values())

    @staticmethod
    def of_one(checkpoint: Checkpoint) -> Collection:
        """A single checkpoint, names as they are."""
        return Collection(
            checkpoint.tensors, (locate(checkpoint.tensors, checkpoint),), order_is_known=True
        )

    def labels(self) -> tuple[str, ...]:
        """The sources' paths below the folder that they have in common."""
        return labels([source.path for source in self.sources])


def compare(reference: Checkpoint, other: Checkpoint, *, any_rank: bool = False) -> Iterator[str]:
    """Every difference of names, shapes and dtypes, a line each."""
    mine, theirs = printable(reference.path), printable(other.path)
    for name, tensor in reference.tensors.items():
        found = other.tensors.get(name)
        if found is None:
            yield f"{printable(name)}: in {mine}, missing in {theirs}"
            continue
        if found.shape != tensor.shape and not (any_rank and has_rank(name)):
            yield f"{printable(name)}: shape {tensor.shape} in {mine}, {found.shape} in {theirs}"
        if found.dtype is not tensor.dtype:
            yield (
                f"{printable(name)}: {tensor.dtype.name} in {mine}, {found.dtype.name} in {theirs}"
            )
    for name in sorted(other.tensors.keys() - reference.tensors.keys()):
        yield f"{printable(name)}: in {theirs}, missing in {mine}"


def locate(reference: Mapping[str, Tensor], checkpoint: Checkpoint) -> Source:
    """Reduce a checkpoint to where its tensors are, in the order of the reference's."""
    tensors = [checkpoint.tensors[name] for name in reference]
    return Source(
        replace(checkpoint, tensors={}),
        np.array([tensor.part for tensor in tensors], np.int32),
        np.array([tensor.offset for tensor in tensors], np.int64),
        {
            index: tensor.strides
            for index, tensor in enumerate(tensors)
            if tensor.strides is not None
        },
        {
            index: tensor.shape
            for index, (tensor, like) in enumerate(zip(tensors, reference.values(), strict=True))
            if tensor.shape != like.shape
        },
    )
