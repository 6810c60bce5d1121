"""Pictures of landscapes, as PNG and SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.evaluation.pictures import METADATA, new_figure, style

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.landscape.result import Landscape

_COLUMNS = 2
_LEVELS = 14


def draw(landscape: Landscape, path: Path) -> None:
    """Draw a landscape as PNG and SVG.

    Args:
        landscape: the landscape: a panel for each metric.
        path: where it goes, without a suffix.
    """
    draw_panel = {"rays": _rays, "segment": _segment, "plane": _plane}[landscape.kind]
    metrics = list(landscape.values)
    with style():
        columns = min(len(metrics), _COLUMNS)
        rows = -(-len(metrics) // columns)
        figure = new_figure(columns, rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in panels[len(metrics) :]:
            panel.set_visible(False)
        for panel, metric in zip(panels, metrics, strict=False):
            draw_panel(panel, landscape, metric)
        figure.suptitle(_title(landscape))
        figure.savefig(path.with_suffix(".png"), dpi=150, metadata=METADATA["png"])
        figure.savefig(path.with_suffix(".svg"), metadata=METADATA["svg"])


def _title(landscape: Landscape) -> str:
    statistics = "refreshed at each point" if landscape.refreshed else "not refreshed"
    parameters = f"{landscape.dimension:,} parameters"
    return f"{landscape.kind}, {parameters}, norm statistics {statistics}"


def _rays(panel: Any, landscape: Landscape, metric: str) -> None:  # noqa: ANN401
    distances, directions = landscape.axes["distance"], len(landscape.axes["direction"])
    for name, rays in zip(landscape.checkpoints, landscape.values[metric], strict=True):
        [line] = panel.plot(distances, rays.mean(axis=0), marker=".", label=_label(name))
        panel.fill_between(
            distances, rays.min(axis=0), rays.max(axis=0),
            color=line.get_color(), alpha=0.2, linewidth=0,
        )  # fmt: skip
    panel.set_xlabel("distance")
    panel.set_ylabel(metric)
    panel.set_title(f"{directions} directions: mean, least and most")
    panel.legend()


def _segment(panel: Any, landscape: Landscape, metric: str) -> None:  # noqa: ANN401
    panel.plot(landscape.axes["position"], landscape.values[metric], marker=".")
    for place, name in enumerate(landscape.checkpoints):
        panel.axvline(place, color="grey", linewidth=0.8)
        panel.annotate(
            name, (place, 1), xycoords=("data", "axes fraction"), xytext=(2, -4),
            textcoords="offset points", rotation=90, va="top", fontsize=7,
        )  # fmt: skip
    panel.set_xlabel(f"position (0 and 1 are {landscape.apart:.3g} apart)")
    panel.set_ylabel(metric)


def _plane(panel: Any, landscape: Landscape, metric: str) -> None:  # noqa: ANN401
    xs, ys, grid = landscape.axes["x"], landscape.axes["y"], landscape.values[metric]
    known = grid[np.isfinite(grid)]
    if known.size and known.min() < known.max():
        drawn = panel.contourf(xs, ys, grid, levels=_LEVELS, cmap="viridis_r")
        panel.figure.colorbar(drawn, ax=panel, label=metric)
    for corner in landscape.corners:
        x, y = corner["x"], corner["y"]
        panel.plot(x, y, "X", color="black", markersize=8)
        panel.annotate(corner["checkpoint"], (x, y), xytext=(5, 5), fontsize=7,
                       textcoords="offset points")  # fmt: skip
    panel.set_xlim(xs[0], xs[-1])
    panel.set_ylim(ys[0], ys[-1])
    panel.set_xlabel("distance along the first axis")
    panel.set_ylabel("distance along the second axis")
    panel.set_title(metric)
    panel.set_aspect("equal")


def _label(name: str) -> str:
    """What a legend shows: of names with a line in front it shows none."""
    return f" {name}" if name.startswith("_") else name
