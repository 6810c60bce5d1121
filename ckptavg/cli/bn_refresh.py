"""`ckptavg bn-refresh`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from ckptavg.cli.common import Console, OutputType, PathType, SizeType, common_options
from ckptavg.cli.refresh_options import refresh_options, say_report, take_refresh_options
from ckptavg.errors import printable

if TYPE_CHECKING:
    from pathlib import Path


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
    **options: Any,  # noqa: ANN401 - the refresh's options
) -> None:
    """Reset a checkpoint's BatchNorm statistics with one pass of training data.

    --model and --loader name your own code, which is imported and run. All tensors but the
    running statistics stay as they are, byte for byte.
    """
    console = Console(as_json=as_json, quiet=quiet)
    refresh = take_refresh_options(options, required=True)
    from ckptavg.norm.files import refresh_checkpoint

    assert refresh is not None  # noqa: S101 - it was required
    with console.others_to_stderr(), console.progress("refreshing", "batch") as progress:
        report = refresh_checkpoint(
            checkpoint, output, refresh,
            key=key, in_place=in_place, container=container,
            max_shard_size=max_shard_size,
            force=force, fsync=not no_fsync, progress=progress,
        )  # fmt: skip
    say_report(console, report)
    console.say(f"  wrote {printable(output or checkpoint)}")
    console.result(report)
