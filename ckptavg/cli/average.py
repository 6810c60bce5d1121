"""`ckptavg average`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.common import (
    Console,
    OutputType,
    PathType,
    SizeType,
    common_options,
    plural,
    size,
    threads_option,
)
from ckptavg.cli.refresh_options import refresh_options, say_report, take_refresh_options
from ckptavg.cli.selection_options import selection_options, take_selection
from ckptavg.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ckptavg.distributed import Ranks
    from ckptavg.write.summary import SourceSummary, Summary

_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_ROLES = {
    "averaged": "averaged",
    "last": "taken from the last checkpoint",
    "kept": "the same in all",
    "joined": "LoRA factors side by side",
}


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=PathType(), metavar="INPUT...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=OutputType(),
    help="Where the average goes: .safetensors, or .pt .pth .bin .ckpt .tar for a torch file, or "
    "a directory (DIR/) as from_pretrained takes it.",
)
@selection_options
@click.option(
    "--weights",
    default="uniform",
    show_default=True,
    metavar="SCHEME",
    help="uniform, linear, ema:DECAY, power:SIGMA_REL, decay:linear|cosine|1-sqrt; or a number for "
    "each checkpoint (0.2,0.3,0.5); or PATH=NUMBER,... Several schemes, or several --last, make "
    "every combination from one read, in the directory OUTPUT.",
)
@click.option("--no-normalize", is_flag=True, help="Do not divide by the sum of the weights.")
@click.option(
    "--update",
    is_flag=True,
    help="Fold the other inputs into the uniform average among them, made earlier.",
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--container",
    type=click.Choice(["weights", "last"]),
    default="weights",
    show_default=True,
    help="Write the weights alone, or the last checkpoint's torch file with all that it holds "
    "(optimizer, hyper-parameters) and the average in the place of its weights.",
)
@click.option(
    "--max-shard-size",
    type=SizeType(),
    metavar="SIZE",
    help="Bytes of tensors in a file of a directory: 5GB, 500MB.  [default: the inputs' own]",
)
@click.option("--key", help="State dict to take where a file holds several.")
@click.option("--keep-prefix", is_flag=True, help="Leave module. and _orig_mod. on the names.")
@click.option(
    "--drop-aliases", is_flag=True, help="Write tied tensors once, and name the others in metadata."
)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    metavar="NAME",
    help=f"Round floating tensors to this: {', '.join(_DTYPES)}.",
)
@click.option(
    "--ints",
    type=click.Choice(["equal", "last"]),
    default="equal",
    show_default=True,
    help="Integer tensors must be equal, or are taken from the last checkpoint.",
)
@click.option(
    "--norm-stats",
    type=click.Choice(["average", "last"]),
    default="average",
    show_default=True,
    help="What becomes of running_mean and running_var.",
)
@click.option(
    "--lora",
    type=click.Choice(["separate", "exact"]),
    default="separate",
    show_default=True,
    help="Average the factors A and B of LoRA adapters apart, or their products exactly: the "
    "ranks then add up.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and Inf in the inputs pass.")
@click.option(
    "--expect", type=click.IntRange(1), metavar="N", help="Fail unless there are N checkpoints."
)
@click.option(
    "--hash",
    is_flag=True,
    help="Record SHA-256 of the checkpoints, for `ckptavg verify`: they are read once more.",
)
@click.option("--no-fsync", is_flag=True, help="Do not wait until the output is on the disk.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be done.")
@threads_option
@refresh_options
@common_options
def average(
    inputs: tuple[Path, ...],
    *,
    output: str,
    as_json: bool,
    quiet: bool,
    no_fsync: bool,
    no_normalize: bool,
    dry_run: bool,
    weights: str,
    **options: Any,  # noqa: ANN401 - the options above, which the library checks
) -> None:
    """Average checkpoints into one.

    INPUT is a directory of checkpoints, or checkpoints, or a URL of either: .safetensors, what
    torch.save wrote, directories of Hugging Face's libraries and of torch.distributed.checkpoint.
    With --model and --loader the BatchNorm statistics are refreshed as well. Under `torchrun
    --no-python` the processes share the work, on a file system that all of them see.
    """
    console = Console(as_json=as_json, quiet=quiet)
    refresh = take_refresh_options(options, required=False)
    if refresh is None:
        # numpy's BLAS is not used here, and starting its threads takes as long as importing it.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ckptavg.average import average as run
    from ckptavg.average import average_many
    from ckptavg.merge.schemes import parse

    select, last = take_selection(options)
    select = dataclasses.replace(select, last=last or None)
    options |= {"fsync": not no_fsync, "dry_run": dry_run, "normalize": not no_normalize}
    options |= {"weights": weights, "select": select}
    if len(last) > 1 or len(parse(weights)) > 1:
        if refresh is not None:
            raise click.UsageError("several averages are refreshed one at a time, with bn-refresh")
        if options.pop("update"):
            raise click.UsageError("--update makes one average: one --last and one of --weights")
        with _ranks(console) as ranks, _progress(console) as progress:
            summaries = average_many(inputs, output, ranks=ranks, **progress, **options)
        for summary in summaries:
            _say(console, summary, summary.output)
        console.result({"averages": summaries})
        return
    if refresh is None or dry_run:
        with _ranks(console) as ranks, _progress(console) as progress:
            summary = run(inputs, output, ranks=ranks, **progress, **options)
        _say(console, summary, output)
        console.result(summary)
        return
    from ckptavg.norm.together import average_and_refresh

    with (
        console.others_to_stderr(),
        _progress(console) as progress,
        console.progress("refreshing", "batch") as refresh_progress,
    ):
        summary, report = average_and_refresh(
            inputs, output, refresh, refresh_progress=refresh_progress, **progress, **options
        )
    _say(console, summary, output, refreshed=True)
    say_report(console, report)
    console.result({**vars(summary), "refresh": report.as_dict()})


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[dict[str, Any]]:
    """The bars of an average, as keywords."""
    with (
        console.progress("hashing", "B") as hashing,
        console.progress("averaging", "B") as averaging,
    ):
        yield {"hash_progress": hashing, "progress": averaging}


@contextlib.contextmanager
def _ranks(console: Console) -> Iterator[Ranks]:
    """The processes that `torchrun` started for this command; the first one speaks."""
    from ckptavg.distributed import launched_ranks

    with launched_ranks(only_torchrun=True) as ranks:
        if ranks.rank:
            console.mute()
        yield ranks


def _say(console: Console, summary: Summary, output: str, *, refreshed: bool = False) -> None:
    """The summary for people."""
    sources = summary.sources
    if not summary.written:
        rows = zip(sources, summary.emulated_decay, strict=True)
        console.say_table([_source_row(*row) for row in rows])
    verb = "averaged" if summary.written else "would average"
    scheme = "" if summary.scheme == "uniform" else f" ({summary.scheme})"
    console.say(f"{verb} {plural(len(sources), 'checkpoint')}{scheme}: {_span(summary)}")
    roles = ", ".join(f"{count:,} {_ROLES[role]}" for role, count in summary.roles.items())
    console.say(f"  {plural(summary.tensors, 'tensor')}: {roles}")
    if not summary.written:
        console.say(
            f"  would read {size(summary.bytes_read)}, write {size(summary.bytes_written)} to "
            f"{output}, with about {size(summary.memory)} of memory"
        )
        return
    console.say(f"  wrote {printable(output)} ({size(summary.bytes_written)})")
    if summary.norm_stats == "stale" and not refreshed:
        name = shlex.quote(str(output))
        console.say(
            "The BatchNorm statistics are stale: no data have passed through these weights. "
            "Refresh them:\n"
            f"  ckptavg bn-refresh {name} --model FILE.py:MODEL --loader FILE.py:LOADER"
        )


def _source_row(source: SourceSummary, decay: float) -> tuple[str, ...]:
    step = f"{source.step[0]} {source.step[1]}" if source.step else "no step recorded"
    weight, emulated = f"weight {source.weight:.4g}", f"emulated decay {decay:.4g}"
    return printable(source.name), step, size(source.bytes), weight, emulated


def _span(summary: Summary) -> str:
    names = [printable(source.name) for source in summary.sources]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
