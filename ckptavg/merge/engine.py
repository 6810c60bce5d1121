"""Carry out jobs: read a chunk of each input, add it to float64 sums, divide, round, write.

The engine knows nothing of models, names or formats. A chunk fits a core's cache. numpy and the
system calls release the interpreter's lock, so several threads share the chunks.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckptavg.errors import CkptAvgError
from ckptavg.formats.checkpoint import read_span, read_view
from ckptavg.formats.tensors import AnyArray, bytes_of, new_arrays
from ckptavg.merge.chunk import Chunk
from ckptavg.merge.jobs import CHUNK, chunks

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.jobs import Job, Mean, StoredTensor

_REPORT_EVERY = 16 << 20
"""Bytes between two reports of a thread. Each report wakes the caller, who takes the lock."""
_LARGE = 8 << 20
"""Bytes of a large strided tensor. Only one of these is held in memory at a time."""
_WIDEST = 16  # bytes of an element of complex128
_MOST_THREADS = 4  # their buffers take less than 64 MB
_REMOTE_THREADS = 8


def default_threads(checkpoints: Iterable[Checkpoint] = ()) -> int:
    """The number of processors that this process may use, 4 at most.

    It is 8 if bytes come over a network, since waiting threads need no processor.
    """
    if any(checkpoint.is_remote for checkpoint in checkpoints):
        return _REMOTE_THREADS
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    return min(os.cpu_count() or 1, _MOST_THREADS)


class Sink(Protocol):
    """An output that takes bytes from several threads at once."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset."""


def execute(
    jobs: Iterator[Job],
    sinks: Sequence[Sink],
    threads: int,
    *,
    allow_nonfinite: bool = False,
    every: int = 1,
    first: int = 0,
) -> Generator[int, None, None]:
    """Carry out jobs, and yield the number of bytes written since the last time.

    Args:
        jobs: the jobs.
        sinks: one for each output.
        threads: the number of threads.
        allow_nonfinite: accept NaN and Inf in the inputs.
        every: carry out only every n-th chunk; the others are for other processes.
        first: the index of the first chunk to carry out.

    Raises:
        BadValueError: an input is NaN or Inf, or a result does not fit the output's dtype.
    """
    pool = _Pool(itertools.islice(chunks(jobs), first, None, every), sinks, allow_nonfinite)
    try:
        pool.start(threads)
        yield from pool.reports()
    finally:
        pool.stop()


