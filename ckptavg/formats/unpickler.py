"""Read a torch file's pickle as data: nothing that it names is ever imported or called.

The pure-Python `pickle._Unpickler` with its dispatch overridden. The C one cannot be made safe: it
allocates what a file claims before looking, and hashes nested tuples without a bound.
Only tensors' descriptions, containers, numbers and strings are built; every other global becomes
an inert `Placeholder`.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from ckptavg.tensors import BY_NAME, DType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LARGEST_PICKLE = 256 << 20
_MOST_GLOBALS = 10_000
_DEEPEST_KEY = 2
_LONGEST_KEY = 16
_WIDEST_KEY = 128

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


class PickleError(Exception):
    """The pickle is damaged, hostile, or of a kind that torch does not write."""


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


class Placeholder:
    """An instance of some class or the result of some function: kept, never made.

    Attributes:
        origin: what the pickle calls the class or function.
        arguments: what it was to be called with.
        state: what it was to be given as state.
        items: what was to be put into it.
    """

    origin: ClassVar[str] = ""
    arguments: tuple[object, ...]
    state: object
    items: list[object]

    def __new__(cls, *arguments: object, **_: object) -> Self:
        """Keep the arguments, whether the pickle calls the class or makes a bare instance."""
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, None, []
        return made

    def __init__(self, *_: object, **__: object) -> None:
        """All was done in `__new__`, which a pickle may call alone."""

    def __call__(self, *arguments: object) -> Placeholder:
        return type(self)(*arguments)

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def append(self, item: object) -> None:
        """Keep an item of a list-like."""
        self.items.append(item)

    def extend(self, items: Iterable[object]) -> None:
        """Keep the items of a list-like."""
        self.items.extend(items)

    def add(self, item: object) -> None:
        """Keep an item of a set-like."""
        self.items.append(item)


def load(data: bytes) -> object:
    """Build what the pickle describes, out of inert parts.

    Raises:
        PickleError: whatever is wrong with it.
    """
    if len(data) > LARGEST_PICKLE:
        raise PickleError(f"its pickle is {len(data)} bytes long, of at most {LARGEST_PICKLE}")
    try:
        return InertUnpickler(io.BytesIO(data)).load()
    except PickleError:
        raise
    # Whatever bytes can make the machine trip over: none of it is the user's mistake.
    except (Exception, RecursionError) as error:
        raise PickleError(f"damaged pickle ({type(error).__name__}: {error})") from error


def _refuse(what: str) -> NoReturn:
    raise PickleError(f"its pickle has {what}, which torch does not write")


def _check_key(key: object, depth: int = 0) -> None:
    """Only what hashes in bounded time may be a key."""
    if isinstance(key, tuple) and depth < _DEEPEST_KEY and len(key) <= _LONGEST_KEY:
        for part in key:
            _check_key(part, depth + 1)
    elif isinstance(key, int):
        if key.bit_length() > _WIDEST_KEY:
            _refuse("a huge integer as a key")
    elif not isinstance(key, str | float | complex | bytes | Placeholder | DType | None):
        _refuse(f"a {type(key).__name__} as a key")


def _build_set(items: Iterable[object] = ()) -> set[object]:
    kept = list(items)
    for item in kept:
        _check_key(item)
    return set(kept)


def _build_frozenset(items: Iterable[object] = ()) -> frozenset[object]:
    return frozenset(_build_set(items))


def _fill(target: dict[Any, Any], pairs: object) -> dict[Any, Any]:
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:  # type: ignore[attr-defined]
        _check_key(key)
        target[key] = value
    return target


def _build_dict(pairs: object = ()) -> dict[Any, Any]:
    return _fill({}, pairs)


def _build_ordered_dict(pairs: object = ()) -> dict[Any, Any]:
    return _fill(StateOrderedDict(), pairs)


def _build_default_dict(_factory: object = None, pairs: object = ()) -> dict[Any, Any]:
    return _fill({}, pairs)


def _build_size(values: Iterable[int] = ()) -> tuple[int, ...]:
    return tuple(values)


def _build_nested_class(owner: object, name: object) -> object:
    origin = getattr(owner, "origin", "?")
    return type("Placeholder", (Placeholder,), {"origin": f"{origin}.{name}"})


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
        return UnreadableTensor(f"a lazily transformed tensor ({', '.join(map(str, marks))})")
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
        return UnreadableTensor("a tensor of a dtype that is not known here")
    return _build_tensor(storage, offset, shape, strides, None, None, metadata, dtype=dtype)


def _build_parameter(data: object, *_: object) -> object:
    return data


def _build_from_type(function: Callable[..., object], _type: object, args: Any, _: object) -> object:  # noqa: ANN401
    """`torch._tensor._rebuild_from_type_v2`: a tensor of a subclass, or one with attributes."""
    return function(*args)


_BUILDERS: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): _build_ordered_dict,
    ("collections", "defaultdict"): _build_default_dict,
    ("torch", "Size"): _build_size,
    ("torch._utils", "_rebuild_tensor"): _build_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _build_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _build_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _build_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _build_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _build_from_type,
    **{
        (module, name): builder
        for module in ("builtins", "__builtin__")
        for name, builder in (
            ("set", _build_set),
            ("frozenset", _build_frozenset),
            ("dict", _build_dict),
            ("getattr", _build_nested_class),
        )
    },
}


class InertUnpickler(pickle._Unpickler):  # type: ignore[misc,name-defined]  # noqa: SLF001
    """The pickle machine over inert parts."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]  # noqa: SLF001

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._file = file
        self._size = len(file.getbuffer())
        self._known: dict[tuple[str, str], object] = {}

    def find_class(self, module: str, name: str) -> object:
        """What stands for a global here; nothing is imported."""
        found = self._known.get((module, name))
        if found is None:
            if len(self._known) >= _MOST_GLOBALS:
                _refuse("too many kinds of objects")
            found = self._known[module, name] = _stand_in(module, name)
        return found

    def persistent_load(self, pid: object) -> Storage:
        """A storage's record: `("storage", type, key, device, size)`."""
        match pid:
            case ("storage", kind, str(key), _, int(size)):
                return Storage(key, kind if isinstance(kind, DType) else None, size)
        return _refuse("an unknown persistent id")

    def load_build(self) -> None:
        """BUILD: give an object its state."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif isinstance(target, StateOrderedDict):
            if isinstance(state, dict):
                target.module_versions = state.get("_metadata")
        elif not isinstance(target, PickledTensor | UnreadableTensor):
            _refuse(f"a state for a {type(target).__name__}")

    def load_setitem(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """SETITEMS."""
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | Placeholder):
            _refuse(f"an item for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(target, dict):
                _check_key(key)
            target[key] = value

    def load_dict(self) -> None:
        """DICT."""
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_additems(self) -> None:
        """ADDITEMS."""
        items = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            target |= _build_set(items)
        elif isinstance(target, Placeholder):
            target.extend(items)
        else:
            _refuse(f"an item for a {type(target).__name__}")

    def load_frozenset(self) -> None:
        """FROZENSET."""
        self.append(_build_frozenset(self.pop_mark()))

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: never more than there is."""
        size = int.from_bytes(self.read(8), "little")
        if size > self._size:
            _refuse("a longer byte array than itself")
        self.append(bytearray(self.read(size)))

    def load_forbidden(self) -> None:
        """Opcodes that no checkpoint has."""
        _refuse("an opcode")


