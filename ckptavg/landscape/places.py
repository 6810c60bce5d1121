"""Places in the space of weights: combinations of checkpoints, and steps in random directions.

Directions are drawn in the space of the *parameters*; buffers, such as running statistics, are
those of the combination.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.arithmetic import rounded
from ckptavg.checkpoint import Checkpoint
from ckptavg.tensors import BY_NAME, fresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from ckptavg.tensors import AnyArray, DType

    Floats = npt.NDArray[np.float64]


_BITS = 32
_FLAT = 1e-12
"""Relative to a square: what is rounding."""


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
        filter_normalize: give each filter of a direction the norm of the weights' own filter,
            and leave out what has fewer than two dimensions (Li et al. 2018, arXiv 1712.09913,
            section 4): scale-invariant networks distort distances otherwise.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        parameters: Sequence[str],
        aliases: Mapping[str, str] | None = None,
        *,
        seed: int = 0,
        filter_normalize: bool = False,
    ) -> None:
        self._checkpoints, self._seed, self._filters = checkpoints, seed, filter_normalize
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

    def at(self, place: Place) -> Checkpoint:
        """The weights at a place, as something like a checkpoint: read one by one, never kept.

        Floats of fewer than 32 bits come as float32: rounded to theirs, a short step is another.
        """
        first = self._checkpoints[0]
        fields = {name: getattr(first, name) for name in first.__dataclass_fields__}
        fields["tensors"] = {
            name: replace(tensor, dtype=self._out_dtype(name))
            for name, tensor in first.tensors.items()
        }
        return _Mixture(**fields, make=lambda name: self._value(place, name))

    def _value(self, place: Place, name: str) -> AnyArray:
        dtype = self._checkpoints[0].tensors[name].dtype
        if not dtype.averaged:
            # Counters and the like: of the checkpoint that has the largest part.
            largest = int(np.argmax(place.coefficients))
            return self._checkpoints[largest].read(name)
        value = self._combination(place, name)
        if place.direction is not None and place.distance and name in self._drawn_as:
            value = value + place.distance * self._step(place, name, value)
        shape = self._checkpoints[0].tensors[name].shape
        wide = np.asarray(value).reshape(-1)
        out = rounded(wide, self._out_dtype(name), fresh((wide.size,)))
        return np.asarray(out).reshape(shape)

    def _out_dtype(self, name: str) -> DType:
        """The widest of the checkpoints' dtypes, of floats float32 at least."""
        dtypes = [one.tensors[name].dtype for one in self._checkpoints]
        widest = max(dtypes, key=lambda dtype: (dtype.kind == "complex", dtype.bits))
        narrow = widest.kind == "float" and widest.bits < _BITS
        return BY_NAME["float32"] if narrow else widest

    def _combination(self, place: Place, name: str) -> AnyArray:
        pairs = zip(place.coefficients, self._checkpoints, strict=True)
        total: AnyArray | None = None
        for factor, one in pairs:
            if factor:
                term = factor * _wide(one.read(name))
                total = term if total is None else np.add(total, term, out=_room(total, term))
        assert total is not None  # noqa: S101 - they sum to 1
        return total

    def _step(self, place: Place, name: str, weights: AnyArray) -> AnyArray:
        """A direction's part in one parameter: of unit length over all of them."""
        assert place.direction is not None  # noqa: S101
        drawn = self._drawn(place.direction, self._drawn_as[name])
        if not self._filters:
            return drawn / self._norm(place.direction)
        if drawn.ndim < 2:  # noqa: PLR2004 - no filters
            return np.zeros_like(drawn)
        own, its = _filter_norms(weights), _filter_norms(drawn)
        return drawn * (own / np.where(its, its, 1))

    def _drawn(self, direction: int, name: str) -> AnyArray:
        """A direction's normally distributed numbers in one parameter, the same every time."""
        seed = np.random.SeedSequence([self._seed, direction, self._numbers[name]])
        tensor = self._checkpoints[0].tensors[name]
        made = np.random.default_rng(seed)
        drawn: AnyArray = made.standard_normal(tensor.shape)
        if tensor.dtype.kind == "complex":
            drawn = drawn + 1j * made.standard_normal(tensor.shape)
        return np.asarray(drawn)

    def _norm(self, direction: int) -> float:
        if direction not in self._norms:
            drawn = (self._drawn(direction, name) for name in self._parameters)
            self._norms[direction] = _norm(drawn)
        return self._norms[direction]

    def norm(self) -> float:
        """The norm of the first checkpoint's parameters."""
        return _norm(_wide(self._checkpoints[0].read(name)) for name in self._parameters)

    def distance(self, one: int, other: int) -> float:
        """The Euclidean distance of two checkpoints' parameters."""
        pair = self._checkpoints[one], self._checkpoints[other]
        return _norm(
            _wide(pair[0].read(name)) - _wide(pair[1].read(name)) for name in self._parameters
        )

    def gram(self) -> Floats:
        """Products of the differences from the first checkpoint, `[others, others]`.

        Over the parameters alone: `gram[i, j] = (x[i+1] - x[0]) . (x[j+1] - x[0])`.
        """
        count = len(self._checkpoints) - 1
        total = np.zeros((count, count))
        for differences in self._differences():
            for row, one in enumerate(differences):
                total[row] += [one @ other for other in differences]
        return total

    def products(self, checkpoint: Checkpoint) -> Floats:
        """Products of a further checkpoint's difference from the first with the others'.

        Returns:
            `[others + 1]`: the last is the product with itself.
        """
        total = np.zeros(len(self._checkpoints))
        for name, differences in zip(self._parameters, self._differences(), strict=True):
            gap = _flat(checkpoint.read(name)) - _flat(self._checkpoints[0].read(name))
            total += [*(one @ gap for one in differences), gap @ gap]
        return total

    def _differences(self) -> Iterator[list[Floats]]:
        """For each parameter the others less the first, each `[real numbers]`."""
        for name in self._parameters:
            first = _flat(self._checkpoints[0].read(name))
            yield [_flat(one.read(name)) - first for one in self._checkpoints[1:]]


