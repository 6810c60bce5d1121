"""The report of a refresh, for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptavg.cli.console import Console, plural
from ckptavg.errors import printable

if TYPE_CHECKING:
    from ckptavg.batchnorm.report import RefreshReport


def say_report(console: Console, report: RefreshReport) -> None:
    """Print what a refresh changed, and how certain the new statistics are."""
    if not report.layers:
        console.say("no norm statistics to refresh")
        return
    shared = f" in {report.processes} processes" if report.processes > 1 else ""
    console.say(
        f"refreshed {plural(len(report.layers), 'norm layer')} with "
        f"{plural(report.batches, 'batch')} of {plural(report.samples, 'sample')} in all{shared} "
        f"(estimator {report.estimator})"
    )
    mean = report.largest(lambda layer: layer.mean_change)
    variance = report.largest(lambda layer: layer.variance_ratio)
    console.say(
        f"  largest change: mean by {mean.mean_change:.3g} standard deviations in "
        f"{printable(mean.name)}, variance by a factor of {variance.variance_ratio:.3g} in "
        f"{printable(variance.name)}"
    )
    _say_errors(console, report)


def _say_errors(console: Console, report: RefreshReport) -> None:
    """Print how far the statistics may be from those of endless data."""
    known = [layer for layer in report.layers if math.isfinite(layer.mean_error)]
    if known:
        mean = max(known, key=lambda layer: layer.mean_error)
        std = max(known, key=lambda layer: layer.log_std_error)
        console.say(
            f"  remaining error: mean {mean.mean_error:.2g} standard deviations in "
            f"{printable(mean.name)}, log of the standard deviation {std.log_std_error:.2g} in "
            f"{printable(std.name)}"
        )
    if report.converged:
        console.say(f"  both are within {report.tol:g}: the pass ended here")
    elif report.converged is not None:
        console.say(f"  the data ended before both were within {report.tol:g}")
