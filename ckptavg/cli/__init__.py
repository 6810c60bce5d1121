"""The command line: parse, draw progress, map errors to exit codes. No logic."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

import click

from ckptavg import __version__
from ckptavg.cli.average import average
from ckptavg.cli.bn_refresh import bn_refresh
from ckptavg.cli.demo import demo
from ckptavg.cli.evaluate import evaluate
from ckptavg.cli.inspect import inspect
from ckptavg.cli.landscape import landscape
from ckptavg.cli.soup import soup
from ckptavg.cli.verify import verify
from ckptavg.errors import CkptAvgError, PeerError, UserCodeError

if TYPE_CHECKING:
    from types import FrameType

_FAULT, _INTERRUPTED = 1, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version")
def cli() -> None:
    """Average model checkpoints offline, and refresh their BatchNorm statistics.

    Stochastic Weight Averaging (Izmailov et al. 2018) after the fact, on the files that a training
    run left behind.
    """


for _command in (average, bn_refresh, evaluate, soup, landscape, inspect, verify, demo):
    cli.add_command(_command)


class _TerminatedError(BaseException):
    """SIGTERM or SIGHUP arrived: everything is to be cleaned up on the way out."""


def _on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    for other in (signal.SIGTERM, signal.SIGHUP):  # a second one must not disturb the clean-up
        signal.signal(other, signal.SIG_IGN)
    raise _TerminatedError(number)


def main() -> None:
    """Run the command line and leave with the exit code that `docs/cli.md` lists."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP, and shall
            signal.signal(number, _on_signal)
    sys.exit(_run())


def _run() -> int:
    try:
        code = cli(standalone_mode=False)
    except PeerError:
        return _FAULT  # it has said itself what was wrong
    except BaseException as error:  # noqa: BLE001 - what is not known there is raised again
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Say what happened in one line; returns the exit code."""
    code = _FAULT
    match error:
        case click.exceptions.Exit() | click.ClickException():
            code = error.exit_code
            if isinstance(error, click.ClickException):
                error.show()
            return code
        case KeyboardInterrupt() | click.Abort():
            text, code = "interrupted", _INTERRUPTED
        case _TerminatedError():
            text, code = "terminated", 128 + int(error.args[0])
        case UserCodeError():
            traceback.print_exception(error.__cause__)
            text = f"error: {error}"
        case CkptAvgError():
            text = f"error: {error}"
        case BrokenPipeError():
            # Whoever read our output has left: stdout must not be flushed again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return code
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            text = f"error: {where}{error.strerror or error}"
        case MemoryError():
            text = "error: out of memory; fewer --threads take less"
        case _:
            raise error
    click.echo(f"ckptavg: {text}", err=True)
    return code
