"""What a thread does with a chunk: read each input, add it to the sums, divide, round, write."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckptavg.formats.checkpoint import read_span, read_view
from ckptavg.formats.tensors import AnyArray, Room, Tensor, bytes_of, fresh
from ckptavg.merge.arithmetic import Sum, accumulator_dtype, all_finite, nonfinite, rounded
from ckptavg.merge.jobs import CHUNK, BadValueError
from ckptavg.merge.narrow import format_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from ckptavg.merge.jobs import Input, Job, Share

    Read = Callable[["Input"], AnyArray]

_WHOLE_AT_ONCE = 8 << 20
"""Bytes from which only one strided tensor at a time is held in memory."""


_FLOAT32 = np.dtype(np.float32)
_WIDEST = 16
"""Bytes of an element of complex128."""


class Sink(Protocol):
    """What takes an output's bytes, from several threads at once."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` (bytes) at `offset`."""


class Worker:
    """One thread's buffers, used again for every chunk.

    Args:
        sinks: one for each output.
        whole: held while a large strided tensor is in memory.
        allow_nonfinite: let NaN and Inf of the inputs pass.
    """

    def __init__(
        self, sinks: Sequence[Sink], whole: threading.Lock, *, allow_nonfinite: bool
    ) -> None:
        self._sinks, self._whole, self._allow = sinks, whole, allow_nonfinite
        self._buffers: dict[str, AnyArray] = {}

    def _buffer(self, purpose: str, count: int, dtype: np.dtype[Any]) -> AnyArray:
        """Room for so many values, the same memory every time."""
        held, size = self._buffers.get(purpose), count * dtype.itemsize
        if held is None or held.nbytes < size:
            # A whole number of elements of every dtype.
            held = np.empty(-(-size // _WIDEST) * _WIDEST, np.uint8)
            self._buffers[purpose] = held
        return held[:size].view(dtype)

    def do(self, job: Job, start: int, count: int) -> int:
        """Do a chunk of a job; returns the bytes written."""
        if job.strided:
            large = job.dtype.nbytes(count) > _WHOLE_AT_ONCE
            with self._whole if large else contextlib.nullcontext():
                return self._do_strided(job)
        itemsize = job.inputs[0].tensor.dtype.itemsize

        def read(entry: Input) -> AnyArray:
            values = self._buffer("raw", count, entry.tensor.dtype.numpy)
            entry.part.read_into(entry.tensor.offset + start * itemsize, bytes_of(values))
            return values

        def room(purpose: str, dtype: np.dtype[Any]) -> AnyArray:
            return self._buffer(purpose, count, dtype)

        if job.copy:
            values = read(job.inputs[0])
            return sum(self._write(job, share, start, values) for share in job.shares)
        chunk = _Chunk(job, read, room, start, self._allow)
        sums = chunk.sums()
        return sum(
            self._write(job, share, start, chunk.finish(share, total))
            for share, total in zip(job.shares, sums, strict=True)
        )

    def _write(self, job: Job, share: Share, start: int, values: AnyArray) -> int:
        data = bytes_of(values)
        sink = self._sinks[share.output]
        for target in share.targets:
            sink.write(target + start * job.dtype.itemsize, data)
        for place in share.scattered:
            span, view = read_span(place.part, place.tensor)
            view[...] = values.reshape(view.shape)
            sink.write(place.tensor.offset, span.data)
        return len(data) * (len(share.targets) + len(share.scattered))

    def _do_strided(self, job: Job) -> int:
        """A tensor that is not contiguous everywhere: slabs across its widest stride.

        The slabs are contiguous, or nearly so, in the (first) input; the results are held whole.
        """
        like = job.inputs[0].tensor
        if job.copy:
            values = np.ascontiguousarray(read_view(job.inputs[0].part, like))
            return sum(self._write(job, share, 0, values) for share in job.shares)
        outs = [np.empty(like.shape, job.dtype.numpy) for _ in job.shares]
        axis = _widest(like)
        rows = max(1, CHUNK * like.shape[axis] // job.count)
        if any(_widest(entry.tensor) != axis for entry in job.inputs):
            # Slabs along one's widest stride cut across all of another's span: one slab, then.
            rows = like.shape[axis]
        for first in range(0, like.shape[axis], rows):
            place = (slice(None),) * axis + (slice(first, first + rows),)

            def read(entry: Input, first: int = first) -> AnyArray:
                return read_view(entry.part, _slab(entry.tensor, axis, first, first + rows))

            chunk = _Chunk(job, read, fresh(outs[0][place].shape), None, self._allow)
            for share, total, out in zip(job.shares, chunk.sums(), outs, strict=True):
                out[place] = chunk.finish(share, total)
        return sum(
            self._write(job, share, 0, out) for share, out in zip(job.shares, outs, strict=True)
        )


@dataclass(frozen=True)
class _Chunk:
    """A chunk of a job.

    Attributes:
        job: the job.
        read: gives an input's values in the chunk.
        room: gives uninitialised memory of the chunk's shape, by its purpose and dtype.
        start: its first element; None within a strided tensor.
        allow: let NaN and Inf of the inputs pass.
    """

    job: Job
    read: Read
    room: Room
    start: int | None
    allow: bool

    def sums(self) -> list[Sum]:
        """Read each input once, and add it to the sums that it is a part of: one for each share."""
        job, dtype = self.job, accumulator_dtype(self.job.dtype)
        narrow = format_of(job.inputs[0].tensor.dtype)
        sums = [Sum(self.room(f"sum {number}", dtype), narrow) for number in range(len(job.shares))]
        for number, entry in enumerate(job.inputs):
            takers: defaultdict[float, list[Sum]] = defaultdict(list)
            for share, total in zip(job.shares, sums, strict=True):
                if share.weights[number] != 0:
                    takers[share.weights[number]].append(total)
            if not takers:
                continue
            values, largest = self.read(entry), np.inf
            if narrow is not None:
                values, largest = narrow.widen(values, self.room("single", _FLOAT32))
            elif len(takers) > 1 or len(next(iter(takers.values()))) > 1:
                wide = self.room("wide", dtype)
                np.copyto(wide, values, casting="same_kind")
                values = wide
            # Averages over more and over fewer of the last checkpoints share many of their weights.
            for weight, several in takers.items():
                term = values
                if weight != 1:
                    term = np.multiply(values, weight, out=self.room("product", dtype), dtype=dtype)
                for total in several:
                    total.add(term, largest if weight == 1 else np.inf)
        return sums

    def finish(self, share: Share, total: Sum) -> AnyArray:
        """Divide a sum, round it and check it."""
        values = total.mean(share.divisor, self.job.dtype, self.room)
        if not all_finite(values, self.job.dtype, self.room):
            odd = nonfinite(values, self.job.dtype)
            values = np.array(values)
            values[odd] = self._settle(share, odd, values[odd])
        if share.nonnegative and (values < 0).any():
            element = self._element(values < 0, 0)
            raise BadValueError("the weights make this variance negative", self.job, element)
        return values

    def _settle(self, share: Share, odd: AnyArray, values: AnyArray) -> AnyArray:
        """What stands where the output is NaN or Inf, from what the inputs hold there.

        The same NaN or Inf in every input (a mask of -inf) stays as it is.
        """
        job = self.job
        used = [
            entry for entry, weight in zip(job.inputs, share.weights, strict=True) if weight != 0
        ]
        first = np.array(self.read(used[0])[odd])
        same = np.full(len(first), not share.one_of_several)
        culprit = np.where(np.isfinite(first), -1, 0)
        for number, entry in enumerate(used[1:], 1):
            other = self.read(entry)[odd]
            same &= (other == first) | (np.isnan(other) & np.isnan(first))
            culprit = np.where((culprit < 0) & ~np.isfinite(other), number, culprit)
        kept = rounded(
            first.astype(accumulator_dtype(job.dtype)),
            job.dtype,
            fresh(first.shape),
        )
        misfit = (culprit < 0) | (same & np.isinf(first) & np.isnan(kept))
        wrong = misfit if self.allow else misfit | ~same
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            element = self._element(odd, position)
            if misfit[position]:
                raise BadValueError(f"the average does not fit {job.dtype.name}", job, element)
            entry = used[culprit[position]]
            raise BadValueError(f"is {self.read(entry)[odd][position]}", job, element, entry.part)
        return np.where(same, kept, values)

    def _element(self, where: AnyArray, position: int) -> int | None:
        """Which element of the job the n-th marked one is."""
        return None if self.start is None else self.start + int(np.flatnonzero(where)[position])


def _widest(tensor: Tensor) -> int:
    """The axis along which neighbours are farthest apart in the file."""
    strides = tensor.element_strides
    return max(range(len(strides)), key=lambda axis: (tensor.shape[axis] > 1, strides[axis]))


def _slab(tensor: Tensor, axis: int, first: int, last: int) -> Tensor:
    """The part of a tensor from `first` to `last` along an axis."""
    strides = tensor.element_strides
    size = min(last, tensor.shape[axis]) - first
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    offset = tensor.offset + first * strides[axis] * tensor.dtype.itemsize
    return Tensor(tensor.dtype, shape, tensor.part, offset, strides)
