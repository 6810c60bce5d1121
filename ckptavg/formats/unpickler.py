"""Read a torch file's pickle as data: nothing that it names is imported or called.

This is the pure-Python `pickle._Unpickler` with most of its opcodes replaced. The C one cannot be
made safe: it allocates what a file claims before looking, and hashes nested tuples without a bound.
A few globals stand for functions of this module, and all others for inert placeholders.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from types import FunctionType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NoReturn

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats import dtensors
from ckptavg.formats.pickled import (
    STORAGES,
    PickledTensor,
    Placeholder,
    StateOrderedDict,
    Storage,
    UnreadableTensor,
    is_tensor,
)
from ckptavg.formats.tensors import BY_NAME, DType

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Sizes = Iterable[int]

LARGEST_PICKLE = 256 << 20
_MOST_GLOBALS = 10_000
_LONGEST_GLOBAL = 1_000
# Calls may copy this many elements of their arguments, and so many more for each byte read.
_FREE_COPIES = 1 << 20
_COPIES_PER_BYTE = 2
_COPIED = (str, bytes, bytearray, tuple, list, dict, set, frozenset)
_WIDEST_KEY = 64  # bits


class PickleError(FormatError):
    """The pickle is damaged, hostile, or of a kind that torch does not write."""


def load(data: bytes, path: Path | None = None) -> object:
    """Build what the pickle of a file describes, out of inert parts; PickleError if it cannot."""
    if len(data) > LARGEST_PICKLE:
        raise PickleError(f"its pickle of {len(data)} bytes exceeds {LARGEST_PICKLE}", path=path)
    return run(InertUnpickler(io.BytesIO(data)), path)


def run(unpickler: InertUnpickler, path: Path | None = None) -> object:
    """Build what an unpickler's stream describes, and leave the stream where the pickle ends."""
    try:
        return unpickler.load()
    except PickleError as error:
        error.path = path
        raise
    except CkptAvgError:
        raise
    # Damaged bytes can raise anything.
    except Exception as error:
        what = f"{type(error).__name__}: {printable(error)}"
        raise PickleError(f"damaged pickle ({what})", path=path) from error


def refuse(what: str) -> NoReturn:
    """Raise `PickleError` for what no checkpoint has."""
    raise PickleError(f"its pickle has {what}, which torch does not write")


class InertUnpickler(pickle._Unpickler):  # noqa: SLF001 - the pure-Python one has no other name
    """An unpickler that builds inert parts.

    Args:
        file: a stream at the start of a pickle. No more than the pickle is read of it.
    """

    # Attributes of the base class that its type stubs leave out.
    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001

    def __init__(self, file: BinaryIO) -> None:
        # Strings that Python 2 pickled may hold any bytes.
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self._file, self._start = file, file.tell()
        self._globals: dict[tuple[str, str], object] = {}
        self._copies, self._most_copies = 0, _FREE_COPIES

    def find_class(self, module: str, name: str) -> object:
        """Return what stands for a global. Nothing is imported."""
        if (module, name) not in self._globals:
            if len(self._globals) >= _MOST_GLOBALS:
                refuse("too many kinds of objects")
            if len(module) + len(name) > _LONGEST_GLOBAL:
                refuse("a global with an endless name")
            self._globals[module, name] = _stand_in(module, name)
        return self._globals[module, name]

    def persistent_load(self, pid: object) -> object:
        """Return the storage that `("storage", type, key, device, size)` names."""
        match pid:
            case ("storage", kind, str(key), _, int()):
                return Storage(key, kind if isinstance(kind, DType) else None)
        return refuse("an unknown persistent id")

    def call(self, function: object, arguments: object) -> Any:  # noqa: ANN401
        """Call what stands for a global. Nothing else in a pickle can be called."""
        if not isinstance(arguments, tuple):
            refuse("a call without a tuple of arguments")
        self._count_copies(len(arguments))
        if isinstance(function, Placeholder):
            return Placeholder(function.origin, arguments)
        if not isinstance(function, FunctionType):
            refuse(f"a call of a {type(function).__name__}")
        self._count_copies(sum(len(part) for part in arguments if isinstance(part, _COPIED)))
        return function(self, *arguments)

    def _count_copies(self, count: int) -> None:
        """Bound what calls copy, since the arguments can be the same big list each time."""
        self._copies += count
        if self._copies > self._most_copies:
            # How long the pickle is becomes known only at its end: go by what was read so far.
            read = self._file.tell() - self._start
            self._most_copies = _FREE_COPIES + _COPIES_PER_BYTE * read
        if self._copies > self._most_copies:
            refuse("calls that multiply what it holds")

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def _newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self._reduce()

    def _instantiate(self, klass: object, args: list[object]) -> None:
        """Make an instance: what the base class does for INST and OBJ, of the first protocols."""
        self.append(self.call(klass, tuple(args)))

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif isinstance(target, StateOrderedDict):
            if isinstance(state, dict):
                target.module_versions = state.get("_metadata")
        elif not is_tensor(target):
            refuse(f"a state for a {type(target).__name__}")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _setitems(self) -> None:
        self._put(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._put(items)

    def _put(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            _fill(target, zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, Placeholder):
            refuse(f"an item for a {type(target).__name__}")

    def _additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            target |= _set(items)
        elif not isinstance(target, Placeholder):
            refuse(f"an item for a {type(target).__name__}")

    def _frozenset(self) -> None:
        items = self.pop_mark()  # first, as it gives `append` another stack
        self.append(frozenset(_set(items)))

    def _bytearray8(self) -> None:
        """Read as many bytes as there are, whatever length is claimed."""
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    def _refuse(self) -> None:
        refuse("an opcode")

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BYTEARRAY8[0]: _bytearray8,
    }
    dispatch |= dict.fromkeys(
        pickle.NEXT_BUFFER + pickle.READONLY_BUFFER + pickle.EXT1 + pickle.EXT2 + pickle.EXT4
        # In protocol 0, torch cannot name a storage.
        + pickle.PERSID + pickle.PUT + pickle.GET,
        _refuse,
    )  # fmt: skip


def _key(key: object) -> object:
    """What replaces an object as the key of a dict or the member of a set.

    Hashing a tuple of tuples of tuples can take for ever, and big integers or tuples of numbers can
    be made to have one hash. So scalars are keys as they are, and everything else by identity.
    """
    if isinstance(key, str | float | bytes | Placeholder | DType | None):
        return key
    if isinstance(key, int) and key.bit_length() <= _WIDEST_KEY:
        return key
    return Placeholder("key", (key,))


def _set(items: Iterable[object]) -> set[object]:
    return {_key(item) for item in items}


def _fill(target: dict[Any, Any], pairs: Iterable[tuple[object, object]]) -> dict[Any, Any]:
    """Put pairs into a dict, with keys as `_key` has them."""
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        target[_key(key)] = value
    return target


def _tensor(
    storage: object, offset: int, shape: Sizes, strides: Sizes, *, marks: object, dtype: object
) -> PickledTensor | UnreadableTensor:
    """Describe a tensor. The dtype is the storage's where it is None."""
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
    unpickler: InertUnpickler, function: object, kind: object, arguments: object, state: object
) -> object:
    name = kind.origin.rpartition(".")[2] if isinstance(kind, Placeholder) else ""
    if name in dtensors.READERS:
        return dtensors.READERS[name](arguments, state)
    return unpickler.call(function, arguments)


