"""Places in the space of weights: combinations of checkpoints, and steps in random directions.

Directions are drawn in the space of the *parameters*; buffers, such as running statistics, are
those of the combination.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.arithmetic import rounded
from ckptavg.checkpoint import Checkpoint
from ckptavg.tensors import fresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from ckptavg.tensors import AnyArray

    Floats = npt.NDArray[np.float64]


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
        checkpoints: of one model.
        parameters: names of the model's parameters in the checkpoints, each storage once.
        seed: of the directions.
        filter_normalize: give each filter of a direction the norm of the weights' own filter,
            and leave out what has fewer than two dimensions (Li et al. 2018, arXiv 1712.09913,
            section 4): scale-invariant networks distort distances otherwise.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        parameters: Sequence[str],
        *,
        seed: int = 0,
        filter_normalize: bool = False,
    ) -> None:
        self._checkpoints, self._seed, self._filters = checkpoints, seed, filter_normalize
        self.parameters = tuple(parameters)
        self._numbers = {name: number for number, name in enumerate(parameters)}
        self._norms: dict[int, float] = {}

    @property
    def dimension(self) -> int:
        """How many parameters there are."""
        return sum(self._checkpoints[0].tensors[name].count for name in self.parameters)

    def at(self, place: Place) -> Checkpoint:
        """The weights at a place, as something like a checkpoint: read one by one, never kept."""
        first = self._checkpoints[0]
        fields = {name: getattr(first, name) for name in first.__dataclass_fields__}
        return _Mixture(**fields, make=lambda name: self._value(place, name))

    def _value(self, place: Place, name: str) -> AnyArray:
        dtype = self._checkpoints[0].tensors[name].dtype
        if not dtype.averaged:
            # Counters and the like: of the checkpoint that is nearest.
            nearest = int(np.argmax(np.abs(place.coefficients)))
            return self._checkpoints[nearest].read(name)
        value = self._combination(place, name)
        if place.direction is not None and place.distance and name in self._numbers:
            value = value + place.distance * self._step(place, name, value)
        shape = self._checkpoints[0].tensors[name].shape
        return np.asarray(rounded(value.reshape(-1), dtype, fresh((value.size,)))).reshape(shape)

    def _combination(self, place: Place, name: str) -> Floats:
        pairs = zip(place.coefficients, self._checkpoints, strict=True)
        terms = [factor * _wide(one.read(name)) for factor, one in pairs if factor]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def _step(self, place: Place, name: str, weights: Floats) -> Floats:
        """A direction's part in one parameter: of unit length over all of them."""
        assert place.direction is not None  # noqa: S101
        drawn = self._drawn(place.direction, name)
        if not self._filters:
            return drawn / self._norm(place.direction)
        if drawn.ndim < 2:  # noqa: PLR2004 - no filters
            return np.zeros_like(drawn)
        own, its = _filter_norms(weights), _filter_norms(drawn)
        return drawn * (own / np.where(its, its, 1))

    def _drawn(self, direction: int, name: str) -> Floats:
        """A direction's normally distributed numbers in one parameter, the same every time."""
        seed = np.random.SeedSequence([self._seed, direction, self._numbers[name]])
        shape = self._checkpoints[0].tensors[name].shape
        return np.random.default_rng(seed).standard_normal(shape)

    def _norm(self, direction: int) -> float:
        if direction not in self._norms:
            drawn = (self._drawn(direction, name) for name in self.parameters)
            self._norms[direction] = float(np.sqrt(sum(float(np.sum(one**2)) for one in drawn)))
        return self._norms[direction]

    def gram(self) -> Floats:
        """Products of the differences from the first checkpoint, `[others, others]`.

        Over the parameters alone: `gram[i, j] = (x[i+1] - x[0]) . (x[j+1] - x[0])`.
        """
        count = len(self._checkpoints) - 1
        total = np.zeros((count, count))
        for differences in self._differences():
            total += differences @ differences.T
        return total

    def distance(self, one: int, other: int) -> float:
        """The Euclidean distance of two checkpoints' parameters."""
        total = 0.0
        for name in self.parameters:
            gap = _wide(self._checkpoints[one].read(name)) - _wide(
                self._checkpoints[other].read(name)
            )
            total += float(np.sum(gap**2))
        return float(np.sqrt(total))

    def norm(self) -> float:
        """The norm of the first checkpoint's parameters."""
        values = (_wide(self._checkpoints[0].read(name)) for name in self.parameters)
        return float(np.sqrt(sum(float(np.sum(one**2)) for one in values)))

    def products(self, checkpoint: Checkpoint) -> Floats:
        """Products of a further checkpoint's difference from the first with the others'.

        Returns:
            `[others + 1]`: the last is the product with itself.
        """
        total = np.zeros(len(self._checkpoints))
        for name, differences in zip(self.parameters, self._differences(), strict=True):
            gap = (_wide(checkpoint.read(name)) - _wide(self._checkpoints[0].read(name))).ravel()
            total += np.append(differences @ gap, gap @ gap)
        return total

    def _differences(self) -> Iterator[Floats]:
        """For each parameter the others less the first, `[others, elements]`."""
        for name in self.parameters:
            first = _wide(self._checkpoints[0].read(name)).ravel()
            others = (_wide(one.read(name)).ravel() for one in self._checkpoints[1:])
            yield np.stack([other - first for other in others])


def _wide(values: AnyArray) -> Floats:
    wide: Floats = values.astype(np.float64)
    return wide


def _filter_norms(values: Floats) -> Floats:
    """Norms of the filters, along the first dimension, `[filters, 1, ...]`."""
    norms: Floats = np.sqrt(np.sum(values.reshape(len(values), -1) ** 2, axis=1))
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
