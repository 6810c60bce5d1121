"""Where the bytes of each tensor go in an output: known before the first of them is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptavg.formats.parts import Part
    from ckptavg.formats.tensors import DType, Tensor


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output.

    Attributes:
        names: its name, and the names of the tensors that are tied to it.
        dtype: element type in the output.
        shape: its dimensions.
        nbytes: bytes of its elements.
    """

    names: tuple[str, ...]
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checksum:
    """A record of a zip whose CRC-32 is known only when its bytes have been written.

    Attributes:
        start: where the record's bytes begin.
        size: how many there are.
        targets: where the checksum goes, as four little-endian bytes.
    """

    start: int
    size: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """An output file without its tensors.

    Attributes:
        size: bytes of the file, tensors included.
        blobs: the bytes around the tensors, each with its offset.
        checksums: to be filled in at the end.
    """

    size: int
    blobs: tuple[tuple[int, bytes], ...] = ()
    checksums: tuple[Checksum, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that are copied into the output.

    Attributes:
        part: the file that they are copied from.
        offset: of the first byte in that file.
        size: the number of bytes.
        target: of the first byte in the output.
    """

    part: Part
    offset: int
    size: int
    target: int


@dataclass(frozen=True, slots=True)
class Scattered:
    """A place in the output where a tensor is not contiguous, as in the checkpoint's file.

    Attributes:
        part: that file, which has the bytes between the tensor's elements.
        tensor: dtype, shape, offset and strides, the same in that file and in the output.
    """

    part: Part
    tensor: Tensor


@dataclass(frozen=True)
class Layout:
    """An output without its tensors: a file, or a directory of files.

    Offsets count through all the files, one after the other.

    Attributes:
        files: name to layout; the only one of an output that is a file has the name `""`.
        targets: for each tensor, the offsets at which its bytes are written.
        copies: bytes that are copied from other files.
        scattered: further places of tensors, by the position of the tensor.
    """

    files: Mapping[str, FileLayout]
    targets: tuple[tuple[int, ...], ...]
    copies: tuple[Copy, ...] = ()
    scattered: Mapping[int, tuple[Scattered, ...]] = field(default_factory=dict)

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
