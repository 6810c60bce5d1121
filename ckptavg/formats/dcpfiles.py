"""Read the files of a `torch.distributed.checkpoint` directory: `.metadata` and `*.distcp`.

`.metadata` is a pickle of classes of `torch.distributed.checkpoint.metadata` and `.filesystem`,
which are placeholders here. It says where the items are in the `.distcp` files. Each item is a
small torch zip: a piece of a tensor, or some other object.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats import unpickler
from ckptavg.formats.blocks import Box, misfit
from ckptavg.formats.budget import LARGEST_PICKLE
from ckptavg.formats.checkpoint import PROVENANCE, read_view
from ckptavg.formats.parts import Memory, Part, open_source
from ckptavg.formats.paths import is_inside
from ckptavg.formats.pickled import PickledTensor, Placeholder, Storage, UnreadableTensor
from ckptavg.formats.tensors import DType, is_extra_state, is_possible
from ckptavg.formats.torchpickle import locate
from ckptavg.formats.torchzip import Archive

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence
    from pathlib import Path

    from ckptavg.formats.blocks import Region

METADATA = ".metadata"
_OBJECT = "torch.distributed.checkpoint.metadata.BytesStorageMetadata"
# The metadata of a thousand tensors on a thousand ranks have more than a torch file has: 140 bytes,
# 70 opcodes and 1 kB of memory for each piece.
_SCALE = 10
# A small pickle can name one long list again and again: so many pieces are looked at in all.
_MOST_PIECES = 5_000_000
_LONGEST_PLACE = 100
_MOST_DIMENSIONS = 64
_LARGEST_NUMBER = 1 << 60  # a number's hash is its remainder after division by 2**61 - 1
_ENDS = 1 << 10  # bytes: an item's zip has its pickle in the first, its directory in the last
_BATCH = 1_000  # items whose ends are in memory at once
_LARGEST_OBJECT = 1 << 20
_LARGEST_PICKLE, _MOST_VALUES = 4 << 10, 1_000  # of items that are tensors


class Item(NamedTuple):
    """A piece of a tensor, or another object: so many bytes from an offset in one of the files."""

    file: str
    offset: int
    length: int


Items = defaultdict[tuple[str, tuple[int, ...] | None], list[Item]]


class Piece(NamedTuple):
    """A piece of the tensor of that name, as the metadata describe it."""

    name: str
    dtype: DType
    region: Region
    item: Item


class Metadata:
    """What `.metadata` says of its entries; FormatError if it is not what torch writes."""

    def __init__(self, directory: Path) -> None:
        self.file = open_source(directory / METADATA)
        pickled = self.file.read(0, min(self.file.size, _SCALE * LARGEST_PICKLE + 1))
        self.digest = hashlib.sha256(pickled).hexdigest()
        root = unpickler.load(pickled, self.file.path, scale=_SCALE)
        fields = self._fields(root, "Metadata")
        entries, items = fields.get("state_dict_metadata"), fields.get("storage_data")
        if not isinstance(entries, Mapping) or not isinstance(items, Mapping):
            raise self._fault("has no state_dict_metadata, or no storage_data")
        if not all(isinstance(name, str) for name in entries):
            raise self._fault("has an entry whose name is not a string")
        self._entries, self._items = entries, items
        places = fields.get("planner_data")
        self.places: Mapping[Any, object] = places if isinstance(places, Mapping) else {}
        provenance = fields.get(PROVENANCE)
        self.provenance = provenance if isinstance(provenance, str) else None
        self.names: tuple[str, ...] = tuple(entries)
        self._pieces_left = _MOST_PIECES

    def place(self, name: str) -> tuple[str | int, ...]:
        """Keys under which an entry was in the nested state dict; its name if they are unknown."""
        place = self.places.get(name, (name,))
        if (
            not isinstance(place, tuple)
            or not 1 <= len(place) <= _LONGEST_PLACE
            or not all(isinstance(key, str) or _is_small(key) for key in place)
        ):
            raise self._fault("has no valid place in the state dict", name)
        return place

    def leaf(self, name: str) -> PickledTensor | UnreadableTensor | Placeholder:
        """What stands for an entry in the state dict.

        A tensor's storage has its name as key, and the placeholder of an object as argument.
        """
        if self._kind(self._entries[name]) != "TensorStorageMetadata":
            return Placeholder(_OBJECT, (name,))
        fields = self._fields(self._entries[name], "TensorStorageMetadata", name)
        shape = self._numbers(fields.get("size"), name)
        match getattr(fields.get("properties"), "state", None):
            case (DType() as dtype, *_) | {"dtype": DType() as dtype}:
                if not is_possible(shape, dtype.itemsize):
                    raise self._fault("has no valid shape", name)
                return PickledTensor(Storage(name, dtype), dtype, 0, shape, ())
        return UnreadableTensor("a tensor of a dtype that is not supported")

    def pieces(self, tensors: Mapping[str, PickledTensor]) -> Iterator[Piece]:
        """Every piece of some tensors, each tensor's once they are known to make it up."""
        items = self.items(tensors)
        for name, tensor in tensors.items():
            regions = self._regions(name)
            if fault := misfit(tensor.shape, regions):
                raise self._fault(fault.message, name)
            for region in regions:
                corner, _ = region
                # Older versions record no corner if it is the tensor's own.
                found = items[name, corner] + ([] if any(corner) else items[name, None])
                if len(found) != 1:
                    count = f"{len(found)} places" if found else "no place"
                    raise self._fault(f"its piece at {list(corner)} has {count} in the files", name)
                yield Piece(name, tensor.dtype, region, found[0])

    def items(self, names: Container[str]) -> Items:
        """The items of some entries, by name and corner of the piece; objects have no corner."""
        found: Items = defaultdict(list)
        for index, info in self._items.items():
            fields = self._fields(index, "MetadataIndex")
            name, offset = fields.get("fqn"), fields.get("offset")
            if isinstance(name, str) and name in names:
                corner = None if offset is None else self._numbers(offset, name)
                found[name, corner].append(self._item(info, name))
        return found

    def _item(self, info: object, name: str) -> Item:
        fields = self._fields(info, "_StorageInfo", name)
        if extensions := fields.get("transform_descriptors"):
            known = extensions if isinstance(extensions, list | tuple) else ()
            names = [each for each in known[:_LONGEST_PLACE] if isinstance(each, str)]
            what = printable(f"by way of {', '.join(names) or 'an extension'}")
            remedy = "save it again without extensions of torch.distributed.checkpoint"
            raise self._fault(f"is stored {what}, which is not supported", name, remedy)
        file, offset, length = map(fields.get, ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not is_inside(file):
            which = repr(file) if isinstance(file, str) else "without a name"
            raise self._fault(f"is in a file {which}, outside the checkpoint", name)
        if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise self._fault("has no valid place in its file", name)
        return Item(file, offset, length)

    def _regions(self, name: str) -> list[Region]:
        """Where a tensor's pieces are in it: those that have elements, each once."""
        chunks = self._fields(self._entries[name], "TensorStorageMetadata", name).get("chunks")
        if not isinstance(chunks, list):
            raise self._fault("has no list of pieces", name)
        self._pieces_left -= len(chunks)
        if self._pieces_left < 0:
            raise self._fault(f"has more than {_MOST_PIECES} pieces of tensors", name)
        regions: dict[Region, None] = {}
        for chunk in chunks:
            fields = self._fields(chunk, "ChunkStorageMetadata", name)
            sizes = self._numbers(fields.get("sizes"), name)
            if 0 not in sizes:
                regions[self._numbers(fields.get("offsets"), name), sizes] = None
        return list(regions)

    def _numbers(self, value: object, name: str) -> tuple[int, ...]:
        """A `torch.Size`: no negative numbers, and none so large that others have its hash."""
        if (
            not isinstance(value, tuple)
            or len(value) > _MOST_DIMENSIONS
            or not all(_is_small(number) and number >= 0 for number in value)
        ):
            raise self._fault("has no valid shape", name)
        return value

    def _fields(self, value: object, kind: str, tensor: str | None = None) -> dict[Any, Any]:
        """The attributes of an object of some class."""
        state = value.state if isinstance(value, Placeholder) else None
        if self._kind(value) != kind or not isinstance(state, dict):
            raise self._fault(f"has no {kind} where torch writes one", tensor)
        return state

    @staticmethod
    def _kind(value: object) -> str:
        return value.origin.rpartition(".")[2] if isinstance(value, Placeholder) else ""

    def _fault(
        self, message: str, tensor: str | None = None, remedy: str | None = None
    ) -> FormatError:
        return FormatError(printable(message), path=self.file.path, tensor=tensor, remedy=remedy)


def _is_small(value: object) -> bool:
    """Whether a value is an int, of those that each have a hash of their own."""
    return type(value) is int and abs(value) < _LARGEST_NUMBER


class Shards:
    """The `.distcp` files of a directory; `files` has those that were opened, by name."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self.files: dict[str, Part] = {}
        self._directory, self._metadata = directory, metadata
        self._values: dict[bytes, object] = {}

    def boxes(self, tensors: Mapping[str, PickledTensor]) -> dict[str, list[Box]]:
        """Find the pieces of tensors, each given by what the metadata say of it."""
        by_file: defaultdict[str, list[Piece]] = defaultdict(list)
        for piece in self._metadata.pieces(tensors):
            by_file[piece.item.file].append(piece)
        boxes: dict[str, list[Box]] = {name: [] for name in tensors}
        for pieces in by_file.values():
            pieces.sort(key=lambda piece: piece.item.offset)
            for first in range(0, len(pieces), _BATCH):
                for piece, section in self._sections(pieces[first : first + _BATCH]):
                    boxes[piece.name].append(self._box(piece, section))
        return boxes

    def number(self, name: str) -> object:
        """Read a number that was saved as an object, or as a tensor; None where it is neither."""
        leaf = self._metadata.leaf(name)
        if isinstance(leaf, PickledTensor) and not leaf.shape and leaf.dtype.kind == "int":
            [box] = self.boxes({name: leaf})[name]
            return int(read_view(box.source, box.tensor))
        items = self._metadata.items({name})[name, None] if isinstance(leaf, Placeholder) else []
        if len(items) != 1 or items[0].length > _LARGEST_OBJECT:
            return None
        return _load(self._open(items[0], name), items[0])

    def objects(self, entries: Mapping[str, object]) -> Objects:
        """What is no tensor in a state dict, given by what the metadata say of it."""
        names = {
            name: stored
            for name, value in entries.items()
            if is_extra_state(name) and (stored := stored_name(value)) is not None
        }
        found = self._metadata.items(set(names.values())) if names else {}
        items = {}
        for name, stored in names.items():
            match found.get((stored, None)):
                case [Item(length=length) as item] if length <= _LARGEST_OBJECT:
                    items[name] = self._open(item, name), item
        return Objects(entries, items)

    def _open(self, item: Item, tensor: str) -> Part:
        """Open the file of an item, and check that the item is in it."""
        if item.file not in self.files:
            try:
                self.files[item.file] = open_source(self._directory / item.file)
            except CkptAvgError as error:
                raise FormatError(error.message, path=error.path, tensor=tensor) from error
        file = self.files[item.file]
        if item.offset + item.length > file.size:
            missing = item.offset + item.length - file.size
            message = f"ends at byte {file.size}, {missing} bytes too early: was it truncated?"
            raise FormatError(message, path=file.path, tensor=tensor)
        return file

    def _sections(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, _Zip]]:
        """The items of pieces in one file, with what describes them read in few requests."""
        places: list[tuple[int, int]] = []
        for piece in pieces:
            file = self._open(piece.item, piece.name)
            _, offset, length = piece.item
            size = min(_ENDS, length)
            places += [(offset, size), (offset + length - size, size)]
        ends = iter(file.read_many(places))
        for piece, head, tail in zip(pieces, ends, ends, strict=True):
            yield piece, _Zip(file, piece.item, head, tail)

    def _box(self, piece: Piece, section: _Zip) -> Box:
        """Find the tensor in an item, which must be the piece that the metadata say."""
        name, dtype, (corner, shape), item = piece
        file = self.files[item.file]
        try:
            archive = Archive(section)
            value = self._value(archive)
            tensor = locate(archive, {name: value})[name]
        except CkptAvgError as error:
            raise FormatError(
                error.message, path=error.path, tensor=name, remedy=error.remedy
            ) from error
        if not isinstance(value, PickledTensor) or (value.dtype, value.shape) != (dtype, shape):
            message = (
                f"has a piece of {tensor.dtype.name} {list(tensor.shape)} at byte {item.offset} "
                f"where the metadata says {dtype.name} {list(shape)}"
            )
            raise FormatError(message, path=file.path, tensor=name)
        return Box(file, corner, replace(tensor, offset=item.offset + tensor.offset))

    def _value(self, archive: Archive) -> object:
        """What an item's pickle describes. Tensors of one shape and dtype have the same pickle."""
        pickled = archive.content("data.pkl")
        if len(pickled) > _LARGEST_PICKLE:
            message = f"has a pickle of {len(pickled)} bytes where a tensor's has a few hundred"
            raise FormatError(message, path=archive.file.path)
        if pickled not in self._values:
            if len(self._values) >= _MOST_VALUES:
                self._values.clear()
            self._values[pickled] = unpickler.load(pickled, archive.file.path)
        return self._values[pickled]


class Objects(Mapping[str, object]):
    """What is no tensor in a state dict, by name: the state of a module is read when asked for.

    Args:
        entries: placeholders and other values by name. They stay where they cannot be read.
        items: files and items of the states of modules, by name.
    """

    def __init__(
        self, entries: Mapping[str, object], items: Mapping[str, tuple[Part, Item]]
    ) -> None:
        self._entries, self._items = entries, items

    def __getitem__(self, name: str) -> object:
        if name in self._items:
            with contextlib.suppress(FormatError):
                return _load(*self._items[name])
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def stored_name(value: object) -> str | None:
    """The name that an entry has in the files: a leaf of the metadata; None for other values."""
    match value:
        case PickledTensor(storage=Storage(key=str(name))):
            return name
        case Placeholder(origin=origin, arguments=(str(name),)) if origin == _OBJECT:
            return name
    return None


def _load(file: Part, item: Item) -> object:
    """Read an object as inert data."""
    content = file.read(item.offset, item.length)
    return Archive(Memory(file.path, bytearray(content))).load()


class _Zip(Part):
    """An item as a file of its own, of which the first and the last bytes are in memory."""

    def __init__(self, file: Part, item: Item, head: bytes, tail: bytes) -> None:
        self.path, self.size = file.path, item.length
        self._file, self._offset = file, item.offset
        self._ends = (0, head), (item.length - len(tail), tail)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`, of the item."""
        for start, data in self._ends:
            if start <= offset and offset + len(out) <= start + len(data):
                out[:] = data[offset - start :][: len(out)]
                return
        self._file.read_into(self._offset + offset, out)