def _stand_in(module: str, name: str) -> object:
    builder = _BUILDERS.get((module, name))
    if builder is not None:
        return builder
    if module == "torch" and name in BY_NAME:
        return BY_NAME[name]
    if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
        return BY_NAME[_STORAGES[name]]
    if module.startswith("torch.") and name.startswith("_rebuild_"):
        kind = name.removeprefix("_rebuild_").replace("_", " ")
        return lambda *_: UnreadableTensor(f"stored by {name} ({kind})")
    return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})


for _opcode, _method in (
    (pickle.BUILD, InertUnpickler.load_build),
    (pickle.SETITEM, InertUnpickler.load_setitem),
    (pickle.SETITEMS, InertUnpickler.load_setitems),
    (pickle.DICT, InertUnpickler.load_dict),
    (pickle.ADDITEMS, InertUnpickler.load_additems),
    (pickle.FROZENSET, InertUnpickler.load_frozenset),
    (pickle.BYTEARRAY8, InertUnpickler.load_bytearray8),
    (pickle.NEXT_BUFFER, InertUnpickler.load_forbidden),
    (pickle.READONLY_BUFFER, InertUnpickler.load_forbidden),
    (pickle.PERSID, InertUnpickler.load_forbidden),
    (pickle.EXT1, InertUnpickler.load_forbidden),
    (pickle.EXT2, InertUnpickler.load_forbidden),
    (pickle.EXT4, InertUnpickler.load_forbidden),
):
    InertUnpickler.dispatch[_opcode[0]] = _method
