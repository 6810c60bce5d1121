"""Floats of 16 and 8 bits, to float32 and back, by operations on whole arrays of integers.

numpy and ml_dtypes convert these value by value. Shifted to where float32 has its fields, a code is
that float32 times a power of two, subnormal ones too; only the exponents that stand for NaN and Inf
would mean something else, and arrays with some of those take the libraries' way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ckptavg.formats.tensors import Allocate, AnyArray, DType

_MANTISSA, _BIAS = 23, 127  # of float32
_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
_SIGNED, _UNSIGNED = ({size: np.dtype(f"{kind}{size}") for size in (1, 2)} for kind in "iu")
_SUBNORMAL = np.array([1], np.int32).view(np.float32)
_EXPONENT = np.int32(0xFF << _MANTISSA)


@dataclass(frozen=True)
class Narrow:
    """A format with a sign, an exponent and a mantissa, and subnormal values.

    Attributes:
        bits: of a code.
        mantissa: bits of the mantissa.
        bias: of the exponent.
        special: the first magnitude that is no number.
    """

    bits: int
    mantissa: int
    bias: int
    special: int

    @property
    def scale(self) -> float:
        """What `widen` gives for 1: `2 ** (bias - 127)`."""
        return 2.0 ** (self.bias - _BIAS)

    @property
    def spacing(self) -> float:
        """All scaled values are multiples of it."""
        return self.scale * 2.0 ** (1 - self.bias - self.mantissa)

    @cached_property
    def _shift(self) -> np.int32:
        return np.int32(_MANTISSA - self.mantissa)

    @cached_property
    def _fields(self) -> np.int32:
        """Where float32 has the sign and what a code has of exponent and mantissa."""
        magnitude = ((1 << (self.bits - 1)) - 1) << int(self._shift)
        return np.int32(magnitude - (1 << 31))

    def widen(self, values: AnyArray, out: AnyArray) -> tuple[AnyArray, float]:
        """The values times `scale`, exactly.

        Args:
            values: `[n]`, in the format's dtype.
            out: float32, `[n]`.

        Returns:
            `out`, and the largest magnitude in it (NaN or Inf where there are some).
        """
        largest = largest_code(values)
        if largest >= self.special:
            np.multiply(values.astype(np.float32), np.float32(self.scale), out=out)
            return out, np.inf
        shifted = out.view(_INT32)
        np.copyto(shifted, values.view(_SIGNED[values.itemsize]))
        np.left_shift(shifted, self._shift, out=shifted)
        np.bitwise_and(shifted, self._fields, out=shifted)
        return out, float(np.int32(largest << int(self._shift)).view(np.float32))

    def narrow(self, values: AnyArray, dtype: DType, allocate: Allocate) -> AnyArray:
        """float32 rounded to the format, to nearest and ties to even, as a cast rounds.

        Args:
            values: float32.
            dtype: the format's.
            allocate: for what is computed on the way, and for the result.
        """
        bits = values.view(_INT32)
        exponents = np.bitwise_and(bits, _EXPONENT, out=allocate("single", _FLOAT32).view(_INT32))
        if exponents.max(initial=0) >= self._too_large:
            return values.astype(dtype.numpy)
        # Added to a value, 1.5 * 2 ** (its exponent + dropped bits) leaves no room for those: the
        # sum is rounded by the processor, and taking it off again leaves the rounded value.
        np.clip(exponents, self._smallest, _EXPONENT, out=exponents)  # np.maximum is half as fast
        anchors = exponents.view(_FLOAT32)
        np.multiply(anchors, np.float32(1.5 * 2.0 ** int(self._shift)), out=anchors)
        rounded = np.add(values, anchors, out=allocate("rounded", _FLOAT32))
        np.subtract(rounded, anchors, out=rounded)
        np.multiply(rounded, np.float32(self.scale), out=rounded)
        shifted = np.right_shift(rounded.view(_INT32), self._shift, out=exponents)
        unsigned = _UNSIGNED[self.bits // 8]
        codes, signs = allocate("codes", unsigned), allocate("signs", unsigned)
        np.copyto(codes, shifted, casting="unsafe")
        np.right_shift(bits, np.int32(32 - self.bits), out=shifted)
        np.copyto(signs, shifted, casting="unsafe")
        np.bitwise_and(signs, unsigned.type(1 << (self.bits - 1)), out=signs)
        np.bitwise_or(codes, signs, out=codes)
        return codes.view(dtype.numpy)

    @cached_property
    def _smallest(self) -> np.int32:
        """The exponent of the smallest normal value, where float32 has it."""
        return np.int32((1 - self.bias + _BIAS) << _MANTISSA)

    @cached_property
    def _too_large(self) -> np.int32:
        """An exponent of float32 from which values may round to what is no number."""
        # With a single code for NaN, the largest exponent has numbers beside it.
        largest = self.special >> self.mantissa
        return np.int32((largest - self.bias + _BIAS) << _MANTISSA)


def largest_code(values: AnyArray) -> int:
    """The largest magnitude among codes with a sign, as an integer.

    Args:
        values: of a floating dtype of 8 or 16 bits.
    """
    # Of unsigned integers the negative codes are the largest, of signed ones the smallest.
    size = values.itemsize
    top = int(np.maximum.reduce(values.view(_UNSIGNED[size]), axis=None, initial=0))
    positive = int(np.maximum.reduce(values.view(_SIGNED[size]), axis=None, initial=0))
    return max(top & ((1 << (8 * size - 1)) - 1), positive)


FORMATS = {
    "float16": Narrow(16, 10, 15, 0x7C00),
    "float8_e5m2": Narrow(8, 2, 15, 0x7C),
    "float8_e4m3fn": Narrow(8, 3, 7, 0x7F),
}
"""By torch's name. bfloat16 is not among them: ml_dtypes is as fast there."""


def format_of(dtype: DType) -> Narrow | None:
    """The format of a dtype; None where it has to go the libraries' way.

    So do all where the processor takes subnormal numbers for zero (`torch.set_flush_denormal`).
    """
    found = FORMATS.get(dtype.name)
    return found if found is not None and (_SUBNORMAL * np.float32(1)).all() else None
