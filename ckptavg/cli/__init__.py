"""The command line: parse, draw progress, map errors to exit codes. No logic."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

import click

from ckptavg import __version__
from ckptavg.cli.average import average
from ckptavg.cli.bn_refresh import bn_refresh
from ckptavg.cli.demo import demo
from ckptavg.cli.inspect import inspect
from ckptavg.errors import CkptAvgError, UserCodeError

if TYPE_CHECKING:
    from types import FrameType

_FAULT, _INTERRUPTED, _TERMINATED = 1, 130, 143


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version")
def cli() -> None:
    """Average model checkpoints offline, and refresh their BatchNorm statistics.

    Stochastic Weight Averaging (Izmailov et al. 2018) after the fact, on the files that a training
    run left behind.
    """


for _command in (average, bn_refresh, inspect, demo):
    cli.add_command(_command)


class _TerminatedError(BaseException):
    """SIGTERM arrived: everything is to be cleaned up on the way out."""


def _on_sigterm(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _TerminatedError


def main() -> None:
    """Run the command line and leave with the exit code that `docs/cli.md` lists."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(_run())


def _run() -> int:
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except _TerminatedError:
        return _fail("terminated", _TERMINATED)
    except UserCodeError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        return _fail(f"error: {error}", _FAULT)
    except CkptAvgError as error:
        return _fail(f"error: {error}", _FAULT)
    except BrokenPipeError:
        # The reader of our output has left; there is nobody to tell.
        sys.stdout = None  # type: ignore[assignment]
        return _FAULT
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"error: {where}{error.strerror or error}", _FAULT)
    except MemoryError:
        return _fail("error: out of memory; fewer --threads take less", _FAULT)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    click.echo(f"ckptavg: {message}", err=True)
    return code
