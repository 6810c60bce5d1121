"""The command line: it reads options, shows progress, and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from ckptavg import __version__
from ckptavg.cli.average import average
from ckptavg.cli.bn_refresh import bn_refresh
from ckptavg.cli.console import say_on_stderr, shown
from ckptavg.cli.convert import convert
from ckptavg.cli.demo import demo
from ckptavg.cli.evaluate import evaluate
from ckptavg.cli.inspect import inspect
from ckptavg.cli.landscape import landscape
from ckptavg.cli.options import model_of_transformers
from ckptavg.cli.soup import soup
from ckptavg.cli.sweep import sweep
from ckptavg.cli.verify import verify
from ckptavg.errors import CkptAvgError, PeerError, UserCodeError, described, problem_of_torch

if TYPE_CHECKING:
    from types import FrameType

_ERROR, _INTERRUPTED = 1, 130
_LONGEST_PART = 8_000  # characters at the beginning and at the end of a traceback
_WHOSE = "if the traceback ends in your code, look there; otherwise it is a bug in ckptavg"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version")
def cli() -> None:
    """Average model checkpoints offline, and refresh their BatchNorm statistics.

    This is Stochastic Weight Averaging (Izmailov et al. 2018) after the training, on the
    checkpoints that it saved.
    """


_COMMANDS = (average, convert, bn_refresh, evaluate, soup, sweep, landscape, inspect, verify, demo)
for _command in _COMMANDS:
    cli.add_command(_command)


class _TerminatedError(BaseException):
    """SIGTERM or SIGHUP has arrived; as an exception it lets everything be cleaned up."""


def _on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    _disregard_signals()
    raise _TerminatedError(number)


def _disregard_signals() -> None:
    """Let nothing disturb the end any more.

    Not by SIG_IGN: python complains of a signal that had arrived before it was ignored.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) * 2:
        with contextlib.suppress(KeyboardInterrupt, _TerminatedError):  # of one that had arrived
            signal.signal(number, lambda *_: None)


def main() -> None:
    """Run the command line and leave with the exit code that `docs/cli.md` lists."""
    gc.set_threshold(10_000)  # by default it goes again and again through 100,000 tensors
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: no file that is opened later must take its place
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for as long as it runs
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda *args, **keywords: shown(formatted(*args, **keywords))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP is ignored
            signal.signal(number, _on_signal)
    code = _run()
    _disregard_signals()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # python, while it ends, has handlers no more
    sys.exit(code)


def _run() -> int:
    try:
        arguments = sys.argv[1:]
        sys.argv[1:] = []  # functions of the user's may read them later than their module
        code = cli(arguments, standalone_mode=False)
    except PeerError:
        return _ERROR  # the process that failed says why
    except SystemExit:  # of click, where it completes words in a shell
        raise
    except BaseException as error:  # noqa: BLE001 - an unknown one is shown with its traceback
        _disregard_signals()
        # In an import an interruption may come out as another exception.
        cause = error.__cause__ or error.__context__
        return _explain(cause if isinstance(cause, KeyboardInterrupt) else error)
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Say in one line what went wrong; returns the exit code."""
    code = _ERROR
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case click.Abort() | KeyboardInterrupt():
            text, code = "interrupted", _INTERRUPTED
        case click.ClickException():
            return _show(error)
        case _TerminatedError():
            text, code = "terminated", 128 + int(error.args[0])
        case UserCodeError():
            if error.__cause__ is not None:
                _show_traceback(error.__cause__)
            text = f"error: {error}"
        case CkptAvgError():
            text = f"error: {error}"
        case BrokenPipeError():
            # The reader of our output has left: stdout must not be flushed again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return code
        case _:
            problem = _of_surroundings(error)
            if problem is None:
                _show_traceback(error)
                problem = f"unexpected {described(error)}; {_WHOSE}"
            text = f"error: {problem}"
    say_on_stderr(text)
    return code


def _show_traceback(error: BaseException) -> None:
    """Print the traceback of an exception; the middle of a long one is left out."""
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    if len(text) > 2 * _LONGEST_PART:
        text = f"{text[:_LONGEST_PART]}\n...\n{text[-_LONGEST_PART:]}"
    click.echo(shown(text), err=True)


def _of_surroundings(error: BaseException) -> str | None:
    """What the system has refused, or lacks; None for other errors."""
    if problem := problem_of_torch(error):
        return f"this runs a model, and {problem}"
    match error:
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or error}"
        case MemoryError():
            return "out of memory; use fewer --threads"
    return None


def _show(error: click.ClickException) -> int:
    """Print a usage error; returns the exit code."""
    text = io.StringIO()
    error.show(text)
    click.echo(shown(text.getvalue()), err=True, nl=False)
    if isinstance(error, click.MissingParameter) and isinstance(error.param, click.Option):
        click.echo("It may also be set in [tool.ckptavg] of pyproject.toml.", err=True)
        if error.param.name == "model" and error.ctx is not None:
            _propose_model(error.ctx)
    return error.exit_code


def _propose_model(context: click.Context) -> None:
    """Print the options that make the model, where transformers wrote the checkpoints."""
    from ckptavg.formats.paths import is_remote

    given = context.params.get("checkpoint") or context.params.get("checkpoints") or ()
    paths = [
        path for path in (given if isinstance(given, tuple) else (given,)) if not is_remote(path)
    ]
    saved = [folder for path in paths for folder in sorted(path.glob("checkpoint-*"))]
    if proposed := model_of_transformers(*paths, *saved):
        click.echo(f"To make the model with transformers: {shown(proposed)}", err=True)
