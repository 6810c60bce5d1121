"""`ckptavg demo`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptavg.cli.common import common_options


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("ckptavg-demo"))
@common_options
def demo(directory: Path, *, as_json: bool, quiet: bool) -> None:
    """Train a small network, average its checkpoints, and show what that is worth."""
    raise NotImplementedError
