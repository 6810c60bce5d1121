"""Places in the space of weights: combinations of checkpoints, and steps in random directions.

Directions are drawn in the space of the *parameters*; buffers, such as running statistics, are
those of the combination.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.formats.computed import ComputedCheckpoint
from ckptavg.formats.tensors import BY_NAME, new_arrays, power_iteration_vectors
from ckptavg.merge.arithmetic import rounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import AnyArray, DType

    Floats = npt.NDArray[np.float64]


log = logging.getLogger("ckptavg")

_BITS = 32
_CHUNK = 1 << 20
"""Numbers that are in float64 at a time."""


@dataclass(frozen=True)
class Place:
    """A point in the space of weights: `sum(coefficients[i] * x[i]) + distance * direction`.

    Attributes:
        coefficients: one for each checkpoint; they sum to 1.
        direction: number of the random direction; None for none.
        distance: along it: of unit length, in the units of the parameters.
    """

    coefficients: tuple[float, ...]
    direction: int | None = None
    distance: float = 0.0


class Space:
    """The weights between checkpoints of one model, and random directions from them.

    Args:
        checkpoints: of one model, with the same names.
        parameters: names of the model's parameters in the checkpoints, each storage once.
        aliases: further names of tied parameters, each with the one among `parameters`.
        seed: of the directions.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        parameters: Sequence[str],
        aliases: Mapping[str, str] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self._checkpoints, self._seed = checkpoints, seed
        self._vectors = power_iteration_vectors(checkpoints[0].tensors)
        if self._vectors:
            log.info(
                "%d vectors of spectral norm are copied from the checkpoint with the largest "
                "weight",
                len(self._vectors),
            )
        parameters = [name for name in parameters if name not in self._vectors]
        self._parameters = tuple(parameters)
        self._drawn_as = {name: name for name in parameters} | dict(aliases or {})
        self._numbers = {name: number for number, name in enumerate(parameters)}
        self._norms: dict[int, float] = {}

    @property
    def dimension(self) -> int:
        """How many parameters there are; a complex one is two."""
        tensors = self._checkpoints[0].tensors
        return sum(
            tensors[name].count * (2 if tensors[name].dtype.kind == "complex" else 1)
            for name in self._parameters
        )

    def place(self, checkpoint: int, direction: int | None = None, distance: float = 0.0) -> Place:
        """The place of a checkpoint, or the one at a distance from it."""
        factors = (float(checkpoint == other) for other in range(len(self._checkpoints)))
        return Place(tuple(factors), direction if distance else None, distance)

    def at(self, place: Place) -> Checkpoint:
        """The weights at a place, as something like a checkpoint: read one by one, never kept.

        Floats of fewer than 32 bits come as float32: rounded to theirs, a short step is another.
        """
        first = self._checkpoints[0]
        tensors = {
            name: replace(tensor, dtype=self._out_dtype(name))
            for name, tensor in first.tensors.items()
        }
        fields = {**vars(first), "tensors": tensors}
        return ComputedCheckpoint(**fields, make=lambda name: self._value(place, name))

    def _value(self, place: Place, name: str) -> AnyArray:
        tensor = self._checkpoints[0].tensors[name]
        if not tensor.dtype.averaged or name in self._vectors:
            # Counters, and what spectral norm iterates: of the checkpoint with the largest part.
            largest = int(np.argmax(place.coefficients))
            return self._checkpoints[largest].read(name)
        pairs = zip(place.coefficients, self._checkpoints, strict=True)
        terms = [(factor, each.read(name).reshape(-1)) for factor, each in pairs if factor]
        steps = self._steps(place, name)
        dtype, done = self._out_dtype(name), 0
        out = np.empty(tensor.count, dtype.numpy)
        while done < tensor.count:
            part = slice(done, min(done + _CHUNK, tensor.count))
            total = sum(factor * _wide(values[part]) for factor, values in terms)
            if steps is not None:
                total = total + next(steps)
            out[part] = rounded(np.asarray(total), dtype, new_arrays((part.stop - done,)))
            done = part.stop
        return out.reshape(tensor.shape)

    def _steps(self, place: Place, name: str) -> Iterator[AnyArray] | None:
        """What a place's step adds to a parameter, in chunks; None if it adds nothing."""
        if place.direction is None or not place.distance or name not in self._drawn_as:
            return None
        length = place.distance / self._norm(place.direction)
        return (length * part for part in self._drawn(place.direction, self._drawn_as[name]))

    def _out_dtype(self, name: str) -> DType:
        """The widest of the checkpoints' dtypes, of floats float32 at least."""
        dtypes = [each.tensors[name].dtype for each in self._checkpoints]
        widest = max(dtypes, key=lambda dtype: (dtype.kind == "complex", dtype.bits))
        narrow = widest.kind == "float" and widest.bits < _BITS
        return BY_NAME["float32"] if narrow else widest

    def _drawn(self, direction: int, name: str) -> Iterator[AnyArray]:
        """A direction's normally distributed numbers in one parameter, the same every time."""
        seed = np.random.SeedSequence([self._seed, direction, self._numbers[name]])
        generator, tensor = np.random.default_rng(seed), self._checkpoints[0].tensors[name]
        for start in range(0, tensor.count, _CHUNK):
            count = min(_CHUNK, tensor.count - start)
            if tensor.dtype.kind == "complex":
                yield generator.standard_normal(2 * count).view(np.complex128)
            else:
                yield generator.standard_normal(count)

    def _norm(self, direction: int) -> float:
        if direction not in self._norms:
            parts = (part for name in self._parameters for part in self._drawn(direction, name))
            self._norms[direction] = math.sqrt(sum(_square(part) for part in parts))
        return self._norms[direction]

    def norm(self) -> float:
        """The norm of the first checkpoint's parameters."""
        return math.sqrt(sum(one @ one for [one] in self._real(self._checkpoints[:1])))

    @cached_property
    def apart(self) -> float | None:
        """The Euclidean distance of the first two checkpoints' parameters; None where one is."""
        if len(self._checkpoints) == 1:
            return None
        pairs = self._real(self._checkpoints[:2])
        return math.sqrt(sum((first - second) @ (first - second) for first, second in pairs))

    def gram(self) -> Floats:
        """Products of the differences from the first checkpoint, `[others, others]`.

        Over the parameters alone: `gram[i, j] = (x[i+1] - x[0]) . (x[j+1] - x[0])`.
        """
        count = len(self._checkpoints) - 1
        total = np.zeros((count, count))
        for first, *others in self._real(self._checkpoints):
            with np.errstate(invalid="ignore"):  # Inf and NaN: the caller looks for them
                gaps = np.stack([other - first for other in others])
                total += gaps @ gaps.T
        return total

    def _real(self, checkpoints: Sequence[Checkpoint]) -> Iterator[list[Floats]]:
        """The checkpoints' parameters as real numbers, some at a time, `[numbers]` each."""
        for name in self._parameters:
            read = [each.read(name).reshape(-1) for each in checkpoints]
            for start in range(0, read[0].size, _CHUNK):
                yield [_wide(each[start : start + _CHUNK]).view(np.float64) for each in read]


def _square(values: AnyArray) -> float:
    flat = values.view(np.float64)
    return float(flat @ flat)


def _wide(values: AnyArray) -> AnyArray:
    return np.asarray(values.astype(np.complex128 if values.dtype.kind == "c" else np.float64))
