"""The study's figures as tables and a plot: paired differences, intervals, sign tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

ARMS = (
    "last iterate", "best by validation", "decayed", "decayed, refreshed",
    "SWA, not refreshed", "SWA, refreshed",
)  # fmt: skip
PAIRS = (
    ("SWA, refreshed", "decayed"),
    ("SWA, refreshed", "SWA, not refreshed"),
    ("SWA, refreshed", "last iterate"),
    ("SWA, refreshed", "best by validation"),
    ("decayed, refreshed", "decayed"),
)
SWEPT_ARMS = ("decayed", "all minima, uniform", "chosen by sweep")
SWEPT_PAIRS = (
    ("chosen by sweep", "decayed"),
    ("chosen by sweep", "all minima, uniform"),
    ("all minima, uniform", "decayed"),
)
METRICS = (("accuracy", "points", 0, 1), ("NLL", "nats", 1, -1))
_RESAMPLES = 10_000
_LEVEL = 0.05

Rows = Sequence[dict[str, object]]


def differences(rows: Rows, one: str, other: str, metric: int) -> list[float]:
    """One arm less another, seed by seed."""
    return [row[one][metric] - row[other][metric] for row in rows]  # type: ignore[index]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the means of resamples with replacement (percentile bootstrap)."""
    made = np.random.default_rng(seed=0)
    drawn = made.choice(np.array(values), (_RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def sign_test(values: Sequence[float]) -> tuple[int, int, float]:
    """How many differences are positive, of how many that are not 0, and the two-sided p."""
    positive, count = sum(one > 0 for one in values), sum(one != 0 for one in values)
    tail = sum(math.comb(count, k) for k in range(min(positive, count - positive) + 1))
    return positive, count, min(1.0, 2 * tail / 2**count)


def verdict(low: float, high: float, p: float, better: int) -> str:
    """What an interval and a sign test say, if they agree."""
    if low <= 0 <= high or p > _LEVEL:
        return "not told apart"
    return "better" if (low > 0) == (better > 0) else "worse"


def write_report(found: dict[str, Rows], folder: Path) -> None:
    """Write `results.md` and `differences.png`."""
    lines: list[str] = []
    for name, rows in found.items():
        windows = ", ".join(str(row["window"]) for row in rows)
        lines += _section(name, rows, ARMS, PAIRS, f"Checkpoints averaged, by seed: {windows}.")
    (folder / "results.md").write_text("\n".join(lines))
    _draw(found, folder / "differences.png")


def write_windows(found: dict[str, Rows], folder: Path) -> None:
    """Write `windows.md`: what `sweep` has chosen, and what that was worth."""
    lines: list[str] = []
    for name, rows in found.items():
        picks = Counter(f"{row['scheme']} of {row['checkpoints']} ({row['from']})" for row in rows)
        text = ", ".join(f"{pick}: {count}" for pick, count in sorted(picks.items()))
        note = f"Chosen of {rows[0]['averages']} averages, by number of seeds: {text}."
        lines += _section(name, rows, SWEPT_ARMS, SWEPT_PAIRS, note)
    (folder / "windows.md").write_text("\n".join(lines))


def _section(
    name: str,
    rows: Rows,
    arms: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    note: str,
) -> list[str]:
    """The tables of one task."""
    lines = [f"### {name}", "", f"{len(rows)} seeds; mean and standard deviation over them.", ""]
    lines += ["| arm | test accuracy, % | test NLL |", "|---|---|---|"]
    for arm in arms:
        cells = []
        for metric, digits in ((0, 2), (1, 3)):
            values = [row[arm][metric] for row in rows]  # type: ignore[index]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            cells.append(f"{fmean(values):.{digits}f} +- {spread:.{digits}f}")
        lines.append(f"| {arm} | {cells[0]} | {cells[1]} |")
    lines += ["", note, ""]
    lines += [
        "| paired difference | metric | mean | 95 % interval | sign test | |",
        "|---|---|---|---|---|---|",
    ]
    for one, other in pairs:
        for metric, unit, index, better in METRICS:
            values = differences(rows, one, other, index)
            low, high = interval(values)
            positive, count, p = sign_test(values)
            ahead = positive if better > 0 else count - positive
            lines.append(
                f"| {one} - {other} | {metric}, {unit} | {fmean(values):+.3f} | "
                f"{low:+.3f} to {high:+.3f} | ahead in {ahead} of {count}, p = {p:.3f} | "
                f"{verdict(low, high, p, better)} |"
            )
    return [*lines, ""]


def _draw(found: dict[str, Rows], path: Path) -> None:
    figure = Figure((10, 3.2 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), len(METRICS), squeeze=False)
    for row, (name, rows) in enumerate(found.items()):
        for column, (metric, unit, index, _) in enumerate(METRICS):
            panel = panels[row][column]
            for place, (one, other) in enumerate(reversed(PAIRS)):
                values = differences(rows, one, other, index)
                low, high = interval(values)
                panel.plot(
                    values, [place] * len(values), "o", color="grey", alpha=0.5, markersize=4
                )
                panel.plot([low, high], [place, place], color="black")
                panel.plot(fmean(values), place, "D", color="black", markersize=5)
            panel.axvline(0, color="black", linewidth=0.6)
            panel.set_yticks(
                range(len(PAIRS)), [f"{a}\n- {b}" for a, b in reversed(PAIRS)], fontsize=7
            )
            panel.set_title(f"{name}: {metric}, {unit}", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
