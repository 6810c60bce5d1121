"""Read what `torch.save` writes since 1.6: a zip of stored records, one of them a pickle.

https://docs.pytorch.org/docs/stable/notes/serialization.html. The pickle is read as data (see
`unpickler`), the storages by offset and only those of the state dict that is wanted.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ckptavg.checkpoint import PROVENANCE, Checkpoint, span_elements
from ckptavg.errors import CkptAvgError, FormatError, SelectionError, printable
from ckptavg.formats import unpickler
from ckptavg.formats.pickled import PickledTensor, Placeholder, UnreadableTensor
from ckptavg.formats.shapes import is_possible
from ckptavg.formats.statedict import choose, find_state_dicts, training_facts
from ckptavg.tensors import Tensor, is_contiguous

if TYPE_CHECKING:
    from ckptavg.parts import File

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = 30
_LARGEST_DIRECTORY = 64 << 20  # half a million records; they take ten times that in memory
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled


def matches(file: File, head: bytes) -> bool:  # noqa: ARG001 - the formats' common signature
    """Whether the file begins as a zip does."""
    return head.startswith(_ZIP)


def is_legacy(head: bytes) -> bool:
    """Whether the file was saved by torch before 1.6 (or by its legacy writer)."""
    return head[2:].startswith(_LEGACY[: len(head) - 2]) and head.startswith(b"\x80")


def open_checkpoint(file: File, key: str | None) -> Checkpoint:
    """Describe one state dict of a torch file.

    Raises:
        FormatError: the archive or its pickle is damaged, or holds what cannot be averaged.
        SelectionError: which state dict is wanted is unclear.
    """
    archive = _Archive.read(file)
    pickled = archive.content("data.pkl")
    try:
        root = unpickler.load(pickled)
    except unpickler.PickleError as error:
        raise FormatError(str(error), path=file.path) from error
    if isinstance(root, Placeholder):
        raise SelectionError(
            f"holds a whole {printable(root.origin)} object, no state dict",
            path=file.path,
            remedy="load it where its class can be imported, and save its state_dict()",
        )
    found = find_state_dicts(root)
    taken = choose(file.path, found, key)
    entries = found[taken]
    located = {
        name: _locate(archive, name, value)
        for name, value in entries.items()
        if isinstance(value, PickledTensor | UnreadableTensor)
    }
    return Checkpoint(
        path=file.path,
        container="torch",
        parts=(file,),
        tensors=dict(sorted(located.items(), key=lambda item: item[1].offset)),
        metadata=archive.metadata(),
        digest=hashlib.sha256(pickled).hexdigest(),
        facts=training_facts(root),
        key=taken,
        other_keys=tuple(name for name in found if name != taken),
        other_content=bool(taken),
        other_entries=tuple(name for name in entries if name not in located),
        module_versions=_module_versions(entries),
    )


def _module_versions(entries: Mapping[str, object]) -> Mapping[str, Any] | None:
    versions = getattr(entries, "module_versions", None)
    if not isinstance(versions, Mapping):
        return None
    return {
        module: facts
        for module, facts in versions.items()
        if isinstance(module, str) and isinstance(facts, Mapping)
    }


def _locate(archive: _Archive, name: str, value: PickledTensor | UnreadableTensor) -> Tensor:
    """Where a tensor's bytes are in the file, checked against the size of their record."""
    path = archive.file.path
    if isinstance(value, UnreadableTensor):
        raise FormatError(f"cannot be averaged: {value.reason}", path=path, tensor=name)
    numbers = (value.offset, *value.shape, *value.strides)
    if (
        len(value.shape) != len(value.strides)
        or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        or not is_possible(value.shape, 8 * value.dtype.itemsize)
    ):
        raise FormatError("has no valid shape and strides", path=path, tensor=name)
    itemsize = value.dtype.itemsize
    start, size = archive.record(f"data/{value.storage.key}", tensor=name)
    if (value.offset + span_elements(value.shape, value.strides)) * itemsize > size:
        raise FormatError(f"reaches beyond its storage of {size} bytes", path=path, tensor=name)
    strides = None if is_contiguous(value.shape, value.strides) else value.strides
    shape = value.shape
    if value.dtype.kind == "packed":
        if strides is not None or not shape:
            raise FormatError("is packed and not contiguous", path=path, tensor=name)
        # torch counts bytes, safetensors (and so we) the elements in them.
        shape = (*shape[:-1], shape[-1] * 8 // value.dtype.bits)
    return Tensor(value.dtype, shape, 0, start + value.offset * itemsize, strides)


@dataclass(frozen=True)
class _Archive:
    """The records of a torch zip.

    Attributes:
        file: the zip.
        prefix: the folder in it that all records are in, with its slash.
        records: name to entry of the central directory.
    """

    file: File
    prefix: str
    records: dict[str, zipfile.ZipInfo]

    @staticmethod
    def read(file: File) -> _Archive:
        """Read the central directory."""
        try:
            with zipfile.ZipFile(cast("BinaryIO", _Stream(file))) as archive:
                entries = archive.infolist()
        except CkptAvgError:
            raise
        # Whatever bytes can make the zip reader trip over.
        except Exception as error:
            raise FormatError(
                f"its zip directory is damaged ({printable(error)}): truncated?", path=file.path
            ) from error
        records = {entry.filename: entry for entry in entries}
        if len(records) != len(entries):
            raise FormatError("has two records of one name", path=file.path)
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise FormatError("is a zip, but no torch checkpoint", path=file.path)
        opened = _Archive(file, pickles[0].removesuffix("data.pkl"), records)
        opened.check_kind()
        return opened

    def check_kind(self) -> None:
        """Refuse what is no state dict: programs, and other machines' byte order."""
        path = self.file.path
        if f"{self.prefix}constants.pkl" in self.records:
            raise FormatError(
                "is a TorchScript program",
                path=path,
                remedy="save the model's state_dict() instead",
            )
        if f"{self.prefix}byteorder" in self.records and self.content("byteorder") != b"little":
            raise FormatError(
                "was saved on a big-endian machine",
                path=path,
                remedy="load it and save it again on a little-endian one",
            )

    def record(self, name: str, tensor: str | None = None) -> tuple[int, int]:
        """Where a record's bytes are in the file, and how many."""
        path = self.file.path
        entry = self.records.get(self.prefix + name)
        label = printable(name)
        if entry is None:
            raise FormatError(f"record {label} is missing", path=path, tensor=tensor)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise FormatError(
                f"record {label} is compressed or encrypted, as torch never writes it",
                path=path,
                tensor=tensor,
            )
        header = b""
        if 0 <= entry.header_offset <= self.file.size - _LOCAL_HEADER:
            header = self.file.read(entry.header_offset, _LOCAL_HEADER)
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + skip
        if not header.startswith(_ZIP) or start + entry.file_size > self.file.size:
            raise FormatError(
                f"record {label} is not where the zip's directory says", path=path, tensor=tensor
            )
        return start, entry.file_size

    def content(self, name: str) -> bytes:
        """The bytes of a small record."""
        start, size = self.record(name)
        if size > unpickler.LARGEST_PICKLE:
            raise FormatError(f"record {name} has {size} bytes", path=self.file.path)
        return self.file.read(start, size)

    def metadata(self) -> dict[str, str]:
        """Our provenance, where this tool wrote the file."""
        if self.prefix + PROVENANCE not in self.records:
            return {}
        return {PROVENANCE: self.content(PROVENANCE).decode(errors="replace")}


class _Stream:
    """A `File` as the seekable stream that `zipfile` wants."""

    def __init__(self, file: File) -> None:
        self._file, self._position = file, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._file.size)[whence]
        if base + offset < 0:
            raise OSError("before the start of the file")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._position)
        size = left if size < 0 else min(size, left)
        if size > _LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        data = self._file.read(self._position, size)
        self._position += size
        return data
