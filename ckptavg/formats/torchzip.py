"""Read what `torch.save` writes since 1.6: a zip of stored records, one of them a pickle.

https://docs.pytorch.org/docs/stable/notes/serialization.html. The pickle is read as data (see
`unpickler`), the storages by offset and only those of the state dict that is wanted.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats import unpickler
from ckptavg.formats.checkpoint import PROVENANCE, Checkpoint
from ckptavg.formats.streams import SourceStream
from ckptavg.formats.torchpickle import describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.parts import ByteSource

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = 30
_LARGEST_DIRECTORY = 64 << 20  # half a million records; they take ten times that in memory


def matches(path: Path, head: bytes) -> bool:  # noqa: ARG001 - the formats' common signature
    """Whether the file begins as a zip does."""
    return head.startswith(_ZIP)


def open_checkpoint(file: ByteSource, key: str | None) -> Checkpoint:
    """Describe one state dict of a torch file.

    Raises:
        FormatError: the archive or its pickle is damaged, or holds what cannot be averaged.
        SelectionError: which state dict is wanted is unclear.
    """
    archive = Archive.read(file)
    pickled = archive.content("data.pkl")
    return describe(
        archive.file,
        archive.unpickle(pickled),
        key,
        archive.storages,
        digest=hashlib.sha256(pickled).hexdigest(),
        metadata=archive.metadata(),
    )


@dataclass(frozen=True)
class Archive:
    """The records of a torch zip.

    Attributes:
        file: the zip.
        prefix: the folder in it that all records are in, with its slash.
        records: name to entry of the central directory, in its order.
        directory_start: where the central directory begins.
    """

    file: ByteSource
    prefix: str
    records: dict[str, zipfile.ZipInfo]
    directory_start: int

    @staticmethod
    def read(file: ByteSource) -> Archive:
        """Read the central directory."""
        try:
            stream = SourceStream(file, _LARGEST_DIRECTORY, "zip directory")
            with zipfile.ZipFile(cast("BinaryIO", stream)) as archive:
                entries, directory_start = archive.infolist(), archive.start_dir
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
        for name in records:
            if name.startswith("/") or ".." in name.split("/"):
                raise FormatError(f"has a record outside: {printable(name)}", path=file.path)
        _refuse_programs(file.path, records)
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise FormatError("is a zip, but no torch checkpoint", path=file.path)
        prefix = pickles[0].removesuffix("data.pkl")
        opened = Archive(file, prefix, records, directory_start)
        opened.check_kind()
        return opened

    def check_kind(self) -> None:
        """Refuse other machines' byte order."""
        path = self.file.path
        if f"{self.prefix}byteorder" in self.records and self.content("byteorder") != b"little":
            raise FormatError(
                "was saved on a big-endian machine",
                path=path,
                remedy="load it and save it again on a little-endian one",
            )

    def storages(self, users: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """Where storages begin in the file, and their bytes; missing ones are left out.

        Args:
            users: their keys, and for each the name of a tensor in it.
        """
        entries = {key: self.records.get(f"{self.prefix}data/{key}") for key in users}
        present = {key: entry for key, entry in entries.items() if entry is not None}
        places = self._places([(entry, users[key]) for key, entry in present.items()])
        return dict(zip(present, places, strict=True))

    def places(self, names: Iterable[str]) -> list[tuple[int, int]]:
        """Where the bytes of records are, by their whole names: offset and size."""
        return self._places([(self.records[name], None) for name in names])

    def _places(
        self, entries: Sequence[tuple[zipfile.ZipInfo, str | None]]
    ) -> list[tuple[int, int]]:
        """Where records' bytes begin in the file, and how many there are."""
        for entry, user in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise self._fault(
                    entry,
                    user,
                    "is compressed or encrypted, as torch never writes it: load and save it anew",
                )
            if not 0 <= entry.header_offset <= self.file.size - _LOCAL_HEADER:
                raise self._fault(entry, user, "is not where the zip's directory says")
        headers = self.file.read_many(
            [(entry.header_offset, _LOCAL_HEADER) for entry, _ in entries]
        )
        places = []
        for (entry, user), header in zip(entries, headers, strict=True):
            skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            start = entry.header_offset + _LOCAL_HEADER + skip
            if not header.startswith(_ZIP) or start + entry.file_size > self.file.size:
                raise self._fault(entry, user, "is not where the zip's directory says")
            places.append((start, entry.file_size))
        return places

    def _fault(self, entry: zipfile.ZipInfo, tensor: str | None, what: str) -> FormatError:
        name = printable(entry.filename.removeprefix(self.prefix))
        return FormatError(f"record {name} {what}", path=self.file.path, tensor=tensor)

    def content(self, name: str) -> bytes:
        """The bytes of a small record."""
        [(start, size)] = self.places([self.prefix + name])
        if size > unpickler.LARGEST_PICKLE:
            raise FormatError(f"record {name} has {size} bytes", path=self.file.path)
        return self.file.read(start, size)

    def unpickle(self, pickled: bytes) -> object:
        """What a pickle describes, out of inert parts."""
        try:
            return unpickler.load(pickled)
        except unpickler.PickleError as error:
            raise FormatError(str(error), path=self.file.path) from error

    def metadata(self) -> dict[str, str]:
        """Our provenance, where this tool wrote the file."""
        if self.prefix + PROVENANCE not in self.records:
            return {}
        return {PROVENANCE: self.content(PROVENANCE).decode(errors="replace")}


def _refuse_programs(path: Path, records: Iterable[str]) -> None:
    """Refuse a model that was saved with its code and not as a state dict."""
    names = {name.rpartition("/")[2] for name in records if name.count("/") <= 1}
    if "archive_format" in names and any("/data/aotinductor/" in name for name in records):
        kind = "an AOTInductor package"
    elif names & {"archive_format", "serialized_exported_program.json"}:
        kind = "a torch.export program"
    elif names & {"constants.pkl", "model.json"}:
        kind = "a TorchScript program"
    else:
        return
    raise FormatError(
        f"is {kind}, not a checkpoint",
        path=path,
        remedy="save the model's state_dict() instead",
    )
