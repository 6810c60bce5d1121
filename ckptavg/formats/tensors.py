"""What a tensor in a file is: its dtype, its shape and where its bytes are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Kind = Literal["float", "complex", "int", "bool", "packed"]
AnyArray = npt.NDArray[Any]
"""An array of any dtype."""
Room = Callable[[str, np.dtype[Any]], AnyArray]
"""Gives uninitialised memory for as many values as are being worked on, by its purpose and dtype.
Whoever does the same again and again uses the same memory: new pages cost more than the work."""


@dataclass(frozen=True, eq=False)
class DType:
    """An element type. There is one object for each: they are compared by identity.

    Attributes:
        name: torch's name, such as `bfloat16`.
        code: safetensors' code, such as `BF16`; None where that format has none.
        bits: size of an element; less than 8 for packed types.
        kind: what it stands for. `packed` types can be copied and not computed with.
    """

    name: str
    code: str | None
    bits: int
    kind: Kind

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype that computes like it (uint8 for packed types)."""
        if self.kind == "packed":
            return np.dtype(np.uint8)
        return np.dtype(getattr(ml_dtypes, self.name, None) or self.name)

    @property
    def itemsize(self) -> int:
        """Bytes of an element; 1 for packed types."""
        return max(1, self.bits // 8)

    @property
    def averaged(self) -> bool:
        """Whether a mean of such values is a value of the same meaning."""
        return self.kind in ("float", "complex")

    def nbytes(self, count: int) -> int:
        """Bytes that `count` elements take."""
        return (count * self.bits + 7) // 8


# Alone among them, complex128 is known to torch and not to safetensors.
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
    DType("float4_e2m1fn_x2", "F4", 4, "packed"),
    DType("float6_e2m3fn", "F6_E2M3", 6, "packed"),
    DType("float6_e3m2fn", "F6_E3M2", 6, "packed"),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_CODE = {dtype.code: dtype for dtype in DTYPES if dtype.code}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor and where its bytes are.

    Attributes:
        dtype: element type.
        shape: its dimensions; `()` has one element, `(0,)` none.
        part: index into the checkpoint's parts (files).
        offset: where its first element is, in bytes from the part's start.
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
        return self.dtype.nbytes(self.count)

    @property
    def element_strides(self) -> tuple[int, ...]:
        """In elements, one for each dimension, of a contiguous tensor as well."""
        return contiguous_strides(self.shape) if self.strides is None else self.strides


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the strides are those of C order, in every dimension that has any extent."""
    if 0 in shape:
        return True
    expected = contiguous_strides(shape)
    return all(
        size == 1 or own == wanted
        for size, own, wanted in zip(shape, strides, expected, strict=True)
    )


def fresh(shape: tuple[int, ...]) -> Room:
    """New memory every time, for what is done once."""
    return lambda _, dtype: np.empty(shape, dtype)


def bytes_of(array: AnyArray) -> memoryview:
    """The bytes of a C-contiguous array, writable where the array is."""
    return array.reshape(-1).view(np.uint8).data
