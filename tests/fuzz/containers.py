"""Containers of every layout out of pieces, also such as no library writes."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

from ckptavg.formats.torchlegacy import LegacyUnpickler

_SHORT, _WORD, _LONG = 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF


def safetensors_of(header: str | bytes | Mapping[str, object], body: bytes = b"") -> bytes:
    """A length, a header and the tensors' bytes."""
    text = json.dumps(header) if isinstance(header, Mapping) else header
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + body


def safetensors_pieces(data: bytes) -> tuple[bytes, bytes]:
    """Header and body; all of it is the header where its length is beyond the end."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


@dataclass(frozen=True)
class Record:
    """A record of a zip, and what its directory says of it if that is not the truth."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    offset: int | None = None
    extra: bytes = b""


def zip_of(records: Sequence[Record], comment: bytes = b"") -> bytes:
    """A zip; checksums are 0, as no reader of ours looks at them."""
    body, directory = b"", b""
    for record in records:
        size = len(record.data) if record.size is None else record.size
        offset = len(body) if record.offset is None else record.offset
        common = struct.pack(
            "<HHHHHIIIHH",
            *(20, record.flags & _SHORT, record.method & _SHORT, 0, 0, 0),
            *(size & _WORD, size & _WORD, len(record.name), len(record.extra)),
        )
        names = record.name + record.extra
        body += b"PK\3\4" + common + names + record.data
        directory += b"PK\1\2\x14\0" + common
        directory += struct.pack("<HHHII", 0, 0, 0, 0, offset & _WORD) + names
    end = struct.pack(
        "<HHHHIIH", 0, 0, len(records), len(records), len(directory), len(body), len(comment)
    )
    return body + directory + b"PK\5\6" + end + comment


def zip64_extra(size: int, offset: int) -> bytes:
    """What has the size and the place of a record where 32 bits do not."""
    return struct.pack("<HHQQQ", 1, 24, size & _LONG, size & _LONG, offset & _LONG)


def zip_records(data: bytes) -> list[Record]:
    """The records of a zip; raises what `zipfile` raises."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        return [
            Record(
                entry.filename.encode("utf-8", "surrogatepass")[:_SHORT],
                _stored(data, entry),
                entry.compress_type,
                entry.flag_bits,
            )
            for entry in archive.infolist()
        ]


def _stored(data: bytes, entry: zipfile.ZipInfo) -> bytes:
    start = max(0, entry.header_offset)
    header = data[start : start + 30]
    start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return data[start : start + entry.file_size]


def torch_zip_of(pickled: bytes, storages: Mapping[str, bytes]) -> bytes:
    """What `torch.save` writes, without its padding."""
    return zip_of(
        [
            Record(b"x/data.pkl", pickled),
            Record(b"x/byteorder", b"little"),
            *(Record(f"x/data/{key}".encode(), data) for key, data in storages.items()),
            Record(b"x/version", b"3\n"),
        ]
    )


def legacy_of(pickled: bytes, most: int = 1 << 12) -> bytes:
    """What `torch.save` wrote before 1.6, with the storages that the pickle names, all zeros."""
    machine = LegacyUnpickler(BytesIO(pickled))
    with contextlib.suppress(Exception):
        machine.load()
    storages = machine.storages
    if sum(count * size for count, size in storages.values()) > most:
        storages = {}
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return (
        b"".join(pickle.dumps(value, 2) for value in head)
        + pickled
        + pickle.dumps([*storages], 2)
        + b"".join(struct.pack("<q", n) + bytes(n * size) for n, size in storages.values())
    )


def packed(*files: bytes) -> bytes:
    """Several files as one input: each but the last has its length before it."""
    *first, last = files
    return b"".join(struct.pack("<H", len(file) & _SHORT) + file for file in first) + last


def unpacked(data: bytes, count: int) -> list[bytes]:
    """So many files out of one input, whatever it is."""
    files = []
    for _ in range(count - 1):
        size = int.from_bytes(data[:2], "little")
        files.append(data[2 : 2 + size])
        data = data[2 + size :]
    return [*files, data]
