"""`ckptavg bn-refresh`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from ckptavg.cli.common import Console, OutputType, PathType, SizeType, common_options
from ckptavg.cli.evaluation_options import check_metric
from ckptavg.cli.refresh_options import (
    check_spec,
    keywords,
    refresh_options,
    say_report,
    take_refresh_options,
)
from ckptavg.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.norm.files import RefreshOptions
    from ckptavg.norm.judging import Judge
    from ckptavg.norm.report import Verdict


@click.command("bn-refresh")
@click.argument("checkpoint", type=PathType())
@click.option(
    "-o",
    "--output",
    type=OutputType(),
    help="Where the result goes.  [default: the checkpoint itself, if ckptavg made it]",
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@click.option("--in-place", is_flag=True, help="Replace a checkpoint that ckptavg did not make.")
@click.option(
    "--container",
    type=click.Choice(["weights", "last"]),
    default="weights",
    show_default=True,
    help="Write the weights alone, or the whole torch file. In place it is always the whole.",
)
@click.option(
    "--max-shard-size",
    type=SizeType(),
    metavar="SIZE",
    help="Bytes of tensors in a file of a directory: 5GB, 500MB.  [default: the checkpoint's own]",
)
@click.option("--key", help="State dict to take where the file holds several.")
@click.option("--no-fsync", is_flag=True, help="Do not wait until the output is on the disk.")
@refresh_options
@click.option(
    "--eval-loader",
    callback=check_spec,
    metavar="SPEC",
    help="Held-out batches, to evaluate the model with before and after.",
)
@click.option(
    "--eval-loader-arg",
    "eval_loader_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="For the held-out loader.",
)
@click.option(
    "--metric",
    callback=check_metric,
    metavar="METRIC",
    help="loss, accuracy, or a function that is called with the model and the held-out batches and "
    "returns a number.  [default: loss and accuracy]",
)
@click.option(
    "--mode",
    type=click.Choice(["min", "max"]),
    help="Whether the metric should be low or high.  [default: by its name]",
)
@click.option("--keep-better", is_flag=True, help="Keep the old statistics if they are better.")
@click.option(
    "--report",
    "report_path",
    type=OutputType(),
    help="Write the old and the new statistics of each layer into this JSON file.",
)
@common_options
def bn_refresh(
    checkpoint: Path,
    *,
    output: str | None,
    as_json: bool,
    quiet: bool,
    force: bool,
    in_place: bool,
    container: Literal["weights", "last"],
    max_shard_size: int | None,
    key: str | None,
    no_fsync: bool,
    report_path: str | None,
    **options: Any,  # noqa: ANN401 - those of the refresh and of the evaluation
) -> None:
    """Reset a checkpoint's norm statistics with one pass of training data.

    --model and --loader name your own code, which is imported and run. All tensors but the
    running statistics stay as they are, byte for byte. Under `torchrun --no-python` the processes
    share the pass.
    """
    console = Console(as_json=as_json, quiet=quiet)
    judging = {name: options.pop(name) for name in _JUDGING}
    refresh = take_refresh_options(options, required=True)
    assert refresh is not None  # noqa: S101 - it was required
    _check_judging(judging)
    from ckptavg.distributed import launched_ranks
    from ckptavg.norm.files import refresh_checkpoint
    from ckptavg.norm.report_file import ReportFile

    with launched_ranks() as ranks:
        if ranks.rank:
            console.mute()
        with console.others_to_stderr(), console.progress("refreshing", "batch") as progress:
            written = ReportFile(report_path, force=force, others=(checkpoint, output))
            judge = _judge(refresh, judging) if ranks.rank == 0 else None
            report = refresh_checkpoint(
                checkpoint, output, refresh,
                key=key, in_place=in_place, container=container,
                max_shard_size=max_shard_size, force=force, fsync=not no_fsync,
                judge=judge, ranks=ranks, progress=progress,
            )  # fmt: skip
        if ranks.rank == 0:
            written.write(checkpoint, output, report)
    say_report(console, report)
    if report.verdict is not None:
        _say_verdict(console, report.verdict)
    console.say(f"  {'wrote' if report.written else 'left'} {printable(output or checkpoint)}")
    console.result(report.as_dict())


_JUDGING = ("eval_loader", "eval_loader_args", "metric", "mode", "keep_better")


def _check_judging(judging: dict[str, Any]) -> None:
    given = [name for name in _JUDGING if judging[name]]
    if given and judging["eval_loader"] is None:
        option = given[0].removesuffix("s").replace("_", "-")
        raise click.UsageError(f"--{option} needs an --eval-loader")


def _judge(refresh: RefreshOptions, judging: dict[str, Any]) -> Judge | None:
    """What evaluates before and after; None if nobody asked."""
    if judging["eval_loader"] is None:
        return None
    from ckptavg.norm.evaluate import EvaluationOptions
    from ckptavg.norm.judging import Judge

    options = EvaluationOptions(
        model=refresh.model,
        loader=judging["eval_loader"],
        metric=judging["metric"],
        model_args=refresh.model_args,
        loader_args=keywords(judging["eval_loader_args"]),
        forward=refresh.forward,
        device=refresh.device,
        seed=refresh.seed,
    )
    return Judge(options, keep_better=judging["keep_better"], mode=judging["mode"])


def _say_verdict(console: Console, verdict: Verdict) -> None:
    for name, value in verdict.after.items():
        before = verdict.before.get(name)
        old = "-" if before is None else f"{before:.5g}"
        console.say(f"  {printable(name)}: {old} before, {value:.5g} after")
    if verdict.kept == "old":
        console.say(f"  by {printable(verdict.metric)} the old statistics are better, and are kept")
