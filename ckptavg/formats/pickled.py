"""What a torch file's pickle describes, built of inert parts.

Tensors' descriptions, containers, numbers and strings are built; every other global becomes a
`Placeholder`. Nothing here imports or calls what a pickle names.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.errors import printable
from ckptavg.formats.tensors import BY_NAME, DType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_WIDEST_KEY = 64  # bits

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# Those without a dtype of ours, and the bytes of their elements.
_RAW_STORAGES = {
    "UntypedStorage": 1,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
    "QInt32Storage": 4,
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage as the pickle names it: a record of the file, which several tensors may share.

    Attributes:
        key: the record's name.
        dtype: element type; None where it is untyped bytes.
        size: number of elements (of bytes where untyped).
    """

    key: str
    dtype: DType | None
    size: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A strided tensor as the pickle describes it.

    Attributes:
        storage: where its elements are.
        dtype: element type.
        offset: of its first element within the storage, in elements.
        shape: its dimensions.
        strides: in elements.
    """

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_sound(self) -> bool:
        """Whether it is made of numbers: a pickle can put anything there, endless to hash."""
        return all(type(number) is int for number in (self.offset, *self.shape, *self.strides))


@dataclass(frozen=True, slots=True)
class UnreadableTensor:
    """A tensor that has no plain strided bytes: sparse, quantised, conjugate, ...

    Attributes:
        reason: what it is, for the message if somebody wants it averaged.
    """

    reason: str


class StateOrderedDict(OrderedDict[Any, Any]):
    """An `OrderedDict` that keeps a state dict's `_metadata` and takes no other attribute."""

    __slots__ = ("module_versions",)

    module_versions: object


class Placeholder:
    """What stands for a global, or for what a call of it would have made: kept, never made.

    Attributes:
        origin: what the pickle calls the class or function.
        arguments: what it was to be called with; none yet for the global itself.
        state: what it was to be given as state.
        items: what was to be put into it.
    """

    __slots__ = ("arguments", "items", "origin", "state")

    def __init__(self, origin: str, arguments: tuple[object, ...] = ()) -> None:
        self.origin = origin
        self.arguments = arguments
        self.state: object = None
        self.items: list[object] = []

    def append(self, item: object) -> None:
        """Keep an item of a list-like."""
        self.items.append(item)

    def extend(self, items: Iterable[object]) -> None:
        """Keep the items of a list-like or a set-like."""
        self.items.extend(items)


def as_key(key: object) -> object:
    """What stands for it as the key of a dict or the member of a set.

    To hash a tuple of tuples of tuples can take for ever, and big integers and tuples of numbers
    can be made to have one hash. So scalars are keys as they are, and all else by identity.
    """
    if isinstance(key, str | float | bytes | Placeholder | DType | None):
        return key
    if isinstance(key, int) and key.bit_length() <= _WIDEST_KEY:
        return key
    return Placeholder("key", (key,))


def build_set(items: Iterable[object] = ()) -> set[object]:
    """A set, members as `as_key` has them."""
    return {as_key(item) for item in items}


def build_frozenset(items: Iterable[object] = ()) -> frozenset[object]:
    """A frozen set, members as `as_key` has them."""
    return frozenset(build_set(items))


def fill(target: dict[Any, Any], pairs: Iterable[tuple[object, object]]) -> dict[Any, Any]:
    """Put pairs into a dict, keys as `as_key` has them."""
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        target[as_key(key)] = value
    return target


def _build_dict(pairs: Iterable[tuple[object, object]] = ()) -> dict[Any, Any]:
    return fill({}, pairs)


def _build_ordered_dict(pairs: Iterable[tuple[object, object]] = ()) -> dict[Any, Any]:
    return fill(StateOrderedDict(), pairs)


def _build_default_dict(
    _factory: object = None, pairs: Iterable[tuple[object, object]] = ()
) -> dict[Any, Any]:
    return fill({}, pairs)


