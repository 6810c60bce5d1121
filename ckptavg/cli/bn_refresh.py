"""`ckptavg bn-refresh`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command, fields_of, names_of, without
from ckptavg.cli.console import Console, cell
from ckptavg.cli.declarations import parse, path_or_url, variant
from ckptavg.cli.report import say_report
from ckptavg.errors import printable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ckptavg.batchnorm.report import RefreshReport, Verdict
    from ckptavg.evaluation.judging import Judge

_EVAL_LOADER, _EVAL_LOADER_ARG, _KEEP_BETTER = parse("""
--eval-loader SPEC           Held-out batches, to evaluate before and after the refresh.
--eval-loader-arg KEY=VALUE  Keyword argument for the held-out loader; repeatable.
--keep-better                Keep the old statistics if they have the better metric.
""")
_EVALUATION = (_EVAL_LOADER_ARG, options.METRIC, _KEEP_BETTER, options.MODE)
_OUTPUT, _IN_PLACE = parse("""
-o --output PATH  Where the result goes.  [default: the checkpoint itself, if ckptavg made it]
--in-place        Replace the checkpoint even if ckptavg did not make it.
""")


@click.command(
    "bn-refresh",
    cls=Command,
    groups={
        "Refresh of the norm statistics": [
            *(variant(each, required=each.name in ("model", "loader")) for each in options.REFRESH),
            options.IGNORE,
        ],
        "Evaluation before and after": (_EVAL_LOADER, *_EVALUATION),
        "What is written": (
            *(options.KEY, _OUTPUT, _IN_PLACE, options.FORCE, options.CONTAINER),
            *(options.FORMAT, options.MAX_SHARD_SIZE, options.NO_FSYNC),
        ),
        RUNNING: (options.DRY_RUN, *options.COMMON),
    },
    no_effect=[
        without("eval_loader", *names_of(_EVALUATION)),
        without("keep_better", "mode"),
    ],
)
@click.argument("checkpoint", type=path_or_url)
def bn_refresh(
    console: Console,
    checkpoint: Path,
    output: str | None,
    **params: Any,  # noqa: ANN401 - keywords of `refresh_checkpoint`, fields of dataclasses
) -> None:
    """Reset a checkpoint's norm statistics with one pass of training data.

    --model and --loader name your own code, which is imported and run. Only the running statistics
    change; everything else in the checkpoint stays. Under `torchrun --no-python` the processes
    share the pass.
    """
    from ckptavg.batchnorm.files import refresh_checkpoint
    from ckptavg.batchnorm.options import RefreshCheckpointOptions

    with (
        console.ranks() as ranks,
        console.others_to_stderr(),
        console.progress("refreshing", "batch") as progress,
    ):
        judge = _judge(params) if ranks.rank == 0 else None
        fields = fields_of(RefreshCheckpointOptions, params)
        result = refresh_checkpoint(
            checkpoint, output, **fields, judge=judge, ranks=ranks, progress=progress
        )
    if params["dry_run"]:
        _say_layers(console, result)
        console.result(result)
        return
    say_report(console, result)
    if result.verdict is not None:
        _say_verdict(console, result.verdict)
    console.say(f"  {'wrote' if result.written else 'left'} {printable(output or checkpoint)}")
    console.result(result)


def _judge(params: Mapping[str, Any]) -> Judge | None:
    """The judge that evaluates before and after the refresh; None without held-out batches."""
    if params["eval_loader"] is None:
        return None
    from ckptavg.evaluation.evaluate import EvaluationOptions
    from ckptavg.evaluation.judging import Judge

    fields = fields_of(EvaluationOptions, params, prefix="eval_")
    fields["max_samples"] = None  # the option limits the refresh
    return Judge(
        EvaluationOptions(**fields), keep_better=params["keep_better"], mode=params.get("mode")
    )


def _say_layers(console: Console, report: RefreshReport) -> None:
    """Print what would become of each layer."""
    rows = [(layer.name, "would be refreshed") for layer in report.layers]
    rows += [(layer.name, f"would be left alone ({layer.reason})") for layer in report.kept]
    console.say_table([("layer", "in a refresh"), *((printable(a), printable(b)) for a, b in rows)])
    console.say("tried one batch, and wrote nothing")


def _say_verdict(console: Console, verdict: Verdict) -> None:
    for name, after in verdict.after.items():
        before = cell(verdict.before.get(name), ".5g")
        console.say(f"  {printable(name)}: {before} before, {after:.5g} after")
    if verdict.kept == "old":
        console.say(
            f"  the old statistics have the better {printable(verdict.metric)}, and are kept"
        )
