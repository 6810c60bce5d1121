"""Sums in float64, rounded to the output's dtype as torch rounds.

Floating values are accumulated in float64, complex ones in complex128. The first input is copied,
since adding it to 0 would lose -0.0. The others are added in order, and the sum is divided once.
`sum(x_k / K)` would differ in about one of a hundred float32 values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.merge.narrow import format_of, largest_code

if TYPE_CHECKING:
    from ckptavg.formats.tensors import Allocate, AnyArray, DType
    from ckptavg.merge.narrow import Narrow

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
