"""Pictures: what averages are worth by their windows, and the schedule of the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.errors import CkptAvgError
from ckptavg.write.temporary import replacing

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise CkptAvgError(
        f"plots need matplotlib, which cannot be imported: {error}",
        remedy="pip install 'ckptavg[plots]', or leave them out with `plots=False`",
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from ckptavg.evaluation.swept import Sweep

_WIDTH, _HEIGHT = 5.0, 3.8  # inches
# The same file for the same values: no dates, no random names in SVG.
_STYLE: Any = {"svg.hashsalt": "ckptavg", "font.size": 9, "text.parse_math": False}
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


def style() -> AbstractContextManager[None]:
    """The style of all pictures."""
    return mpl.rc_context(_STYLE)


def new_figure(columns: int, rows: int) -> Figure:
    """A figure with room for so many panels."""
    return Figure((_WIDTH * columns, _HEIGHT * rows), layout="constrained")


def _draw(path: Path, draw: Callable[[Any], None]) -> None:
    """Draw one panel into a file, whose suffix says the format."""
    kind = path.suffix.removeprefix(".").lower()
    with style(), replacing(path) as made:
        figure = new_figure(1, 1)
        draw(figure.subplots())
        figure.savefig(made, format=kind, dpi=150, metadata=METADATA[kind])


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """The metric against the length of the window: a line a scheme, checkpoints as dots."""
    metric = sweep.metric

    def draw(panel: Any) -> None:  # noqa: ANN401
        places = range(len(sweep.checkpoints), 0, -1)
        values = [row.metrics.get(metric, np.nan) for row in sweep.checkpoints]
        label = "one checkpoint, counted from the last"
        panel.plot(places, values, ".", color="grey", markersize=4, label=label)
        for scheme in dict.fromkeys(row.scheme for row in sweep.averages):
            rows = sorted(
                (row for row in sweep.averages if row.scheme == scheme), key=lambda row: row.count
            )
            found = [row.metrics.get(metric, np.nan) for row in rows]
            panel.plot([row.count for row in rows], found, marker="o", markersize=4, label=scheme)
        best = sweep.best
        panel.plot(
            best.count, best.metrics[metric], "*", color="black", markersize=12,
            label=f"best of {len(sweep.averages)}",
        )  # fmt: skip
        counts = sorted({1, *(row.count for row in sweep.averages)})
        panel.set_xscale("log")
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
        panel.set_xlabel("checkpoints in the average")
        panel.set_ylabel(f"{metric} on held-out data")
        panel.legend()

    _draw(path, draw)


def draw_schedule(
    steps: Sequence[float], rates: Sequence[float], taken: Sequence[bool], unit: str, path: Path
) -> None:
    """The recorded learning rate against the step, with the members of an average marked.

    Args:
        steps: of the checkpoints, in the order of training.
        rates: the learning rate of each.
        taken: whether each is a member.
        unit: of the steps.
        path: the file.
    """

    def draw(panel: Any) -> None:  # noqa: ANN401
        panel.plot(steps, rates, marker=".", color="grey", linewidth=0.8, label="checkpoints")
        members = [
            (step, rate) for step, rate, is_in in zip(steps, rates, taken, strict=True) if is_in
        ]
        label = f"{len(members)} members"
        panel.plot([step for step, _ in members], [rate for _, rate in members], "o", label=label)
        panel.set_ylim(bottom=0)
        panel.set_xlabel(unit)
        panel.set_ylabel("learning rate")
        panel.legend()

    _draw(path, draw)
