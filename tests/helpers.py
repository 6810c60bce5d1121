"""Helpers that several test modules share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from ckptavg import cli


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process, and expect an exit code of it."""
    result = CliRunner().invoke(cli.cli, [str(argument) for argument in arguments])
    if code == 0 and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ckptavg", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
