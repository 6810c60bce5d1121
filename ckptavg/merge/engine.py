"""The loop: read a chunk of each input, add it to float64 sums, divide, round, write.

It knows nothing of models, names or formats. Chunks are small enough to stay in a core's cache;
numpy and the kernel work without the interpreter's lock, so a few threads share the chunks.
"""

from __future__ import annotations

import itertools
import queue
import threading
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import CkptAvgError
from ckptavg.formats.pauses import signals_waiting
from ckptavg.merge.jobs import chunks
from ckptavg.merge.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from ckptavg.merge.jobs import Job
    from ckptavg.merge.worker import Sink

_REPORT_EVERY = 16 << 20
"""Bytes between two reports: each wakes the caller, who then contends for the interpreter."""


def execute(
    jobs: Iterator[Job],
    sinks: Sequence[Sink],
    threads: int,
    *,
    allow_nonfinite: bool = False,
    every: int = 1,
    first: int = 0,
) -> Generator[int, None, None]:
    """Do the jobs; yields the bytes written since the last time.

    Args:
        jobs: what is to be done.
        sinks: where it goes, one for each output.
        threads: how many work at once.
        allow_nonfinite: let NaN and Inf of the inputs pass.
        every: do one of so many chunks; the others are other processes'.
        first: the first of them.

    Raises:
        BadValueError: an input is NaN or Inf, or the result does not fit the output's dtype.
    """
    own = itertools.islice(chunks(jobs), first, None, every)
    crew = _Crew(own, sinks, allow_nonfinite=allow_nonfinite)
    try:
        crew.start(threads)
        yield from crew.reports()
    finally:
        crew.stop()


class _Crew:
    """Threads that take chunks from one list, and the queue in which they report."""

    def __init__(
        self,
        chunks: Iterator[tuple[Job, int, int]],
        sinks: Sequence[Sink],
        *,
        allow_nonfinite: bool,
    ) -> None:
        self._chunks = chunks
        self._turn, self._stopping = threading.Lock(), threading.Event()
        self._whole = threading.Lock()
        self._sinks, self._allow = sinks, allow_nonfinite
        self._done: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        """Set them to work; fewer of them where the system has no more to give."""
        for _ in range(threads):
            thread = threading.Thread(target=self._work, daemon=True)
            with signals_waiting():
                try:
                    thread.start()
                except RuntimeError as error:
                    if not self._threads:
                        raise CkptAvgError(f"cannot start a thread: {error}") from error
                    break
                self._threads.append(thread)

    def reports(self) -> Iterator[int]:
        """Bytes of each chunk; raises the first failure once all have stopped."""
        working, failure = len(self._threads), None
        while working:
            report = self._done.get()
            if report is None:
                working -= 1
            elif isinstance(report, BaseException):
                failure = failure or report
            else:
                yield report
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """Let the threads end with the chunks that they have.

        None may outlive this call, whatever signals arrive: the sink's descriptor is closed next,
        and its number may then be another file's.
        """
        self._stopping.set()
        interruption: BaseException | None = None
        for thread in self._threads:
            while thread.is_alive():
                try:
                    thread.join()
                except BaseException as error:  # noqa: BLE001 - raised again below
                    interruption = error
        if interruption is not None:
            raise interruption

    def _work(self) -> None:
        try:
            worker = Worker(self._sinks, self._whole, allow_nonfinite=self._allow)
            with np.errstate(all="ignore"):
                unreported = 0
                while (chunk := self._next()) is not None:
                    unreported += worker.do(*chunk)
                    if unreported >= _REPORT_EVERY:
                        self._done.put(unreported)
                        unreported = 0
                self._done.put(unreported)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the caller's thread
            self._stopping.set()
            self._done.put(error)
        finally:
            self._done.put(None)

    def _next(self) -> tuple[Job, int, int] | None:
        if self._stopping.is_set():
            return None
        with self._turn:
            return next(self._chunks, None)
