"""`ckptavg average`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import (
    RUNNING,
    Command,
    NoEffect,
    fields_of,
    without,
    without_blas_threads,
)
from ckptavg.cli.console import Console, plural, size, with_options
from ckptavg.cli.declarations import parse, path_or_url, path_text
from ckptavg.cli.report import say_report
from ckptavg.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.write.provenance import SourceSummary, Summary

_ROLES = {
    "averaged": "averaged",
    "last": "copied from the last checkpoint",
    "kept": "the same in all",
    "joined": "LoRA factors concatenated",
    "skipped": "skipped",
}
_SUM_TO_1 = ("ema:", "power:", "decay:")

_HOW_WEIGHTED = parse("""
--weights SCHEME           uniform, linear, ema:DECAY, power:SIGMA_REL, decay:linear|cosine|1-sqrt;
                           or a number for each checkpoint (0.2,0.3,0.5); or PATH=NUMBER,...
                           Several schemes, or several numbers for --last, make one average for each
                           combination, in the directory OUTPUT.  [default: uniform]
--no-normalize             Do not divide by the sum of the weights.
--update                   Add the inputs to an earlier uniform average, which must be among them.
""")
_HOW_EACH_TENSOR = parse("""
--ints equal|last          Require equal integer tensors, or copy those of the last checkpoint.
                           [default: equal]
--norm-stats average|last  Average running_mean and running_var, or copy those of the last
                           checkpoint.  [default: average]
--lora separate|exact      Average the factors A and B of LoRA adapters separately, or their
                           products exactly (ranks add up).  [default: separate]
--allow-nonfinite          Accept NaN and Inf in the inputs.
""")
_OUTPUT, _KEEP_PREFIX, _HASH = parse("""
-o --output PATH           Where the average goes: a .safetensors file; a torch file (.pt, .pth,
                           .bin, .ckpt, .tar, .th or .pyth); or a directory (DIR/) in the layout of
                           --format. [required]
--keep-prefix              Keep the prefixes module. and _orig_mod. in names.
--hash                     Record the SHA-256 of each checkpoint, for `ckptavg verify`. This reads
                           them once more.
