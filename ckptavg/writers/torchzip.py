"""Lay out the zip that `torch.save` would write for a state dict, without torch.

https://docs.pytorch.org/docs/stable/notes/serialization.html: stored records, each aligned to 64
bytes, the state dict as a pickle among them. Tied tensors share a storage.
"""

from __future__ import annotations

import pickle
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.checkpoint import PROVENANCE
from ckptavg.errors import OutputError
from ckptavg.layout import Checksum, Layout, OutputTensor
from ckptavg.tensors import contiguous_strides

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_FOLDER = "archive"
_ALIGNMENT = 64
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
_PACKED = ("float4_e2m1fn_x2",)


def lay_out_torch(
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    module_versions: Mapping[str, Any] | None,
) -> Layout:
    """A zip with a storage for each tensor; our provenance is one more record.

    Args:
        tensors: in the order in which they are to stand.
        metadata: strings; all but the provenance are left out, for lack of a place.
        module_versions: the state dict's `_metadata`: a dict for each submodule.

    Raises:
        OutputError: torch has no such dtype.
    """
    archive = _Zip()
    archive.add("data.pkl", pickle_state_dict(tensors, module_versions))
    archive.add("byteorder", b"little")
    if PROVENANCE in metadata:
        archive.add(PROVENANCE, metadata[PROVENANCE].encode())
    starts = [
        archive.reserve(f"data/{index}", tensor.nbytes) for index, tensor in enumerate(tensors)
    ]
    archive.add("version", b"3\n")
    archive.finish()
    return Layout(
        archive.end,
        tuple(archive.blobs),
        tuple((start,) for start in starts),
        tuple(archive.checksums()),
    )


@dataclass(slots=True)
class _Record:
    name: bytes
    header: int
    start: int
    size: int
    crc: int | None
    directory: int = 0


# https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7 to 4.3.16.
_LOCAL = struct.Struct("<4s5HIII2H")
_CENTRAL = struct.Struct("<4s6HIII5HII")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4HIIH")
_VERSION = 45  # zip64
_UTF8 = 1 << 11
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16
_MAX32, _MAX16 = 0xFFFFFFFF, 0xFFFF
_EPOCH = (0, 0x21)  # 1980-01-01: the same inputs give the same bytes


class _Zip:
    """The skeleton of a zip whose big records are filled in later."""

    def __init__(self) -> None:
        self.blobs: list[tuple[int, bytes]] = []
        self.end = 0
        self._records: list[_Record] = []

    def _put(self, data: bytes) -> int:
        start = self.end
        self.blobs.append((start, data))
        self.end += len(data)
        return start

    def add(self, name: str, data: bytes) -> None:
        """A record whose bytes are known."""
        self._open(name, len(data), zlib.crc32(data))
        self._put(data)

    def reserve(self, name: str, size: int) -> int:
        """A record whose bytes come later; returns where they begin."""
        start = self._open(name, size, None if size else 0)
        self.end += size
        return start

    def _open(self, name: str, size: int, crc: int | None) -> int:
        encoded = f"{_FOLDER}/{name}".encode()
        zip64 = struct.pack("<2H2Q", 1, 16, size, size) if size >= _MAX32 else b""
        unpadded = self.end + _LOCAL.size + len(encoded) + len(zip64) + 4
        padding = -unpadded % _ALIGNMENT
        extra = zip64 + struct.pack("<2s1H", b"FB", padding) + b"Z" * padding
        short = min(size, _MAX32)
        local = _LOCAL.pack(
            b"PK\3\4", _VERSION, _UTF8, 0, *_EPOCH, crc or 0, short, short, len(encoded), len(extra)
        )
        header = self._put(local + encoded + extra)
        self._records.append(_Record(encoded, header, self.end, size, crc))
        return self.end

    def finish(self) -> None:
        """The central directory, with the 64-bit trailer always: one shape for every size."""
        start = self.end
        for record in self._records:
            record.directory = self._put(self._central(record))
        size, count = self.end - start, len(self._records)
        end64 = self._put(
            _END64.pack(
                b"PK\6\6", _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, start
            )
        )
        self._put(_LOCATOR64.pack(b"PK\6\7", 0, end64, 1))
        few = min(count, _MAX16)
        self._put(_END.pack(b"PK\5\6", 0, 0, few, few, min(size, _MAX32), min(start, _MAX32), 0))

    @staticmethod
    def _central(record: _Record) -> bytes:
        wide = [record.size, record.size] if record.size >= _MAX32 else []
        wide += [record.header] if record.header >= _MAX32 else []
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        short = min(record.size, _MAX32)
        fixed = _CENTRAL.pack(
            b"PK\1\2",
            *(_VERSION, _VERSION, _UTF8, 0, *_EPOCH),
            *(record.crc or 0, short, short, len(record.name), len(extra)),
            *(0, 0, 0, 0, min(record.header, _MAX32)),
        )
        return fixed + record.name + extra

    def checksums(self) -> Iterator[Checksum]:
        """The records whose checksum is not known yet."""
        for record in self._records:
            if record.crc is None:
                places = (record.header + _CRC_IN_LOCAL, record.directory + _CRC_IN_CENTRAL)
                yield Checksum(record.start, record.size, places)


