"""An average made again, and held against the one that is there instead of written."""

from __future__ import annotations

import bisect
import contextlib
import threading
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import CkptAvgError, VerificationError
from ckptavg.formats.checkpoint import Checkpoint, read_view
from ckptavg.formats.tensors import bytes_of
from ckptavg.merge.engine import execute
from ckptavg.merge.jobs import BadValueError
from ckptavg.merge.layout import Layout

if TYPE_CHECKING:
    from ckptavg.formats.tensors import AnyArray
    from ckptavg.merge.plan import Plan
    from ckptavg.write.writing import Progress


class Comparison:
    """What the engine writes into: nothing is written, but compared with what is there.

    The tensors' bytes count one after the other; those of tied ones that are there in several
    places, once for each.

    Args:
        made: the average that is there. It has the plan's tensors.
        plan: how it was made.
        remedy: what to say where it differs.
    """

    def __init__(self, made: Checkpoint, plan: Plan, *, remedy: str | None) -> None:
        self._made, self._plan, self._remedy = made, plan, remedy
        self._names: list[str] = []
        self._begins: list[int] = []
        targets, end = [], 0
        for one in plan.outputs:
            places = dict.fromkeys(name for name in one.names if name in made.tensors)
            distinct = {made.tensors[name]: name for name in reversed(places)}
            targets.append(tuple(end + one.nbytes * place for place in range(len(distinct))))
            self._names += distinct.values()
            self._begins += targets[-1]
            end += one.nbytes * len(distinct)
        self._layout, self._size = Layout({}, tuple(targets)), end
        self._turn = threading.Lock()
        self._differs: tuple[int, str, str] | None = None
        self._strided: tuple[str, AnyArray] | None = None

    def run(self, threads: int, progress: Progress | None) -> None:
        """Compare all of it.

        Raises:
            VerificationError: the first tensor that differs.
        """
        jobs = self._plan.jobs([self._layout])
        steps = execute(jobs, [self], threads, allow_nonfinite=True)
        with contextlib.closing(steps):
            try:
                for done in steps:
                    if progress is not None:
                        progress(done, self._size)
            except BadValueError as error:
                raise self._plan.name_of(error) from error
            except _DiffersError:
                # Of the chunks that were under way, the first.
                assert self._differs is not None  # noqa: S101
                _, name, what = self._differs
                raise VerificationError(
                    what, path=self._made.path, tensor=name, remedy=self._remedy
                ) from None
        for checkpoint in (self._made, *(source.checkpoint for source in self._plan.used)):
            for part in checkpoint.parts:
                part.check_unchanged()

    def write(self, offset: int, data: memoryview) -> None:
        """Compare bytes with those that are there."""
        number = bisect.bisect_right(self._begins, offset) - 1
        while len(data):
            name, begin = self._names[number], self._begins[number]
            size = min(len(data), self._made.tensors[name].nbytes - (offset - begin))
            if size:
                self._compare(name, offset - begin, data[:size])
                offset, data = offset + size, data[size:]
            number += 1

    def _compare(self, name: str, start: int, wanted: memoryview) -> None:
        found = self._read(name, start, len(wanted))
        differs = np.flatnonzero(found != np.frombuffer(wanted, np.uint8))
        if not len(differs):
            return
        dtype = self._made.tensors[name].dtype
        element = (start + int(differs[0])) // dtype.itemsize
        at = element * dtype.itemsize - start
        have, give = (
            np.frombuffer(data, np.uint8)[at : at + dtype.itemsize].view(dtype.numpy)[0]
            for data in (found, wanted)
        )
        if str(have) == str(give):  # NaN of two kinds
            have, give = have.tobytes().hex(), give.tobytes().hex()
        what = f"element {element} is {have}, and its checkpoints give {give}"
        place = self._begins[self._names.index(name)] + start + int(differs[0])
        with self._turn:
            if self._differs is None or place < self._differs[0]:
                self._differs = place, name, what
        raise _DiffersError("differs")

    def _read(self, name: str, start: int, size: int) -> AnyArray:
        tensor = self._made.tensors[name]
        part = self._made.parts[tensor.part]
        if tensor.strides is None:
            out = np.empty(size, np.uint8)
            part.read_into(tensor.offset + start, out.data)
            return out
        with self._turn:
            if self._strided is None or self._strided[0] != name:
                whole = np.ascontiguousarray(read_view(part, tensor))
                self._strided = name, np.asarray(bytes_of(whole))
            return self._strided[1][start : start + size]


class _DiffersError(CkptAvgError):
    """Stops the engine."""
