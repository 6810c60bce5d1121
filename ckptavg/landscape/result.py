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
        apart: the distance of the first two checkpoints' parameters; None where there is one.
        refreshed: whether the norm statistics were refreshed at each point.
        axes: the coordinates of the points: of rays `checkpoint`, `direction` and `distance`, of a
            segment `position`, of a plane `y` and `x`.
        values: the values of each metric, with a dimension for each of the axes.
        corners: of a plane, the name, the coordinates and the metrics of its three checkpoints.
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
