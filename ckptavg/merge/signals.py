"""Delay signals while threads start."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_DELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_waiting() -> Iterator[None]:
    """Delay the handlers of SIGINT, SIGTERM and SIGHUP until the end of the block.

    If a handler raises in `Thread.start`, the thread seems not to have started, though it runs.
    Blocking the signals in this thread would not help, since other threads receive them too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers are only ever called in the main thread
        return
    arrived: list[int] = []
    handlers = {
        number: handler for number in _DELAYED if callable(handler := signal.getsignal(number))
    }
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        interruption: BaseException | None = None
        left = list(handlers)
        while left:
            try:
                signal.signal(left[-1], handlers[left[-1]])
                left.pop()
            except BaseException as error:  # noqa: BLE001 - raised again below
                interruption = error
        for arrival in arrived:
            handlers[signal.Signals(arrival)](arrival, None)
        if interruption is not None:
            raise interruption
