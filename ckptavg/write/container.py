"""Lay out the last checkpoint's own file, with all that it holds, for new weights in their places.

What lies around the weights (optimizer, hyper-parameters, callbacks) is copied byte for byte, so
that whatever could load the checkpoint loads this, and resumes.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import struct
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, OutputError, printable
from ckptavg.formats import torchzip
from ckptavg.formats.checkpoint import PROVENANCE, span_elements
from ckptavg.formats.torchzip import Archive
from ckptavg.merge.layout import Checksum, Copy, FileLayout, Layout, OutputTensor, Scattered
from ckptavg.write.zipfile import CRC_IN_CENTRAL, CRC_IN_LOCAL, Zip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.parts import ByteSource
    from ckptavg.formats.tensors import Tensor

log = logging.getLogger("ckptavg")

_CENTRAL_SIZE, _LENGTHS = 46, 28
_DESCRIPTOR = b"PK\7\x08"
_HAS_DESCRIPTOR = 1 << 3


def lay_out_container(
    path: Path,
    tensors: Sequence[OutputTensor],
    places: Sequence[Sequence[Tensor]],
    file: ByteSource,
    metadata: Mapping[str, str],
) -> Layout:
    """Lay out a torch file that is another one with other values in some of its tensors.

    Args:
        path: the output, for messages.
        tensors: what is written.
        places: for each of them, where it stands in the file, once or more.
        file: the other one.
        metadata: strings; all but the provenance are left out, for lack of a place.

    Raises:
        OutputError: two tensors share bytes, so that they cannot be replaced one by one.
    """
    spans = _spans(path, tensors, places)
    head = file.read(0, 4)
    if torchzip.matches(file.path, head):
        layout, end = _zip(file, spans, metadata)
    else:
        log.info("a file as torch wrote it before 1.6 has no place for what the average is made of")
        layout, end = FileLayout(file.size), file.size
    return Layout(
        {"": layout},
        tuple(tuple(one.offset for one in each if one.strides is None) for each in places),
        tuple(_gaps(file, spans, end)),
        {
            position: tuple(Scattered(file, one) for one in each if one.strides is not None)
            for position, each in enumerate(places)
            if any(one.strides is not None for one in each)
        },
    )


def _spans(
    path: Path, tensors: Sequence[OutputTensor], places: Sequence[Sequence[Tensor]]
) -> list[tuple[int, int]]:
    """Where the tensors' bytes begin and end, in order.

    A scattered tensor's span counts whole: what lies between its elements is written with it.
    """
    spans = sorted(
        (*span(place), tensor.names[0])
        for tensor, each in zip(tensors, places, strict=True)
        for place in each
        if place.count
    )
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise OutputError(
                f"shares bytes with {printable(other)} in the last checkpoint, so that they "
                "cannot be replaced one by one",
                path=path,
                tensor=name,
                remedy="write the weights alone, without --container",
            )
    return [(start, end) for start, end, _ in spans]


def span(place: Tensor) -> tuple[int, int]:
    """Where a tensor's bytes begin and end in its file."""
    nbytes = place.nbytes
    if place.strides is not None:
        nbytes = span_elements(place.shape, place.strides) * place.dtype.itemsize
    return place.offset, place.offset + nbytes


def _gaps(file: ByteSource, spans: Sequence[tuple[int, int]], end: int) -> Iterator[Copy]:
    """What lies between the tensors, up to where the copying ends."""
    position = 0
    for start, stop in [*spans, (end, end)]:
        if start > position:
            yield Copy(file, position, start - position, position)
        position = max(position, stop)


def _zip(
    file: ByteSource, spans: Sequence[tuple[int, int]], metadata: Mapping[str, str]
) -> tuple[FileLayout, int]:
    """The zip's new end: our provenance, and a directory with the new checksums."""
    archive = Archive.read(file)
    own = archive.prefix + PROVENANCE
    entries = dict(zip(archive.records, _raw_entries(archive), strict=True))
    entries.pop(own, None)
    added = Zip(archive.prefix, archive.directory_start)
    if PROVENANCE in metadata:
        added.add_unfinished(PROVENANCE, metadata[PROVENANCE].encode())
    directory = dict(zip(entries, added.finish(list(entries.values())), strict=True))
    checksums = (*added.checksums(), *_checksums(archive, directory, spans))
    return FileLayout(added.end, tuple(added.blobs), checksums), archive.directory_start


def _raw_entries(archive: Archive) -> Iterator[bytes]:
    """The entries of the central directory as they stand in the file."""
    start = archive.directory_start
    directory = archive.file.read(start, archive.file.size - start)
    position = 0
    for _ in archive.records:
        lengths = struct.unpack_from("<3H", directory, position + _LENGTHS)
        size = _CENTRAL_SIZE + sum(lengths)
        yield directory[position : position + size]
        position += size


def _checksums(
    archive: Archive, directory: Mapping[str, int], spans: Sequence[tuple[int, int]]
) -> Iterator[Checksum]:
    """The checksums of the records that hold some of the weights."""
    begins = [start for start, _ in spans]
    names = [name for name in directory if name.startswith(f"{archive.prefix}data/")]
    for name, (start, size) in archive.places(dict.fromkeys(names)).items():
        first = bisect.bisect_left(begins, start)
        if first == len(begins) or begins[first] >= start + size:
            continue
        yield Checksum(start, size, (directory[name] + CRC_IN_CENTRAL, _own(archive, name, start)))


def _own(archive: Archive, name: str, start: int) -> int:
    """Where a record's checksum stands beside it: behind its bytes, or in its header."""
    entry = archive.records[name]
    if not entry.flag_bits & _HAS_DESCRIPTOR:
        return entry.header_offset + CRC_IN_LOCAL
    end = start + entry.file_size
    if archive.file.read(end, len(_DESCRIPTOR)) != _DESCRIPTOR:
        raise FormatError(
            f"record {printable(name)} is not followed by its checksum", path=archive.file.path
        )
    return end + len(_DESCRIPTOR)
