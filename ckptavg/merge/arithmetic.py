"""Sums in float64, rounded to the output's dtype as torch rounds.

Floating values are accumulated in float64, complex ones in complex128. The first input is copied,
since adding it to 0 would lose -0.0. The others are added in order, and the sum is divided once.
`sum(x_k / K)` would differ in about one of a hundred float32 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ckptavg.formats.tensors import Allocate, AnyArray, DType

_MANTISSA, _BIAS = 23, 127  # of float32
_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
_SIGNED, _UNSIGNED = ({size: np.dtype(f"{kind}{size}") for size in (1, 2)} for kind in "iu")
_SUBNORMAL = np.array([1], np.int32).view(np.float32)
_EXPONENT = np.int32(0xFF << _MANTISSA)


# numpy and ml_dtypes convert floats of 16 and 8 bits value by value; here it is done by operations
# on whole arrays of integers. Shifted to where float32 has its fields, a code is that float32 times
# a power of two, subnormal ones too. Only the exponents of NaN and Inf would mean something else:
# arrays with some of those take the libraries' way.
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


_FLOAT32, _BOOL = np.dtype(np.float32), np.dtype(bool)


def accumulator_dtype(dtype: DType) -> np.dtype[Any]:
    """The dtype in which values of a dtype are summed."""
    return np.dtype(np.complex128 if dtype.kind == "complex" else np.float64)


class Sum:
    """The float64 sum of an output's terms.

    It is held in float32 while that is exact. Codes of 8 and 16 bits are multiples of a spacing, so
    their sums are exact up to `2 ** 24` spacings.

    Args:
        buffer: memory for the sum: float64 or complex128, uninitialised, C-contiguous.
        narrow: the format of the terms if they are scaled codes; None for plain values.
    """

    def __init__(self, buffer: AnyArray, narrow: Narrow | None = None) -> None:
        self._wide = buffer
        self._single = buffer.reshape(-1).view(_FLOAT32)[: buffer.size].reshape(buffer.shape)
        self._scale = narrow.scale if narrow else 1.0
        self._limit = narrow.spacing * 2.0**24 if narrow else 0.0
        self._bound = 0.0
        self._held: AnyArray | None = None

    def add(self, term: AnyArray, largest: float = np.inf) -> None:
        """Add a term; the first one is copied.

        Args:
            term: values of the buffer's shape.
            largest: the largest magnitude in a term of codes.
        """
        self._bound += largest
        if self._held is None:
            self._held = self._single if self._bound <= self._limit else self._wide
            np.copyto(self._held, term, casting="same_kind")
            return
        if self._bound > self._limit:
            self._widen()
        np.add(self._held, term, out=self._held)

    def _widen(self) -> None:
        if self._held is self._single:
            np.copyto(self._wide, self._single.copy())  # both are the same memory
            self._held = self._wide

    def mean(self, divisor: float, dtype: DType, allocate: Allocate) -> AnyArray:
        """The sum divided by the divisor, rounded to a dtype as `torch.Tensor.to` rounds.

        The division is done in place, so the sum cannot be used again.
        """
        divisor *= self._scale
        if dtype.bits > 32 or float(np.float32(divisor)) != divisor:  # noqa: PLR2004
            self._widen()
        total = self._wide if self._held is self._wide else self._single
        if divisor != 1:
            # In float32, the result is the float64 quotient rounded: that has over twice the bits.
            np.divide(total, divisor, out=total)
        return rounded(total, dtype, allocate)


def rounded(total: AnyArray, dtype: DType, allocate: Allocate) -> AnyArray:
    """float64, float32 or complex128 values in the output's dtype, rounded like `torch.Tensor.to`.

    Returns:
        An allocated array, or `total` itself if it has the dtype already.
    """
    if dtype.kind == "float" and dtype.bits < 32:  # noqa: PLR2004 - by way of float32
        total = _cast(total, _FLOAT32, allocate)
    if (form := format_of(dtype)) is not None:
        return form.narrow(total, dtype, allocate)
    return _cast(total, dtype.numpy, allocate)


def _cast(values: AnyArray, dtype: np.dtype[Any], allocate: Allocate) -> AnyArray:
    if values.dtype == dtype:
        return values
    out = allocate(dtype.name, dtype)
    np.copyto(out, values, casting="unsafe")
    return out


def all_finite(values: AnyArray, dtype: DType, allocate: Allocate) -> bool:
    """Whether no value is NaN or Inf."""
    if dtype.name in _CODES:
        return largest_code(values) < _CODES[dtype.name]
    return bool(np.isfinite(values, out=allocate("finite", _BOOL)).all())


def nonfinite(values: AnyArray, dtype: DType) -> AnyArray:
    """Where values are NaN or Inf, as bools of the same shape."""
    if dtype.name not in _CODES:
        return ~np.isfinite(values)
    special = _CODES[dtype.name]
    codes: AnyArray = values.view(f"u{dtype.itemsize}") & special
    odd: AnyArray = codes == special
    return odd


# Bits of NaN and Inf: exponents of all ones, or the only code of NaN in a format without Inf.
# np.isfinite would convert value by value to float32, at a tenth of the speed.
_CODES = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,
}
