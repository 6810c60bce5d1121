"""Lay out the last checkpoint's own torch file, with other weights in their places.

What lies around the weights (optimizer, hyper-parameters, callbacks) is copied byte for byte, so
that whatever could load the checkpoint can load the output, and resume from it.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import struct
from typing import TYPE_CHECKING

from ckptavg.errors import CkptAvgError, FormatError, OutputError, listed, printable
from ckptavg.formats import open_checkpoint, torchzip
from ckptavg.formats.checkpoint import PROVENANCE, span_elements, without_wrappers
from ckptavg.formats.torchzip import Archive
from ckptavg.merge.jobs import Checksum, FileLayout, Layout, OutputTensor, StoredTensor
from ckptavg.write.torchzip import mention_kept
from ckptavg.write.zipfile import CRC_IN_CENTRAL, CRC_IN_LOCAL, Zip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.parts import Part
    from ckptavg.formats.tensors import Tensor

log = logging.getLogger("ckptavg")

_CENTRAL_SIZE, _LENGTHS = 46, 28  # of an entry in the zip's directory
# The weights in files whose `state_dict` is an average: see `statedict.weights_beside_average`.
BESIDE_AVERAGE = ("current_model_state", "ema_state_dict")
_WEIGHTS_ALONE = "write the weights alone, with `container=weights`"
_DESCRIPTOR = b"PK\7\x08"
_HAS_DESCRIPTOR = 1 << 3

Span = tuple[int, int]
"""Where bytes begin and end in a file."""


def lay_out_container(
    path: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    last: Checkpoint,
    *,
    mirrored: bool,
) -> Layout:
    """Lay out the last checkpoint's torch file with other values in some of its tensors.

    Args:
        path: the output.
        tensors: the tensors with other values.
        metadata: strings; the file has no place for any but the provenance.
        last: the last checkpoint.
        mirrored: write the tensors as well to the average that Lightning or MMEngine keeps there.

    Raises:
        OutputError: two tensors share bytes, so that each cannot have a value of its own.
    """
    file = last.parts[0]
    mention_kept(last, last.other_entries)
    targets = [[last.tensors[tensor.names[0]]] for tensor in tensors]
    for key in last.other_keys:
        if mirrored and (last.key in BESIDE_AVERAGE and key == "state_dict"):
            _add_twins(path, tensors, targets, open_checkpoint(last.path, key=key))
        else:
            _mention_other(last, key)
    spans = _spans(path, tensors, targets)
    if torchzip.matches(file.path, file.read(0, 4)):
        layout, end = _lay_out_zip(file, spans, metadata)
    else:
        log.info("a file in torch's format from before 1.6 has no place for the provenance")
        layout, end = FileLayout(file.size), file.size
    scattered = {
        position: tuple(StoredTensor(file, place) for place in each if place.strides is not None)
        for position, each in enumerate(targets)
    }
    return Layout(
        path,
        {"": layout},
        tuple(tuple(place.offset for place in each if place.strides is None) for each in targets),
        tuple(_copies(file, spans, end)),
        {position: each for position, each in scattered.items() if each},
    )


def _add_twins(
    path: Path,
    tensors: Sequence[OutputTensor],
    targets: Sequence[list[Tensor]],
    twin: Checkpoint,
) -> None:
    """Add the places that the tensors have in another state dict, with or without a prefix."""
    twins = {**without_wrappers(twin, keep_prefix=False)[0].tensors, **twin.tensors}
    for tensor, places in zip(tensors, targets, strict=True):
        others = dict.fromkeys(twins[name] for name in tensor.names if name in twins)
        kind = places[0].dtype, places[0].shape
        if not others or any((place.dtype, place.shape) != kind for place in others):
            raise OutputError(
                "differs in dtype or shape between its state_dict and its weights",
                path=path,
                tensor=tensor.names[0],
                remedy=_WEIGHTS_ALONE,
            )
        places += [place for place in others if place != places[0]]


def _mention_other(last: Checkpoint, key: str) -> None:
    """Warn of what becomes of another state dict. Tensors that both share are in the file once."""
    with contextlib.suppress(CkptAvgError):
        others = open_checkpoint(last.path, key=key).tensors
        if not any(tensor.dtype.averaged for tensor in others.values()):
            return  # counters, as in Lightning's `averaging_state`
        weights = sorted({_span(tensor) for tensor in last.tensors.values() if tensor.count})
        shared = [n for n, each in others.items() if each.count and _overlaps(weights, _span(each))]
        if shared:
            log.warning(
                "%s in the container shares %d of %d tensors with the weights, which change: %s",
                *(printable(key), len(shared), len(others), listed(shared)),
            )
        if len(shared) == len(others):
            return
    log.warning("%s in the container stays the last checkpoint's", printable(key))


def _span(place: Tensor) -> Span:
    nbytes = place.nbytes
    if place.strides is not None:
        nbytes = span_elements(place.shape, place.strides) * place.dtype.itemsize
    return place.offset, place.offset + nbytes


def _overlaps(spans: Sequence[Span], span: Span) -> bool:
    """Whether a span overlaps one of several, which are sorted and apart from each other."""
    before = bisect.bisect_left(spans, (span[1], 0)) - 1
    return before >= 0 and spans[before][1] > span[0]


def _spans(
    path: Path, tensors: Sequence[OutputTensor], targets: Sequence[Sequence[Tensor]]
) -> list[Span]:
    """The spans of the tensors in order, which must not overlap."""
    spans = sorted(
        (*_span(place), tensor.names[0])
        for tensor, places in zip(tensors, targets, strict=True)
        for place in places
        if place.count
    )
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise OutputError(
                f"shares bytes with {printable(other)} in the last checkpoint, so its file cannot "
                "hold separate averages",
                path=path,
                tensor=name,
                remedy=_WEIGHTS_ALONE,
            )
    return [(start, end) for start, end, _ in spans]


def _copies(file: Part, spans: Sequence[Span], end: int) -> Iterator[tuple[StoredTensor, int]]:
    """What lies between the tensors, up to the given end."""
    position = 0
    for start, stop in [*spans, (end, end)]:
        if start > position:
            yield StoredTensor.of_bytes(file, position, start - position), position
        position = max(position, stop)


def _lay_out_zip(
    file: Part, spans: Sequence[Span], metadata: Mapping[str, str]
) -> tuple[FileLayout, int]:
    """The new end of a zip (provenance and directory), and the offset at which it begins."""
    archive = Archive(file)
    entries = dict(zip(archive.records, _directory_entries(archive), strict=True))
    entries.pop(archive.prefix + PROVENANCE, None)
    added = Zip(archive.prefix, archive.directory_start)
    if PROVENANCE in metadata:
        added.add(PROVENANCE, metadata[PROVENANCE].encode())
    directory = dict(zip(entries, added.finish(list(entries.values())), strict=True))
    checksums = tuple(_checksums(archive, directory, spans))
    return FileLayout(added.end, tuple(added.blobs), checksums), archive.directory_start


def _directory_entries(archive: Archive) -> Iterator[bytes]:
    """The entries of the zip's directory as they stand in the file."""
    start = archive.directory_start
    directory = archive.file.read(start, archive.file.size - start)
    position = 0
    for _ in archive.records:
        lengths = struct.unpack_from("<3H", directory, position + _LENGTHS)
        size = _CENTRAL_SIZE + sum(lengths)
        yield directory[position : position + size]
        position += size


def _checksums(
    archive: Archive, directory: Mapping[str, int], spans: Sequence[Span]
) -> Iterator[Checksum]:
    """The checksums of the records that hold some of the weights."""
    begins = [start for start, _ in spans]
    names = [name for name in directory if name.startswith(f"{archive.prefix}data/")]
    for name, (start, size) in archive.places(dict.fromkeys(names)).items():
        first = bisect.bisect_left(begins, start)
        if first < len(begins) and begins[first] < start + size:
            beside = _checksum_beside(archive, name, start)
            yield Checksum(start, size, (directory[name] + CRC_IN_CENTRAL, beside))


def _checksum_beside(archive: Archive, name: str, start: int) -> int:
    """Where a record's own checksum stands: behind its bytes, or in the header before them."""
    entry = archive.records[name]
    if not entry.flag_bits & _HAS_DESCRIPTOR:
        return entry.header_offset + CRC_IN_LOCAL
    end = start + entry.file_size
    if archive.file.read(end, len(_DESCRIPTOR)) != _DESCRIPTOR:
        raise FormatError(
            f"record {printable(name)} is not followed by its checksum", path=archive.file.path
        )
    return end + len(_DESCRIPTOR)
