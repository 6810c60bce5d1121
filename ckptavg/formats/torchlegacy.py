"""Read what `torch.save` wrote before 1.6: a stream of pickles, and the storages after them.

Torch writes such files still when it is told `_use_new_zipfile_serialization=False`. There are a
magic number, a version, facts of the machine, the object and the storages' keys, all pickled; then
for each key the number of its elements, int64, and the elements. All pickles are read as data (see
`unpickler`), the storages by offset and only those of the state dict that is wanted.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ckptavg.errors import FormatError, printable
from ckptavg.formats import unpickler
from ckptavg.formats.pickled import Storage, storage_itemsize
from ckptavg.formats.streams import SourceStream
from ckptavg.formats.tensors import DType
from ckptavg.formats.torchpickle import describe
from ckptavg.formats.unpickler import InertUnpickler, PickleError, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import BinaryIO

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.parts import ByteSource

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
# The magic number's pickle: in decimal by protocol 1, in binary by the others, in a frame since 4.
_HEAD = re.compile(
    rb"L%dL\n\.|\x80[\2-\5](?:\x95.{8})?\x8a\n%s\."
    % (_MAGIC, re.escape(_MAGIC.to_bytes(10, "little"))),
    re.DOTALL,
)
_BUFFER = 64 << 10  # bytes that are read at a time, so up to which the storages' are read in vain
_COUNT = 8  # bytes of the number before a storage
_LARGEST_SIZE = 1 << 62
_LONGEST_KEY = 1_000  # characters; torch's are numbers


def matches(path: Path, head: bytes) -> bool:  # noqa: ARG001 - the formats' common signature
    """Whether the file begins with the magic number's pickle, of whatever protocol."""
    return _HEAD.match(head) is not None


def open_checkpoint(file: ByteSource, key: str | None) -> Checkpoint:
    """Describe one state dict of a torch file.

    Raises:
        FormatError: the file is damaged or cut off, or holds what cannot be averaged.
        SelectionError: which state dict is wanted is unclear.
    """
    content = _read(file)
    return describe(
        file,
        content.root,
        key,
        content.places,
        digest=hashlib.sha256(file.read(0, content.end)).hexdigest(),
        metadata={},
    )


