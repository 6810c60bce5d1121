"""Tensors whose elements lie in pieces, in several files or places of one, read as if in one."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.formats.checkpoint import read_view
from ckptavg.formats.parts import Part
from ckptavg.formats.tensors import Tensor, contiguous_strides

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.formats.tensors import DType

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a piece sits in its tensor: index of its first element, and its dimensions."""

_MOST_COMPARED = 2_000_000  # pairs of pieces of one tensor; a grid of 128 x 128 needs half of it


@dataclass(frozen=True, slots=True)
class Box:
    """An n-d piece of a tensor.

    Attributes:
        source: the file that it is in.
        corner: index in the tensor of its first element.
        shape: its dimensions.
        offset: of its first element in the file, in bytes.
        strides: in elements; None where it is contiguous in C order.
    """

    source: Part
    corner: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    def holds(self, axis: int, index: int) -> bool:
        """Whether elements with that index along an axis are in it."""
        return 0 <= index - self.corner[axis] < self.shape[axis]

    def below(self, dtype: DType, at: tuple[int, ...], first: int = 0, last: int = 0) -> Tensor:
        """What it has of the tensor's rows `first` to `last` below the index `at`.

        Args:
            dtype: the tensor's.
            at: index in the tensor along its first axes; along all of them, it is one element.
            first: index in the tensor along the next axis.
            last: one more than the last such index.
        """
        strides = contiguous_strides(self.shape) if self.strides is None else self.strides
        axis = len(at)
        index = at if axis == len(self.shape) else (*at, first)
        steps = zip(index, self.corner[: axis + 1], strides[: axis + 1], strict=True)
        return Tensor(
            dtype,
            (last - first, *self.shape[axis + 1 :]) if axis < len(self.shape) else (),
            0,
            self.offset + dtype.itemsize * sum((i - corner) * step for i, corner, step in steps),
            None if self.strides is None else self.strides[axis:],
        )


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor that lies in pieces.

    Attributes:
        dtype: element type. Elements of packed types are bytes here.
        shape: its dimensions.
        boxes: its pieces, by their corners; together they are the tensor, each element once.
        tallest: the largest extent of a piece along the first axis.
    """

    dtype: DType
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    tallest: int

    @staticmethod
    def of(dtype: DType, shape: tuple[int, ...], boxes: Sequence[Box]) -> Pieces:
        """A tensor of pieces in any order."""
        tallest = max((box.shape[0] for box in boxes), default=0) if shape else 0
        return Pieces(dtype, shape, tuple(sorted(boxes, key=lambda box: box.corner)), tallest)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.row_bytes(-1)

    def row_bytes(self, axis: int) -> int:
        """Bytes of what has one index along an axis and those before; -1 stands for none."""
        return self.dtype.itemsize * math.prod(self.shape[axis + 1 :])

    def read_into(self, first: int, out: memoryview) -> None:
        """Fill `out` with its bytes in C order, from the byte `first`."""
        if not self.shape:
            self._fill((), self.boxes, first, out)
            return
        # Of thousands of pieces, those that lie in these rows.
        row = self.row_bytes(0)
        low, high = first // row - self.tallest + 1, (first + len(out) - 1) // row
        begin = bisect_left(self.boxes, low, key=lambda box: box.corner[0])
        end = bisect_right(self.boxes, high, key=lambda box: box.corner[0])
        self._fill((), self.boxes[begin:end], first, out)

    def _fill(self, at: tuple[int, ...], boxes: Sequence[Box], first: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `first` of what lies below the index `at`."""
        axis = len(at)
        if axis == len(self.shape):
            [box] = boxes
            box.source.read_into(box.below(self.dtype, at).offset + first, out)
            return
        row = self.row_bytes(axis)
        while len(out):  # the end of a row, whole rows, the beginning of a row
            index, skip = divmod(first, row)
            if skip or len(out) < row:
                part = out[: row - skip]
                held = [box for box in boxes if box.holds(axis, index)]
                self._fill((*at, index), held, skip, part)
            else:
                part = out[: len(out) // row * row]
                self._fill_rows(at, boxes, index, part)
            first, out = first + len(part), out[len(part) :]

    def _fill_rows(
        self, at: tuple[int, ...], boxes: Sequence[Box], first: int, out: memoryview
    ) -> None:
        """Fill `out` with whole rows from `first` below the index `at`: each box reads its own."""
        axis, row = len(at), self.row_bytes(len(at))
        last, rest = first + len(out) // row, self.shape[axis + 1 :]
        for box in boxes:
            low = max(first, box.corner[axis])
            high = min(last, box.corner[axis] + box.shape[axis])
            if low >= high:
                continue
            piece = box.below(self.dtype, at, low, high)
            rows = out[(low - first) * row : (high - first) * row]
            if piece.strides is None and piece.shape[1:] == rest:
                box.source.read_into(piece.offset, rows)
                continue
            target = np.ndarray((high - low, *rest), self.dtype.numpy, rows)
            columns = zip(box.corner[axis + 1 :], piece.shape[1:], strict=True)
            place = tuple(slice(corner, corner + size) for corner, size in columns)
            target[:, *place] = read_view(box.source, piece)


class Blocks(Part):
    """Tensors in pieces as one part, in which they lie one after the other.

    Args:
        path: the checkpoint that they belong to.
        tensors: what they are, in the order of their addresses.

    Attributes:
        path: the checkpoint that they belong to.
        size: 0, since the bytes on the disk are those of the files.
        offsets: where each begins, in bytes, `[num_tensors]`.
    """

    size = 0

    def __init__(self, path: Path, tensors: Sequence[Pieces]) -> None:
        self.path = path
        self._tensors = tuple(tensors)
        *self.offsets, self._end = itertools.accumulate(
            (tensor.nbytes for tensor in self._tensors), initial=0
        )

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`: of each tensor in that range the bytes in it, each once."""
        index = bisect_right(self.offsets, offset) - 1
        while len(out):
            tensor, first = self._tensors[index], offset - self.offsets[index]
            part = out[: tensor.nbytes - first]
            if len(part):
                tensor.read_into(first, part)
            offset, out, index = offset + len(part), out[len(part) :], index + 1


def misfit(shape: tuple[int, ...], regions: Sequence[Region]) -> str | None:
    """What keeps pieces from being a tensor, each element once; None where they are one.

    Args:
        shape: the tensor's.
        regions: where the pieces sit, none of them empty.
    """
    for corner, sizes in regions:
        if not (len(corner) == len(sizes) == len(shape)) or any(
            first + size > whole for first, size, whole in zip(corner, sizes, shape, strict=True)
        ):
            return f"has a piece {_show(sizes)} at {_show(corner)}, outside its {_show(shape)}"
    clash = _clash(regions)
    if clash is not None:
        return clash
    missing = math.prod(shape) - sum(math.prod(sizes) for _, sizes in regions)
    return f"lacks {missing} elements: some pieces are missing" if missing else None


def _clash(regions: Sequence[Region]) -> str | None:
    """Where two regions overlap. Goes along the axis that splits them most."""
    axes = range(len(regions[0][0])) if regions else range(0)
    if not axes:
        return "has several pieces of one element" if len(regions) > 1 else None
    axis = max(axes, key=lambda axis: len({corner[axis] for corner, _ in regions}))
    active: list[Region] = []
    compared = 0
    for corner, sizes in sorted(regions, key=lambda region: region[0][axis]):
        active = [other for other in active if other[0][axis] + other[1][axis] > corner[axis]]
        compared += len(active)
        if compared > _MOST_COMPARED:
            return f"is in {len(regions)} pieces, too entangled to compare"
        for other in active:
            if _overlap((corner, sizes), other):
                return f"has overlapping pieces at {_show(other[0])} and {_show(corner)}"
        active.append((corner, sizes))
    return None


def _overlap(one: Region, other: Region) -> bool:
    return all(
        first < other_first + other_size and other_first < first + size
        for first, size, other_first, other_size in zip(*one, *other, strict=True)
    )


def _show(numbers: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, numbers))}]"
