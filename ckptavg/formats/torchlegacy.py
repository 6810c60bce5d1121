"""Read what `torch.save` wrote before 1.6: a stream of pickles, and the storages after them.

Torch still writes such files with `_use_new_zipfile_serialization=False`. The pickles are a magic
number, a version, facts of the machine, the object, and the keys of the storages. For each key
follow the number of its elements, int64, and the elements. The pickles are read as data (see
`unpickler`), and storages by offset, only those of the state dict that is wanted.
"""

from __future__ import annotations

import hashlib
import io
import re
from typing import TYPE_CHECKING, BinaryIO

from ckptavg.errors import FormatError, printable
from ckptavg.formats import budget, unpickler
from ckptavg.formats.budget import PickleError, refuse
from ckptavg.formats.parts import SourceStream
from ckptavg.formats.pickled import Placeholder, Storage
from ckptavg.formats.tensors import DType
from ckptavg.formats.torchpickle import big_endian, describe
from ckptavg.formats.unpickler import InertUnpickler

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.parts import Part
    from ckptavg.formats.statedict import Key

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".pyth")
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
# The pickle of the magic number: decimal in protocol 1, binary in the others, framed since 4.
_HEAD = re.compile(
    rb"L%dL\n\.|\x80[\2-\5](?:\x95.{8})?\x8a\n%s\."
    % (_MAGIC, re.escape(_MAGIC.to_bytes(10, "little"))),
    re.DOTALL,
)
_BUFFER = 64 << 10  # bytes read at a time: so many of the storages' may be read in vain
_COUNT = 8  # bytes of the number before a storage
_LARGEST_SIZE = 1 << 62
# Bytes of an element in storages whose types are no dtypes here.
_RAW_STORAGES = {
    "UntypedStorage": 1, "QInt8Storage": 1, "QUInt8Storage": 1, "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1, "QInt32Storage": 4,
}  # fmt: skip


def matches(path: Path, head: bytes) -> bool:  # noqa: ARG001 - the formats' common signature
    """Whether the file begins with the pickle of the magic number, of whatever protocol."""
    return _HEAD.match(head) is not None


def open_checkpoint(file: Part, key: Key) -> Checkpoint:
    """Describe one state dict of a torch file, or several."""
    legacy = LegacyFile(file)
    digest = hashlib.sha256(file.read(0, legacy.end)).hexdigest()
    return describe(legacy, legacy.root, key, digest, metadata={})


class LegacyUnpickler(InertUnpickler):
    """An unpickler that knows the persistent ids of these files.

    Attributes:
        storages: number and bytes of the elements, by key, in the order in which they come.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, tuple[int, int]] = {}

    def persistent_load(self, pid: object) -> object:
        """Return the storage or the module's class that a persistent id names."""
        self.budget.spend(calls=budget.CALLS_OF_STORAGE)
        match pid:
            case ("module", kind, _file, _source):
                return kind
            case ("storage", kind, str(key), _device, int(size), None):
                return self._storage(kind, key, size)
            case ("storage", _kind, str(), _device, int(), _view):
                refuse("a view of a storage")
        return refuse("an unknown persistent id")

    def _storage(self, kind: object, key: str, size: int) -> Storage:
        dtype = kind if isinstance(kind, DType) else None
        untyped = kind.origin.rpartition(".")[2] if isinstance(kind, Placeholder) else ""
        itemsize = dtype.itemsize if dtype else _RAW_STORAGES.get(untyped)
        if itemsize is None:
            refuse("a storage of an unknown type")
        if not 0 <= size < _LARGEST_SIZE:
            refuse("a storage of an impossible size")
        first_size, first_itemsize = self.storages.setdefault(key, (size, itemsize))
        if first_size * first_itemsize != size * itemsize:
            refuse("a storage of two sizes")
        return Storage(key, dtype)


class LegacyFile:
    """A torch file as it was before 1.6: what its pickle describes, and where the pickles end."""

    def __init__(self, file: Part) -> None:
        self.file = file
        source = SourceStream(file, budget.LARGEST_PICKLE, "pickle")
        self._stream = io.BufferedReader(source, _BUFFER)
        magic, version, system = (self._load(InertUnpickler(self._stream)) for _ in range(3))
        if magic != _MAGIC or version != _VERSION or not isinstance(system, dict):
            raise FormatError("is damaged at its start", path=file.path)
        if system.get("little_endian") is not True:
            raise big_endian(file.path)
        machine = LegacyUnpickler(self._stream)
        self.root = self._load(machine)
        self._sizes = machine.storages
        keys = self._load(InertUnpickler(self._stream))
        self.end = self._stream.tell()
        self._starts = self._lay_out(keys)

    def _load(self, machine: InertUnpickler) -> object:
        try:
            return unpickler.run(machine, self.file.path)
        except PickleError as error:
            if self._stream.tell() >= self.file.size:
                error.message += ": was it truncated?"
            raise

    def _lay_out(self, keys: object) -> dict[str, int]:
        """Where storages begin, which follow one another in the order of their keys."""
        names = keys if isinstance(keys, list) else []
        names = [key for key in names if isinstance(key, str)]
        if names != keys or len(names) != len(self._sizes) or set(names) != self._sizes.keys():
            message = "is damaged: its storages are not those of its pickle"
            raise FormatError(message, path=self.file.path)
        starts, end = {}, self.end
        for key in names:
            count, itemsize = self._sizes[key]
            starts[key] = end + _COUNT
            end += _COUNT + count * itemsize
        if end > self.file.size:
            message = f"is {self.file.size} bytes long and should be {end}: was it truncated?"
            raise FormatError(message, path=self.file.path)
        return starts

    def storages(self, users: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """Find storages, and check their numbers of elements; see `Container`."""
        places = {}
        before = self.file.read_many((self._starts[key] - _COUNT, _COUNT) for key in users)
        for (key, tensor), number in zip(users.items(), before, strict=True):
            found, (count, itemsize) = int.from_bytes(number, "little"), self._sizes[key]
            if found != count:
                message = f"storage {printable(key)} has {found} elements and not {count}"
                raise FormatError(f"is damaged: {message}", path=self.file.path, tensor=tensor)
            places[key] = (self._starts[key], count * itemsize)
        return places
