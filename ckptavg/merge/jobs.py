"""What the engine does: bytes of the outputs, and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.errors import CkptAvgError
from ckptavg.formats.tensors import BY_NAME, Tensor
from ckptavg.merge.gathered import Gathered

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    """A tensor's bytes in one checkpoint.

    Attributes:
        part: the file.
        tensor: dtype, shape and place of the (first) tensor.
    """

    part: Part
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """What one of the outputs takes of the inputs: `sum(weights[i] * inputs[i]) / divisor`.

    Attributes:
        weights: one for each input; those with 0 are no part of it.
        divisor: of the weighted sum.
        targets: offsets in the output at which the result is written.
        output: which of the outputs.
        scattered: further places, in which it is not contiguous.
        nonnegative: negative results are an error (variances under negative weights).
        one_of_several: it is one checkpoint's of several, so that NaN and Inf in it do not stand
            in every one.
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
    """Bytes of the outputs, and the inputs that they are made of, each of which is read once.

    Attributes:
        inputs: what is averaged; for a copy, the one that is copied.
        count: elements; a run of neighbouring tensors counts as one.
        copy: the input's bytes are the outputs'.
        dtype: element type of the outputs.
        shares: one for each output.
        number: of the first tensor, for whoever must name one.
    """

    inputs: tuple[Input, ...]
    count: int
    copy: bool
    dtype: DType
    shares: tuple[Share, ...]
    number: int

    @property
    def strided(self) -> bool:
        """Whether an input or a place is not contiguous, so that it goes tensor by tensor."""
        return any(share.scattered for share in self.shares) or any(
            entry.tensor.strides is not None for entry in self.inputs
        )

    @staticmethod
    def copy_of(copied: Copy, output: int) -> Job:
        """The job that copies some bytes into an output."""
        entry = Input(copied.part, Tensor(_BYTE, (copied.size,), 0, copied.offset))
        share = Share((1.0,), 1.0, (copied.target,), output)
        return Job((entry,), copied.size, copy=True, dtype=_BYTE, shares=(share,), number=-1)


def _chunk_for(outputs: int) -> int:
    """Elements of a chunk of which each output has a sum: fewer for many, but worth the calls."""
    return max(_SMALLEST_CHUNK, min(_CHUNK_OF_SEVERAL, _SUMS // outputs))


def chunks(jobs: Iterator[Job]) -> Iterator[tuple[Job, int, int]]:
    """Cut the jobs into chunks that stay in a core's cache: job, first element, elements."""
    for job in jobs:
        # Each output has a sum of its own.
        size = CHUNK if len(job.shares) == 1 else _chunk_for(len(job.shares))
        if isinstance(job.inputs[0].part, Gathered):
            size *= 2  # each chunk goes through much of the files
        if job.strided:
            yield job, 0, job.count
        else:
            for start in range(0, job.count, size):
                yield job, start, min(size, job.count - start)


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
