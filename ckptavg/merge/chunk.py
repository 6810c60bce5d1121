"""The computation of a chunk: weighted sums in float64, divided, rounded and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.formats.tensors import Allocate, AnyArray, new_arrays
from ckptavg.merge.arithmetic import (
    accumulator_dtype,
    all_finite,
    nonfinite,
    rounded,
    widened,
)
from ckptavg.merge.jobs import BadValueError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptavg.merge.jobs import Job, Mean, StoredTensor

_DOWNSCALE = 2.0**-200  # sums of the largest float64 values, times this, fit float64


@dataclass(frozen=True)
class Chunk:
    """The computation of a chunk.

    Attributes:
        job: the job.
        read: reads the chunk's values of an input.
        allocate: gives uninitialised arrays of the chunk's shape.
        start: index of the chunk's first element in the job; None in a strided tensor.
        allow_nonfinite: accept NaN and Inf in the inputs.
    """

    job: Job
    read: Callable[[StoredTensor], AnyArray]
    allocate: Allocate
    start: int | None
    allow_nonfinite: bool

    def sums(self) -> list[AnyArray]:
        """The weighted sum for each mean, in float64 or complex128. Each input is read once."""
        job, dtype = self.job, accumulator_dtype(self.job.dtype)
        sums: dict[int, AnyArray] = {}
        for entry, places_by_weight in job.terms:
            values = widened(self.read(entry), self.allocate)
            if len(job.means) > 1:
                wide = self.allocate("wide", dtype)
                np.copyto(wide, values, casting="same_kind")
                values = wide
            for weight, places in places_by_weight:
                term = values
                if weight != 1:
                    term = np.multiply(
                        values, weight, out=self.allocate("product", dtype), dtype=dtype
                    )
                for place in places:
                    if place in sums:
                        np.add(sums[place], term, out=sums[place])
                    else:  # copied: adding it to 0 would lose -0.0
                        sums[place] = self.allocate(f"sum {place}", dtype)
                        np.copyto(sums[place], term, casting="same_kind")
        return [sums[place] for place in range(len(job.means))]

    def result(self, mean: Mean, total: AnyArray) -> AnyArray:
        """The values of a mean: the sum divided (in place), rounded and checked.

        Raises:
            BadValueError: a value is NaN, Inf or negative where that is an error.
        """
        dtype = self.job.dtype
        if mean.divisor != 1:
            np.divide(total, mean.divisor, out=total)
        values = rounded(total, dtype, self.allocate)
        if not all_finite(values, dtype, self.allocate):
            odd = nonfinite(values, dtype)
            values = np.array(values)
            values[odd] = self._nonfinite_values(mean, odd, values[odd])
        if mean.nonnegative and (values < 0).any():
            element = self._element(values < 0, 0)
            raise BadValueError("the weights make this variance negative", self.job, element)
        return values

    def _nonfinite_values(self, mean: Mean, odd: AnyArray, values: AnyArray) -> AnyArray:
        """The values where a result is NaN or Inf.

        A value that is the same in all inputs, such as -inf in a mask, is kept as it is. A mean of
        which only the sum is too large is computed again from smaller numbers. Others are errors,
        or stay as computed if `allow_nonfinite` is set.

        Args:
            mean: the weighted mean.
            odd: bools of the chunk's shape, True where the result is NaN or Inf.
            values: the result at these places, `[num_odd]`.

        Raises:
            BadValueError: an input has NaN or Inf, or a finite mean does not fit the dtype.
        """
        job = self.job
        pairs = zip(job.inputs, mean.weights, strict=True)
        used = [(entry, weight) for entry, weight in pairs if weight != 0]
        wide = accumulator_dtype(job.dtype)
        entry, weight = used[0]
        first = self.read(entry)[odd].astype(wide)
        total = first * _DOWNSCALE * weight
        same = np.full(len(first), not mean.must_be_finite)
        culprit = np.where(np.isfinite(first), -1, 0)
        for number, (entry, weight) in enumerate(used[1:], 1):
            other = self.read(entry)[odd].astype(wide)
            total += other * _DOWNSCALE * weight
            same &= (other == first) | (np.isnan(other) & np.isnan(first))
            culprit = np.where((culprit < 0) & ~np.isfinite(other), number, culprit)
        kept = rounded(first, job.dtype, new_arrays(first.shape))
        again = rounded(total / mean.divisor / _DOWNSCALE, job.dtype, new_arrays(first.shape))
        is_finite = (culprit < 0) & ~nonfinite(again, job.dtype)
        values = np.where(is_finite, again, values)
        misfit = (culprit < 0) & ~is_finite | (same & np.isinf(first) & np.isnan(kept))
        wrong = misfit if self.allow_nonfinite else misfit | ~(same | is_finite)
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            element = self._element(odd, position)
            if misfit[position]:
                raise BadValueError(f"the average does not fit {job.dtype.name}", job, element)
            entry, _ = used[culprit[position]]
            raise BadValueError(f"is {self.read(entry)[odd][position]}", job, element, entry.part)
        return np.where(same, kept, values)

    def _element(self, where: AnyArray, position: int) -> int | None:
        """Index in the job of the n-th marked element; None in a strided tensor."""
        return None if self.start is None else self.start + int(np.flatnonzero(where)[position])
