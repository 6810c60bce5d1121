"""What stands for the globals that a pickle names, and what their calls return.

A few are functions of this module, and all others inert placeholders.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import NoneType
from typing import TYPE_CHECKING, Any, Protocol

from ckptavg.errors import printable
from ckptavg.formats import budget, dtensors
from ckptavg.formats.budget import Budget, refuse
from ckptavg.formats.pickled import (
    STORAGES,
    PickledTensor,
    Placeholder,
    StateOrderedDict,
    Storage,
    UnreadableTensor,
)
from ckptavg.formats.tensors import BY_NAME, DType

if TYPE_CHECKING:
    from collections.abc import Callable

Sizes = Iterable[int]
_WIDEST_KEY = 64  # bits
_PLAIN_KEYS = {str, float, bytes, Placeholder, DType, NoneType}
_MOST_AXES = 1_000


class Unpickler(Protocol):
    """What the functions need of the unpickler that calls them."""

    budget: Budget

    def find_class(self, module: str, name: str) -> object:
        """Return what stands for a global."""

    def call(self, function: object, arguments: object) -> object:
        """Call what stands for a global."""


def _key(key: object) -> object:
    """What replaces an object as the key of a dict or the member of a set.

    Hashing a tuple of tuples of tuples can take for ever, and big integers or tuples of numbers can
    be made to have one hash. So scalars are keys as they are, and everything else by identity.
    """
    if type(key) in _PLAIN_KEYS:
        return key
    if isinstance(key, int) and key.bit_length() <= _WIDEST_KEY:
        return key
    return Placeholder("key", (key,))


def as_set(items: Iterable[object]) -> set[object]:
    """A set, with members as `_key` has them."""
    return {_key(item) for item in items}


def fill(target: dict[Any, Any], pairs: Iterable[tuple[object, object]]) -> dict[Any, Any]:
    """Put pairs into a dict, with keys as `_key` has them."""
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        target[_key(key)] = value
    return target


def _tensor(
    unpickler: Unpickler,
    storage: object,
    offset: int,
    shape: Sizes,
    strides: Sizes,
    *,
    marks: object,
    dtype: object,
) -> PickledTensor | UnreadableTensor:
    """Describe a tensor. The dtype is the storage's where it is None."""
    unpickler.budget.spend(calls=budget.CALLS_OF_TENSOR - 1)
    if not isinstance(storage, Storage):
        return UnreadableTensor("a tensor without a storage of its own")
    if isinstance(marks, dict) and any(marks.values()):
        kind = ", ".join(mark for mark in ("conj", "neg") if marks.get(mark)) or "unknown"
        return UnreadableTensor(f"a lazily transformed tensor ({kind})")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, DType):
        kind = printable(dtype.origin) if isinstance(dtype, Placeholder) else "an unknown dtype"
        return UnreadableTensor(f"a tensor of {kind}, which is not supported")
    tensor = PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))
    # Anything else could take for ever to hash.
    if set(map(type, (offset, *tensor.shape, *tensor.strides))) != {int}:
        return UnreadableTensor("a tensor without a valid shape and strides")
    return tensor


# What stands for globals: functions that are called with the unpickler and the pickled arguments.


def _parameter(_unpickler: object, data: object = None, *_: object) -> object:
    """Also the class itself, of which torch before 0.4 made an instance around its data."""
    return data


def _tensor_of_subclass(
    unpickler: Unpickler, function: object, kind: object, arguments: object, state: object
) -> object:
    name = kind.origin.rpartition(".")[2] if isinstance(kind, Placeholder) else ""
    if name in dtensors.READERS:
        return dtensors.READERS[name](arguments, state)
    tensor = unpickler.call(function, arguments)
    if isinstance(tensor, UnreadableTensor) and isinstance(kind, Placeholder):
        is_quantised = kind.origin.startswith("torchao.")
        remedy = "; average the checkpoints before they are quantised" if is_quantised else ""
        return UnreadableTensor(f"a {printable(kind.origin)}{remedy}")
    return tensor


def _encode(_unpickler: Unpickler, *arguments: object) -> object:
    """Bytes, which protocols up to 2 pickle as text that is to be encoded."""
    match arguments:
        case (str(text), "latin1"):
            return text.encode("latin1")
    return Placeholder("_codecs.encode", arguments)


def _bytes(_unpickler: Unpickler, *arguments: object) -> object:
    """No bytes, as protocols up to 2 pickle them."""
    return Placeholder("builtins.bytes", arguments) if arguments else b""


def _bytearray(_unpickler: Unpickler, *arguments: object) -> object:
    match arguments:
        case () | (bytes(),) | (str(), "latin-1"):
            return bytearray(*arguments)
    return Placeholder("builtins.bytearray", arguments)


def _size(_unpickler: object, numbers: object = ()) -> object:
    if not isinstance(numbers, list | tuple) or len(numbers) > _MOST_AXES:
        refuse("a size that no tensor has")
    return tuple(numbers)


def _entries(unpickler: Unpickler, items: Collection[Any]) -> Any:  # noqa: ANN401
    """What a dict or a set is to be made of, once the budget has its entries."""
    unpickler.budget.spend(memory=budget.ENTRY_OF_MANY * len(items))
    return items


def _attribute(unpickler: Unpickler, owner: object, name: object) -> object:
    """A nested class, a member of an enumeration, a bound method."""
    if not isinstance(name, str):  # a tuple of tuples of tuples takes for ever to hash
        refuse("an attribute whose name is not a string")
    return unpickler.find_class(getattr(owner, "origin", "?"), name)


_GLOBALS: dict[tuple[str, str], Callable[..., object]] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "set"): lambda unpickler, items=(): as_set(_entries(unpickler, items)),
    ("builtins", "frozenset"): (
        lambda unpickler, items=(): frozenset(as_set(_entries(unpickler, items)))
    ),
    ("builtins", "dict"): lambda unpickler, pairs=(): fill({}, _entries(unpickler, pairs)),
    ("builtins", "getattr"): _attribute,
    ("collections", "OrderedDict"): lambda unpickler, pairs=(): fill(
        StateOrderedDict(), _entries(unpickler, pairs)
    ),
    ("collections", "defaultdict"): lambda unpickler, _factory=None, pairs=(): fill(
        {}, _entries(unpickler, pairs)
    ),
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): lambda unpickler, *place: _tensor(
        unpickler, *place, marks=None, dtype=None
    ),
    ("torch._utils", "_rebuild_tensor_v2"): (
        lambda unpickler, storage, offset, shape, strides, _grad, _hooks, marks=None: _tensor(
            unpickler, storage, offset, shape, strides, marks=marks, dtype=None
        )
    ),
    ("torch._utils", "_rebuild_tensor_v3"): (
        lambda unpickler, storage, offset, shape, strides, _grad, _hooks, dtype, marks=None: (
            _tensor(unpickler, storage, offset, shape, strides, marks=marks, dtype=dtype)
        )
    ),
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch.autograd.variable", "Variable"): _parameter,
    ("torch._tensor", "_rebuild_from_type"): _tensor_of_subclass,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_subclass,
}


def stand_in(module: str, name: str) -> object:
    """What stands for a global: a function of this module, a dtype, or else a placeholder."""
    if module == "__builtin__":  # its name in Python 2, and so in protocols up to 2
        module = "builtins"
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
