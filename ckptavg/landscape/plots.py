"""Pictures of what was found, as PNG and SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ckptavg.errors import CkptAvgError
from ckptavg.landscape.rays import Rays
from ckptavg.landscape.segment import Segment

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise CkptAvgError(
        f"plots need matplotlib, which cannot be imported: {error}",
        remedy="pip install 'ckptavg[plots]', or --no-plots",
    ) from error

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.landscape.plane import PlaneResult

_WIDTH, _HEIGHT = 5.0, 3.8  # inches
_COLUMNS = 2
_LEVELS = 14


def draw(result: Rays | Segment | PlaneResult, path: Path, title: str) -> None:
    """Draw it as PNG and SVG.

    Args:
        result: what is drawn: a panel for each metric.
        path: where it goes, without a suffix.
        title: above all panels.
    """
    metrics = list(result.curves if isinstance(result, Rays | Segment) else result.grids)
    # The same file for the same values: no dates, no random names in SVG.
    with mpl.rc_context({"svg.hashsalt": "ckptavg", "font.size": 9, "text.parse_math": False}):
        columns = min(len(metrics), _COLUMNS)
        rows = -(-len(metrics) // columns)
        figure = Figure((_WIDTH * columns, _HEIGHT * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in panels[len(metrics) :]:
            panel.set_visible(False)
        for panel, metric in zip(panels, metrics, strict=False):
            if isinstance(result, Rays):
                _rays(panel, result, metric)
            elif isinstance(result, Segment):
                _segment(panel, result, metric)
            else:
                _plane(figure, panel, result, metric)
        figure.suptitle(title)
        figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _rays(panel: Any, result: Rays, metric: str) -> None:  # noqa: ANN401
    for name, rays in zip(result.checkpoints, result.curves[metric], strict=True):
        columns = list(zip(*rays, strict=True))
        means = [sum(column) / len(column) for column in columns]
        [line] = panel.plot(result.distances, means, marker=".", label=_label(name))
        panel.fill_between(
            result.distances, [min(c) for c in columns], [max(c) for c in columns],
            color=line.get_color(), alpha=0.2, linewidth=0,
        )  # fmt: skip
    panel.set_xlabel("distance")
    panel.set_ylabel(metric)
    panel.set_title(f"{result.directions} directions: mean, least and most")
    panel.legend()


def _segment(panel: Any, result: Segment, metric: str) -> None:  # noqa: ANN401
    panel.plot(result.positions, result.curves[metric], marker=".")
    for place, name in enumerate(result.checkpoints):
        panel.axvline(place, color="grey", linewidth=0.8)
        panel.annotate(
            name, (place, 1), xycoords=("data", "axes fraction"), xytext=(2, -4),
            textcoords="offset points", rotation=90, va="top", fontsize=7,
        )  # fmt: skip
    panel.set_xlabel(f"position (0 and 1 are {result.apart:.3g} apart)")
    panel.set_ylabel(metric)


def _plane(figure: Any, panel: Any, result: PlaneResult, metric: str) -> None:  # noqa: ANN401
    grid = result.grids[metric]
    values = [value for row in grid for value in row if math.isfinite(value)]
    if values and min(values) < max(values):
        drawn = panel.contourf(result.xs, result.ys, grid, levels=_LEVELS, cmap="viridis_r")
        figure.colorbar(drawn, ax=panel, label=metric)
    for mark in result.checkpoints:
        panel.plot(mark.x, mark.y, "X", color="black", markersize=8)
        panel.annotate(mark.checkpoint, (mark.x, mark.y), xytext=(5, 5), fontsize=7,
                       textcoords="offset points")  # fmt: skip
    panel.set_xlim(result.xs[0], result.xs[-1])
    panel.set_ylim(result.ys[0], result.ys[-1])
    panel.set_xlabel("distance along the first axis")
    panel.set_ylabel("distance along the second axis")
    panel.set_title(metric)
    panel.set_aspect("equal")


def _label(name: str) -> str:
    """What a legend shows: of names with a line in front it shows none."""
    return f" {name}" if name.startswith("_") else name
