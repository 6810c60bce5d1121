"""What the pickle of a torch file is built of: descriptions of tensors, plain data, placeholders.

The unpickler looks each global up with `stand_in`. A few globals are functions of this module, and
all others are inert: nothing here imports or calls what a pickle names.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

from ckptavg.errors import printable
from ckptavg.formats.tensors import BY_NAME, DType

Pairs = Iterable[tuple[object, object]]

_WIDEST_KEY = 64  # bits
STORAGES = {
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


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage as the pickle names it: a record of the file, which several tensors may share.

    Attributes:
        key: name of the record.
        dtype: element type; None where the storage is untyped bytes.
    """

    key: str
    dtype: DType | None


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A strided tensor as the pickle describes it. Its numbers are unchecked.

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
        """Whether offset, shape and strides are ints. If not, hashing it can take for ever."""
        return all(type(number) is int for number in (self.offset, *self.shape, *self.strides))


@dataclass(frozen=True, slots=True)
class UnreadableTensor:
    """A tensor that has no plain strided bytes: sparse, quantised, conjugate, ...

    Attributes:
        reason: what kind of tensor it is, for the message if it is to be averaged.
    """

    reason: str


def is_tensor(value: object) -> TypeGuard[PickledTensor | UnreadableTensor]:
    """Whether a pickled value is a tensor, readable or not."""
    return isinstance(value, PickledTensor | UnreadableTensor)


class StateOrderedDict(dict[Any, Any]):
    """An `OrderedDict` that keeps a state dict's `_metadata` and takes no other attribute."""

    __slots__ = ("module_versions",)

    module_versions: object


class Placeholder:
    """What stands for a global, or for the object that a call of it would have made.

    Attributes:
        origin: full name of the class or function.
        arguments: what the pickle calls it with; empty for the global itself.
        state: what the pickle gives the object as its state.
    """

    __slots__ = ("arguments", "origin", "state")

    def __init__(self, origin: str, arguments: tuple[object, ...] = ()) -> None:
        self.origin = origin
        self.arguments = arguments
        self.state: object = None

    def append(self, item: object) -> None:
        """Drop an item of a list-like object."""

    def extend(self, items: Iterable[object]) -> None:
        """Drop the items of a list-like object."""


class Special(enum.Enum):
    """Globals whose calls the unpickler carries out itself."""

    GETATTR = enum.auto()
    """`getattr`: a nested class, a member of an enumeration, a bound method."""
    REBUILD_FROM_TYPE = enum.auto()
    """`torch._tensor._rebuild_from_type_v2`: a tensor of a subclass, or one with attributes."""


def as_key(key: object) -> object:
    """What replaces an object as the key of a dict or the member of a set.

    Hashing a tuple of tuples of tuples can take for ever, and big integers or tuples of numbers can
    be made to have one hash. So scalars are keys as they are, and everything else by identity.
    """
    if isinstance(key, str | float | bytes | Placeholder | DType | None):
        return key
    if isinstance(key, int) and key.bit_length() <= _WIDEST_KEY:
        return key
    return Placeholder("key", (key,))


def build_set(items: Iterable[object] = ()) -> set[object]:
    """A set, with members as `as_key` has them."""
    return {as_key(item) for item in items}


def build_frozenset(items: Iterable[object] = ()) -> frozenset[object]:
    """A frozen set, with members as `as_key` has them."""
    return frozenset(build_set(items))


def fill(target: dict[Any, Any], pairs: Pairs) -> dict[Any, Any]:
    """Put pairs into a dict, with keys as `as_key` has them."""
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        target[as_key(key)] = value
    return target


def _build_dict(pairs: Pairs = ()) -> dict[Any, Any]:
    return fill({}, pairs)


def _build_ordered_dict(pairs: Pairs = ()) -> dict[Any, Any]:
    return fill(StateOrderedDict(), pairs)


def _build_default_dict(_factory: object = None, pairs: Pairs = ()) -> dict[Any, Any]:
    return fill({}, pairs)


def _build_size(values: Iterable[int] = ()) -> tuple[int, ...]:
    return tuple(values)


def _build_parameter(data: object = None, *_: object) -> object:
    """Also the class itself, of which torch before 0.4 made an instance around its data."""
    return data


def _build_tensor(
    storage: object,
    offset: int,
    shape: Iterable[int],
    strides: Iterable[int],
    *rest: object,
    dtype: DType | None = None,
) -> PickledTensor | UnreadableTensor:
    """Arguments of `_rebuild_tensor` and `_rebuild_tensor_v2`; rest: grad, hooks, metadata."""
    if not isinstance(storage, Storage):
        return UnreadableTensor("a tensor without a storage of its own")
    marks = rest[2] if len(rest) > 2 else None  # noqa: PLR2004
    if isinstance(marks, dict) and any(marks.values()):
        kind = ", ".join(mark for mark in ("conj", "neg") if marks.get(mark)) or "unknown"
        return UnreadableTensor(f"a lazily transformed tensor ({kind})")
    dtype = dtype or storage.dtype
    if dtype is None:
        return UnreadableTensor("a tensor of unknown element type")
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


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
        return UnreadableTensor(f"a tensor of a dtype that is not supported ({kind})")
    return _build_tensor(storage, offset, shape, strides, None, None, metadata, dtype=dtype)


_BUILTINS: dict[str, Callable[..., object] | Special] = {
    "set": build_set,
    "frozenset": build_frozenset,
    "dict": _build_dict,
    "getattr": Special.GETATTR,
}
_GLOBALS: dict[tuple[str, str], Callable[..., object] | Special] = {
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
    ("torch._tensor", "_rebuild_from_type"): Special.REBUILD_FROM_TYPE,
    ("torch._tensor", "_rebuild_from_type_v2"): Special.REBUILD_FROM_TYPE,
    **{("builtins", name): builder for name, builder in _BUILTINS.items()},
    **{("__builtin__", name): builder for name, builder in _BUILTINS.items()},
}


def stand_in(module: str, name: str) -> object:
    """What stands for a global: a function of this module, a dtype, or else a placeholder."""
    if (module, name) in _GLOBALS:
        return _GLOBALS[module, name]
    if module == "torch" and name in BY_NAME:
        return BY_NAME[name]
    if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
        return BY_NAME[STORAGES[name]]
    if module.startswith("torch.") and name.startswith("_rebuild_"):
        reason = printable(f"stored by {name} ({name.removeprefix('_rebuild_').replace('_', ' ')})")
        return lambda *_: UnreadableTensor(reason)
    return Placeholder(f"{module}.{name}")
