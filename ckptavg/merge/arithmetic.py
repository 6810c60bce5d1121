"""Conversions between floating dtypes, and whether values are finite.

Sums are float64 (complex128 for complex values). Floats of 16 and 8 bits are converted to and from
float32 by NumKong, as `torch.Tensor.to` converts them. Where it is not installed, numpy and
ml_dtypes give the same bits at a tenth of the speed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ckptavg.formats.tensors import BY_NAME

if TYPE_CHECKING:
    from types import ModuleType

    from ckptavg.formats.tensors import Allocate, AnyArray, DType

_FLOAT32, _BOOL = np.dtype(np.float32), np.dtype(bool)
_FLOAT64, _COMPLEX128 = np.dtype(np.float64), np.dtype(np.complex128)
_BFLOAT16, _E4M3FN = BY_NAME["bfloat16"].numpy, BY_NAME["float8_e4m3fn"].numpy
# Bits of NaN and Inf: exponents of all ones, or the only code of NaN in a format without Inf.
# np.isfinite would convert value by value to float32, at a tenth of the speed.
# By dtype and not by name: numpy puts the name of a dtype together anew, in 15 us.
_SPECIAL = {
    _BFLOAT16: 0x7F80,
    BY_NAME["float16"].numpy: 0x7C00,
    BY_NAME["float8_e5m2"].numpy: 0x7C,
    _E4M3FN: 0x7F,
}
_NAMES = {dtype: dtype.name for dtype in (_FLOAT32, *_SPECIAL)}
_LARGEST = {dtype: float(ml_dtypes.finfo(dtype).max) for dtype in _SPECIAL}  # type: ignore[no-untyped-call]


def accumulator_dtype(dtype: DType) -> np.dtype[Any]:
    """The dtype in which values of a dtype are summed."""
    return _COMPLEX128 if dtype.kind == "complex" else _FLOAT64


def widened(values: AnyArray, allocate: Allocate) -> AnyArray:
    """float32 instead of values that numpy would convert one by one; else the values themselves."""
    # numpy adds bfloat16 to float64 faster than both steps take.
    is_slow = values.dtype in _SPECIAL and values.dtype != _BFLOAT16
    return _cast(values, _FLOAT32, allocate) if is_slow else values


def rounded(total: AnyArray, dtype: DType, allocate: Allocate) -> AnyArray:
    """float64, float32 or complex128 values in a dtype, rounded like `torch.Tensor.to`.

    Returns:
        An allocated array, or `total` itself if it has the dtype already.
    """
    if dtype.kind == "float" and dtype.bits < 32:  # noqa: PLR2004 - by way of float32
        total = _cast(total, _FLOAT32, allocate)
    return _cast(total, dtype.numpy, allocate)


def _cast(values: AnyArray, dtype: np.dtype[Any], allocate: Allocate) -> AnyArray:
    if values.dtype == dtype:
        return values
    out = allocate(dtype, dtype)
    if not _convert_by_numkong(values, out):
        np.copyto(out, values, casting="unsafe")
    return out


def _convert_by_numkong(values: AnyArray, out: AnyArray) -> bool:
    """Convert values between float32 and a narrow float; False if that is left to numpy.

    NumKong makes numbers of NaN, and of some values that do not fit into the narrow float; it loses
    the sign of NaN in float8_e4m3fn. It takes no arrays without dimensions.

    Args:
        values: float32 or narrow, aligned, with one dimension or more.
        out: narrow or float32, of the same shape, C-contiguous.
    """
    source, target = values.dtype, out.dtype
    is_narrow = {_FLOAT32} < {source, target} <= _NAMES.keys()
    if not is_narrow or not values.ndim:
        return False
    if source == _E4M3FN and _largest_code(values) == _SPECIAL[source]:
        return False
    if target in _LARGEST:
        largest = _LARGEST[target]
        if not -largest <= values.min(initial=0) <= values.max(initial=0) <= largest:
            return False
    library = _numkong()
    if library is None:
        return False
    library.astype(values, _NAMES[target], out=out)
    return True


@functools.cache
def _numkong() -> ModuleType | None:
    """The library; None where it is not installed. Importing it takes 0.05 s."""
    try:
        import numkong  # noqa: PLC0415
    except ImportError:
        return None
    return numkong


def all_finite(values: AnyArray, dtype: DType, allocate: Allocate) -> bool:
    """Whether no value is NaN or Inf."""
    if dtype.numpy not in _SPECIAL:
        return bool(np.isfinite(values, out=allocate("finite", _BOOL)).all())
    return _largest_code(values) < _SPECIAL[dtype.numpy]


def _largest_code(values: AnyArray) -> int:
    """The largest magnitude among narrow floats, as an integer."""
    # Of unsigned integers the negative codes are the largest, of signed ones the smallest.
    size, sign = values.itemsize, 1 << (8 * values.itemsize - 1)
    negative = int(np.maximum.reduce(values.view(f"u{size}"), axis=None, initial=0)) & (sign - 1)
    positive = int(np.maximum.reduce(values.view(f"i{size}"), axis=None, initial=0))
    return max(negative, positive)


def nonfinite(values: AnyArray, dtype: DType) -> AnyArray:
    """Where values are NaN or Inf, as bools of the same shape."""
    if dtype.numpy not in _SPECIAL:
        return ~np.isfinite(values)
    special = _SPECIAL[dtype.numpy]
    codes: AnyArray = values.view(f"u{dtype.itemsize}") & special
    odd: AnyArray = codes == special
    return odd