def _room(total: AnyArray, term: AnyArray) -> AnyArray | None:
    return total if total.dtype == np.result_type(total, term) else None


def _wide(values: AnyArray) -> AnyArray:
    return np.asarray(values.astype(np.complex128 if values.dtype.kind == "c" else np.float64))


def _flat(values: AnyArray) -> Floats:
    """Real numbers, of complex ones both parts, `[numbers]`."""
    flat: Floats = np.ascontiguousarray(_wide(values)).ravel().view(np.float64)
    return flat


def _norm(arrays: Iterable[AnyArray]) -> float:
    return float(np.sqrt(sum(float(np.sum(np.abs(one) ** 2)) for one in arrays)))


def _filter_norms(values: AnyArray) -> Floats:
    """Norms of the filters, along the first dimension, `[filters, 1, ...]`."""
    norms: Floats = np.sqrt(np.sum(np.abs(values.reshape(len(values), -1)) ** 2, axis=1))
    return norms.reshape(-1, *[1] * (values.ndim - 1))


@dataclass(frozen=True)
class _Mixture(Checkpoint):
    """Something like a checkpoint whose tensors are computed as they are read."""

    make: Callable[[str], AnyArray] = field(default=None, kw_only=True)  # type: ignore[assignment]

    def read(self, name: str) -> AnyArray:
        """The tensor as an array of its shape."""
        return self.make(name)


@dataclass(frozen=True)
class Plane:
    """The plane through three weights, with an orthonormal basis.

    Izmailov et al. 2018, section 3.1: `u = (w_1 - w_0) / |w_1 - w_0|`; `v` is
    `w_2 - w_0` without its part along `u`, of unit length.

    Args:
        gram: products of `w_1 - w_0` and `w_2 - w_0`, `[2, 2]`.
    """

    gram: Floats

    @cached_property
    def corners(self) -> tuple[tuple[float, float], ...]:
        """Coordinates of the three weights."""
        length = float(np.sqrt(self.gram[0, 0]))
        along = float(self.gram[0, 1]) / length
        return (0.0, 0.0), (length, 0.0), (along, self._height)

    @property
    def _height(self) -> float:
        square = self.gram[1, 1] - self.gram[0, 1] ** 2 / self.gram[0, 0]
        return float(np.sqrt(max(square, 0.0)))

    @property
    def is_flat(self) -> bool:
        """Whether the three are on a line, or two of them the same."""
        scale = float(max(self.gram[0, 0], self.gram[1, 1]))
        least = min(float(self.gram[0, 0]), float(self.gram[1, 1]), self._height**2)
        return least <= _FLAT * scale

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        """The combination of the three weights that is at a point of the plane."""
        _, (length, _), (along, height) = self.corners
        third = y / height
        second = (x - third * along) / length
        return 1 - second - third, second, third

    def project(self, products: Floats) -> tuple[float, float, float]:
        """Where a further weight is nearest, and how far it is from the plane.

        Args:
            products: as `Space.products` has them, `[3]`.
        """
        _, (length, _), (along, height) = self.corners
        x = float(products[0]) / length
        y = (float(products[1]) - x * along) / height
        return x, y, float(np.sqrt(max(float(products[2]) - x * x - y * y, 0.0)))
