"""Jobs for the engine: which bytes of the outputs are computed from which inputs.

A layout says where the bytes of each tensor go, before the first of them is written.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from ckptavg.errors import CkptAvgError
from ckptavg.formats.paths import is_remote
from ckptavg.formats.tensors import BY_NAME, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from ckptavg.formats.parts import Part
    from ckptavg.formats.tensors import DType


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output.

    Attributes:
        names: its names; several if tensors are tied.
        dtype: its element type.
        shape: its sizes in all dimensions.
        nbytes: bytes of its elements.
    """

    names: tuple[str, ...]
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checksum:
    """The CRC-32 of a record of a zip file, which is known when the record has been written.

    Attributes:
        start: offset of the record's bytes.
        size: the number of the record's bytes.
        targets: offsets at which the checksum is written, as four little-endian bytes.
    """

    start: int
    size: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of a file: its size, and the bytes that stand beside its tensors.

    Attributes:
        size: bytes of the file, tensors included.
        blobs: the bytes around the tensors, each with its offset.
        checksums: the checksums to fill in at the end.
    """

    size: int
    blobs: tuple[tuple[int, bytes], ...] = ()
    checksums: tuple[Checksum, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, or neighbouring tensors, in the part that holds the bytes.

    Attributes:
        part: a file, or what stands for one.
        tensor: dtype, shape, offset and strides of the first tensor.
    """

    part: Part
    tensor: Tensor

    @staticmethod
    def of_bytes(part: Part, offset: int, size: int) -> StoredTensor:
        """Bytes from an offset on, as a tensor of uint8."""
        return StoredTensor(part, Tensor(BY_NAME["uint8"], (size,), 0, offset))


@dataclass(frozen=True)
class Layout:
    """An output without its tensors: a file, or a directory of files.

    Offsets count through all the files, one after the other.

    Attributes:
        path: the file or directory.
        files: the layout of each file by name; an output that is one file has the name `""`.
        targets: for each tensor, the offsets at which its bytes are written.
        copies: what is copied from other files, and the offset at which it is written.
        scattered: for tensors by their number, further places where they are strided: a part that
            has the bytes between the elements, and the same offset and strides as in the output.
    """

    path: Path
    files: Mapping[str, FileLayout]
    targets: tuple[tuple[int, ...], ...]
    copies: tuple[tuple[StoredTensor, int], ...] = ()
    scattered: Mapping[int, tuple[StoredTensor, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def bases(self) -> list[int]:
        """The offset at which each of the files begins."""
        return list(accumulate((file.size for file in self.files.values()), initial=0))[:-1]

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory of files."""
        return "" not in self.files


CHUNK = 256 * 1024
"""Elements of a chunk: 1 MiB in float32, 2 MiB in float64."""

REMOTE = 4
"""A chunk of remote inputs is so many times as large: each is a request."""

_CHUNK_OF_SEVERAL, _SMALLEST_CHUNK = 64 * 1024, 16 * 1024
_SUMS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Mean:
    """What one output computes from the inputs: `sum(weights[i] * inputs[i]) / divisor`.

    Attributes:
        weights: one for each input; an input with weight 0 is not read.
        divisor: the divisor of the weighted sum.
        targets: offsets in the output at which the result is written.
        output: the number of the output.
        scattered: further places of the result in the output, where it is strided.
        nonnegative: whether negative results are an error (variances under negative weights).
        must_be_finite: whether NaN and Inf of all inputs are an error too. The only input is then
            one of several checkpoints, and the others may have finite values.
    """

    weights: tuple[float, ...]
    divisor: float
    targets: tuple[int, ...]
    output: int = 0
    scattered: tuple[StoredTensor, ...] = ()
    nonnegative: bool = False
    must_be_finite: bool = False


@dataclass(frozen=True)
class Job:
    """What all outputs compute from the same inputs, each of which is read once.

    Attributes:
        inputs: the inputs of the mean, or the one that is copied.
        count: the number of elements, of all tensors that are neighbours.
        copy: whether the outputs' bytes are those of the input.
        dtype: the element type of the outputs.
        means: one for each output.
        number: the position of the first tensor in the plan, for error messages.
    """

    inputs: tuple[StoredTensor, ...]
    count: int
    copy: bool
    dtype: DType
    means: tuple[Mean, ...]
    number: int

    @cached_property
    def terms(self) -> list[tuple[StoredTensor, list[tuple[float, list[int]]]]]:
        """The inputs that count, each with its weights and the numbers of the means that have them.

        Averages of the last 5 and the last 10 checkpoints share weights: these multiply once.
        """
        terms = []
        for number, entry in enumerate(self.inputs):
            means_by_weight: defaultdict[float, list[int]] = defaultdict(list)
            for place, mean in enumerate(self.means):
                if mean.weights[number] != 0:
                    means_by_weight[mean.weights[number]].append(place)
            if means_by_weight:
                terms.append((entry, [*means_by_weight.items()]))
        return terms

    @property
    def strided(self) -> bool:
        """Whether an input or a result is strided. The job is then a single tensor."""
        return any(mean.scattered for mean in self.means) or any(
            entry.tensor.strides is not None for entry in self.inputs
        )

    @staticmethod
    def copy_of(copied: StoredTensor, target: int, output: int) -> Job:
        """The job that copies what a file has to an offset in an output."""
        dtype = copied.tensor.dtype
        count = copied.tensor.nbytes // dtype.itemsize
        mean = Mean((1.0,), 1.0, (target,), output)
        return Job((copied,), count, copy=True, dtype=dtype, means=(mean,), number=-1)


def chunks(jobs: Iterable[Job]) -> Iterator[tuple[Job, int, int]]:
    """Cut jobs into chunks that fit a core's cache: job, first element, number of elements.

    Those of remote inputs are larger.
    """
    for job in jobs:
        if job.strided:
            yield job, 0, job.count
            continue
        outputs = len(job.means)
        size = CHUNK
        if outputs > 1:  # each output has a sum of its own
            size = max(_SMALLEST_CHUNK, min(_CHUNK_OF_SEVERAL, _SUMS // outputs))
        if any(is_remote(entry.part.path) for entry in job.inputs):
            size *= REMOTE
        for start in range(0, job.count, size):
            yield job, start, min(size, job.count - start)


class BadValueError(CkptAvgError):
    """A value that must not be in the output. `Plan.explain` adds the name of its tensor.

    Attributes:
        number: the position of the job's first tensor in the plan.
        element: the index of the value in the job; None in a strided tensor.
        path: the file that has the value; None if it comes from the computation.
    """

    def __init__(
        self, message: str, job: Job, element: int | None, part: Part | None = None
    ) -> None:
        super().__init__(message, path=part.path if part else None)
        self.number, self.element = job.number, element
