"""Read the `.distcp` files of a `torch.distributed.checkpoint` directory, item by item.

An item is a small torch zip with one tensor, a piece of a larger one; or with some other object.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from ckptavg.errors import CkptAvgError, FormatError
from ckptavg.formats.blocks import Box, misfit
from ckptavg.formats.checkpoint import read_view
from ckptavg.formats.dcpmetadata import OtherEntry
from ckptavg.formats.parts import Section
from ckptavg.formats.pickled import PickledTensor
from ckptavg.formats.remote import open_source
from ckptavg.formats.torchpickle import locate
from ckptavg.formats.torchzip import Archive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.blocks import Region
    from ckptavg.formats.dcpmetadata import Item, Metadata
    from ckptavg.formats.parts import ByteSource
    from ckptavg.formats.tensors import DType

_ENDS = 1 << 10  # bytes: an item's zip has its pickle in the first, its directory in the last
_BATCH = 1_000  # items whose ends are in memory at once
_LARGEST_OBJECT = 1 << 16


class _Piece(NamedTuple):
    """A piece of a tensor, and where it is said to be."""

    name: str
    dtype: DType
    region: Region
    item: Item


class Shards:
    """The files that the pieces are in.

    Args:
        path: the directory.
        metadata: what says where the pieces are.

    Attributes:
        path: the directory.
        files: those that were opened, by name.
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path = path
        self.files: dict[str, ByteSource] = {}
        self._metadata = metadata

    def boxes(self, tensors: Mapping[str, PickledTensor]) -> dict[str, list[Box]]:
        """The pieces of tensors, by name; none of an empty one.

        Args:
            tensors: what the metadata says of them, by the name of their entry.

        Raises:
            FormatError: the pieces do not make up the tensors, or an item is not the piece that
                the metadata says; a file is missing or damaged.
        """
        by_file: defaultdict[str, list[_Piece]] = defaultdict(list)
        for piece in self._pieces(tensors):
            by_file[piece.item.file].append(piece)
        found: dict[str, list[Box]] = {name: [] for name in tensors}
        for name, pieces in by_file.items():
            file = self._open(name, pieces[0].name)
            pieces.sort(key=lambda piece: piece.item.offset)
            for piece, section in _sections(file, pieces):
                found[piece.name].append(_box(file, piece, section))
        return found

    def _pieces(self, tensors: Mapping[str, PickledTensor]) -> Iterator[_Piece]:
        """Every piece, once the pieces of its tensor are known to make it up."""
        items = self._metadata.items(tensors)
        for name, tensor in tensors.items():
            regions = self._metadata.regions(name)
            fault = misfit(tensor.shape, regions)
            if fault is not None:
                raise self._fault(fault, name)
            for region in regions:
                yield _Piece(name, tensor.dtype, region, self._item(items, name, region))

    def _item(
        self,
        items: Mapping[tuple[str, tuple[int, ...] | None], Sequence[Item]],
        name: str,
        region: Region,
    ) -> Item:
        corner, _ = region
        found = [*items.get((name, corner), ())]
        if not any(corner):  # which older versions leave out
            found += items.get((name, None), ())
        if len(found) != 1:
            what = "no place" if not found else f"{len(found)} places"
            raise self._fault(f"its piece at {list(corner)} has {what} in the files", name)
        return found[0]

    def _open(self, name: str, tensor: str) -> ByteSource:
        if name not in self.files:
            try:
                self.files[name] = open_source(self.path / name)
            except CkptAvgError as error:
                raise _of_tensor(error, tensor) from error
        return self.files[name]

    def number(self, entry: object) -> object:
        """A number that was saved as an object, or as a tensor; None where it is neither."""
        if isinstance(entry, PickledTensor) and not entry.shape and entry.dtype.kind == "int":
            name = entry.storage.key
            [box] = self.boxes({name: entry})[name]
            return int(read_view(box.source, box.below(entry.dtype, ())))
        return self._object(entry.name) if isinstance(entry, OtherEntry) else None

    def _object(self, name: str) -> object:
        """What was saved under a name that is no tensor's; None where it is not one, or large."""
        items = self._metadata.items({name}).get((name, None), [])
        if len(items) != 1 or items[0].length > _LARGEST_OBJECT:
            return None
        [item] = items
        file = self._open(item.file, name)
        _check(file, item, name)
        archive = Archive.read(Section(file, item.offset, item.length))
        return archive.unpickle(archive.content("data.pkl"))

    def _fault(self, message: str, tensor: str) -> FormatError:
        return FormatError(message, path=self._metadata.path, tensor=tensor)


class _Zip(Section):
    """An item of which the first and the last bytes are in memory."""

    def __init__(self, file: ByteSource, item: Item, head: bytes, tail: bytes) -> None:
        super().__init__(file, item.offset, item.length)
        self._head, self._tail = head, tail

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`, of the item."""
        end, tail_at = offset + len(out), self.size - len(self._tail)
        if end <= len(self._head):
            out[:] = self._head[offset:end]
        elif tail_at <= offset and end <= self.size:
            out[:] = self._tail[offset - tail_at : end - tail_at]
        else:
            super().read_into(offset, out)


def _sections(file: ByteSource, pieces: Sequence[_Piece]) -> Iterator[tuple[_Piece, _Zip]]:
    """The items of pieces, with what describes them read in few requests.

    Raises:
        FormatError: an item reaches beyond the file's end.
    """
    for first in range(0, len(pieces), _BATCH):
        batch = pieces[first : first + _BATCH]
        places: list[tuple[int, int]] = []
        for piece in batch:
            _check(file, piece.item, piece.name)
            offset, length = piece.item.offset, piece.item.length
            size = min(_ENDS, length)
            places += [(offset, size), (offset + length - size, size)]
        ends = iter(file.read_many(places))
        for piece, head, tail in zip(batch, ends, ends, strict=True):
            yield piece, _Zip(file, piece.item, head, tail)


def _check(file: ByteSource, item: Item, tensor: str) -> None:
    if item.offset + item.length > file.size:
        raise FormatError(
            f"ends at byte {file.size}, {item.offset + item.length - file.size} bytes too early: "
            "was it truncated?",
            path=file.path,
            tensor=tensor,
        )


def _box(file: ByteSource, piece: _Piece, section: _Zip) -> Box:
    """Look at what an item says of itself.

    Raises:
        FormatError: it is not the piece that the metadata says.
    """
    name, dtype, (corner, shape), item = piece
    try:
        archive = Archive.read(section)
        value = archive.unpickle(archive.content("data.pkl"))
        tensor = locate(file.path, {name: value}, archive.storages)[name]
    except CkptAvgError as error:
        raise _of_tensor(error, name) from error
    if not isinstance(value, PickledTensor) or (value.dtype, value.shape) != (dtype, shape):
        raise FormatError(
            f"has a piece of {tensor.dtype.name} {list(tensor.shape)} at byte {item.offset} "
            f"where the metadata says {dtype.name} {list(shape)}",
            path=file.path,
            tensor=name,
        )
    return Box(file, corner, shape, item.offset + tensor.offset, tensor.strides)


def _of_tensor(error: CkptAvgError, tensor: str) -> FormatError:
    """The same with the tensor that it is about."""
    return FormatError(error.message, path=error.path, tensor=tensor, remedy=error.remedy)
