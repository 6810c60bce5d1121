"""Where each tensor's bytes go in an output file, known before the first of them is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptavg.tensors import DType


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output.

    Attributes:
        names: its name, and those of the tensors that are tied to it.
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
    """A record whose CRC-32 is known only when its tensor has been written.

    Attributes:
        start: where the record's bytes begin.
        size: how many there are.
        targets: where the checksum goes, as four little-endian bytes.
    """

    start: int
    size: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """An output file without its tensors.

    Attributes:
        size: bytes of the whole file.
        blobs: what stands around the tensors: offset and bytes.
        targets: for each tensor, the offsets at which its bytes are written.
        checksums: what is to be filled in at the end.
    """

    size: int
    blobs: tuple[tuple[int, bytes], ...]
    targets: tuple[tuple[int, ...], ...]
    checksums: tuple[Checksum, ...] = ()
