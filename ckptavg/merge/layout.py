"""The layout of an output: where the bytes of each tensor go, and what stands around them."""

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
    """What a file has beside its tensors.

    Attributes:
        size: bytes of the file, tensors included.
        blobs: the bytes around the tensors, each with its offset.
        checksums: the checksums to fill in at the end.
    """

    size: int
    blobs: tuple[tuple[int, bytes], ...] = ()
    checksums: tuple[Checksum, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that are copied from a file into the output.

    Attributes:
        part: the file.
        offset: offset of the first byte in the file.
        size: the number of bytes.
        target: offset of the first byte in the output.
    """

    part: Part
    offset: int
    size: int
    target: int


@dataclass(frozen=True, slots=True)
class Scattered:
    """A strided tensor in the output, whose elements stand apart as in the checkpoint's file.

    Attributes:
        part: the checkpoint's file, which has the bytes between the elements.
        tensor: dtype, shape, offset and strides: the same in that file and in the output.
    """

    part: Part
    tensor: Tensor


@dataclass(frozen=True)
class Layout:
    """An output without its tensors: a file, or a directory of files.

    Offsets count through all the files, one after the other.

    Attributes:
        files: the layout of each file by name; an output that is one file has the name `""`.
        targets: for each tensor, the offsets at which its bytes are written.
        copies: bytes that are copied from other files.
        scattered: for tensors by their number, further places where they are strided.
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
