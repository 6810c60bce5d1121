"""Tensors of a checkpoint: their element types, their places in files, and what names tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Kind = Literal["float", "complex", "int", "bool"]
AnyArray = npt.NDArray[Any]
"""An array of any dtype."""
Allocate = Callable[[Hashable, np.dtype[Any]], AnyArray]
"""Gives an uninitialised array for a purpose and a dtype. Loops use the same memory each time:
getting new pages from the system takes longer than the arithmetic."""

_MOST_DIMENSIONS = 64  # of numpy and torch
_MOST_BYTES = 1 << 63


@dataclass(frozen=True, eq=False)
class DType:
    """An element type. There is one object for each, so that `is` compares them.

    Attributes:
        name: torch's name, such as `bfloat16`.
        code: safetensors' code, such as `BF16`; None where that format has none.
        bits: size of an element.
        kind: what the elements are.
    """

    name: str
    code: str | None
    bits: int
    kind: Kind

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of the same elements."""
        return np.dtype(getattr(ml_dtypes, self.name, None) or self.name)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.bits // 8

    @property
    def averaged(self) -> bool:
        """Whether tensors of this type are averaged."""
        return self.kind in ("float", "complex")


# safetensors has all but complex128, and others whose elements are smaller than a byte.
DTYPES = (
    DType("float64", "F64", 64, "float"),
    DType("float32", "F32", 32, "float"),
    DType("float16", "F16", 16, "float"),
    DType("bfloat16", "BF16", 16, "float"),
    DType("float8_e4m3fn", "F8_E4M3", 8, "float"),
    DType("float8_e5m2", "F8_E5M2", 8, "float"),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 8, "float"),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 8, "float"),
    DType("float8_e8m0fnu", "F8_E8M0", 8, "float"),
    DType("complex64", "C64", 64, "complex"),
    DType("complex128", None, 128, "complex"),
    DType("int64", "I64", 64, "int"),
    DType("int32", "I32", 32, "int"),
    DType("int16", "I16", 16, "int"),
    DType("int8", "I8", 8, "int"),
    DType("uint64", "U64", 64, "int"),
    DType("uint32", "U32", 32, "int"),
    DType("uint16", "U16", 16, "int"),
    DType("uint8", "U8", 8, "int"),
    DType("bool", "BOOL", 8, "bool"),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_CODE = {dtype.code: dtype for dtype in DTYPES if dtype.code}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's element type and shape, and its place in a file.

    Attributes:
        dtype: element type.
        shape: sizes of its dimensions.
        part: index of its file among the checkpoint's parts.
        offset: where its first element begins, in bytes from the start of the part.
        strides: in elements, one for each dimension; None where it is contiguous in C order.
    """

    dtype: DType
    shape: tuple[int, ...]
    part: int
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def element_strides(self) -> tuple[int, ...]:
        """Its strides in elements, also where it is contiguous."""
        return contiguous_strides(self.shape) if self.strides is None else self.strides

    @property
    def widest_axis(self) -> int:
        """The axis along which neighbours are farthest apart in the file."""
        strides = self.element_strides
        return max(range(len(strides)), key=lambda axis: (self.shape[axis] > 1, strides[axis]))

    def slab(self, axis: int, first: int, last: int) -> Tensor:
        """The part of it from index `first` to `last` along an axis."""
        strides = self.element_strides
        size = min(last, self.shape[axis]) - first
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        offset = self.offset + first * strides[axis] * self.dtype.itemsize
        return Tensor(self.dtype, shape, self.part, offset, strides)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece of a tensor, which is what one rank saved of it, is in the tensor.

    Attributes:
        corner: index in the tensor of the piece's first element.
        shape: the tensor's; None where that is not recorded.
        ranks: number of ranks that have pieces of it; None where that is not recorded.
    """

    corner: tuple[int, ...]
    shape: tuple[int, ...] | None = None
    ranks: int | None = None


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor in C order, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the strides are those of C order, apart from dimensions of size 1."""
    if 0 in shape:
        return True
    expected = contiguous_strides(shape)
    return all(
        size == 1 or stride == contiguous
        for size, stride, contiguous in zip(shape, strides, expected, strict=True)
    )


def is_possible(shape: tuple[int, ...], itemsize: int) -> bool:
    """Whether numpy could have an array of this shape, in which no size is negative.

    Dimensions of size 0 do not count: numpy refuses `(2**62, 4, 0)`, which has no element.

    Args:
        shape: sizes of the dimensions.
        itemsize: bytes of an element.
    """
    if len(shape) > _MOST_DIMENSIONS:
        return False
    count = math.prod(shape) or math.prod(size for size in shape if size)
    return count * itemsize < _MOST_BYTES


def new_arrays(shape: tuple[int, ...]) -> Allocate:
    """An `Allocate` that gives a new array of this shape each time."""
    return lambda _, dtype: np.empty(shape, dtype)


def bytes_of(array: AnyArray) -> memoryview:
    """The bytes of a C-contiguous array; writable if the array is."""
    return array.reshape(-1).view(np.uint8).data


_NORM_STATISTICS = ("running_mean", "running_var")
_NORM_STATE = (*_NORM_STATISTICS, "num_batches_tracked")


def _is_entry(name: str, entries: tuple[str, ...]) -> bool:
    """Whether the last part of a name, which a module gives to its own tensor, is one of these."""
    return name.endswith(entries) and name.replace("/", ".").rpartition(".")[2] in entries


def is_norm_statistic(name: str) -> bool:
    """Whether a tensor is the running mean or the running variance of a norm layer."""
    return _is_entry(name, _NORM_STATISTICS)


def is_norm_state(name: str) -> bool:
    """Whether a tensor is a running statistic of a norm layer, or counts its batches."""
    return _is_entry(name, _NORM_STATE)


def norm_layers(names: Iterable[str]) -> set[str]:
    """The norm layers that have running statistics among these names of tensors."""
    return {name.rpartition(".")[0] for name in names if is_norm_statistic(name)}


_POWER_ITERATION = re.compile(
    r"(?P<torch>.*\bparametrizations\.[^.]+\.\d+\.)_[uv]"
    r"|(?P<hook>.+)_[uv]"
    r"|(?P<biggan>.*\b)(u|sv)\d+"
)


def power_iteration_vectors(tensors: Mapping[str, object]) -> frozenset[str]:
    """The names of the vectors from which spectral norm estimates the largest singular value.

    They are `parametrizations.weight.0._u` and `_v` in torch, `weight_u` and `weight_v` beside
    `weight_orig` in its older API, or beside `weight_bar`, and `u0` beside `sv0` in BigGAN.
    `weight_v` of weight norm and `pos_bias_u` of Conformers are no such vectors.

    Args:
        tensors: all tensors of a checkpoint by name.
    """
    vectors = set()
    for name in tensors:
        match = _POWER_ITERATION.fullmatch(name)
        if match is None:
            continue
        hook, biggan = match["hook"], match["biggan"]
        if (
            match["torch"] is not None
            or (hook is not None and (f"{hook}_orig" in tensors or f"{hook}_bar" in tensors))
            or (biggan is not None and {f"{biggan}u0", f"{biggan}sv0"} <= tensors.keys())
        ):
            vectors.add(name)
    return frozenset(vectors)


def is_extra_state(name: str) -> bool:
    """Whether a tensor is the opaque state of a module, such as an fp8 recipe."""
    return _is_entry(name, ("_extra_state",))
