"""Pickle what torch pickles, without torch: a state dict, and the metadata of a DCP directory."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.formats.pickled import STORAGES, PickledTensor, Placeholder, StateOrderedDict
from ckptavg.formats.tensors import DType, contiguous_strides

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ckptavg.formats.dcpfiles import Item
    from ckptavg.merge.jobs import OutputTensor

_STORAGES = {name: storage for storage, name in STORAGES.items()}
_DEEPEST = 100
_LONGEST = 64 << 20


def pickle_state_dict(
    values: Mapping[str, bytes], module_versions: Mapping[str, Any] | None
) -> bytes:
    """The opcodes that make an `OrderedDict`.

    Args:
        values: pickles of its values, by name.
        module_versions: torch's `_metadata`: a dict for each submodule.
    """
    state = b""
    if module_versions:
        metadata = _ORDERED_DICT + _items(
            _text(module) + pickle.EMPTY_DICT + _items(_plain_facts(facts))
            for module, facts in module_versions.items()
        )
        state = pickle.EMPTY_DICT + _items([_text("_metadata") + metadata]) + pickle.BUILD
    items = _items(_text(name) + value for name, value in values.items())
    return _ORDERED_DICT + items + state


def pickle_one(value: bytes) -> bytes:
    """The whole pickle of a value, from the opcodes that make it."""
    return b"".join((pickle.PROTO, b"\2", value, pickle.STOP))


def _plain_facts(facts: Mapping[Any, object]) -> Iterator[bytes]:
    """What is no plain value, or has no plain name, is left out."""
    for key, value in facts.items():
        if isinstance(key, str) and isinstance(value, int | str):
            yield _text(key) + (_text(value) if isinstance(value, str) else _number(value))


def pickle_tensor(key: str, tensor: OutputTensor) -> bytes:
    """Pickle a contiguous tensor as torch does: as a call that makes it of a storage.

    Args:
        key: of the storage, which has the tensor's bytes alone.
        tensor: its dtype and shape.
    """
    name = tensor.dtype.name
    if name in _STORAGES:
        rebuild, storage, dtype = "_rebuild_tensor_v2", _global("torch", _STORAGES[name]), b""
        size = tensor.nbytes // tensor.dtype.itemsize
    else:
        rebuild, storage = "_rebuild_tensor_v3", _global("torch.storage", "UntypedStorage")
        dtype, size = _global("torch", name), tensor.nbytes
    storage_id = _text("storage") + storage + _text(key) + _text("cpu") + _number(size)
    arguments = (
        pickle.MARK + storage_id + pickle.TUPLE + pickle.BINPERSID,
        _number(0),  # the tensor's first element in the storage
        _numbers(tensor.shape),
        _numbers(contiguous_strides(tensor.shape)),
        pickle.NEWFALSE,  # requires_grad
        _ORDERED_DICT,  # backward hooks
        dtype,
    )
    return _call("torch._utils", rebuild, *arguments)


def pickle_entries(
    entries: Mapping[str, object], tensors: Mapping[object, bytes]
) -> dict[str, bytes]:
    """Pickle the entries of a state dict that are plain data; others are left out.

    Args:
        entries: values as a checkpoint's pickle has them, by name.
        tensors: pickles of the tensors within them.
    """
    pickles: dict[str, bytes] = {}
    left = _LONGEST
    for name, value in entries.items():
        with contextlib.suppress(_NotPlainError):
            pickles[name] = _Encoder(tensors, left).encode(value)
            left -= len(pickles[name])
    return pickles


class StoredEntry(NamedTuple):
    """An entry of a DCP directory.

    Attributes:
        place: its keys in the nested state dict.
        tensor: its dtype and shape; None for what is no tensor.
        item: where it is in the files.
    """

    place: tuple[str | int, ...]
    tensor: OutputTensor | None
    item: Item

    @property
    def name(self) -> str:
        """Its name where the state dict is flat."""
        return ".".join(map(str, self.place))


_DCP = "torch.distributed.checkpoint.metadata"
_DCP_VERSION = "1.0.0"
# Of the class before it, up to the first of its attributes.
_NEW_OBJECT = pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.EMPTY_DICT + pickle.MARK


def pickle_dcp(entries: Sequence[StoredEntry], provenance: str | None) -> bytes:
    """Pickle the `Metadata` that torch's `FileSystemWriter` writes, with the provenance in it.

    The provenance is an attribute more than torch's class has, which torch ignores.

    Args:
        entries: what is stored, each tensor in one piece.
        provenance: the text.
    """
    memo, pickled = _Memo(), io.BytesIO()
    pickled.write(pickle.PROTO + b"\2" + _global(_DCP, "Metadata") + _NEW_OBJECT)

    def write(name: str, *value: bytes) -> None:
        pickled.write(_text(name))
        pickled.writelines(value)

    def write_dict(name: str, pairs: Iterable[bytes]) -> None:
        write(name, pickle.EMPTY_DICT, pickle.MARK)
        pickled.writelines(pairs)
        pickled.write(pickle.SETITEMS)

    # In the order of the pickle, as the memo demands.
    write_dict(
        "state_dict_metadata",
        (_text(each.name) + _description(each.tensor, memo) for each in entries),
    )
    write_dict("planner_data", (_text(each.name) + _place(each.place) for each in entries))
    write_dict(
        "storage_data", (_index(each, memo) + _storage_info(each.item, memo) for each in entries)
    )
    no_ids = dict.fromkeys(("checkpoint_id", "save_id", "load_id"), pickle.NONE)
    write(
        "storage_meta",
        _object(_global(_DCP, "StorageMeta"), **no_ids, modules=pickle.EMPTY_LIST),
    )
    write("version", _text(_DCP_VERSION))
    if provenance is not None:
        write(PROVENANCE, _text(provenance))
    pickled.write(pickle.SETITEMS + pickle.BUILD + pickle.STOP)
    return pickled.getvalue()


class _Memo:
    """The first time a value is needed it is pickled, and then named by its number."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def __call__(self, value: bytes) -> bytes:
        is_known = value in self._numbers
        number = struct.pack("<I", self._numbers.setdefault(value, len(self._numbers)))
        return pickle.LONG_BINGET + number if is_known else value + pickle.LONG_BINPUT + number