def _build_size(values: Iterable[int] = ()) -> tuple[int, ...]:
    return tuple(values)


def _build_tensor(
    storage: object,
    offset: int,
    shape: Iterable[int],
    strides: Iterable[int],
    *rest: object,
    dtype: DType | None = None,
) -> PickledTensor | UnreadableTensor:
    """`torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`; rest: grad, hooks, metadata."""
    if not isinstance(storage, Storage):
        return UnreadableTensor("a tensor without a storage of its own")
    marks = rest[2] if len(rest) > 2 else None  # noqa: PLR2004
    if isinstance(marks, dict) and any(marks.values()):
        kind = ", ".join(mark for mark in ("conj", "neg") if marks.get(mark)) or "unknown"
        return UnreadableTensor(f"a lazily transformed tensor ({kind})")
    found = dtype or storage.dtype
    if found is None:
        return UnreadableTensor("a tensor of unknown element type")
    return PickledTensor(storage, found, offset, tuple(shape), tuple(strides))


def _build_tensor_v3(  # noqa: PLR0917 - torch's own argument list
    storage: object,
    offset: int,
    shape: Iterable[int],
    strides: Iterable[int],
    _grad: object,
    _hooks: object,
    dtype: object,
    metadata: object = None,
) -> PickledTensor | UnreadableTensor:
    if not isinstance(dtype, DType):
        kind = printable(dtype.origin) if isinstance(dtype, Placeholder) else "no dtype"
        return UnreadableTensor(f"a tensor of a dtype that is not known here ({kind})")
    return _build_tensor(storage, offset, shape, strides, None, None, metadata, dtype=dtype)


def _build_parameter(data: object = None, *_: object) -> object:
    """Also the class itself, of which torch before 0.4 made an instance around its data."""
    return data


def call_inner(function: object, _type: object, args: object, _state: object) -> object:
    """`torch._tensor._rebuild_from_type_v2`: a tensor of a subclass, or one with attributes."""
    raise NotImplementedError(function, args)  # the machine makes the inner call itself


def look_up(owner: object, name: object) -> object:
    """`getattr`: a nested class, an enumeration's member, a bound method."""
    raise NotImplementedError(owner, name)  # the machine does, as for any global


_BUILDERS: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): _build_ordered_dict,
    ("collections", "defaultdict"): _build_default_dict,
    ("torch", "Size"): _build_size,
    ("torch._utils", "_rebuild_tensor"): _build_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _build_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _build_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _build_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _build_parameter,
    ("torch.nn.parameter", "Parameter"): _build_parameter,
    ("torch.autograd.variable", "Variable"): _build_parameter,
    ("torch._tensor", "_rebuild_from_type"): call_inner,
    ("torch._tensor", "_rebuild_from_type_v2"): call_inner,
    **{
        (module, name): builder
        for module in ("builtins", "__builtin__")
        for name, builder in (
            ("set", build_set),
            ("frozenset", build_frozenset),
            ("dict", _build_dict),
            ("getattr", look_up),
        )
    },
}


def stand_in(module: str, name: str) -> object:
    """What stands for a global: a function of this module, a dtype, or else a placeholder."""
    builder = _BUILDERS.get((module, name))
    if builder is not None:
        return builder
    if module == "torch" and name in BY_NAME:
        return BY_NAME[name]
    if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
        return BY_NAME[_STORAGES[name]]
    if module.startswith("torch.") and name.startswith("_rebuild_"):
        reason = printable(f"stored by {name} ({name.removeprefix('_rebuild_').replace('_', ' ')})")
        return lambda *_: UnreadableTensor(reason)
    return Placeholder(f"{module}.{name}")


def storage_itemsize(kind: object) -> int | None:
    """Bytes of an element of a storage of such a type; None where the type is not known."""
    if isinstance(kind, DType):
        return kind.itemsize
    if isinstance(kind, Placeholder):
        return _RAW_STORAGES.get(kind.origin.rpartition(".")[2])
    return None
