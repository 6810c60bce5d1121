"""Read `.metadata` of a `torch.distributed.checkpoint` directory: what there is, and where.

The pickle's classes are those of `torch.distributed.checkpoint.metadata` and `.filesystem`; here
they are placeholders, looked at and never made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptavg.errors import FormatError, printable
from ckptavg.formats.pickled import PickledTensor, Placeholder, Storage, UnreadableTensor
from ckptavg.formats.shapes import is_possible
from ckptavg.formats.tensors import DType

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

    from ckptavg.formats.blocks import Region

Offsets = tuple[int, ...]

# A small pickle can name one long list again and again: bound what is gone through.
_MOST_PIECES = 5_000_000
_LONGEST_PLACE = 100
_MOST_DIMENSIONS = 64
_LARGEST_NUMBER = 1 << 60  # a number's hash is what is left of it after division by 2**61 - 1


class Item(NamedTuple):
    """Where a piece of a tensor, or some other object, is: in one of the files.

    Attributes:
        file: the file's name, relative to the directory.
        offset: of the item's first byte.
        length: its bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class OtherEntry:
    """An entry that is no tensor: the pickle of some object.

    Attributes:
        name: its name in the metadata.
    """

    name: str


class Metadata:
    """What `.metadata` says.

    Args:
        path: the file, for messages.
        root: what its pickle describes.

    Attributes:
        names: the names of all entries, in the order of the file.

    Raises:
        FormatError: it is not what torch writes.
    """

    def __init__(self, path: Path, root: object) -> None:
        self.path = path
        fields = self._fields(root, "Metadata")
        self._entries = self._mapping(fields, "state_dict_metadata")
        self._items = self._mapping(fields, "storage_data")
        places = fields.get("planner_data")
        self._places: Mapping[Any, object] = places if isinstance(places, Mapping) else {}
        if not all(isinstance(name, str) for name in self._entries):
            raise self._fault("has an entry without a name")
        self.names: tuple[str, ...] = tuple(self._entries)
        self._pieces_left = _MOST_PIECES

    def place(self, name: str) -> tuple[str | int, ...]:
        """Where an entry was in the nested state dict; its name alone where nothing says it."""
        place = self._places.get(name, (name,))
        if (
            not isinstance(place, tuple)
            or not 1 <= len(place) <= _LONGEST_PLACE
            or not all(isinstance(key, str) or _is_small(key) for key in place)
        ):
            raise self._fault("has no valid place in the state dict", name)
        return place

    def has_place(self, name: str) -> bool:
        """Whether the planner recorded where an entry was in the nested state dict."""
        return name in self._places

    def leaf(self, name: str) -> PickledTensor | UnreadableTensor | OtherEntry:
        """What stands for an entry in the nested state dict.

        The storage of such a tensor has the entry's name as key.
        """
        if self._kind(self._entries[name]) != "TensorStorageMetadata":
            return OtherEntry(name)
        fields = self._fields(self._entries[name], "TensorStorageMetadata", name)
        dtype = self._dtype(fields.get("properties"))
        shape = self._numbers(fields.get("size"), name)
        if dtype is None:
            return UnreadableTensor("a tensor of a dtype that is not known here")
        if not is_possible(shape, 8 * dtype.itemsize):
            raise self._fault("has no valid shape", name)
        return PickledTensor(Storage(name, dtype, 0), dtype, 0, shape, ())

    def regions(self, name: str) -> list[Region]:
        """Where a tensor's pieces sit in it: those that have elements, each once."""
        chunks = self._fields(self._entries[name], "TensorStorageMetadata", name).get("chunks")
        if not isinstance(chunks, list):
            raise self._fault("has no list of pieces", name)
        self._pieces_left -= len(chunks)
        if self._pieces_left < 0:
            raise self._fault(f"has more than {_MOST_PIECES} pieces of tensors", name)
        regions: dict[Region, None] = {}
        for chunk in chunks:
            fields = self._fields(chunk, "ChunkStorageMetadata", name)
            corner, sizes = (self._numbers(fields.get(field), name) for field in _CHUNK)
            if 0 not in sizes:
                regions[corner, sizes] = None
        return list(regions)

    def items(self, names: Container[str]) -> dict[tuple[str, Offsets | None], list[Item]]:
        """Where the entries of these names are, by name and corner of the piece.

        There is one item for each, unless the file contradicts itself.
        """
        found: dict[tuple[str, Offsets | None], list[Item]] = {}
        for index, info in self._items.items():
            fields = self._fields(index, "MetadataIndex")
            name, offset = fields.get("fqn"), fields.get("offset")
            if not isinstance(name, str) or name not in names:
                continue
            corner = None if offset is None else self._numbers(offset, name)
            found.setdefault((name, corner), []).append(self._item(info, name))
        return found

    def _item(self, info: object, name: str) -> Item:
        fields = self._fields(info, "_StorageInfo", name)
        if fields.get("transform_descriptors"):
            raise FormatError(
                f"is stored {_names(fields['transform_descriptors'])}, which is not supported",
                path=self.path,
                tensor=name,
                remedy="save it again without extensions of torch.distributed.checkpoint",
            )
        file, offset, length = (fields.get(field) for field in _INFO)
        if not isinstance(file, str) or not _is_below(file):
            where = f"in {file!r}" if isinstance(file, str) else "nowhere"
            raise self._fault(f"is said to be {where}, outside the checkpoint", name)
        if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise self._fault("has no valid place in its file", name)
        return Item(file, offset, length)

    def _dtype(self, properties: object) -> DType | None:
        """The element type; the properties' state begins with it."""
        match getattr(properties, "state", None):
            case (DType() as dtype, *_) | {"dtype": DType() as dtype}:
                return dtype
        return None

    def _numbers(self, value: object, name: str) -> tuple[int, ...]:
        """A `torch.Size`: no negative numbers, and none so large that others have its hash."""
        if (
            not isinstance(value, tuple)
            or len(value) > _MOST_DIMENSIONS
            or not all(_is_small(number) and number >= 0 for number in value)
        ):
            raise self._fault("has no valid shape", name)
        return value

    def _mapping(self, fields: Mapping[Any, object], name: str) -> Mapping[Any, object]:
        value = fields.get(name)
        if not isinstance(value, Mapping):
            raise self._fault(f"has no {name}")
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

    def _fault(self, message: str, tensor: str | None = None) -> FormatError:
        return FormatError(printable(message), path=self.path, tensor=tensor)


_CHUNK = ("offsets", "sizes")
_INFO = ("relative_path", "offset", "length")


def _is_small(value: object) -> bool:
    """Whether it is a whole number, of those that each have a hash of their own."""
    return type(value) is int and abs(value) < _LARGEST_NUMBER


def _names(descriptors: object) -> str:
    """How extensions name themselves: compression, encryption."""
    known = descriptors if isinstance(descriptors, list | tuple) else ()
    names = [name for name in known[:_LONGEST_PLACE] if isinstance(name, str)]
    return printable(f"by way of {', '.join(names) or 'an extension'}")


def _is_below(name: str) -> bool:
    """Whether a relative path stays in its directory."""
    return "\0" not in name and not {"", ".", ".."} & set(name.replace("\\", "/").split("/"))
