"""A landscape: metrics at points of the space of weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.landscape.places import Floats


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Metrics at points around checkpoints, or between them.

    Attributes:
        kind: `rays`, `segment` or `plane`.
        checkpoints: the checkpoints' names.
        dimension: the number of parameters.
        apart: the distance between the parameters of the first two checkpoints; None if there is
            only one checkpoint.
        refreshed: whether the norm statistics were refreshed at each point.
        axes: the coordinates of the points, by the name of the axis. Rays have `checkpoint`,
            `direction` and `distance`; a segment has `position`; a plane has `y` and `x`.
        values: the values of each metric, with a dimension for each axis.
        corners: name, coordinates and metrics of each of the three checkpoints of a plane.
    """

    kind: str
    checkpoints: tuple[str, ...]
    dimension: int
    apart: float | None
    refreshed: bool
    axes: Mapping[str, Sequence[Any]]
    values: Mapping[str, Floats] = field(repr=False)
    corners: Sequence[Mapping[str, Any]] = ()

    def as_dict(self) -> dict[str, Any]:
        """The landscape in plain values, for JSON."""
        axes = {name: list(axis) for name, axis in self.axes.items()}
        values = {metric: array.tolist() for metric, array in self.values.items()}
        return {**vars(self), "axes": axes, "values": values}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point, with its coordinates and its metrics."""
        coordinates = [*itertools.product(*self.axes.values())]
        metrics = zip(*(array.ravel().tolist() for array in self.values.values()), strict=True)
        names = (*self.axes, *self.values)
        return [
            dict(zip(names, point + values, strict=True))
            for point, values in zip(coordinates, metrics, strict=True)
        ]
