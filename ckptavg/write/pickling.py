"""Pickle a state dict as `torch.save` does, without torch (and without the memo)."""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Any

from ckptavg.errors import OutputError
from ckptavg.formats.pickled import PickledTensor, Placeholder, StateOrderedDict
from ckptavg.formats.tensors import DType, contiguous_strides

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from ckptavg.merge.layout import OutputTensor

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
_DEEPEST = 100
_LONGEST = 64 << 20


def pickle_state_dict(
    tensors: Sequence[OutputTensor],
    module_versions: Mapping[str, Any] | None,
    extras: Mapping[str, object] | None = None,
    inner: Mapping[object, OutputTensor] | None = None,
) -> bytes:
    """An `OrderedDict` of tensors as `torch.save` pickles it.

    Args:
        tensors: each under its names; their storages have the keys 0, 1, ...
        module_versions: torch's `_metadata`: a dict for each submodule.
        extras: what else is in the state dict, by name.
        inner: the tensors within `extras`, whose storages' keys follow.
    """
    items = [
        _text(name) + _tensor(str(index), tensor)
        for index, tensor in enumerate(tensors)
        for name in tensor.names
    ]
    writer = _Plain({})
    for index, (pickled, tensor) in enumerate((inner or {}).items(), len(tensors)):
        writer.tensors[pickled] = _tensor(str(index), tensor)
    items += [_text(name) + writer.encode(value) for name, value in (extras or {}).items()]
    state = b""
    if module_versions:
        metadata = _ORDERED_DICT + _items(
            _text(module) + pickle.EMPTY_DICT + _items(_plain_facts(facts))
            for module, facts in module_versions.items()
        )
        state = pickle.EMPTY_DICT + _items([_text("_metadata") + metadata]) + pickle.BUILD
    return pickle.PROTO + b"\2" + _ORDERED_DICT + _items(items) + state + pickle.STOP


class UnwritableError(Exception):
    """A value that is not plain data."""


def is_writable(value: object, inner: Collection[object]) -> bool:
    """Whether a value is plain data, so that it can go into another file.

    Args:
        value: an entry of a state dict.
        inner: the tensors that can be written.
    """
    try:
        _Plain(dict.fromkeys(inner, b"")).encode(value)
    except UnwritableError:
        return False
    return True


class _Plain:
    """Pickles plain values; whatever else a file named has no business in another.

    Attributes:
        tensors: pickles of the tensors within the values.
    """

    def __init__(self, tensors: dict[object, bytes]) -> None:
        self.tensors = tensors
        self._left = _LONGEST

    def encode(self, value: object, depth: int = 0) -> bytes:
        """The value's pickle.

        Raises:
            UnwritableError: it is not plain, endless, or holds itself.
        """
        if depth > _DEEPEST:
            raise UnwritableError
        data = self._encode(value, depth + 1)
        # A list of lists of the same lists is a short pickle and an endless one without the memo.
        self._left -= len(data)
        if self._left < 0:
            raise UnwritableError
        return data

    def _encode(self, value: object, depth: int) -> bytes:  # noqa: PLR0911 - a table
        value = _spelled_out(value)
        match value:
            case str():
                return _text(value)
            case None | bool() | int() | float():
                return _number(value)
            case bytes():
                # As protocol 2 has it: `torch.load` takes no opcode for bytes where it is careful.
                return _call("_codecs", "encode", _text(value.decode("latin1")), _text("latin1"))
            case bytearray():
                return _call("builtins", "bytearray", self.encode(bytes(value), depth))
            case set() | frozenset():
                members = self.encode(sorted(value, key=repr), depth)
                return _call("builtins", type(value).__name__, members)
            case DType():
                return _global("torch", value.name)
            case PickledTensor() if value.is_sound and value in self.tensors:
                return self.tensors[value]
            case Placeholder(origin="_io.BytesIO", state=(content, int() as at, *_)) if isinstance(
                content := _spelled_out(content), bytes
            ):
                # Transformer Engine has its `_extra_state` in these.
                state = self.encode((content, at, None), depth)
                return _call("_io", "BytesIO") + state + pickle.BUILD
        return self._encode_container(value, depth)

    def _encode_container(self, value: object, depth: int) -> bytes:
        if isinstance(value, tuple):
            return pickle.MARK + self._joined(value, depth) + pickle.TUPLE
        if isinstance(value, list):
            inside = self._joined(value, depth)
            return pickle.EMPTY_LIST + pickle.MARK + inside + pickle.APPENDS
        if isinstance(value, dict):
            start = _ORDERED_DICT if isinstance(value, StateOrderedDict) else pickle.EMPTY_DICT
            pairs = value.items()
            return start + _items(self._joined(pair, depth) for pair in pairs)
        raise UnwritableError

    def _joined(self, values: Iterable[object], depth: int) -> bytes:
        return b"".join(self.encode(value, depth) for value in values)


def _spelled_out(value: object) -> object:
    """Bytes that a pickle has as a call, since torch's protocol 2 has no bytes; others as they are.

    Raises:
        UnwritableError: the text in the call stands for no bytes.
    """
    match value:
        case Placeholder(origin="_codecs.encode", arguments=(str() as text, "latin1")):
            return _from_latin1(text)
        case Placeholder(
            origin="builtins.bytearray" | "__builtin__.bytearray", arguments=(content,)
        ) if isinstance(content := _spelled_out(content), bytes):
            return bytearray(content)
        case Placeholder(origin="__builtin__.bytes", arguments=()):
            return b""
        case Placeholder(origin="builtins.bytearray" | "__builtin__.bytearray", arguments=()):
            return bytearray()
    return value


def _from_latin1(text: str) -> bytes:
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise UnwritableError from error


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    inside = b"".join(arguments)
    return _global(module, name) + pickle.MARK + inside + pickle.TUPLE + pickle.REDUCE


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


def _number(value: float | None) -> bytes:
    """A number's own pickle (a bool's, that of None), without its head and its end."""
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