class _Pool:
    """Threads that take chunks from one iterator, and the queue in which they report."""

    def __init__(
        self,
        chunks: Iterator[tuple[Job, int, int]],
        sinks: Sequence[Sink],
        allow_nonfinite: bool,  # noqa: FBT001
    ) -> None:
        self._chunks, self._sinks, self._allow_nonfinite = chunks, sinks, allow_nonfinite
        self._turn, self._beginning = threading.Lock(), threading.Event()
        self._stopping = threading.Event()
        self._large = threading.Lock(), _Buffers()
        self._reports: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        """Start the threads, or as many as the system allows.

        They begin to work when all of them are known. If the handler of a signal raises in
        `Thread.start`, nobody would wait for that thread: `stop` ends it before it has begun.
        """
        for _ in range(threads):
            thread = threading.Thread(target=self._work, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if not self._threads:
                    raise CkptAvgError(f"cannot start a thread: {error}") from error
                break
            self._threads.append(thread)
        self._beginning.set()

    def reports(self) -> Iterator[int]:
        """The bytes written by each report. The first failure is raised when all threads end."""
        working, failure = len(self._threads), None
        while working:
            report = self._reports.get()
            if report is None:
                working -= 1
            elif isinstance(report, BaseException):
                failure = failure or report
            else:
                yield report
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """Wait until each thread has finished its chunk, even if signals arrive.

        The caller closes the output next. A thread that still wrote could hit another file, which
        has the same descriptor by then.
        """
        self._stopping.set()
        self._beginning.set()
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
        self._beginning.wait()
        try:
            worker = _Worker(self._sinks, self._large, self._allow_nonfinite)
            with np.errstate(all="ignore"):
                unreported = 0
                while (chunk := self._next_chunk()) is not None:
                    unreported += worker.carry_out(*chunk)
                    if unreported >= _REPORT_EVERY:
                        self._reports.put(unreported)
                        unreported = 0
                self._reports.put(unreported)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._stopping.set()
            self._reports.put(error)
        finally:
            self._reports.put(None)

    def _next_chunk(self) -> tuple[Job, int, int] | None:
        if self._stopping.is_set():
            return None
        with self._turn:
            return next(self._chunks, None)


class _Buffers:
    """Memory that is used again: the system's allocator gives large arrays back late."""

    def __init__(self) -> None:
        self._held: dict[Hashable, AnyArray] = {}

    def get(self, purpose: Hashable, dtype: np.dtype[Any], count: int) -> AnyArray:
        """Uninitialised memory for `count` values: the same memory for the same purpose."""
        held, size = self._held.get(purpose), count * dtype.itemsize
        if held is None or held.nbytes < size:
            self._held.pop(purpose, None)
            # A whole number of elements of every dtype.
            held = np.empty(-(-size // _WIDEST) * _WIDEST, np.uint8)
            self._held[purpose] = held
        return held[:size].view(dtype)


class _Worker:
    """The work of one thread, with buffers that are used for every chunk.

    Args:
        sinks: one for each output.
        large: the buffers for large strided tensors, which all threads share, and their lock.
        allow_nonfinite: accept NaN and Inf in the inputs.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        large: tuple[threading.Lock, _Buffers],
        allow_nonfinite: bool,  # noqa: FBT001
    ) -> None:
        self._sinks, self._large = sinks, large
        self._allow_nonfinite = allow_nonfinite
        self._buffers = _Buffers()

    def carry_out(self, job: Job, start: int, count: int) -> int:
        """Carry out a chunk of a job, and return the number of bytes written."""
        if job.strided:
            if count * job.dtype.itemsize <= _LARGE:
                return self._carry_out_strided(job, self._buffers)
            lock, buffers = self._large
            with lock:
                return self._carry_out_strided(job, buffers)
        if job.copy:
            values = self._read(job.inputs[0], start, count)
            return sum(self._write(job, mean, start, values) for mean in job.means)
        chunk = Chunk(
            job,
            partial(self._read, start=start, count=count),
            partial(self._buffers.get, count=count),
            start,
            self._allow_nonfinite,
        )
        return sum(
            self._write(job, mean, start, chunk.result(mean, total))
            for mean, total in zip(job.means, chunk.sums(), strict=True)
        )

    def _read(self, entry: StoredTensor, start: int, count: int) -> AnyArray:
        dtype = entry.tensor.dtype
        values = self._buffers.get("raw", dtype.numpy, count)
        entry.part.read_into(entry.tensor.offset + start * dtype.itemsize, bytes_of(values))
        return values

    def _write(self, job: Job, mean: Mean, start: int, values: AnyArray) -> int:
        data, sink = bytes_of(values), self._sinks[mean.output]
        for target in mean.targets:
            sink.write(target + start * job.dtype.itemsize, data)
        for place in mean.scattered:
            span, view = read_span(place.part, place.tensor)
            view[...] = values.reshape(view.shape)
            sink.write(place.tensor.offset, span.data)
        return len(data) * (len(mean.targets) + len(mean.scattered))

    def _carry_out_strided(self, job: Job, buffers: _Buffers) -> int:
        """Carry out a job with a strided tensor, and return the number of bytes written.

        Inputs are read in slabs along the axis of the first input's widest stride, in which slabs
        are almost contiguous. Results are held in full.
        """
        like = job.inputs[0].tensor
        results = [
            buffers.get(f"result {number}", job.dtype.numpy, job.count).reshape(like.shape)
            for number in range(1 if job.copy else len(job.means))
        ]
        axis = like.widest_axis
        rows = max(1, CHUNK * like.shape[axis] // job.count)
        if any(entry.tensor.widest_axis != axis for entry in job.inputs):
            # A slab of one input may reach over all of another: read the tensors in full.
            rows = like.shape[axis]
        for first in range(0, like.shape[axis], rows):
            place = (slice(None),) * axis + (slice(first, first + rows),)

            def read(entry: StoredTensor, first: int = first) -> AnyArray:
                return read_view(entry.part, entry.tensor.slab(axis, first, first + rows))

            if job.copy:
                results[0][place] = read(job.inputs[0])
                continue
            allocate = new_arrays(results[0][place].shape)
            chunk = Chunk(job, read, allocate, None, self._allow_nonfinite)
            for mean, total, result in zip(job.means, chunk.sums(), results, strict=True):
                result[place] = chunk.result(mean, total)
        return sum(
            self._write(job, mean, 0, results[0 if job.copy else number])
            for number, mean in enumerate(job.means)
        )
