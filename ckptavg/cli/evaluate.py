"""`ckptavg evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command
from ckptavg.cli.console import Console, cell
from ckptavg.errors import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ckptavg.evaluation.evaluate import Evaluation


@click.command(
    cls=Command,
    groups={
        "Model, data and metric": (*options.EVALUATION, options.METRIC),
        "Refresh before each evaluation": options.EVALUATION_REFRESH,
        "Which checkpoints": (*options.CANDIDATES, options.KEY),
        RUNNING: options.COMMON,
    },
    no_effect=options.EVALUATION_NO_EFFECT,
)
@options.CHECKPOINTS
def evaluate(
    console: Console,
    checkpoints: tuple[Path, ...],
    **params: Any,  # noqa: ANN401 - the fields of `EvaluateOptions`
) -> None:
    """Evaluate checkpoints on held-out data.

    CHECKPOINT is a checkpoint, or a directory of them. The model is made once, and loads the
    weights of each checkpoint in eval mode. --model and --loader name your own code, which is
    imported and run. Batches are (inputs, targets), or dicts with labels. `average --best N
    --metrics FILE` reads the output of --json.
    """
    from ckptavg.evaluation.evaluate import EvaluateOptions, winners
    from ckptavg.evaluation.evaluate import evaluate as run

    fields = options.evaluation_fields(EvaluateOptions, params)
    with console.others_to_stderr(), console.progress("evaluating", "checkpoint") as progress:
        evaluations = run(checkpoints, **fields, progress=progress)
    best = winners(evaluations)
    _say(console, evaluations, best)
    console.result(
        {
            "evaluations": [each.as_dict() for each in evaluations],
            "best": {name: each.checkpoint for name, each in best.items()},
        }
    )


def _say(
    console: Console, evaluations: Sequence[Evaluation], best: Mapping[str, Evaluation]
) -> None:
    """Print a table of the metrics, with a star at the best of each."""
    names = list(dict.fromkeys(name for each in evaluations for name in each.metrics))
    unit = next((each.unit for each in evaluations if each.unit), "")
    heading = "epoch" if unit == "epoch" else "step"
    rows = [("checkpoint", heading, *map(printable, names))]
    for each in evaluations:
        values = [
            cell(each.metrics.get(name), ".5g") + (" *" if best.get(name) is each else "")
            for name in names
        ]
        step = cell(each.step) if each.averaged is None else "{:,} to {:,}".format(*each.averaged)
        step = step if each.unit in ("", unit) else "-"
        rows.append((printable(each.checkpoint), step, *values))
    console.say_table(rows)
    if best:
        console.say("* the best")
