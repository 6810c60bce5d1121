"""The work of the engine: bytes of the outputs, and the inputs that they are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.errors import CkptAvgError
from ckptavg.formats.tensors import BY_NAME, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptavg.formats.parts import Part
    from ckptavg.formats.tensors import DType
    from ckptavg.merge.layout import Copy, Scattered

CHUNK = 256 * 1024
"""Elements of a chunk: 1 MiB of float32, and a sum of 2 MiB."""

_CHUNK_OF_SEVERAL, _SMALLEST_CHUNK = 64 * 1024, 16 * 1024
_SUMS = 1024 * 1024
_BYTE = BY_NAME["uint8"]


@dataclass(frozen=True, slots=True)
class Input:
    """The bytes of a tensor, or of neighbouring tensors, in one checkpoint.

    Attributes:
        part: the file.
        tensor: dtype, shape and place of the (first) tensor.
    """

    part: Part
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Combination:
    """What one output computes from the inputs: `sum(weights[i] * inputs[i]) / divisor`.

    Attributes:
        weights: one for each input; an input with weight 0 has no part in it.
        divisor: of the weighted sum.
        targets: offsets in the output at which the result is written.
        output: the number of the output.
        scattered: further places of the result, in which it is not contiguous.
        nonnegative: negative results are an error (variances under negative weights).
        one_of_several: the input is one of several checkpoints, so NaN and Inf in it need not
            stand in all of them.
    """

    weights: tuple[float, ...]
    divisor: float
    targets: tuple[int, ...]
    output: int = 0
    scattered: tuple[Scattered, ...] = ()
    nonnegative: bool = False
    one_of_several: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """Bytes of the outputs, and the inputs that they are computed from. Each input is read once.

    Attributes:
        inputs: what is averaged, or the one input that is copied.
        count: elements; neighbouring tensors count as one.
        copy: the outputs' bytes are those of the input.
        dtype: element type of the outputs.
        combinations: one for each output.
        number: the position of the first tensor in the plan, for error messages.
    """

    inputs: tuple[Input, ...]
    count: int
    copy: bool
    dtype: DType
    combinations: tuple[Combination, ...]
    number: int

    @property
    def strided(self) -> bool:
        """Whether an input or a target is not contiguous, so that the job is one tensor."""
        return any(combination.scattered for combination in self.combinations) or any(
            entry.tensor.strides is not None for entry in self.inputs
        )

    def is_continued_by(self, other: Job) -> bool:
        """Whether another job does the same with the bytes behind this one's, in all files."""
        if (
            (self.dtype, self.copy, len(self.inputs), len(self.combinations))
            != (other.dtype, other.copy, len(other.inputs), len(other.combinations))
            or self.strided
            or other.strided
        ):  # fmt: skip
            return False
        for mine, theirs in zip(self.inputs, other.inputs, strict=True):
            if mine.part is not theirs.part or mine.tensor.dtype is not theirs.tensor.dtype:
                return False
            end = mine.tensor.offset + self.count * mine.tensor.dtype.itemsize
            if theirs.tensor.offset != end:
                return False
        size = self.count * self.dtype.itemsize
        return all(
            len(mine.targets) == 1
            and theirs.targets == (mine.targets[0] + size,)
            and (mine.weights, mine.divisor, mine.output, mine.nonnegative, mine.one_of_several)
            == (theirs.weights, theirs.divisor, theirs.output, theirs.nonnegative,
                theirs.one_of_several)
            for mine, theirs in zip(self.combinations, other.combinations, strict=True)
        )  # fmt: skip

    @staticmethod
    def copy_of(copied: Copy, output: int) -> Job:
        """The job that copies bytes from a file into an output."""
        entry = Input(copied.part, Tensor(_BYTE, (copied.size,), 0, copied.offset))
        combination = Combination((1.0,), 1.0, (copied.target,), output)
        return Job(
            (entry,), copied.size, copy=True, dtype=_BYTE, combinations=(combination,), number=-1
        )


def chunks(jobs: Iterable[Job]) -> Iterator[tuple[Job, int, int]]:
    """Cut the jobs into chunks that stay in a core's cache: job, first element, elements."""
    for job in jobs:
        if job.strided:
            yield job, 0, job.count
            continue
        outputs = len(job.combinations)
        size = CHUNK
        if outputs > 1:  # each output has a sum of its own
            size = max(_SMALLEST_CHUNK, min(_CHUNK_OF_SEVERAL, _SUMS // outputs))
        for start in range(0, job.count, size):
            yield job, start, min(size, job.count - start)


class BadValueError(CkptAvgError):
    """A value that must not be in the output. The caller knows the name of its tensor.

    Attributes:
        number: the position of the job's first tensor in the plan.
        element: the element of the job; None in a strided tensor.
        path: the file of the input that has the value, if an input has it.
    """

    def __init__(
        self, message: str, job: Job, element: int | None, part: Part | None = None
    ) -> None:
        super().__init__(message, path=part.path if part else None)
        self.number, self.element = job.number, element