class LegacyUnpickler(InertUnpickler):
    """The pickle machine, with the persistent ids of these files.

    Attributes:
        storages: elements and bytes of an element, by key, as they are first mentioned.
        views: storages that are pieces of others, by a name made up for each: the other's key,
            where the piece begins in it, and its size, in bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, tuple[int, int]] = {}
        self.views: dict[str, tuple[str, int, int]] = {}

    def persistent_load(self, pid: object) -> object:
        """A storage's record, or a module's class, which comes with its source.

        They are `("storage", type, key, device, size, view)`, with a view of None or
        `(key, offset, size)`, all in elements, and `("module", class, file, source)`.
        """
        match pid:
            case ("module", kind, _, _):
                return kind
            case ("storage", kind, str(key), _, int(size), view):
                return self._storage(kind, key, size, view)
        return refuse("an unknown persistent id")

    def _storage(self, kind: object, key: str, size: int, view: object) -> Storage:
        itemsize = storage_itemsize(kind)
        if itemsize is None:
            refuse("a storage of an unknown type")
        if len(key) > _LONGEST_KEY:  # the name of each view has it
            refuse("a storage with an endless key")
        if not 0 <= size < _LARGEST_SIZE:
            refuse("a storage of an impossible size")
        first_size, first_itemsize = self.storages.setdefault(key, (size, itemsize))
        if first_size * first_itemsize != size * itemsize:
            refuse("a storage of two sizes")
        dtype = kind if isinstance(kind, DType) else None
        if view is None:
            return Storage(key, dtype, size)
        match view:
            case (_, int(start), int(length)) if 0 <= start <= start + length <= size:
                name = f"{key}[{start * itemsize}:{(start + length) * itemsize}]"
                self.views[name] = (key, start * itemsize, length * itemsize)
                return Storage(name, dtype, length)
        return refuse("a storage beyond the one that it is a piece of")


@dataclass(frozen=True)
class _Stored:
    """What a file holds.

    Attributes:
        file: the file.
        root: what was saved.
        end: where the pickles end.
        storages: where each storage begins, elements, and bytes of an element.
        views: as `LegacyUnpickler` has them.
    """

    file: ByteSource
    root: object
    end: int
    storages: Mapping[str, tuple[int, int, int]]
    views: Mapping[str, tuple[str, int, int]]

    def places(self, users: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """Where storages begin in the file, and their bytes.

        Args:
            users: their keys, and for each the name of a tensor in it.
        """
        wholes = {key: self.views[key][0] if key in self.views else key for key in users}
        self._check_counts({whole: users[key] for key, whole in wholes.items()})
        return {key: self._place(key) for key in users}

    def _place(self, key: str) -> tuple[int, int]:
        if key in self.views:
            whole, start, size = self.views[key]
            return self.storages[whole][0] + start, size
        start, count, itemsize = self.storages[key]
        return start, count * itemsize

    def _check_counts(self, users: Mapping[str, str]) -> None:
        """Compare the number before each storage with what the pickle says of it."""
        places = [(self.storages[key][0] - _COUNT, _COUNT) for key in users]
        for (key, user), told in zip(users.items(), self.file.read_many(places), strict=True):
            found, count = int.from_bytes(told, "little"), self.storages[key][1]
            if found != count:
                raise FormatError(
                    f"is damaged: storage {printable(key)} has {found} elements and not {count}",
                    path=self.file.path,
                    tensor=user,
                )


def _read(file: ByteSource) -> _Stored:
    """Read the pickles, and lay the storages out behind them."""
    source = SourceStream(file, unpickler.LARGEST_PICKLE, "pickle")
    stream = io.BufferedReader(source, _BUFFER)
    magic, version, system = (_load(InertUnpickler(stream), file, stream) for _ in range(3))
    if magic != _MAGIC or version != _VERSION or not isinstance(system, dict):
        raise FormatError("is damaged at its start", path=file.path)
    if system.get("little_endian") is not True:
        raise FormatError(
            "was saved on a big-endian machine",
            path=file.path,
            remedy="load it and save it again on a little-endian one",
        )
    machine = LegacyUnpickler(stream)
    root = _load(machine, file, stream)
    keys = _load(InertUnpickler(stream), file, stream)
    end = stream.tell()
    _check_keys(file.path, keys, machine.storages)
    storages = _lay_out(file, end, {key: machine.storages[key] for key in cast("list[str]", keys)})
    return _Stored(file, root, end, storages, machine.views)


def _load(machine: InertUnpickler, file: ByteSource, stream: BinaryIO) -> object:
    try:
        return unpickler.run(machine)
    except PickleError as error:
        cut = ": was it truncated?" if stream.tell() >= file.size else ""
        raise FormatError(f"{error}{cut}", path=file.path) from error


def _check_keys(path: Path, keys: object, storages: Mapping[str, object]) -> None:
    """The storages that are there must be those that are spoken of, each once."""
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or len(keys) != len(storages)
        or set(keys) != set(storages)
    ):
        raise FormatError("is damaged: its storages are not those of its pickle", path=path)


def _lay_out(
    file: ByteSource, end: int, storages: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int, int]]:
    """Where storages begin, one after the other: `(start, elements, bytes of an element)`."""
    placed = {}
    for key, (count, itemsize) in storages.items():
        placed[key] = (end + _COUNT, count, itemsize)
        end += _COUNT + count * itemsize
    if end > file.size:
        raise FormatError(
            f"is {file.size} bytes long and should be {end}: was it truncated?", path=file.path
        )
    return placed
