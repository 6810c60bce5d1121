"""Carry out jobs: read a chunk of each input, add it to float64 sums, divide, round, write.

The engine knows nothing of models, names or formats. Chunks are small enough to stay in a core's
cache. numpy and the kernel work without the interpreter's lock, so a few threads share the chunks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckptavg.errors import CkptAvgError
from ckptavg.formats.checkpoint import read_span, read_view
from ckptavg.formats.paths import is_remote
from ckptavg.formats.tensors import Allocate, AnyArray, Tensor, bytes_of, new_arrays
from ckptavg.merge.arithmetic import Sum, accumulator_dtype, all_finite, nonfinite, rounded
from ckptavg.merge.jobs import CHUNK, BadValueError, chunks
from ckptavg.merge.narrow import format_of
from ckptavg.merge.signals import signals_waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.jobs import Combination, Input, Job

_REPORT_EVERY = 16 << 20
"""Bytes between two reports: each wakes the caller, who then contends for the interpreter."""
_LARGE = 8 << 20
"""Bytes from which only one strided tensor at a time is held in memory."""
_FLOAT32 = np.dtype(np.float32)
_WIDEST = 16
"""Bytes of an element of complex128."""


# The most threads whose buffers stay within 64 MB.
_MOST_THREADS = 4
_REMOTE_THREADS = 16


def default_threads(checkpoints: Iterable[Checkpoint] = ()) -> int:
    """The number of processors that this process may use, 4 at most.

    It is 16 where bytes come over a network: threads that wait for them need no processor.
    """
    if any(is_remote(part.path) for checkpoint in checkpoints for part in checkpoint.parts):
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
    """Carry out jobs; yields the number of bytes written since the last time.

    Args:
        jobs: the work.
        sinks: one for each output.
        threads: how many threads share the work.
        allow_nonfinite: let NaN and Inf of the inputs pass.
        every: carry out one of so many chunks; the others belong to other processes.
        first: the number of the first chunk that is carried out.

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
        self._turn, self._stopping = threading.Lock(), threading.Event()
        self._large_tensor = threading.Lock()
        self._reports: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        """Start the threads, or as many as the system allows."""
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
        """The bytes that were written; raises the first failure once all threads have ended."""
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
        """Wait until each thread has finished its chunk, whatever signals arrive.

        The caller closes the output's descriptor next, and its number may then be another file's.
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
            worker = _Worker(self._sinks, self._large_tensor, self._allow_nonfinite)
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


class _Worker:
    """One thread's work, with buffers that serve for every chunk.

    Args:
        sinks: one for each output.
        large_tensor: a lock that is held while a large strided tensor is in memory.
        allow_nonfinite: let NaN and Inf of the inputs pass.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        large_tensor: threading.Lock,
        allow_nonfinite: bool,  # noqa: FBT001
    ) -> None:
        self._sinks, self._large_tensor = sinks, large_tensor
        self._allow_nonfinite = allow_nonfinite
        self._buffers: dict[str, AnyArray] = {}

    def carry_out(self, job: Job, start: int, count: int) -> int:
        """Carry out a chunk of a job; returns the number of bytes written."""
        if job.strided:
            is_large = job.dtype.nbytes(count) > _LARGE
            with self._large_tensor if is_large else contextlib.nullcontext():
                return self._carry_out_strided(job)
        if job.copy:
            values = self._read(job.inputs[0], start, count)
            return sum(
                self._write(job, combination, start, values) for combination in job.combinations
            )
        chunk = _Chunk(
            job,
            lambda entry: self._read(entry, start, count),
            lambda purpose, dtype: self._buffer(purpose, count, dtype),
            start,
            self._allow_nonfinite,
        )
        return sum(
            self._write(job, combination, start, chunk.result(combination, total))
            for combination, total in zip(job.combinations, chunk.sums(), strict=True)
        )

    def _buffer(self, purpose: str, count: int, dtype: np.dtype[Any]) -> AnyArray:
        """Uninitialised memory for `count` values: the same memory for the same purpose."""
        held, size = self._buffers.get(purpose), count * dtype.itemsize
        if held is None or held.nbytes < size:
            # A whole number of elements of every dtype.
            held = np.empty(-(-size // _WIDEST) * _WIDEST, np.uint8)
            self._buffers[purpose] = held
        return held[:size].view(dtype)

    def _read(self, entry: Input, start: int, count: int) -> AnyArray:
        dtype = entry.tensor.dtype
        values = self._buffer("raw", count, dtype.numpy)
        entry.part.read_into(entry.tensor.offset + start * dtype.itemsize, bytes_of(values))
        return values

    def _write(self, job: Job, combination: Combination, start: int, values: AnyArray) -> int:
        data, sink = bytes_of(values), self._sinks[combination.output]
        for target in combination.targets:
            sink.write(target + start * job.dtype.itemsize, data)
        for place in combination.scattered:
            span, view = read_span(place.part, place.tensor)
            view[...] = values.reshape(view.shape)
            sink.write(place.tensor.offset, span.data)
        return len(data) * (len(combination.targets) + len(combination.scattered))

    def _carry_out_strided(self, job: Job) -> int:
        """A tensor that is not contiguous everywhere: slabs across its widest stride.

        The slabs are contiguous, or nearly so, in the first input. The results are held in full.
        """
        like = job.inputs[0].tensor
        if job.copy:
            values = np.ascontiguousarray(read_view(job.inputs[0].part, like))
            return sum(self._write(job, combination, 0, values) for combination in job.combinations)
        results = [np.empty(like.shape, job.dtype.numpy) for _ in job.combinations]
        axis = _widest_axis(like)
        rows = max(1, CHUNK * like.shape[axis] // job.count)
        if any(_widest_axis(entry.tensor) != axis for entry in job.inputs):
            # Slabs along one input's widest stride would cut across all of another's span.
            rows = like.shape[axis]
        for first in range(0, like.shape[axis], rows):
            place = (slice(None),) * axis + (slice(first, first + rows),)

            def read(entry: Input, first: int = first) -> AnyArray:
                return read_view(entry.part, _slab(entry.tensor, axis, first, first + rows))

            room = new_arrays(results[0][place].shape)
            chunk = _Chunk(job, read, room, None, self._allow_nonfinite)
            for combination, total, result in zip(
                job.combinations, chunk.sums(), results, strict=True
            ):
                result[place] = chunk.result(combination, total)
        return sum(
            self._write(job, combination, 0, result)
            for combination, result in zip(job.combinations, results, strict=True)
        )


@dataclass(frozen=True)
class _Chunk:
    """A chunk of a job that computes.

    Attributes:
        job: the job.
        read: gives the values of an input in the chunk.
        room: gives uninitialised memory of the chunk's shape, by purpose and dtype.
        start: the chunk's first element; None within a strided tensor.
        allow_nonfinite: let NaN and Inf of the inputs pass.
    """

    job: Job
    read: Callable[[Input], AnyArray]
    room: Allocate
    start: int | None
    allow_nonfinite: bool

    def sums(self) -> list[Sum]:
        """The weighted sum of each combination. Each input is read once."""
        job, dtype = self.job, accumulator_dtype(self.job.dtype)
        narrow = format_of(job.inputs[0].tensor.dtype)
        sums = [
            Sum(self.room(f"sum {number}", dtype), narrow)
            for number in range(len(job.combinations))
        ]
        for number, entry in enumerate(job.inputs):
            # Averages over more and over fewer of the last checkpoints share most of their weights.
            sums_by_weight: defaultdict[float, list[Sum]] = defaultdict(list)
            for combination, total in zip(job.combinations, sums, strict=True):
                if combination.weights[number] != 0:
                    sums_by_weight[combination.weights[number]].append(total)
            if not sums_by_weight:
                continue
            values, largest = self.read(entry), np.inf
            if narrow is not None:
                values, largest = narrow.widen(values, self.room("single", _FLOAT32))
            elif sum(map(len, sums_by_weight.values())) > 1:
                wide = self.room("wide", dtype)
                np.copyto(wide, values, casting="same_kind")
                values = wide
            for weight, totals in sums_by_weight.items():
                term = values
                if weight != 1:
                    term = np.multiply(values, weight, out=self.room("product", dtype), dtype=dtype)
                for total in totals:
                    total.add(term, largest if weight == 1 else np.inf)
        return sums

    def result(self, combination: Combination, total: Sum) -> AnyArray:
        """A sum, divided, rounded and checked."""
        dtype = self.job.dtype
        values = total.mean(combination.divisor, dtype, self.room)
        if not all_finite(values, dtype, self.room):
            odd = nonfinite(values, dtype)
            values = np.array(values)
            values[odd] = self._settled(combination, odd, values[odd])
        if combination.nonnegative and (values < 0).any():
            element = self._element(values < 0, 0)
            raise BadValueError("the weights make this variance negative", self.job, element)
        return values

    def _settled(self, combination: Combination, odd: AnyArray, values: AnyArray) -> AnyArray:
        """What stands where a result is NaN or Inf: the inputs' own value if it is one in all.

        A mask of -inf is such a value.

        Args:
            combination: of the result.
            odd: where the result is NaN or Inf, bools of the chunk's shape.
            values: the result there, `[num_odd]`.
        """
        job = self.job
        pairs = zip(job.inputs, combination.weights, strict=True)
        used = [entry for entry, weight in pairs if weight != 0]
        first = np.array(self.read(used[0])[odd])
        same = np.full(len(first), not combination.one_of_several)
        culprit = np.where(np.isfinite(first), -1, 0)
        for number, entry in enumerate(used[1:], 1):
            other = self.read(entry)[odd]
            same &= (other == first) | (np.isnan(other) & np.isnan(first))
            culprit = np.where((culprit < 0) & ~np.isfinite(other), number, culprit)
        wide = first.astype(accumulator_dtype(job.dtype))
        kept = rounded(wide, job.dtype, new_arrays(first.shape))
        misfit = (culprit < 0) | (same & np.isinf(first) & np.isnan(kept))
        wrong = misfit if self.allow_nonfinite else misfit | ~same
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            element = self._element(odd, position)
            if misfit[position]:
                raise BadValueError(f"the average does not fit {job.dtype.name}", job, element)
            entry = used[culprit[position]]
            raise BadValueError(f"is {self.read(entry)[odd][position]}", job, element, entry.part)
        return np.where(same, kept, values)

    def _element(self, where: AnyArray, position: int) -> int | None:
        """The number of the n-th marked element in the job; None in a strided tensor."""
        return None if self.start is None else self.start + int(np.flatnonzero(where)[position])


def _widest_axis(tensor: Tensor) -> int:
    """The axis along which neighbours are farthest apart in the file."""
    strides = tensor.element_strides
    return max(range(len(strides)), key=lambda axis: (tensor.shape[axis] > 1, strides[axis]))


def _slab(tensor: Tensor, axis: int, first: int, last: int) -> Tensor:
    """The part of a tensor from index `first` to `last` along an axis."""
    strides = tensor.element_strides
    size = min(last, tensor.shape[axis]) - first
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    offset = tensor.offset + first * strides[axis] * tensor.dtype.itemsize
    return Tensor(tensor.dtype, shape, tensor.part, offset, strides)