def _encode(_unpickler: InertUnpickler, *arguments: object) -> object:
    """Bytes, which protocols up to 2 pickle as text that is to be encoded."""
    match arguments:
        case (str(text), "latin1"):
            return text.encode("latin1")
    return Placeholder("_codecs.encode", arguments)


def _bytes(_unpickler: InertUnpickler, *arguments: object) -> object:
    """No bytes, as protocols up to 2 pickle them."""
    return Placeholder("builtins.bytes", arguments) if arguments else b""


def _bytearray(_unpickler: InertUnpickler, *arguments: object) -> object:
    match arguments:
        case () | (bytes(),) | (str(), "latin-1"):
            return bytearray(*arguments)
    return Placeholder("builtins.bytearray", arguments)


def _attribute(unpickler: InertUnpickler, owner: object, name: object) -> object:
    """A nested class, a member of an enumeration, a bound method."""
    if not isinstance(name, str):  # a tuple of tuples of tuples takes for ever to hash
        refuse("an attribute whose name is not a string")
    return unpickler.find_class(getattr(owner, "origin", "?"), name)


_GLOBALS: dict[tuple[str, str], Callable[..., object]] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "set"): lambda _, items=(): _set(items),
    ("builtins", "frozenset"): lambda _, items=(): frozenset(_set(items)),
    ("builtins", "dict"): lambda _, pairs=(): _fill({}, pairs),
    ("builtins", "getattr"): _attribute,
    ("collections", "OrderedDict"): lambda _, pairs=(): _fill(StateOrderedDict(), pairs),
    ("collections", "defaultdict"): lambda _, _factory=None, pairs=(): _fill({}, pairs),
    ("torch", "Size"): lambda _, numbers=(): tuple(numbers),
    ("torch._utils", "_rebuild_tensor"): lambda _, *place: _tensor(*place, marks=None, dtype=None),
    ("torch._utils", "_rebuild_tensor_v2"): (
        lambda _, storage, offset, shape, strides, _grad, _hooks, marks=None: _tensor(
            storage, offset, shape, strides, marks=marks, dtype=None
        )
    ),
    ("torch._utils", "_rebuild_tensor_v3"): (
        lambda _, storage, offset, shape, strides, _grad, _hooks, dtype, marks=None: _tensor(
            storage, offset, shape, strides, marks=marks, dtype=dtype
        )
    ),
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch.autograd.variable", "Variable"): _parameter,
    ("torch._tensor", "_rebuild_from_type"): _tensor_of_subclass,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_subclass,
}


def _stand_in(module: str, name: str) -> object:
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
