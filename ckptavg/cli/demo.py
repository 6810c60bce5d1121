"""`ckptavg demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command
from ckptavg.cli.declarations import path_or_url, variant

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.cli.console import Console
    from ckptavg.demo.run import DemoReport


_SEED = variant(options.SEED, type=click.IntRange(0, 2**32 - 1))


@click.command(cls=Command, groups={RUNNING: (_SEED, *options.COMMON)})
@click.argument("directory", type=path_or_url, default="ckptavg-demo", metavar="[DIR]")
def demo(console: Console, directory: Path, seed: int) -> None:
    """Train a small network, average its checkpoints, and show what that gains.

    This takes one to three minutes in one thread, and downloads nothing. All files are in DIR
    (ckptavg-demo by default), which must be new or empty.
    """
    from ckptavg.demo.run import run

    with (
        console.progress("training", "epoch") as progress,
        console.progress("evaluating", "point") as point_progress,
    ):
        report = run(directory, seed=seed, progress=progress, point_progress=point_progress)
    _say(console, report)
    console.result(report)


def _say(console: Console, report: DemoReport) -> None:
    """Print the metrics of each model, and how the loss rises around them."""
    console.say(
        f"MNIST-1D: {report.train_examples:,} training examples, {report.label_noise:.0%} of the "
        f"labels wrong; {report.test_examples:,} clean test examples; {report.epochs} epochs\n"
    )
    rows = [(row.name, f"{row.accuracy:6.1f} %", f"{row.nll:.3f}") for row in report.rows]
    console.say_table([("", "accuracy", "  NLL"), *rows])
    last, average = report.rise.rises
    slower = "more slowly" if average < last else "no more slowly"
    rise = report.rise
    console.say(
        f"\nRandom directions, {rise.distance:.3g} away from the weights (twice as far as the "
        "average is\nfrom the last iterate): the NLL of 2,000 test examples has risen by "
        f"{average:.3f} around the\naverage and by {last:.3f} around the last iterate, so it rises "
        f"{slower} around the average.\nIt has risen by less in {rise.lower} of {rise.directions} "
        f"directions.\n  {', '.join(report.pictures)}"
    )
    console.say(f"\nAll files are in {report.directory}. To average and refresh by hand:")
    for command in report.commands:
        console.say(f"  {command}")
