"""`ckptavg verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptavg.cli.common import Console, PathType, common_options, plural, threads_option
from ckptavg.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.verify import Verification


@click.command()
@click.argument("output", type=PathType())
@click.argument("inputs", nargs=-1, type=PathType(), metavar="[INPUT...]")
@click.option("--key", help="State dict of OUTPUT that is the average, where it holds several.")
@threads_option
@common_options
def verify(
    output: Path,
    inputs: tuple[Path, ...],
    *,
    key: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Verify that an average is what it says of itself.

    OUTPUT is an average that ckptavg has made, INPUT its checkpoints as they were given to
    `average`. These must be the ones that it names; they are averaged again, into a temporary file
    beside OUTPUT, and compared with it bit for bit.
    """
    console = Console(as_json=as_json, quiet=quiet)
    from ckptavg.verify import verify as run

    with (
        console.progress("hashing", "B") as hashing,
        console.progress("comparing", "B") as comparing,
    ):
        found = run(
            output, inputs, key=key, threads=threads, progress=comparing, hash_progress=hashing
        )
    _say(console, found)
    console.result(found)


def _say(console: Console, found: Verification) -> None:
    console.say(f"{printable(found.output)}: verified")
    checked = f", {found.sources_hashed} of them by SHA-256" if found.sources_hashed else ""
    console.say(
        f"  {plural(found.sources, 'checkpoint')} ({printable(found.scheme)}): those that it was "
        f"made of, by sizes and headers{checked}"
    )
    console.say(f"  {plural(found.compared, 'tensor')}: made again, and equal in every bit")
    if found.refreshed:
        console.say(f"  {plural(found.refreshed, 'tensor')}: statistics of data, not made again")
