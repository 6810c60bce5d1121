"""`ckptavg evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.common import Console, PathType, common_options
from ckptavg.cli.evaluation_options import (
    candidate_options,
    check_metric,
    evaluation_options,
    take_candidates,
    take_evaluation,
)
from ckptavg.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.norm.evaluate import Evaluation


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=PathType(), metavar="CHECKPOINT...")
@click.option(
    "--metric",
    callback=check_metric,
    metavar="loss|accuracy|SPEC",
    help="Mean cross-entropy, share of right classes, or a function that is called with the model "
    "and the batches and returns a number, or several by name.  [default: loss and accuracy]",
)
@evaluation_options
@click.option("--key", help="State dict to take where a file holds several.")
@candidate_options
@common_options
def evaluate(
    inputs: tuple[Path, ...],
    *,
    metric: str | None,
    key: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,  # noqa: ANN401 - the options above, which the library checks
) -> None:
    """Evaluate checkpoints on held-out data.

    CHECKPOINT is a checkpoint, or a directory of them. The model is made once, put in eval mode,
    and given the weights of one checkpoint after the other. --model and --loader name your own
    code, which is imported and run; batches are (inputs, targets). What --json prints is what
    `average --best N --metrics FILE` reads.
    """
    console = Console(as_json=as_json, quiet=quiet)
    rules, evaluation = take_candidates(options), take_evaluation(options, metric)
    from ckptavg.norm.evaluate import evaluate as run
    from ckptavg.norm.evaluate import winners

    with console.others_to_stderr(), console.progress("evaluating", "checkpoint") as progress:
        found = run(inputs, evaluation, select=rules, key=key, progress=progress)
    best = winners(found)
    _say(console, found, best)
    console.result(
        {
            "evaluations": [one.as_dict() for one in found],
            "best": {name: one.checkpoint for name, one in best.items()},
        }
    )


def _say(console: Console, found: Sequence[Evaluation], best: dict[str, Evaluation]) -> None:
    """The table for people: a star marks the best."""
    names = list(dict.fromkeys(name for one in found for name in one.metrics))
    rows = [("checkpoint", "step", *map(printable, names))]
    for one in found:
        values = [
            ("-" if name not in one.metrics else f"{one.metrics[name]:.5g}")
            + (" *" if best.get(name) is one else "")
            for name in names
        ]
        step = "-" if one.step is None else f"{one.step:,}"
        rows.append((printable(one.checkpoint), step, *values))
    console.say_table(rows)
    if best:
        console.say("* the best")
