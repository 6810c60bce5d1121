"""Sums in float64, rounded to the output's dtype as torch rounds.

Every floating value is accumulated in float64 and every complex one in complex128: the first input
is copied in (adding it to 0 would lose -0.0), the others are added in order, and the sum is divided
once. `sum(x_k / K)` would differ from this in one of some hundred float32 values.
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
    """What values of a dtype are summed in."""
    return np.dtype(np.complex128 if dtype.kind == "complex" else np.float64)


class Sum:
    """The sum of an output's terms, as float64 has it.

    It is held in float32 as long as that is the very same: a sum of multiples of some spacing is
    exact in any order while it is no larger than `2 ** 24` of them. Codes of 8 and 16 bits are so.

    Args:
        room: float64 or complex128, uninitialised, C-contiguous; the sum is held there.
        narrow: the format of the terms, if they are scaled codes of one.
    """

    def __init__(self, room: AnyArray, narrow: Narrow | None = None) -> None:
        self._wide = room
        self._single = room.reshape(-1).view(_FLOAT32)[: room.size].reshape(room.shape)
        self._scale = narrow.scale if narrow else 1.0
        self._limit = narrow.spacing * 2.0**24 if narrow else 0.0
        self._bound = 0.0
        self._held: AnyArray | None = None

    def add(self, term: AnyArray, largest: float = np.inf) -> None:
        """Add to the sum, or begin it: adding to 0 would lose -0.0.

        Args:
            term: of the room's shape.
            largest: magnitude in it, if it is codes of the format.
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
        """The sum by the divisor, rounded to the output's dtype as `torch.Tensor.to` rounds.

        The sum itself is gone then.
        """
        divisor *= self._scale
        if dtype.bits > 32 or float(np.float32(divisor)) != divisor:  # noqa: PLR2004
            self._widen()
        total = self._wide if self._held is self._wide else self._single
        if divisor != 1:
            # float64 rounded to float32 is what float32 divides to: it has over twice the digits.
            np.divide(total, divisor, out=total)
        return rounded(total, dtype, allocate)


def rounded(total: AnyArray, dtype: DType, allocate: Allocate) -> AnyArray:
    """float64, float32 or complex128 in the output's dtype, rounded as `torch.Tensor.to` does.

    Returns:
        Some of the room, or `total` itself where that is the dtype already.
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


# Exponents of all ones (the single code for NaN where there is no Inf). isfinite itself goes value
# by value through float32 for these, at a tenth of the speed.
_CODES = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,
}
