"""Python's collector of cyclic garbage, and signals, kept out of the way."""

from __future__ import annotations

import contextlib
import gc
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Make many objects without its going through all of them again and again.

    That takes as long as parsing a header of 100,000 tensors does.
    """
    was_at_work = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_at_work:
            gc.enable()


@contextlib.contextmanager
def signals_waiting() -> Iterator[None]:
    """Let no signal's exception come between: it is raised at the end.

    `Thread.start` cannot bear one: it says that no thread can be started, when one is.
    """
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
