"""Lay out a zip of stored records, of which those of tensors are filled in later.

https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7 to 4.3.16.
"""

from __future__ import annotations

import struct
import zlib
from itertools import accumulate
from typing import TYPE_CHECKING

from ckptavg.merge.jobs import Checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

_ALIGNMENT = 64  # torch's
_LOCAL = struct.Struct("<4s5HIII2H")
_CENTRAL = struct.Struct("<4s6HIII5HII")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4HIIH")
_VERSION = 45  # zip64
_UTF8 = 1 << 11
CRC_IN_LOCAL, CRC_IN_CENTRAL = 14, 16
_MAX32, _MAX16 = 0xFFFFFFFF, 0xFFFF
_EPOCH = (0, 0x21)  # 1980-01-01: the same inputs give the same bytes


class Zip:
    """The headers and the directory of a zip, and the content of its small records.

    Args:
        folder: the folder that all records are in.
        start: where the first record begins: 0, or behind the records of an existing zip.

    Attributes:
        blobs: offset and bytes of what is known already.
        end: bytes of the zip so far.
        checksums: of the records that are written later, once the directory is there.
    """

    def __init__(self, folder: str = "archive/", start: int = 0) -> None:
        self.blobs: list[tuple[int, bytes]] = []
        self.end = start
        self.checksums: list[Checksum] = []
        self._folder = folder
        self._entries: list[bytes] = []
        self._reserved: list[tuple[int, int, int, int]] = []  # entry, header, start, size

    def _put(self, data: bytes) -> int:
        start = self.end
        self.blobs.append((start, data))
        self.end += len(data)
        return start

    def add(self, name: str, data: bytes) -> None:
        """Add a record whose content is known."""
        self._add_header(name, len(data), zlib.crc32(data))
        self._put(data)

    def reserve(self, name: str, size: int) -> int:
        """Add a record whose content is written later, and return where that begins."""
        header = self._add_header(name, size, 0)
        start = self.end
        self.end += size
        if size:
            self._reserved.append((len(self._entries) - 1, header, start, size))
        return start

    def _add_header(self, name: str, size: int, crc: int) -> int:
        """Add the header of a record, and its entry for the directory."""
        encoded = (self._folder + name).encode()
        zip64 = struct.pack("<2H2Q", 1, 16, size, size) if size >= _MAX32 else b""
        unpadded = self.end + _LOCAL.size + len(encoded) + len(zip64) + 4
        padding = -unpadded % _ALIGNMENT
        extra = zip64 + struct.pack("<2s1H", b"FB", padding) + b"Z" * padding
        short = min(size, _MAX32)
        local = _LOCAL.pack(
            b"PK\3\4", _VERSION, _UTF8, 0, *_EPOCH, crc, short, short, len(encoded), len(extra)
        )
        header = self._put(local + encoded + extra)
        wide = [size, size] if size >= _MAX32 else []
        wide += [header] if header >= _MAX32 else []
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        central = _CENTRAL.pack(
            b"PK\1\2",
            *(_VERSION, _VERSION, _UTF8, 0, *_EPOCH),
            *(crc, short, short, len(encoded), len(extra)),
            *(0, 0, 0, 0, min(header, _MAX32)),
        )
        self._entries.append(central + encoded + extra)
        return header

    def finish(self, entries: Sequence[bytes] = ()) -> list[int]:
        """Add the central directory. It always has the 64-bit trailer.

        Args:
            entries: of the directory of the existing zip, as they stand there.

        Returns:
            Where each of those entries is now.
        """
        start, all_entries = self.end, [*entries, *self._entries]
        places = [*accumulate(map(len, all_entries), initial=start)][:-1]
        self._put(b"".join(all_entries))
        for entry, header, begin, nbytes in self._reserved:
            central = places[len(entries) + entry]
            targets = header + CRC_IN_LOCAL, central + CRC_IN_CENTRAL
            self.checksums.append(Checksum(begin, nbytes, targets))
        size, count = self.end - start, len(places)
        end64 = self._put(
            _END64.pack(
                b"PK\6\6", _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, start
            )
        )
        self._put(_LOCATOR64.pack(b"PK\6\7", 0, end64, 1))
        few = min(count, _MAX16)
        self._put(_END.pack(b"PK\5\6", 0, 0, few, few, min(size, _MAX32), min(start, _MAX32), 0))
        return places[: len(entries)]
