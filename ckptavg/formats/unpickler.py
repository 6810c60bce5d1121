"""Read a torch file's pickle as data: nothing that it names is imported or called.

This is the pure-Python `pickle._Unpickler` with most of its dispatch table replaced. The C one
cannot be made safe: it allocates what a file claims before looking, and hashes nested tuples
without a bound. What the pickle is built of is in `pickled`.
"""

from __future__ import annotations

import io
import pickle
from types import FunctionType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NoReturn

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats.pickled import (
    Placeholder,
    Special,
    StateOrderedDict,
    Storage,
    build_frozenset,
    build_set,
    fill,
    is_tensor,
    stand_in,
)
from ckptavg.formats.tensors import DType

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LARGEST_PICKLE = 256 << 20
_MOST_GLOBALS = 10_000
_LONGEST_GLOBAL = 1_000
# Calls may copy this many elements of their arguments, and so many more for each byte read.
_FREE_COPIES = 1 << 20
_COPIES_PER_BYTE = 2
_COPIED = (str, bytes, bytearray, tuple, list, dict, set, frozenset)


class PickleError(FormatError):
    """The pickle is damaged, hostile, or of a kind that torch does not write."""


def load(data: bytes, path: Path | None = None) -> object:
    """Build what the pickle describes, out of inert parts.

    Args:
        data: the pickle.
        path: file that it comes from, for messages.

    Raises:
        PickleError: whatever is wrong with the pickle.
    """
    if len(data) > LARGEST_PICKLE:
        message = f"its pickle is {len(data)} bytes long, more than {LARGEST_PICKLE}"
        raise PickleError(message, path=path)
    return run(InertUnpickler(io.BytesIO(data)), path)


def run(unpickler: InertUnpickler, path: Path | None = None) -> object:
    """Build what an unpickler's stream describes, and leave the stream where the pickle ends.

    Raises:
        PickleError: whatever is wrong with the pickle.
        CkptAvgError: the stream cannot be read.
    """
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
        known = self._globals.get((module, name))
        if known is None:
            if len(self._globals) >= _MOST_GLOBALS:
                refuse("too many kinds of objects")
            if len(module) + len(name) > _LONGEST_GLOBAL:
                refuse("a global with an endless name")
            known = self._globals[module, name] = stand_in(module, name)
        return known

    def persistent_load(self, pid: object) -> object:
        """Return the storage that `("storage", type, key, device, size)` names."""
        match pid:
            case ("storage", kind, str(key), _, int()):
                return Storage(key, kind if isinstance(kind, DType) else None)
        return refuse("an unknown persistent id")

    def _call(self, function: object, arguments: object) -> Any:  # noqa: ANN401
        """Call what stands for a global. Nothing else in a pickle can be called."""
        if not isinstance(arguments, tuple):
            refuse("a call without a tuple of arguments")
        self._count_copies(len(arguments))
        if isinstance(function, Placeholder):
            return Placeholder(function.origin, arguments)
        self._count_copies(sum(len(part) for part in arguments if isinstance(part, _COPIED)))
        if function is Special.REBUILD_FROM_TYPE:
            inner, _, inner_arguments, _ = arguments
            return self._call(inner, inner_arguments)
        if function is Special.GETATTR:
            owner, name = arguments
            if not isinstance(name, str):  # a tuple of tuples of tuples takes for ever to hash
                refuse("an attribute whose name is not a string")
            return self.find_class(getattr(owner, "origin", "?"), name)
        if not isinstance(function, FunctionType):
            refuse(f"a call of a {type(function).__name__}")
        return function(*arguments)

    def _count_copies(self, count: int) -> None:
        """Bound what calls copy, since the arguments can be the same big list each time."""
        self._copies += count
        if self._copies > self._most_copies:
            # How long the pickle is becomes known only at its end: go by what was read so far.
            read = self._file.tell() - self._start
            self._most_copies = _FREE_COPIES + _COPIES_PER_BYTE * read
        if self._copies > self._most_copies:
            refuse("calls that multiply what it holds")

    def load_reduce(self) -> None:
        """REDUCE and NEWOBJ: call a function, make an instance."""
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX: make an instance. Keyword arguments are left out."""
        self.stack.pop()
        self.load_reduce()

    def _instantiate(self, klass: object, args: list[object]) -> None:
        """INST and OBJ: make an instance, in the first protocols."""
        self.append(self._call(klass, tuple(args)))

    def load_build(self) -> None:
        """BUILD: give an object its state."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif isinstance(target, StateOrderedDict):
            if isinstance(state, dict):
                target.module_versions = state.get("_metadata")
        elif not is_tensor(target):
            refuse(f"a state for a {type(target).__name__}")

    def load_setitem(self) -> None:
        """SETITEM: put one pair into a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """SETITEMS: put pairs into a dict."""
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        """DICT: make a dict of pairs."""
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, dict):
            fill(target, pairs)
        elif not isinstance(target, Placeholder):
            refuse(f"an item for a {type(target).__name__}")

    def load_additems(self) -> None:
        """ADDITEMS: put members into a set."""
        items = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            target |= build_set(items)
        elif not isinstance(target, Placeholder):
            refuse(f"an item for a {type(target).__name__}")

    def load_frozenset(self) -> None:
        """FROZENSET: make a frozen set of members."""
        items = self.pop_mark()  # first, as it gives `append` another stack
        self.append(build_frozenset(items))

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: read as many bytes as there are, whatever length is claimed."""
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    def load_forbidden(self) -> None:
        """Refuse an opcode that no checkpoint has."""
        refuse("an opcode")


_OPCODES = {
    pickle.REDUCE: InertUnpickler.load_reduce,
    pickle.NEWOBJ: InertUnpickler.load_reduce,
    pickle.NEWOBJ_EX: InertUnpickler.load_newobj_ex,
    pickle.BUILD: InertUnpickler.load_build,
    pickle.SETITEM: InertUnpickler.load_setitem,
    pickle.SETITEMS: InertUnpickler.load_setitems,
    pickle.DICT: InertUnpickler.load_dict,
    pickle.ADDITEMS: InertUnpickler.load_additems,
    pickle.FROZENSET: InertUnpickler.load_frozenset,
    pickle.BYTEARRAY8: InertUnpickler.load_bytearray8,
    pickle.NEXT_BUFFER: InertUnpickler.load_forbidden,
    pickle.READONLY_BUFFER: InertUnpickler.load_forbidden,
    pickle.EXT1: InertUnpickler.load_forbidden,
    pickle.EXT2: InertUnpickler.load_forbidden,
    pickle.EXT4: InertUnpickler.load_forbidden,
    # Opcodes of protocol 0, in which torch cannot name a storage.
    pickle.PERSID: InertUnpickler.load_forbidden,
    pickle.PUT: InertUnpickler.load_forbidden,
    pickle.GET: InertUnpickler.load_forbidden,
}
InertUnpickler.dispatch |= {opcode[0]: method for opcode, method in _OPCODES.items()}
