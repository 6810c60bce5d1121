"""Lay out a `torch.distributed.checkpoint` directory: `.metadata`, and `.distcp` files of items.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html. It is as one process saves it, and
any number of processes load it. Each item is a small torch zip: a tensor, or some other entry.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ckptavg.errors import printable
from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.formats.dcpfiles import METADATA, Item
from ckptavg.formats.parts import open_source
from ckptavg.merge.jobs import Checksum, FileLayout, Layout, StoredTensor
from ckptavg.write.directory import in_shards
from ckptavg.write.pickling import (
    StoredEntry,
    pickle_dcp,
    pickle_entries,
    pickle_one,
    pickle_tensor,
)
from ckptavg.write.torchzip import mention_kept, mention_left_out
from ckptavg.write.zipfile import Zip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.jobs import OutputTensor

log = logging.getLogger("ckptavg")

# What Lightning and Megatron have beside the shards, and do not load a directory without.
_FILES_ALONG = ("meta.pt", "common.pt", "metadata.json")


def lay_out_dcp(
    path: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    last: Checkpoint,
    *,
    max_shard_size: int | None,
) -> Layout:
    """Lay out the directory.

    Args:
        path: the output.
        tensors: in the order of their items. Tied tensors are one item with several names.
        metadata: strings, of which only the provenance is written: there is no place for others.
        last: the last checkpoint. It has the places of entries in the nested state dict, the
            entries that are not tensors, and files that come along.
        max_shard_size: most bytes of tensors in a file; None for one file.
    """
    pickles = pickle_entries(last.other_entries, {})
    mention_left_out(name for name in last.other_entries if name not in pickles)
    mention_kept(last, pickles)
    if last.container == "dcp" and last.other_content:
        log.info(
            "only the weights are written, not the rest of %s, such as an optimizer's state",
            printable(last.name),
        )
    files: dict[str, FileLayout] = {}
    entries: list[StoredEntry] = []
    targets: list[tuple[int, ...]] = []
    size = 0
    for number, shard in enumerate(in_shards(tensors, max_shard_size)):
        file = _Items(f"__0_{number}.distcp")
        for name, pickled in () if number else pickles.items():
            item, _ = file.add(pickled)
            entries.append(_entry(name, last, None, item))
        for tensor in shard:
            item, start = file.add(pickle_tensor("0", tensor), tensor)
            entries += (_entry(name, last, tensor, item) for name in tensor.names)
            targets.append((size + start,))
        files[file.name] = file.layout()
        size += file.size
    described = pickle_dcp(entries, metadata.get(PROVENANCE))
    files[METADATA] = FileLayout(len(described), ((0, described),))
    size += len(described)
    copies = []
    for name in _FILES_ALONG if last.container == "dcp" else ():
        if (last.path / name).is_file():
            source = open_source(last.path / name)
            files[name] = FileLayout(source.size)
            copies.append((StoredTensor.of_bytes(source, 0, source.size), size))
            size += source.size
    return Layout(path, files, tuple(targets), tuple(copies))


def _entry(name: str, last: Checkpoint, tensor: OutputTensor | None, item: Item) -> StoredEntry:
    return StoredEntry(last.places.get(name, (name,)), tensor, item)


class _Items:
    """A `.distcp` file: zips, one after the other.

    Args:
        name: the name of the file.

    Attributes:
        size: bytes of the file so far.
    """

    def __init__(self, name: str) -> None:
        self.name, self.size = name, 0
        self._blobs: list[tuple[int, bytes]] = []
        self._checksums: list[Checksum] = []

    def add(self, pickled: bytes, tensor: OutputTensor | None = None) -> tuple[Item, int]:
        """Add the zip of a pickle, and of the tensor in it.

        Returns:
            The item, and where the bytes of the tensor begin in the file.
        """
        archive, nbytes = Zip(), 0
        archive.add("data.pkl", pickle_one(pickled))
        archive.add("byteorder", b"little")
        start = archive.end
        if tensor is not None:
            start, nbytes = archive.reserve("data/0", tensor.nbytes), tensor.nbytes
        archive.add("version", b"3\n")
        archive.finish()
        # The bytes between two tensors are written at once.
        before = b"".join(blob for offset, blob in archive.blobs if offset < start)
        behind = b"".join(blob for offset, blob in archive.blobs if offset >= start)
        begin = self.size
        at, last = self._blobs.pop() if self._blobs else (begin, b"")
        self._blobs += [(at, last + before), (begin + start + nbytes, behind)]
        self._checksums += (
            Checksum(begin + each.start, each.size, tuple(begin + to for to in each.targets))
            for each in archive.checksums
        )
        self.size += archive.end
        return Item(self.name, begin, archive.end), begin + start

    def layout(self) -> FileLayout:
        """The layout of the file."""
        return FileLayout(self.size, tuple(self._blobs), tuple(self._checksums))
