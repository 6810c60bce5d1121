"""`ckptavg convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command, without_blas_threads
from ckptavg.cli.console import Console, plural, size
from ckptavg.cli.declarations import parse, path_text
from ckptavg.errors import printable

if TYPE_CHECKING:
    from ckptavg.write.provenance import Summary


[_OUTPUT] = parse("""
-o --output PATH  Where the result goes: a .safetensors file; a torch file (.pt, .pth, .bin, .ckpt,
                  .tar, .th or .pyth); or a directory (DIR/) in the layout of --format. [required]
""")


@click.command(
    cls=Command,
    groups={
        "What is written": (
            *(_OUTPUT, options.FORCE, options.KEYS, options.SKIP, options.DTYPE),
            *(options.FORMAT, options.MAX_SHARD_SIZE, options.DROP_ALIASES, options.NO_FSYNC),
        ),
        RUNNING: (options.DRY_RUN, options.THREADS, *options.COMMON),
    },
    no_effect=options.OUTPUT_NO_EFFECT,
)
@click.argument("checkpoint", type=path_text, metavar="INPUT")
def convert(
    console: Console,
    checkpoint: str,
    output: str,
    **params: Any,  # noqa: ANN401 - the fields of `ConvertOptions`
) -> None:
    """Write a checkpoint in another layout.

    INPUT is a checkpoint in any layout that `average` reads. The names and bytes of its tensors
    do not change, unless --dtype or --skip is given. The optimizer state of a training checkpoint
    is not written.
    """
    without_blas_threads()
    from ckptavg.convert import convert as run

    with console.progress("converting", "B") as progress:
        summary = run(checkpoint, output, progress=progress, **params)
    _say(console, summary, output)
    console.result(summary)


def _say(console: Console, summary: Summary, output: str) -> None:
    verb, would = ("converted", "wrote") if summary.written else ("would convert", "would write")
    skipped = summary.roles.get("skipped")
    left_out = f", {skipped:,} skipped" if skipped else ""
    console.say(f"{verb} {printable(summary.sources[0].name)}")
    console.say(f"  {plural(summary.tensors, 'tensor')}{left_out}")
    console.say(f"  {would} {printable(output)} ({size(summary.bytes_written)})")