def _description(tensor: OutputTensor | None, memo: _Memo) -> bytes:
    """Torch's description of an entry: a tensor's dtype, shape and only piece."""
    if tensor is None:
        return _object(memo(_global(_DCP, "BytesStorageMetadata")))
    properties = (
        _global("torch", tensor.dtype.name),
        _call("torch.serialization", "_get_layout", _text("torch.strided")),
        pickle.NEWFALSE,  # requires_grad
        _call(_DCP, "_MEM_FORMAT_ENCODING", _number(0)),  # contiguous
        pickle.NEWFALSE,  # pin_memory
    )
    return _object(
        memo(_global(_DCP, "TensorStorageMetadata")),
        properties=memo(
            _global(_DCP, "TensorProperties") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
            + pickle.MARK + b"".join(properties) + pickle.TUPLE + pickle.BUILD
        ),
        size=_size(tensor.shape, memo),
        chunks=pickle.EMPTY_LIST
        + _object(
            memo(_global(_DCP, "ChunkStorageMetadata")),
            offsets=_size((0,) * len(tensor.shape), memo),
            sizes=_size(tensor.shape, memo),
        )
        + pickle.APPEND,
    )  # fmt: skip


def _index(entry: StoredEntry, memo: _Memo) -> bytes:
    kind, name = memo(_global(_DCP, "MetadataIndex")), _text(entry.name)
    if entry.tensor is None:
        return _object(kind, fqn=name, index=pickle.NONE)
    corner = _size((0,) * len(entry.tensor.shape), memo)
    return _object(kind, fqn=name, index=_number(0), offset=corner)


