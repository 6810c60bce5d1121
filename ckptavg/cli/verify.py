"""`ckptavg verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command
from ckptavg.cli.console import Console, plural
from ckptavg.cli.declarations import parse, path_text
from ckptavg.errors import printable

if TYPE_CHECKING:
    from ckptavg.verify import Verification


[_KEY] = parse("""
--key NAME  State dict of OUTPUT that is the average, if it holds several.
""")


@click.command(cls=Command, groups={RUNNING: (_KEY, options.THREADS, *options.COMMON)})
@click.argument("output", type=path_text)
@click.argument("inputs", nargs=-1, type=path_text, metavar="INPUT...")
def verify(
    console: Console, output: str, inputs: tuple[str, ...], key: str | None, threads: int | None
) -> None:
    """Make an average again from its checkpoints, and compare every bit.

    OUTPUT is an average that ckptavg made. INPUT are its checkpoints, or their directory; they must
    be those that OUTPUT records. It records their names, and not where they are. The new average is
    a temporary file beside OUTPUT.
    """
    from ckptavg.verify import verify as run

    with (
        console.progress("hashing", "B") as hashing,
        console.progress("comparing", "B") as comparing,
    ):
        verification = run(
            output, inputs, key=key, threads=threads, progress=comparing, hash_progress=hashing
        )
    _say(console, verification)
    console.result(verification)


def _say(console: Console, verification: Verification) -> None:
    from ckptavg.merge.recipe import COPY

    console.say(f"{printable(verification.output)}: verified")
    hashed = verification.sources_hashed
    by_hash = f", {hashed} of them by SHA-256" if hashed else ""
    scheme = "" if verification.scheme == COPY else f" ({printable(verification.scheme)})"
    console.say(
        f"  {plural(verification.sources, 'checkpoint')}{scheme}: the recorded ones, "
        f"by size and header{by_hash}"
    )
    console.say(f"  {plural(verification.compared, 'tensor')}: made again, equal in every bit")
    if verification.refreshed:
        console.say(
            f"  {plural(verification.refreshed, 'tensor')}: refreshed statistics, not compared"
        )