""")
[_EXPECT] = parse("""
--expect N    Fail unless N checkpoints are selected.
""")


_NO_EFFECT = (
    without("best", "metric", "metrics"),
    *options.SELECTION_NO_EFFECT,
    NoEffect(
        "without --start, --steps, --cycle or --weights power",
        lambda params: (
            not any(params[name] for name in ("start", "steps", "cycle"))
            and not any(scheme.needs_steps for scheme in params["weights"])
        ),
        ["unit"],
    ),
    NoEffect(
        "with --weights ema, power and decay, which always sum to 1",
        lambda params: all(scheme.name.startswith(_SUM_TO_1) for scheme in params["weights"]),
        ["normalize"],
    ),
    NoEffect(
        "with --container last",
        lambda params: params["container"] == "last",
        ["format", "max_shard_size", "dtype", "drop_aliases", "skip"],
    ),
    *options.OUTPUT_NO_EFFECT,
    *options.REFRESH_NO_EFFECT,
)


@click.command(
    cls=Command,
    groups={
        "Which checkpoints": (*options.SELECTION, options.KEYS, _EXPECT),
        "How they are averaged": (
            *_HOW_WEIGHTED,
            options.SKIP,
            options.TAKE_LAST,
            *_HOW_EACH_TENSOR,
        ),
        "What is written": (
            *(_OUTPUT, options.FORCE, options.CONTAINER, options.FORMAT, options.MAX_SHARD_SIZE),
            *(options.DTYPE, _KEEP_PREFIX, options.DROP_ALIASES, _HASH, options.NO_FSYNC),
        ),
        "Refresh of the norm statistics": options.REFRESH,
        RUNNING: (options.DRY_RUN, options.THREADS, *options.COMMON),
    },
    no_effect=_NO_EFFECT,
)
@click.argument("inputs", nargs=-1, required=True, type=path_text, metavar="INPUT...")
def average(
    console: Console,
    inputs: tuple[str, ...],
    output: str,
    **params: Any,  # noqa: ANN401 - the fields of the dataclasses below
) -> None:
    """Average checkpoints into one.

    INPUT is a directory of checkpoints, a checkpoint, or a URL of either. A checkpoint is a
    .safetensors file, a torch file, or a directory written by a Hugging Face library or
    torch.distributed.checkpoint. With --model and --loader the BatchNorm statistics are refreshed
    as well. Under `torchrun --no-python` the processes share the work; they need a common file
    system.
    """
    refreshes = params.get("model") is not None
    if not refreshes:
        without_blas_threads()
    from ckptavg.average import average as run
    from ckptavg.average import average_many
    from ckptavg.merge.recipe import AverageOptions
    from ckptavg.select.rules import Selection

    fields = fields_of(AverageOptions, params)
    fields["select"] = Selection(**fields_of(Selection, params))
    several = len(params["weights"]) > 1 or len(params["last"] or ()) > 1
    if several and refreshes:
        raise click.UsageError(
            "--model refreshes one average only; refresh several with bn-refresh, one at a time"
        )
    if several and params["update"]:
        raise click.UsageError("--update makes one average, from one --last and one --weights")
    with (
        console.ranks(only_torchrun=True) as ranks,
        console.progress("hashing", "B") as fields["hash_progress"],
        console.progress("averaging", "B") as fields["progress"],
    ):
        fields["ranks"] = ranks
        if several:
            summaries = average_many(inputs, output, **fields)
            for summary in summaries:
                _say(console, summary, summary.output, params["key"])
            console.result({"averages": summaries})
        elif not refreshes or params["dry_run"]:
            summary = run(inputs, output, **fields)
            _say(console, summary, output, params["key"])
            console.result(summary)
        else:
            from ckptavg.batchnorm.together import average_and_refresh

            refresh = options.refresh_options(params)
            with console.others_to_stderr(), console.progress("refreshing", "batch") as progress:
                summary, report = average_and_refresh(
                    [*map(path_or_url, inputs)], output, refresh,
                    refresh_progress=progress, **fields,
                )  # fmt: skip
            _say(console, summary, output, params["key"])
            say_report(console, report)
            console.result({**vars(summary), "refresh": report})


def _say(console: Console, summary: Summary, output: str, keys: Sequence[str] | None) -> None:
    """Print the summary of one average."""
    from ckptavg.formats.statedict import as_key

    members = summary.sources
    if not summary.written:
        rows = zip(members, summary.emulated_decay, strict=True)
        console.say_table([_row(*row) for row in rows])
    verb = "averaged" if summary.written else "would average"
    scheme = "" if summary.scheme == "uniform" else f" ({summary.scheme})"
    span = printable(members[0].name)
    if len(members) > 1:
        span += f" to {printable(members[-1].name)}"
    console.say(f"{verb} {plural(len(members), 'checkpoint')}{scheme}: {span}")
    roles = ", ".join(f"{count:,} {_ROLES[role]}" for role, count in summary.roles.items())
    console.say(f"  {plural(summary.tensors, 'tensor')}: {roles}")
    if not summary.written:
        console.say(
            f"  would read {size(summary.bytes_read)}, write {size(summary.bytes_written)} to "
            f"{output}, with about {size(summary.memory)} of memory"
        )
        for sentence in summary.advice:
            console.say(with_options(sentence))
        return
    console.say(f"  wrote {printable(output)} ({size(summary.bytes_written)})")
    if summary.norm_stats == "stale":
        last = path_or_url(members[-1].path)
        model = options.model_of_transformers(Path(output), directory=last)
        key = " --key KEY" if isinstance(as_key(keys), tuple) else ""
        console.say(
            "The BatchNorm statistics are stale: no data have passed through these weights. "
            "Refresh them:\n"
            f"  ckptavg bn-refresh {shlex.quote(output)}{key} "
            f"{model or '--model FILE.py:MODEL'} --loader FILE.py:LOADER"
        )


def _row(member: SourceSummary, decay: float) -> tuple[str, ...]:
    step = " ".join(map(str, member.step)) if member.step else "no step recorded"
    weight, emulated = f"weight {member.weight:.4g}", f"emulated decay {decay:.4g}"
    return printable(member.name), step, size(member.bytes), weight, emulated
