"""Tensors whose elements lie in pieces, in several files or places of one, read as if in one."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ckptavg.formats.checkpoint import read_view
from ckptavg.formats.parts import Part
from ckptavg.formats.tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.tensors import DType

Index = tuple[int, ...]
Region = tuple[Index, tuple[int, ...]]
"""Where a piece is in its tensor: index of its first element, and its dimensions."""

_MOST_CELLS = 1 << 22


@dataclass(frozen=True, slots=True)
class Box:
    """An n-dimensional piece of a tensor.

    Attributes:
        source: the file that it is in.
        corner: index in the tensor of its first element.
        tensor: the piece, as a tensor of that file.
    """

    source: Part
    corner: Index
    tensor: Tensor

    def holds(self, axis: int, index: int) -> bool:
        """Whether elements of the tensor with that index along an axis are in the box."""
        return 0 <= index - self.corner[axis] < self.tensor.shape[axis]

    def address(self, index: Index) -> int:
        """Offset in the file, in bytes, of the first element below an index of the whole tensor."""
        steps = zip(index, self.corner, self.tensor.element_strides, strict=False)
        elements = sum((i - first) * step for i, first, step in steps)
        return self.tensor.offset + self.tensor.dtype.itemsize * elements


class Pieces:
    """A tensor that lies in boxes, each element in one."""

    def __init__(self, dtype: DType, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
        self.dtype, self.shape = dtype, shape
        self.boxes = sorted(boxes, key=lambda box: box.corner)
        self._tallest = max(box.tensor.shape[0] for box in boxes) if shape and boxes else 0

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self._nbytes_below(0)

    def _nbytes_below(self, axes: int) -> int:
        """Bytes of the elements with one index along each of the first axes."""
        return self.dtype.itemsize * math.prod(self.shape[axes:])

    def read_into(self, first: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes in C order, from the byte `first`."""
        boxes = self.boxes
        if self.shape:  # of thousands of pieces, take those that can have these rows
            row = self._nbytes_below(1)
            low, high = first // row - self._tallest + 1, (first + len(out) - 1) // row
            begin = bisect_left(boxes, low, key=lambda box: box.corner[0])
            boxes = boxes[begin : bisect_right(boxes, high, key=lambda box: box.corner[0])]
        self._fill((), boxes, first, out)

    def _fill(self, index: Index, boxes: Sequence[Box], first: int, out: memoryview) -> None:
        """Fill `out` with bytes from `first` of what lies below an index."""
        axis = len(index)
        if axis == len(self.shape):
            [box] = boxes
            box.source.read_into(box.address(index) + first, out)
            return
        row = self._nbytes_below(axis + 1)
        while len(out):  # the end of a row, whole rows, the beginning of a row
            number, skip = divmod(first, row)
            if skip or len(out) < row:
                part = out[: row - skip]
                inside = [box for box in boxes if box.holds(axis, number)]
                self._fill((*index, number), inside, skip, part)
            else:
                part = out[: len(out) // row * row]
                self._fill_rows(index, boxes, number, part)
            first, out = first + len(part), out[len(part) :]

    def _fill_rows(self, index: Index, boxes: Sequence[Box], first: int, out: memoryview) -> None:
        """Fill `out` with complete rows from `first` below an index; each box fills its part."""
        axis, row = len(index), self._nbytes_below(len(index) + 1)
        last, rest = first + len(out) // row, self.shape[axis + 1 :]
        for box in boxes:
            shape, strides = box.tensor.shape, box.tensor.strides
            low = max(first, box.corner[axis])
            high = min(last, box.corner[axis] + shape[axis])
            if low >= high:
                continue
            rows = out[(low - first) * row : (high - first) * row]
            offset = box.address((*index, low))
            corner, sizes = box.corner[axis + 1 :], shape[axis + 1 :]
            if strides is None and sizes == rest:
                box.source.read_into(offset, rows)
                continue
            piece = Tensor(self.dtype, (high - low, *sizes), 0, offset, strides and strides[axis:])
            place = (slice(c, c + size) for c, size in zip(corner, sizes, strict=True))
            target = np.ndarray((high - low, *rest), self.dtype.numpy, rows)
            target[:, *place] = read_view(box.source, piece)


class Blocks(Part):
    """Tensors of a checkpoint as one part, in which they lie one after the other.

    Attributes:
        offsets: where each begins, in bytes, `[num_tensors]`.
    """

    size = 0  # the bytes on the disk are those of the files

    def __init__(self, path: Path, tensors: Sequence[Pieces]) -> None:
        self.path = path
        self._tensors = tuple(tensors)
        sizes = (tensor.nbytes for tensor in self._tensors)
        *self.offsets, _ = itertools.accumulate(sizes, initial=0)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`, with the bytes of each tensor in that range."""
        number = bisect_right(self.offsets, offset) - 1
        while len(out):
            tensor, first = self._tensors[number], offset - self.offsets[number]
            part = out[: tensor.nbytes - first]
            if len(part):
                tensor.read_into(first, part)
            offset, out, number = offset + len(part), out[len(part) :], number + 1


def join(
    path: Path, pieces: Mapping[str, Pieces], files: Iterable[Part]
) -> tuple[tuple[Part, ...], dict[str, Tensor]]:
    """Describe tensors by name, and the parts that they are in: all put together, and the files.

    The first part has them by width of the element type, as outputs have them, and then by name:
    their order in the files changes with the ranks. So neighbours are the same in all checkpoints
    of a run, and averaged together. Tensors of the same pieces are one, under several names.
    """
    names = sorted(pieces, key=lambda name: (-pieces[name].dtype.bits, name))
    blocks = Blocks(path, [pieces[name] for name in names])
    parts: tuple[Part, ...] = (blocks, *files)
    tensors: dict[str, Tensor] = {}
    first_names: dict[object, str] = {}
    for name, offset in zip(names, blocks.offsets, strict=True):
        tensor = pieces[name]
        first = first_names.setdefault((tensor.dtype, tensor.shape, *tensor.boxes), name)
        if first != name and tensor.boxes:
            tensors[name] = tensors[first]
            continue
        tensors[name] = Tensor(tensor.dtype, tensor.shape, 0, offset)
        if len(tensor.boxes) == 1 and tensor.boxes[0].tensor.strides is not None:
            # Strided tensors are read whole; in chunks, each would read nearly all of it again.
            [box] = tensor.boxes
            tensors[name] = replace(box.tensor, part=parts.index(box.source))
    return parts, tensors


class Misfit(NamedTuple):
    """Why pieces do not make up a tensor, and the number of the piece that is wrong."""

    message: str
    number: int | None = None


def misfit(shape: tuple[int, ...], regions: Sequence[Region]) -> Misfit | None:
    """Why pieces, none of them empty, do not make up a tensor; None if they do."""
    for number, (corner, sizes) in enumerate(regions):
        if not (len(corner) == len(sizes) == len(shape)) or any(
            first + size > whole for first, size, whole in zip(corner, sizes, shape, strict=True)
        ):
            message = f"has a piece {list(sizes)} at {list(corner)}, outside its {list(shape)}"
            return Misfit(message, number)
    # Cut the tensor wherever a piece begins, and mark the cells that each piece covers.
    cuts = [sorted({corner[axis] for corner, _ in regions}) for axis in range(len(shape))]
    if math.prod(map(len, cuts)) > _MOST_CELLS:
        return Misfit(f"is in {len(regions)} pieces, too entangled to compare")
    covered_by = np.zeros([len(cut) for cut in cuts], np.int32)
    for number, (corner, sizes) in enumerate(regions, 1):
        covered = (
            slice(bisect_left(cut, first), bisect_left(cut, first + size))
            for cut, first, size in zip(cuts, corner, sizes, strict=True)
        )
        index: Any = (..., *covered)  # with the dots, a view even of no dimensions
        cells = covered_by[index]
        if other := cells.max():
            message = f"has overlapping pieces at {list(regions[other - 1][0])} and {list(corner)}"
            return Misfit(message, number - 1)
        cells[...] = number
    missing = math.prod(shape) - sum(math.prod(sizes) for _, sizes in regions)
    return Misfit(f"lacks {missing} elements: some pieces are missing") if missing else None
