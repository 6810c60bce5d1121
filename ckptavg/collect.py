"""Which checkpoints go into an average: find them, open them, hold them against each other.

Checkpoints are opened one at a time and reduced to where their tensors are, in the order of the
first one's: twenty checkpoints of 100,000 tensors fit into memory that way.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ckptavg.checkpoint import Checkpoint, without_wrappers
from ckptavg.compare import Contents
from ckptavg.discover import find, hint
from ckptavg.errors import MismatchError, SelectionError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.lora import is_factor
from ckptavg.order import DIGITS, in_order, labels, natural
from ckptavg.tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

log = logging.getLogger("ckptavg")


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
            checkpoint.tensors, (_locate(checkpoint.tensors, checkpoint),), order_is_known=True
        )

    def labels(self) -> tuple[str, ...]:
        """The sources' paths below the folder that they have in common."""
        return labels([source.path for source in self.sources])


def collect(
    inputs: Sequence[Path],
    *,
    key: str | None = None,
    keep_prefix: bool = False,
    expect: int | None = None,
    any_rank: bool = False,
) -> Collection:
    """Find, open, compare and order the checkpoints.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        key: which state dict to take where a file holds several.
        keep_prefix: leave a wrapper's prefix on the names.
        expect: how many checkpoints there must be.
        any_rank: let the ranks of LoRA factors differ.

    Raises:
        SelectionError: there are none, or not as many as expected.
        FormatError: one of them is damaged or of an unknown kind.
        MismatchError: they differ in names, shapes or dtypes.
    """
    gathered = _Gathered(any_rank=any_rank)
    taken_off: dict[str, int] = defaultdict(int)
    for path, named in find(inputs):
        opened = _open(path, key, named=named)
        if opened is None:
            log.info("%s is an average made earlier: left out", printable(path.name))
            continue
        checkpoint, prefix = without_wrappers(opened, keep_prefix=keep_prefix)
        if prefix:
            taken_off[prefix] += 1
        gathered.add(checkpoint)
    for prefix, count in taken_off.items():
        log.info("took the wrapper's prefix %r off all names in %d checkpoints", prefix, count)
    return gathered.finish(inputs, expect)


def _open(path: Path, key: str | None, *, named: bool) -> Checkpoint | None:
    """Open a checkpoint; None if it is an average of ours that nobody named."""
    try:
        opened = open_checkpoint(path, key=key)
    except SelectionError:
        # An average of ours is a state dict without a key, which is no reason to stop.
        if named or key is None or not open_checkpoint(path).is_average:
            raise
        return None
    if opened.is_average and named:
        log.info("%s is an average made earlier: taken, since it was named", printable(path.name))
    return None if opened.is_average and not named else opened


class _Gathered:
    """What has been opened so far."""

    def __init__(self, *, any_rank: bool) -> None:
        self._any_rank = any_rank
        self.reference: Checkpoint | None = None
        self.sources: list[Source] = []
        self.differences: list[str] = []

    def add(self, checkpoint: Checkpoint) -> None:
        if self.reference is None:
            self.reference = checkpoint
        elif checkpoint.tensors is self.reference.tensors:
            first = self.sources[0]
            self.sources.append(replace(first, checkpoint=replace(checkpoint, tensors={})))
            return
        elif differences := list(compare(self.reference, checkpoint, any_rank=self._any_rank)):
            self.differences += differences
            return
        self.sources.append(_locate(self.reference.tensors, checkpoint))

    def finish(self, inputs: Sequence[Path], expect: int | None) -> Collection:
        if self.differences:
            raise MismatchError("the checkpoints are not of one model:", self.differences)
        if self.reference is None:
            where = ", ".join(printable(path) for path in inputs) or "no input"
            raise SelectionError(
                f"no checkpoint found in {where}",
                remedy=hint(inputs),
            )
        tensors = self.reference.tensors
        sources, known = in_order(_without_duplicates(tensors, self.sources))
        if expect is not None and len(sources) != expect:
            found = ", ".join(map(printable, labels([source.path for source in sources])))
            raise SelectionError(f"expected {expect} checkpoints, found {len(sources)}: {found}")
        _mention_what_is_left([source.checkpoint for source in sources])
        files = tuple(part.path for source in self.sources for part in source.checkpoint.parts)
        return Collection(tensors, tuple(sources), known, files)


def _mention_what_is_left(checkpoints: Sequence[Checkpoint]) -> None:
    last = checkpoints[-1]
    if last.other_keys:
        log.info(
            "took the state dict %r; there is also %s, to be taken with --key",
            printable(last.key),
            ", ".join(map(printable, last.other_keys)),
        )
    keys = sorted({printable(checkpoint.key) or "the whole file" for checkpoint in checkpoints})
    if len(keys) > 1:
        log.warning("the checkpoints' state dicts are not of one name: %s", ", ".join(keys))


def compare(reference: Checkpoint, other: Checkpoint, *, any_rank: bool = False) -> Iterator[str]:
    """Every difference of names, shapes and dtypes, a line each."""
    mine, theirs = printable(reference.path), printable(other.path)
    for name, tensor in reference.tensors.items():
        found = other.tensors.get(name)
        if found is None:
            yield f"{printable(name)}: in {mine}, missing in {theirs}"
            continue
        if found.shape != tensor.shape and not (any_rank and is_factor(name)):
            yield f"{printable(name)}: shape {tensor.shape} in {mine}, {found.shape} in {theirs}"
        if found.dtype is not tensor.dtype:
            yield (
                f"{printable(name)}: {tensor.dtype.name} in {mine}, {found.dtype.name} in {theirs}"
            )
    for name in sorted(other.tensors.keys() - reference.tensors.keys()):
        yield f"{printable(name)}: in {theirs}, missing in {mine}"


def _locate(reference: Mapping[str, Tensor], checkpoint: Checkpoint) -> Source:
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


def _without_duplicates(tensors: Mapping[str, Tensor], sources: list[Source]) -> list[Source]:
    """Hard links, symlinks and copies of one checkpoint count once.

    A copy has the same recorded step and the same bytes in every tensor. Of several names the one
    with a number in it stays: `checkpoint-12`, not `last`.
    """
    by_name = sorted(
        sources,
        key=lambda source: (
            not DIGITS.search(source.path.name),
            source.path.is_symlink(),
            natural(str(source.path)),
        ),
    )
    own = dict(zip(sources, labels([source.path for source in sources]), strict=True))
    content = Contents(tuple(tensors.values()))
    by_file: dict[object, Source] = {}
    by_step: defaultdict[object, list[Source]] = defaultdict(list)
    for source in by_name:
        files = tuple(part.identity for part in source.checkpoint.parts)
        alike = by_step[source.checkpoint.step]
        twin = by_file.get(files) or next(
            (other for other in alike if content.same(other, source)), None
        )
        if twin is None:
            by_file[files] = source
            alike.append(source)
        else:
            log.info(
                "%s is the same checkpoint as %s: counted once",
                printable(own[source]),
                printable(own[twin]),
            )
    return list(by_file.values())
