"""`ckptavg soup`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ckptavg.cli.common import (
    Console,
    OutputType,
    PathType,
    common_options,
    plural,
    size,
    threads_option,
)
from ckptavg.cli.evaluation_options import (
    candidate_options,
    check_metric,
    evaluation_options,
    take_candidates,
    take_evaluation,
)
from ckptavg.cli.refresh_options import say_report
from ckptavg.errors import printable

if TYPE_CHECKING:
    from ckptavg.norm.soup import Soup, SoupStep


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=PathType(), metavar="INPUT...")
@click.option(
    "-o", "--output", required=True, type=OutputType(), help="Where the soup goes, as in average."
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--metric",
    callback=check_metric,
    metavar="loss|accuracy|SPEC",
    help="Mean cross-entropy, share of right classes, or a function that is called with the model "
    "and the batches and returns a number.",
)
@click.option(
    "--mode",
    type=click.Choice(["min", "max"]),
    help="Whether the metric should be low or high.  [default: by its name]",
)
@click.option(
    "--metrics",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="FILE",
    help="CSV or JSON with the candidates' own metrics, such as `evaluate --json` prints: then "
    "only averages are evaluated, and the first candidate.",
)
@evaluation_options
@click.option("--key", help="State dict to take where a file holds several.")
@click.option("--no-fsync", is_flag=True, help="Do not wait until the output is on the disk.")
@threads_option
@candidate_options
@common_options
def soup(
    inputs: tuple[Path, ...],
    *,
    output: str,
    metric: str | None,
    mode: Literal["min", "max"] | None,
    metrics: Path | None,
    as_json: bool,
    quiet: bool,
    no_fsync: bool,
    **options: Any,  # noqa: ANN401 - the options above, which the library checks
) -> None:
    """Average those checkpoints that make the average no worse on held-out data.

    INPUT is a directory of checkpoints, or checkpoints. They are tried in the order of their own
    metric, best first, and each stays if the uniform average with it does not get worse: the
    greedy soup of Wortsman et al. 2022. --model and --loader name your own code, which is imported
    and run; batches are (inputs, targets).
    """
    console = Console(as_json=as_json, quiet=quiet)
    if metric is None:
        raise click.UsageError("a soup needs --metric: what is not to get worse")
    rules, evaluation = take_candidates(options), take_evaluation(options, metric)
    from ckptavg.norm.soup import soup as run

    with console.others_to_stderr(), console.progress("evaluating", "average") as progress:
        made = run(
            inputs, output, evaluation,
            mode=mode, metrics=metrics, select=rules, fsync=not no_fsync, progress=progress,
            **options,
        )  # fmt: skip
    _say(console, made, output)
    console.result(made)


def _say(console: Console, made: Soup, output: str) -> None:
    """What became of each candidate, and of all, for people."""
    name = printable(made.metric)
    header = ("checkpoint", name, f"{name} of the soup with it", "kept")
    console.say_table([header, *map(_row, made.steps)])
    kept = sum(step.kept for step in made.steps)
    console.say(f"kept {kept} of {plural(len(made.steps), 'checkpoint')}: {name} {made.value:.5g}")
    console.say(f"  uniform average of all: {name} {made.uniform:.5g}")
    if made.refresh is not None:
        say_report(console, made.refresh)
    console.say(f"  wrote {output} ({size(made.summary.bytes_written)})")


def _row(step: SoupStep) -> tuple[str, ...]:
    tried = "-" if math.isnan(step.soup) and not math.isfinite(step.alone) else f"{step.soup:.5g}"
    return printable(step.checkpoint), f"{step.alone:.5g}", tried, "yes" if step.kept else "no"
