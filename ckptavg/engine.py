"""The loop: read a chunk of each input, add it to a float64 sum, divide, round, write.

It knows nothing of models, names or formats. Chunks are small enough to stay in a core's cache;
numpy and the kernel work without the interpreter's lock, so a few threads share the chunks.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckptavg.arithmetic import accumulate, accumulator_dtype, nonfinite, rounded
from ckptavg.checkpoint import read_span, read_view
from ckptavg.errors import CkptAvgError
from ckptavg.tensors import BY_NAME, AnyArray, Tensor, bytes_of, contiguous_strides

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from ckptavg.layout import Copy, Scattered
    from ckptavg.parts import Part
    from ckptavg.tensors import DType

    Read = Callable[["Input"], AnyArray]

_BYTE = BY_NAME["uint8"]

CHUNK = 256 * 1024
"""Elements of a chunk: 1 MiB of float32, and a sum of 2 MiB."""

_REPORT_EVERY = 16 << 20
"""Bytes between two reports: each wakes the caller, who then contends for the interpreter."""

_WHOLE_AT_ONCE = 8 << 20
"""Bytes from which only one strided tensor at a time is held in memory."""


class Sink(Protocol):
    """What takes the output's bytes, from several threads at once."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` (bytes) at `offset`."""


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor's bytes in one checkpoint.

    Attributes:
        part: the file.
        tensor: dtype, shape and place of the (first) tensor.
        weight: what its values are multiplied by.
    """

    part: Part
    tensor: Tensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """Bytes of the output, and what they are made of.

    Attributes:
        inputs: what is averaged; for a copy, the one that is copied.
        count: elements; a run of neighbouring tensors counts as one.
        copy: the input's bytes are the output's.
        one_of_several: the input is but one checkpoint's of several, so that its NaN and Inf do
            not stand in every one.
        divisor: of the weighted sum.
        dtype: element type of the output.
        targets: offsets in the output at which the result is written.
        scattered: further places, in which it is not contiguous.
        number: of the first tensor, for whoever must name one.
        nonnegative: negative results are an error (variances under negative weights).
    """

    inputs: tuple[Input, ...]
    count: int
    copy: bool
    divisor: float
    dtype: DType
    targets: tuple[int, ...]
    number: int
    nonnegative: bool = False
    one_of_several: bool = False
    scattered: tuple[Scattered, ...] = ()

    @property
    def strided(self) -> bool:
        """Whether an input or a place is not contiguous, so that it goes tensor by tensor."""
        return bool(self.scattered) or any(
            entry.tensor.strides is not None for entry in self.inputs
        )

    @staticmethod
    def copy_of(copied: Copy) -> Job:
        """The job that copies some bytes."""
        entry = Input(copied.part, Tensor(_BYTE, (copied.size,), 0, copied.offset))
        return Job(
            inputs=(entry,), count=copied.size, copy=True, divisor=1.0, dtype=_BYTE,
            targets=(copied.target,), number=-1,
        )  # fmt: skip


class BadValueError(CkptAvgError):
    """A value that must not be in the output; the caller knows the tensor's name.

    Attributes:
        number: of the first tensor of the job.
        element: which element of the job it is; None for a strided tensor.
        path: the input at fault, if it is one.
    """

    def __init__(
        self, message: str, job: Job, element: int | None, part: Part | None = None
    ) -> None:
        super().__init__(message, path=part.path if part else None)
        self.number, self.element = job.number, element


def execute(
    jobs: Iterator[Job], sink: Sink, threads: int, *, allow_nonfinite: bool = False
) -> Generator[int, None, None]:
    """Do the jobs; yields the bytes written since the last time.

    Args:
        jobs: what is to be done.
        sink: where it goes.
        threads: how many work at once.
        allow_nonfinite: let NaN and Inf of the inputs pass.

    Raises:
        BadValueError: an input is NaN or Inf, or the result does not fit the output's dtype.
    """
    crew = _Crew(jobs, sink, allow_nonfinite=allow_nonfinite)
    try:
        crew.start(threads)
        yield from crew.reports()
    finally:
        crew.stop()


class _Crew:
    """Threads that take chunks from one list, and the queue in which they report."""

    def __init__(self, jobs: Iterator[Job], sink: Sink, *, allow_nonfinite: bool) -> None:
        self._chunks = _chunks(jobs)
        self._turn, self._stopping = threading.Lock(), threading.Event()
        self._whole = threading.Lock()
        self._sink, self._allow = sink, allow_nonfinite
        self._done: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        """Set them to work; fewer of them where the system has no more to give."""
        for _ in range(threads):
            thread = threading.Thread(target=self._work, daemon=True)
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
            worker = _Worker(self._sink, self._whole, allow_nonfinite=self._allow)
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


def _chunks(jobs: Iterator[Job]) -> Iterator[tuple[Job, int, int]]:
    """Cut the jobs into chunks: job, first element, elements."""
    for job in jobs:
        if job.strided:
            yield job, 0, job.count
        else:
            for start in range(0, job.count, CHUNK):
                yield job, start, min(CHUNK, job.count - start)


class _Worker:
    """One thread's buffers, used again for every chunk."""

    def __init__(self, sink: Sink, whole: threading.Lock, *, allow_nonfinite: bool) -> None:
        self._sink, self._whole, self._allow = sink, whole, allow_nonfinite
        self._raw: AnyArray = np.empty(0, np.uint8)
        self._total: AnyArray = np.empty(0, np.uint8)

    def do(self, job: Job, start: int, count: int) -> int:
        """Do a chunk of a job; returns the bytes written."""
        if job.strided:
            large = job.dtype.nbytes(count) > _WHOLE_AT_ONCE
            with self._whole if large else contextlib.nullcontext():
                return self._write(job, 0, self._strided(job))

        def read(entry: Input) -> AnyArray:
            values = _buffer(self._raw, count, entry.tensor.dtype.numpy)
            offset = entry.tensor.offset + start * entry.tensor.dtype.itemsize
            entry.part.read_into(offset, bytes_of(values))
            return values

        self._raw = _grown(self._raw, count * job.inputs[0].tensor.dtype.itemsize)
        if job.copy:
            return self._write(job, start, read(job.inputs[0]))
        dtype = accumulator_dtype(job.dtype)
        self._total = _grown(self._total, count * dtype.itemsize)
        return self._write(
            job, start, self._mean(job, _buffer(self._total, count, dtype), read, start)
        )

    def _write(self, job: Job, start: int, values: AnyArray) -> int:
        data = bytes_of(values)
        for target in job.targets:
            self._sink.write(target + start * job.dtype.itemsize, data)
        for place in job.scattered:
            span, view = read_span(place.part, place.tensor)
            view[...] = values.reshape(view.shape)
            self._sink.write(place.tensor.offset, span.data)
        return len(data) * (len(job.targets) + len(job.scattered))

    def _mean(self, job: Job, total: AnyArray, read: Read, start: int | None) -> AnyArray:
        """Sum, divide, round and check; `total` is where the sum is held."""
        for number, entry in enumerate(job.inputs):
            accumulate(total, read(entry), entry.weight, first=number == 0)
        if job.divisor != 1:
            np.divide(total, job.divisor, out=total)
        values = rounded(total, job.dtype)
        odd = nonfinite(values, job.dtype)
        if odd.any():
            values = np.array(values)
            values[odd] = self._settle(job, read, odd, values[odd], start)
        if job.nonnegative and (values < 0).any():
            raise BadValueError(
                "the weights make this variance negative", job, _first(values < 0, start)
            )
        return values

    def _settle(
        self, job: Job, read: Read, odd: AnyArray, values: AnyArray, start: int | None
    ) -> AnyArray:
        """What stands where the output is NaN or Inf, from what the inputs hold there.

        The same NaN or Inf in every input (a mask of -inf) stays as it is.
        """
        first = np.array(read(job.inputs[0])[odd])
        same = np.full(len(first), not job.one_of_several)
        culprit = np.where(np.isfinite(first), -1, 0)
        for number, entry in enumerate(job.inputs[1:], 1):
            other = read(entry)[odd]
            same &= (other == first) | (np.isnan(other) & np.isnan(first))
            culprit = np.where((culprit < 0) & ~np.isfinite(other), number, culprit)
        kept = rounded(first.astype(accumulator_dtype(job.dtype)), job.dtype)
        misfit = (culprit < 0) | (same & np.isinf(first) & np.isnan(kept))
        wrong = misfit if self._allow else misfit | ~same
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            element = None if start is None else start + int(np.flatnonzero(odd)[position])
            if misfit[position]:
                raise BadValueError(f"the average does not fit {job.dtype.name}", job, element)
            entry = job.inputs[culprit[position]]
            raise BadValueError(f"is {read(entry)[odd][position]}", job, element, entry.part)
        return np.where(same, kept, values)

    def _strided(self, job: Job) -> AnyArray:
        """A tensor that is not contiguous everywhere: slabs across its widest stride.

        The slabs are contiguous, or nearly so, in the (first) input; the result is held whole.
        """
        like = job.inputs[0].tensor
        if job.copy:
            return np.ascontiguousarray(read_view(job.inputs[0].part, like))
        out = np.empty(like.shape, job.dtype.numpy)
        axis = _widest(like)
        rows = max(1, CHUNK * like.shape[axis] // job.count)
        if any(_widest(entry.tensor) != axis for entry in job.inputs):
            # Slabs along one's widest stride cut across all of another's span: one slab, then.
            rows = like.shape[axis]
        for first in range(0, like.shape[axis], rows):
            place = (slice(None),) * axis + (slice(first, first + rows),)

            def read(entry: Input, first: int = first) -> AnyArray:
                return read_view(entry.part, _slab(entry.tensor, axis, first, first + rows))

            total = np.empty(out[place].shape, accumulator_dtype(job.dtype))
            out[place] = self._mean(job, total, read, None)
        return out


def _grown(buffer: AnyArray, size: int) -> AnyArray:
    return buffer if buffer.nbytes >= size else np.empty(size, np.uint8)


def _buffer(held: AnyArray, count: int, dtype: np.dtype[Any]) -> AnyArray:
    return held[: count * dtype.itemsize].view(dtype)


def _first(where: AnyArray, start: int | None) -> int | None:
    return None if start is None else start + int(np.flatnonzero(where)[0])


def _widest(tensor: Tensor) -> int:
    """The axis along which neighbours are farthest apart in the file."""
    strides = _strides(tensor)
    return max(range(len(strides)), key=lambda axis: (tensor.shape[axis] > 1, strides[axis]))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return contiguous_strides(tensor.shape) if tensor.strides is None else tensor.strides


def _slab(tensor: Tensor, axis: int, first: int, last: int) -> Tensor:
    """The part of a tensor from `first` to `last` along an axis."""
    strides = _strides(tensor)
    size = min(last, tensor.shape[axis]) - first
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    offset = tensor.offset + first * strides[axis] * tensor.dtype.itemsize
    return Tensor(tensor.dtype, shape, tensor.part, offset, strides)
