"""Read what `torch.save` writes since 1.6: a zip of stored records, one of them a pickle.

https://docs.pytorch.org/docs/stable/notes/serialization.html. The pickle is read as data (see
`unpickler`), and storages by offset, only those of the state dict that is wanted.
"""

from __future__ import annotations

import hashlib
import zipfile
from typing import TYPE_CHECKING, BinaryIO, cast

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats import budget, unpickler
from ckptavg.formats.checkpoint import PROVENANCE, Checkpoint
from ckptavg.formats.parts import SourceStream
from ckptavg.formats.torchpickle import big_endian, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from ckptavg.formats.parts import Part
    from ckptavg.formats.statedict import Key

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".pyth")
_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = 30  # bytes
_LARGEST_DIRECTORY = 16 << 20  # 300,000 records; they take ten times that in memory


def matches(path: Path, head: bytes) -> bool:  # noqa: ARG001 - the formats' common signature
    """Whether the file begins as a zip does."""
    return head.startswith(_MAGIC)


def open_checkpoint(file: Part, key: Key) -> Checkpoint:
    """Describe one state dict of a torch file, or several."""
    archive = Archive(file)
    pickled = archive.content("data.pkl")
    root = unpickler.load(pickled, file.path)
    digest = hashlib.sha256(pickled).hexdigest()
    provenance = archive.content(PROVENANCE)
    metadata = {PROVENANCE: provenance.decode(errors="replace")} if provenance else {}
    return describe(archive, root, key, digest, metadata)


class Archive:
    """A torch zip.

    Attributes:
        prefix: the folder that all records are in, with its slash.
        records: name to entry of the central directory, in its order.
        directory_start: where the central directory begins.

    Raises:
        FormatError: torch could not read it on this machine.
    """

    def __init__(self, file: Part) -> None:
        try:
            stream = SourceStream(file, _LARGEST_DIRECTORY, "zip directory")
            with zipfile.ZipFile(cast("BinaryIO", stream)) as directory:
                entries, self.directory_start = directory.infolist(), directory.start_dir
        except CkptAvgError:
            raise
        except Exception as error:  # damaged bytes can make the zip reader raise anything
            message = f"its zip directory is damaged ({printable(error)}): truncated?"
            raise FormatError(message, path=file.path) from error
        self.file, self.records = file, {entry.filename: entry for entry in entries}
        if len(self.records) != len(entries):
            raise FormatError("has two records of the same name", path=file.path)
        for name in self.records:
            if name.startswith("/") or ".." in name.split("/"):
                raise FormatError(f"has a record with the path {printable(name)}", path=file.path)
        _refuse_programs(file.path, self.records)
        at_top = (name for name in self.records if name.count("/") == 1)
        folders = [name.removesuffix("data.pkl") for name in at_top if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise FormatError("is a zip, but not a torch checkpoint", path=file.path)
        [self.prefix] = folders
        if self.content("byteorder") not in (b"", b"little"):
            raise big_endian(file.path)

    def content(self, name: str) -> bytes:
        """Read a small record in the folder; no bytes if there is none of that name."""
        if self.prefix + name not in self.records:
            return b""
        [(start, size)] = self.places({self.prefix + name: None}).values()
        if size > budget.LARGEST_PICKLE:
            raise FormatError(f"record {name} has {size} bytes", path=self.file.path)
        return self.file.read(start, size)

    def load(self) -> object:
        """Read what the pickle describes, out of inert parts."""
        return unpickler.load(self.content("data.pkl"), self.file.path)

    def storages(self, users: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """Find storages; see `Container`."""
        folder = f"{self.prefix}data/"
        names = {folder + key: tensor for key, tensor in users.items()}
        present = {name: tensor for name, tensor in names.items() if name in self.records}
        return {name[len(folder) :]: place for name, place in self.places(present).items()}

    def places(self, users: Mapping[str, str | None]) -> dict[str, tuple[int, int]]:
        """Find where records begin in the file, and their bytes, by their full names."""

        def fault(name: str, problem: str) -> FormatError:
            message = f"record {printable(name.removeprefix(self.prefix))} {problem}"
            return FormatError(message, path=self.file.path, tensor=users[name])

        for name in users:
            entry = self.records[name]
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise fault(name, "is compressed or encrypted, as torch never does: save it again")
            if not 0 <= entry.header_offset <= self.file.size - _LOCAL_HEADER:
                raise fault(name, "is not where the zip's directory says")
        starts = [self.records[name].header_offset for name in users]
        headers = self.file.read_many([(start, _LOCAL_HEADER) for start in starts])
        places = {}
        for name, start, header in zip(users, starts, headers, strict=True):
            skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            begin, size = start + _LOCAL_HEADER + skip, self.records[name].file_size
            if not header.startswith(_MAGIC) or begin + size > self.file.size:
                raise fault(name, "is not where the zip's directory says")
            places[name] = (begin, size)
        return places


def _refuse_programs(path: Path, records: Collection[str]) -> None:
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
    remedy = "save the model's state_dict() instead"
    raise FormatError(f"is {kind}, not a checkpoint", path=path, remedy=remedy)
