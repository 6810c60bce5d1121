"""Carry out jobs: read a chunk of each input, add it to float64 sums, divide, round, write.

The engine knows nothing of models, names or formats. A chunk fits a core's cache. numpy and the
system calls release the interpreter's lock, so several threads share the chunks.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckptavg.errors import CkptAvgError
from ckptavg.formats.checkpoint import read_span, read_view
from ckptavg.formats.tensors import Allocate, AnyArray, bytes_of, new_arrays
from ckptavg.merge.arithmetic import (
    accumulator_dtype,
    all_finite,
    nonfinite,
    rounded,
    widened,
)
from ckptavg.merge.jobs import CHUNK, BadValueError, chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.jobs import Job, Mean, StoredTensor

_REPORT_EVERY = 16 << 20
"""Bytes between two reports of a thread. Each report wakes the caller, who takes the lock."""
_LARGE = 8 << 20
"""Bytes of a large strided tensor. Only one of these is held in memory at a time."""
_DOWNSCALE = 2.0**-200  # sums of the largest float64 values, times this, fit float64
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
        chunk = _Chunk(
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
            chunk = _Chunk(job, read, allocate, None, self._allow_nonfinite)
            for mean, total, result in zip(job.means, chunk.sums(), results, strict=True):
                result[place] = chunk.result(mean, total)
        return sum(
            self._write(job, mean, 0, results[0 if job.copy else number])
            for number, mean in enumerate(job.means)
        )


@dataclass(frozen=True)
class _Chunk:
    """The computation of a chunk.

    Attributes:
        job: the job.
        read: reads the chunk's values of an input.
        allocate: gives uninitialised arrays of the chunk's shape.
        start: index of the chunk's first element in the job; None in a strided tensor.
        allow_nonfinite: accept NaN and Inf in the inputs.
    """

    job: Job
    read: Callable[[StoredTensor], AnyArray]
    allocate: Allocate
    start: int | None
    allow_nonfinite: bool

    def sums(self) -> list[AnyArray]:
        """The weighted sum for each mean, in float64 or complex128. Each input is read once."""
        job, dtype = self.job, accumulator_dtype(self.job.dtype)
        sums: dict[int, AnyArray] = {}
        for entry, places_by_weight in job.terms:
            values = widened(self.read(entry), self.allocate)
            if len(job.means) > 1:
                wide = self.allocate("wide", dtype)
                np.copyto(wide, values, casting="same_kind")
                values = wide
            for weight, places in places_by_weight:
                term = values
                if weight != 1:
                    term = np.multiply(
                        values, weight, out=self.allocate("product", dtype), dtype=dtype
                    )
                for place in places:
                    if place in sums:
                        np.add(sums[place], term, out=sums[place])
                    else:  # copied: adding it to 0 would lose -0.0
                        sums[place] = self.allocate(f"sum {place}", dtype)
                        np.copyto(sums[place], term, casting="same_kind")
        return [sums[place] for place in range(len(job.means))]

    def result(self, mean: Mean, total: AnyArray) -> AnyArray:
        """The values of a mean: the sum divided (in place), rounded and checked.

        Raises:
            BadValueError: a value is NaN, Inf or negative where that is an error.
        """
        dtype = self.job.dtype
        if mean.divisor != 1:
            np.divide(total, mean.divisor, out=total)
        values = rounded(total, dtype, self.allocate)
        if not all_finite(values, dtype, self.allocate):
            odd = nonfinite(values, dtype)
            values = np.array(values)
            values[odd] = self._nonfinite_values(mean, odd, values[odd])
        if mean.nonnegative and (values < 0).any():
            element = self._element(values < 0, 0)
            raise BadValueError("the weights make this variance negative", self.job, element)
        return values

    def _nonfinite_values(self, mean: Mean, odd: AnyArray, values: AnyArray) -> AnyArray:
        """The values where a result is NaN or Inf.

        A value that is the same in all inputs, such as -inf in a mask, is kept as it is. A mean of
        which only the sum is too large is computed again from smaller numbers. Others are errors,
        or stay as computed if `allow_nonfinite` is set.

        Args:
            mean: the weighted mean.
            odd: bools of the chunk's shape, True where the result is NaN or Inf.
            values: the result at these places, `[num_odd]`.

        Raises:
            BadValueError: an input has NaN or Inf, or a finite mean does not fit the dtype.
        """
        job = self.job
        pairs = zip(job.inputs, mean.weights, strict=True)
        used = [(entry, weight) for entry, weight in pairs if weight != 0]
        wide = accumulator_dtype(job.dtype)
        entry, weight = used[0]
        first = self.read(entry)[odd].astype(wide)
        total = first * _DOWNSCALE * weight
        same = np.full(len(first), not mean.must_be_finite)
        culprit = np.where(np.isfinite(first), -1, 0)
        for number, (entry, weight) in enumerate(used[1:], 1):
            other = self.read(entry)[odd].astype(wide)
            total += other * _DOWNSCALE * weight
            same &= (other == first) | (np.isnan(other) & np.isnan(first))
            culprit = np.where((culprit < 0) & ~np.isfinite(other), number, culprit)
        kept = rounded(first, job.dtype, new_arrays(first.shape))
        again = rounded(total / mean.divisor / _DOWNSCALE, job.dtype, new_arrays(first.shape))
        is_finite = (culprit < 0) & ~nonfinite(again, job.dtype)
        values = np.where(is_finite, again, values)
        misfit = (culprit < 0) & ~is_finite | (same & np.isinf(first) & np.isnan(kept))
        wrong = misfit if self.allow_nonfinite else misfit | ~(same | is_finite)
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            element = self._element(odd, position)
            if misfit[position]:
                raise BadValueError(f"the average does not fit {job.dtype.name}", job, element)
            entry, _ = used[culprit[position]]
            raise BadValueError(f"is {self.read(entry)[odd][position]}", job, element, entry.part)
        return np.where(same, kept, values)

    def _element(self, where: AnyArray, position: int) -> int | None:
        """Index in the job of the n-th marked element; None in a strided tensor."""
        return None if self.start is None else self.start + int(np.flatnonzero(where)[position])
