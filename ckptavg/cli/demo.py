"""`ckptavg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptavg.cli.common import Console, PathType, common_options

if TYPE_CHECKING:
    from ckptavg.demo.run import DemoReport


@click.command()
@click.argument("directory", type=PathType(), default=Path("ckptavg-demo"), metavar="[DIR]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the first weights and of the shuffles.",
)
@common_options
def demo(directory: Path, *, seed: int, as_json: bool, quiet: bool) -> None:
    """Train a small network, average its checkpoints, and show what that is worth.

    Takes about a minute on two processors and downloads nothing. Everything is left in
    DIR (ckptavg-demo unless named), which must be new or empty.
    """
    console = Console(as_json=as_json, quiet=quiet)
    from ckptavg.demo.run import run

    with (
        console.progress("training", "epoch") as progress,
        console.progress("evaluating", "point") as point_progress,
    ):
        report = run(directory, seed=seed, progress=progress, point_progress=point_progress)
    _say(console, report)
    console.result(report)


def _say(console: Console, report: DemoReport) -> None:
    """The report for people."""
    console.say(
        f"MNIST-1D: {report.train_examples:,} training examples, {report.label_noise:.0%} of the "
        f"labels wrong; {report.test_examples:,} clean test examples; {report.epochs} epochs\n"
    )
    width = max(len(row.name) for row in report.rows)
    console.say(f"{'':{width}}  {'accuracy':>8}  {'NLL':>5}")
    for row in report.rows:
        console.say(f"{row.name:{width}}  {row.accuracy:6.1f} %  {row.nll:.3f}")
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
    console.say(f"\nEverything is in {report.directory}. Its average and refresh again, by hand:")
    for command in report.commands:
        console.say(f"  {command}")
