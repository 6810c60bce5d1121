"""Sums in float64, rounded to the output's dtype as torch rounds.

Every floating value is accumulated in float64 and every complex one in complex128: the first input
is copied in (adding it to 0 would lose -0.0), the others are added in order, and the sum is divided
once. `sum(x_k / K)` would differ from this in one of some hundred float32 values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ckptavg.tensors import AnyArray, DType

_FLOAT32 = np.dtype(np.float32)


def accumulator_dtype(dtype: DType) -> np.dtype[np.generic]:
    """What values of a dtype are summed in."""
    return np.dtype(np.complex128 if dtype.kind == "complex" else np.float64)


def accumulate(total: AnyArray, values: AnyArray, weight: float, *, first: bool) -> None:
    """Add `weight * values` to `total` (float64 or complex128), or begin it with them."""
    if weight == 1:
        if first:
            np.copyto(total, values, casting="same_kind")
        else:
            np.add(total, values, out=total)
    elif first:
        np.multiply(values, weight, out=total, dtype=total.dtype)
    else:
        np.add(total, np.multiply(values, weight, dtype=total.dtype), out=total)


def rounded(total: AnyArray, dtype: DType) -> AnyArray:
    """The sum in the output's dtype, rounded as `torch.Tensor.to` does: by way of float32.

    Returns:
        A new array, or `total` itself where that is the dtype already.
    """
    if dtype.kind == "float" and dtype.bits < 32:  # noqa: PLR2004
        total = total.astype(_FLOAT32)
    return total.astype(dtype.numpy, copy=False)


def nonfinite(values: AnyArray, dtype: DType) -> AnyArray:
    """Where values are NaN or Inf, as bools of the same shape."""
    if dtype.name not in _CODES:
        return np.isfinite(values) ^ True
    integers, mask = _CODES[dtype.name]
    return (values.view(integers) & mask) == mask


# Exponents of all ones (a single code for NaN where there is no Inf): ml_dtypes' own isfinite goes
# value by value through float32.
_CODES = {
    "bfloat16": (np.dtype(np.uint16), np.uint16(0x7F80)),
    "float16": (np.dtype(np.uint16), np.uint16(0x7C00)),
    "float8_e5m2": (np.dtype(np.uint8), np.uint8(0x7C)),
    "float8_e4m3fn": (np.dtype(np.uint8), np.uint8(0x7F)),
    "float8_e8m0fnu": (np.dtype(np.uint8), np.uint8(0xFF)),
}