def pickle_state_dict(
    tensors: Sequence[OutputTensor], module_versions: Mapping[str, Any] | None
) -> bytes:
    """An `OrderedDict` of tensors as `torch.save` pickles it (protocol 2, without the memo)."""
    items = b"".join(
        _text(name) + _tensor(str(index), tensor)
        for index, tensor in enumerate(tensors)
        for name in tensor.names
    )
    state = b""
    if module_versions:
        metadata = _ORDERED_DICT + _items(
            _text(module) + pickle.EMPTY_DICT + _items(_plain_facts(facts))
            for module, facts in module_versions.items()
        )
        state = pickle.EMPTY_DICT + _items([_text("_metadata") + metadata]) + pickle.BUILD
    return pickle.PROTO + b"\2" + _ORDERED_DICT + _items([items]) + state + pickle.STOP


def _items(pairs: Iterable[bytes]) -> bytes:
    """Put pickled pairs of key and value into the dict before them."""
    return pickle.MARK + b"".join(pairs) + pickle.SETITEMS


def _plain_facts(facts: Mapping[Any, object]) -> Iterator[bytes]:
    """Only plain values: whatever else a file held there has no business in another."""
    for key, value in facts.items():
        if isinstance(key, str) and isinstance(value, int | str):
            yield _text(key) + (_text(value) if isinstance(value, str) else _number(value))


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _number(value: int) -> bytes:
    """A whole number's or a bool's own pickle, without its head and its end."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _numbers(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE


_ORDERED_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def _tensor(key: str, tensor: OutputTensor) -> bytes:
    """A call of `torch._utils._rebuild_tensor_v2`; v3 for the dtypes without a storage class."""
    name = tensor.dtype.name
    if name in _STORAGES:
        rebuild, storage, dtype = "_rebuild_tensor_v2", _global("torch", _STORAGES[name]), b""
        size = tensor.nbytes // tensor.dtype.itemsize
    else:
        rebuild, storage = "_rebuild_tensor_v3", _global("torch.storage", "UntypedStorage")
        dtype, size = _global("torch", name), tensor.nbytes
    persistent_id = (
        pickle.MARK
        + _text("storage")
        + storage
        + _text(key)
        + _text("cpu")
        + _number(size)
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    shape = _torch_shape(tensor)
    place = _number(0) + _numbers(shape) + _numbers(contiguous_strides(shape))
    no_grad_no_hooks = pickle.NEWFALSE + _ORDERED_DICT
    arguments = pickle.MARK + persistent_id + place + no_grad_no_hooks + dtype + pickle.TUPLE
    return _global("torch._utils", rebuild) + arguments + pickle.REDUCE


def _torch_shape(tensor: OutputTensor) -> tuple[int, ...]:
    """Its shape as torch counts: of packed types the bytes, two elements in each."""
    if tensor.dtype.kind != "packed":
        return tensor.shape
    *outer, last = tensor.shape or (1,)
    if tensor.dtype.name not in _PACKED or last * tensor.dtype.bits % 8:
        raise OutputError(
            f"torch has no {tensor.dtype.name} of shape {tensor.shape}",
            tensor=tensor.names[0],
            remedy="write a .safetensors",
        )
    return (*outer, last * tensor.dtype.bits // 8)
