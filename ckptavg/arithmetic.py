"""Sums in float64, rounded to the output's dtype as torch rounds.

Every floating value is accumulated in float64 and every complex one in complex128: the first input
is copied in (adding it to 0 would lose -0.0), the others are added in order, and the sum is divided
once. `sum(x_k / K)` would differ from this in one of some hundred float32 values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ckptavg.tensors import AnyArray, DType

_FLOAT32 = np.dtype(np.float32)


def accumulator_dtype(dtype: DType) -> np.dtype[Any]:
    """What values of a dtype are summed in."""
    return np.dtype(np.complex128 if dtype.kind == "complex" else np.float64)


def weighted(
    values: AnyArray, weight: float, out: AnyArray | None, dtype: np.dtype[Any]
) -> AnyArray:
    """`weight * values` in the dtype of the sums; the values themselves where the weight is 1.

    Args:
        values: of an input.
        weight: of the input.
        out: room for the product; None to make some.
        dtype: float64 or complex128.
    """
    if weight == 1:
        return values
    product: AnyArray = np.multiply(values, weight, out=out, dtype=dtype)
    return product


def accumulate(total: AnyArray, term: AnyArray, *, first: bool) -> None:
    """Add to a sum (float64 or complex128), or begin it: adding to 0 would lose -0.0."""
    if first:
        np.copyto(total, term, casting="same_kind")
    else:
        np.add(total, term, out=total)


def rounded(total: AnyArray, dtype: DType) -> AnyArray:
    """The sum in the output's dtype, rounded as `torch.Tensor.to` does: by way of float32.

    Returns:
        A new array, or `total` itself where that is the dtype already.
    """
    if dtype.kind == "float" and dtype.bits < 32:  # noqa: PLR2004
        total = total.astype(_FLOAT32)
    values: AnyArray = total.astype(dtype.numpy, copy=False)
    return values


def nonfinite(values: AnyArray, dtype: DType) -> AnyArray:
    """Where values are NaN or Inf, as bools of the same shape."""
    if dtype.name not in _CODES:
        return ~np.isfinite(values)
    mask = _CODES[dtype.name]
    codes: AnyArray = values.view(f"u{dtype.itemsize}") & mask
    odd: AnyArray = codes == mask
    return odd


# Exponents of all ones (the single code for NaN where there is no Inf). isfinite itself goes value
# by value through float32 for these, at a tenth of the speed.
_CODES = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,
    "float8_e8m0fnu": 0xFF,
}
