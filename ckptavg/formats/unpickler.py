"""Read a torch file's pickle as data: nothing that it names is ever imported or called.

The pure-Python `pickle._Unpickler` with its dispatch overridden. The C one cannot be made safe: it
allocates what a file claims before looking, and hashes nested tuples without a bound.
`pickled` has what is built.
"""

from __future__ import annotations

import io
import pickle
from types import FunctionType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NoReturn

from ckptavg.errors import CkptAvgError, printable
from ckptavg.formats.pickled import (
    PickledTensor,
    Placeholder,
    StateOrderedDict,
    Storage,
    UnreadableTensor,
    build_frozenset,
    build_set,
    call_inner,
    fill,
    look_up,
    stand_in,
)
from ckptavg.formats.tensors import DType

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST_PICKLE = 256 << 20
_MOST_GLOBALS = 10_000
_LONGEST_GLOBAL = 1_000
# What calls may copy of their arguments: a bit, and several times what the pickle spells out.
_FREE_COPIES = 1 << 20
_COPIES_PER_BYTE = 2
_COPIED = (str, bytes, bytearray, tuple, list, dict, set, frozenset)


class PickleError(Exception):
    """The pickle is damaged, hostile, or of a kind that torch does not write."""


def load(data: bytes) -> object:
    """Build what the pickle describes, out of inert parts.

    Raises:
        PickleError: whatever is wrong with it.
    """
    if len(data) > LARGEST_PICKLE:
        raise PickleError(f"its pickle is {len(data)} bytes long, of at most {LARGEST_PICKLE}")
    return run(InertUnpickler(io.BytesIO(data)))


def run(machine: InertUnpickler) -> object:
    """Build what a machine's pickle describes, and leave its file where the pickle ends.

    Raises:
        PickleError: whatever is wrong with it.
        CkptAvgError: the file cannot be read.
    """
    try:
        return machine.load()
    except (PickleError, CkptAvgError):
        raise
    # Whatever bytes can make the machine trip over: none of it is the user's mistake.
    except Exception as error:
        what = f"{type(error).__name__}: {printable(error)}"
        raise PickleError(f"damaged pickle ({what})") from error


def refuse(what: str) -> NoReturn:
    """Raise for what no checkpoint has."""
    raise PickleError(f"its pickle has {what}, which torch does not write")


class InertUnpickler(pickle._Unpickler):  # noqa: SLF001 - the pure-Python machine has no other name
    """The pickle machine over inert parts.

    Args:
        file: at a pickle's start. However large it is, no more of it is read than the pickle.
    """

    # The machine's own, of which its type stubs do not know.
    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001

    def __init__(self, file: BinaryIO) -> None:
        # Python 2's strings may hold any bytes.
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self._file, self._start = file, file.tell()
        self._known: dict[tuple[str, str], object] = {}
        self._copies, self._most_copies = 0, _FREE_COPIES

    def find_class(self, module: str, name: str) -> object:
        """What stands for a global here; nothing is imported."""
        found = self._known.get((module, name))
        if found is None:
            if len(self._known) >= _MOST_GLOBALS:
                refuse("too many kinds of objects")
            if len(module) + len(name) > _LONGEST_GLOBAL:
                refuse("a global with an endless name")
            found = self._known[module, name] = stand_in(module, name)
        return found

    def persistent_load(self, pid: object) -> object:
        """A storage's record: `("storage", type, key, device, size)`."""
        match pid:
            case ("storage", kind, str(key), _, int(size)):
                return Storage(key, kind if isinstance(kind, DType) else None, size)
        return refuse("an unknown persistent id")

    def _call(self, function: object, arguments: object) -> Any:  # noqa: ANN401
        """Call what stands for a global. Nothing else in a pickle can be called."""
        if not isinstance(arguments, tuple):
            refuse("a call without a tuple of arguments")
        self._spend(len(arguments))
        if isinstance(function, Placeholder):
            return Placeholder(function.origin, arguments)
        if not isinstance(function, FunctionType):
            refuse(f"a call of a {type(function).__name__}")
        self._spend(sum(len(part) for part in arguments if isinstance(part, _COPIED)))
        if function is call_inner:
            inner, _, inner_arguments, _ = arguments
            return self._call(inner, inner_arguments)
        if function is look_up:
            owner, name = arguments
            if not isinstance(name, str):  # a tuple of tuples of tuples takes for ever to hash
                refuse("an attribute whose name is no text")
            return self.find_class(getattr(owner, "origin", "?"), name)
        return function(*arguments)

    def _spend(self, count: int) -> None:
        """Arguments can be the same big list each time: bound what calls copy."""
        self._copies += count
        if self._copies > self._most_copies:
            # By what was read so far: how long the pickle is, nobody knows before its end.
            read = self._file.tell() - self._start
            self._most_copies = _FREE_COPIES + _COPIES_PER_BYTE * read
        if self._copies > self._most_copies:
            refuse("calls that multiply what it holds")

    def load_reduce(self) -> None:
        """REDUCE and NEWOBJ: call a function, make an instance."""
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX: make an instance; keywords are left out."""
        self.stack.pop()
        self.load_reduce()

    def _instantiate(self, klass: object, args: list[object]) -> None:
        """INST and OBJ, the first protocols' way of making an instance."""
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
        elif not isinstance(target, PickledTensor | UnreadableTensor):
            refuse(f"a state for a {type(target).__name__}")

    def load_setitem(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """SETITEMS."""
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, dict):
            fill(target, pairs)
        elif isinstance(target, Placeholder):
            target.extend(pairs)
        else:
            refuse(f"an item for a {type(target).__name__}")

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
            target |= build_set(items)
        elif isinstance(target, Placeholder):
            target.extend(items)
        else:
            refuse(f"an item for a {type(target).__name__}")

    def load_frozenset(self) -> None:
        """FROZENSET."""
        items = self.pop_mark()  # which gives `append` another stack
        self.append(build_frozenset(items))

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: as much as there is, whatever it claims."""
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    def load_forbidden(self) -> None:
        """Opcodes that no checkpoint has."""
        refuse("an opcode")


for _opcode, _method in (
    (pickle.REDUCE, InertUnpickler.load_reduce),
    (pickle.NEWOBJ, InertUnpickler.load_reduce),
    (pickle.NEWOBJ_EX, InertUnpickler.load_newobj_ex),
    (pickle.BUILD, InertUnpickler.load_build),
    (pickle.SETITEM, InertUnpickler.load_setitem),
    (pickle.SETITEMS, InertUnpickler.load_setitems),
    (pickle.DICT, InertUnpickler.load_dict),
    (pickle.ADDITEMS, InertUnpickler.load_additems),
    (pickle.FROZENSET, InertUnpickler.load_frozenset),
    (pickle.BYTEARRAY8, InertUnpickler.load_bytearray8),
    *(
        (opcode, InertUnpickler.load_forbidden)
        for opcode in (
            *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
            *(pickle.EXT1, pickle.EXT2, pickle.EXT4),
            # Protocol 0, in which torch cannot name a storage.
            *(pickle.PERSID, pickle.PUT, pickle.GET),
        )
    ),
):
    InertUnpickler.dispatch[_opcode[0]] = _method