def _storage_info(item: Item, memo: _Memo) -> bytes:
    return _object(
        memo(_global("torch.distributed.checkpoint.filesystem", "_StorageInfo")),
        relative_path=memo(_text(item.file)),
        offset=_number(item.offset),
        length=_number(item.length),
    )


def _size(sizes: Iterable[int], memo: _Memo) -> bytes:
    return memo(_global("torch", "Size")) + _numbers(sizes) + pickle.TUPLE1 + pickle.REDUCE


def _place(place: Iterable[str | int]) -> bytes:
    keys = (_text(key) if isinstance(key, str) else _number(key) for key in place)
    return pickle.MARK + b"".join(keys) + pickle.TUPLE


def _object(kind: bytes, **attributes: bytes) -> bytes:
    """An object of a class that has no state but its attributes."""
    state = (opcodes for name, each in attributes.items() for opcodes in (_text(name), each))
    return b"".join((kind, _NEW_OBJECT, *state, pickle.SETITEMS, pickle.BUILD))


class _NotPlainError(Exception):
    """A value is not plain data."""


class _Encoder:
    """Pickles plain values. Whatever else a checkpoint names must not be imported from another.

    Args:
        tensors: pickles of the tensors within the values.
        longest: bytes that the pickles may take.
    """

    def __init__(self, tensors: Mapping[object, bytes], longest: int) -> None:
        self._tensors, self._left = tensors, longest

    def encode(self, value: object, depth: int = 0) -> bytes:
        """Pickle a value, unless it is not plain, too large, or contains itself."""
        if depth > _DEEPEST:
            raise _NotPlainError
        data = self._encode(value, depth + 1)
        # Lists that share lists have a short pickle, which without the memo has no end.
        self._left -= len(data)
        if self._left < 0:
            raise _NotPlainError
        return data

    def _encode(self, value: object, depth: int) -> bytes:  # noqa: C901, PLR0911 - a table
        match value:
            case str():
                return _text(value)
            case None | bool() | int() | float():
                return _number(value)
            case bytes():
                # The opcode for bytes is not in protocol 2, nor in what `weights_only` accepts.
                return _call("_codecs", "encode", _text(value.decode("latin1")), _text("latin1"))
            case bytearray():
                return _call("builtins", "bytearray", self.encode(bytes(value), depth))
            case set() | frozenset():
                members = self.encode(sorted(value, key=repr), depth)
                return _call("builtins", type(value).__name__, members)
            case DType():
                return _global("torch", value.name)
            case PickledTensor() if value in self._tensors:
                return self._tensors[value]
            case Placeholder(origin="_io.BytesIO", state=(bytes(content), int(at), *_)):
                # Transformer Engine keeps its `_extra_state` in these.
                state = self.encode((content, at, None), depth)
                return _call("_io", "BytesIO") + state + pickle.BUILD
            case tuple():
                return pickle.MARK + self._joined(value, depth) + pickle.TUPLE
            case list():
                inside = self._joined(value, depth)
                return pickle.EMPTY_LIST + pickle.MARK + inside + pickle.APPENDS
            case dict():
                start = _ORDERED_DICT if isinstance(value, StateOrderedDict) else pickle.EMPTY_DICT
                return start + _items(self._joined(pair, depth) for pair in value.items())
        raise _NotPlainError

    def _joined(self, values: Iterable[object], depth: int) -> bytes:
        return b"".join(self.encode(value, depth) for value in values)


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    inside = b"".join(arguments)
    return _global(module, name) + pickle.MARK + inside + pickle.TUPLE + pickle.REDUCE


def _items(pairs: Iterable[bytes]) -> bytes:
    """Put pickled pairs of key and value into the dict before them."""
    return pickle.MARK + b"".join(pairs) + pickle.SETITEMS


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _number(value: float | None) -> bytes:
    """The opcodes of a number, a bool or None."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _numbers(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE


_ORDERED_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
