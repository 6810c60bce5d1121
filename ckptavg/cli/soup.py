"""`ckptavg soup`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command
from ckptavg.cli.console import Console, plural, size
from ckptavg.cli.declarations import parse
from ckptavg.cli.report import say_report
from ckptavg.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.evaluation.soup import Soup, SoupStep


_METRIC, _METRICS, _OUTPUT = parse("""
--metric loss|accuracy|SPEC
                  Mean cross-entropy, share of correct predictions, or a function of the model and
                  the batches that returns a number; FILE.py:FUNCTION:NAME of one that
                  returns a dict. [required]
--metrics FILE    CSV or JSON file with the metric of each checkpoint, such as the output of
                  `evaluate --json`. Then only the first checkpoint and the averages are evaluated.
-o --output PATH  Where the soup goes, as in `average`. [required]
""")


@click.command(
    cls=Command,
    groups={
        "Model, data and metric": (*options.EVALUATION, _METRIC, options.MODE, _METRICS),
        "Refresh before each evaluation": options.EVALUATION_REFRESH,
        "Which checkpoints": (*options.CANDIDATES, options.KEY),
        "How they are averaged": (options.SKIP, options.TAKE_LAST),
        "What is written": (_OUTPUT, options.FORCE, options.NO_FSYNC),
        RUNNING: (options.THREADS, *options.COMMON),
    },
    no_effect=options.EVALUATION_NO_EFFECT,
)
@options.CHECKPOINTS
def soup(
    console: Console,
    checkpoints: tuple[Path, ...],
    output: str,
    **params: Any,  # noqa: ANN401 - the fields of `SoupOptions`
) -> None:
    """Average the checkpoints that do not make the average worse on held-out data.

    This is the greedy soup of Wortsman et al. 2022. CHECKPOINT is a checkpoint, or a directory of
    them. Checkpoints are tried in the order of their metric, best first. Each is kept unless it
    makes the uniform average worse. --model and --loader name your own code, which is imported and
    run. Batches are (inputs, targets).
    """
    from ckptavg.evaluation.soup import SoupOptions
    from ckptavg.evaluation.soup import soup as run

    fields = options.evaluation_fields(SoupOptions, params)
    with console.others_to_stderr(), console.progress("evaluating", "average") as progress:
        result = run(checkpoints, output, **fields, progress=progress)
    _say(console, result, output)
    console.result(result)


def _say(console: Console, result: Soup, output: str) -> None:
    """Print which checkpoints were kept, and the metric of the soup."""
    name = printable(result.metric)
    header = ("checkpoint", name, f"{name} of the soup with it", "kept")
    console.say_table([header, *map(_row, result.steps)])
    kept, total = sum(step.kept for step in result.steps), len(result.steps)
    console.say(f"kept {kept} of {plural(total, 'checkpoint')}: {name} {result.value:.5g}")
    console.say(f"  uniform average of all: {name} {result.uniform:.5g}")
    if result.refresh is not None:
        say_report(console, result.refresh)
    console.say(f"  wrote {output} ({size(result.summary.bytes_written)})")


def _row(step: SoupStep) -> tuple[str, ...]:
    untried = math.isnan(step.soup) and not math.isfinite(step.alone)
    with_it = "-" if untried else f"{step.soup:.5g}"
    return printable(step.checkpoint), f"{step.alone:.5g}", with_it, "yes" if step.kept else "no"
