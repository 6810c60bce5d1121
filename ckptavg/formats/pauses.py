"""Python's collector of cyclic garbage, and signals, kept out of the way."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
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


_HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_waiting() -> Iterator[None]:
    """Let no signal's exception come between: its handler is called at the end.

    `Thread.start` cannot bear one: it says that no thread can be started, when one is. To block
    signals in this thread would not do, as another one may take them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler is ever called here
        return
    arrived: list[int] = []
    handlers = {
        number: handler for number in _HELD if callable(handler := signal.getsignal(number))
    }
    interruption: BaseException | None = None
    try:
        for number in handlers:
            signal.signal(number, lambda told, _: arrived.append(told))
        yield
    finally:
        left = list(handlers)
        while left:
            try:
                signal.signal(left[-1], handlers[left[-1]])
                left.pop()
            except BaseException as error:  # noqa: BLE001 - raised again below
                interruption = error
    if interruption is not None:
        raise interruption
    for told in arrived:
        handlers[signal.Signals(told)](told, None)
