"""Read a torch file's pickle as data: nothing that it names is imported or called.

This is the pure-Python `pickle._Unpickler` with most of its opcodes replaced. The C one cannot be
made safe: it allocates what a file claims before looking, and hashes nested tuples without a bound.
What its globals stand for is in `standins`.
"""

from __future__ import annotations

import gc
import io
import pickle
import struct
from types import FunctionType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NoReturn

from ckptavg.errors import CkptAvgError, printable
from ckptavg.formats import budget
from ckptavg.formats.budget import Budget, PickleError, refuse
from ckptavg.formats.pickled import Placeholder, StateOrderedDict, Storage, is_tensor
from ckptavg.formats.standins import as_set, fill, stand_in
from ckptavg.formats.tensors import DType

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


_MOST_GLOBALS = 10_000
_LONGEST_GLOBAL = 1_000
_LONGEST_LINE = 1 << 20
_MOST_ARGUMENTS = 100
_COPIED = {str, bytes, bytearray, tuple, list, dict, StateOrderedDict, set, frozenset}
_UINT4 = struct.Struct("<I")
_NARROW = bytes(range(0xC4))  # the bytes of UTF-8 for characters that each take one in memory


def load(data: bytes, path: Path | None = None, *, scale: int = 1) -> object:
    """Build what the pickle of a file describes, out of inert parts; PickleError if it cannot.

    Args:
        data: the pickle.
        path: the file.
        scale: how many times the limits of a torch file's pickle it may reach.
    """
    if len(data) > budget.LARGEST_PICKLE * scale:
        most = budget.LARGEST_PICKLE * scale
        raise PickleError(f"its pickle of {len(data):,} bytes exceeds {most:,}", path=path)
    return run(InertUnpickler(io.BytesIO(data), scale), path)


def run(unpickler: InertUnpickler, path: Path | None = None) -> object:
    """Build what an unpickler's stream describes, and leave the stream where the pickle ends."""
    collects = gc.isenabled()
    gc.disable()  # it would look at all objects again and again, which takes as long as the rest
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
    finally:
        if collects:
            gc.enable()


class InertUnpickler(pickle._Unpickler):  # noqa: SLF001 - the pure-Python one has no other name
    """An unpickler that builds inert parts.

    Args:
        file: a stream at the start of a pickle. No more than the pickle is read of it.
        scale: how many times the limits of a torch file's pickle it may reach.
    """

    # Attributes of the base class that its type stubs leave out.
    proto: int
    metastack: list[list[Any]]
    stack: list[Any]
    append: Callable[[object], None]
    read: Callable[[int], bytes]
    memo: dict[int, object]
    encoding: str
    errors: str

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001

    def __init__(self, file: BinaryIO, scale: int = 1) -> None:
        # Strings that Python 2 pickled may hold any bytes.
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self._file = file
        self._globals: dict[tuple[str, str], object] = {}
        self.budget = Budget(file, scale)

    def load(self) -> object:
        """Carry out the opcodes, as the base class does, within the budget."""
        self.proto = 0
        self.metastack, self.stack = [], []
        self.append = self.stack.append
        self._memo: list[object] = []
        # What the base class adds to reading is of no use: pickles are framed for other readers.
        read = self.read = self._file.read
        opcodes = _OPCODES
        try:
            while True:
                memory = 0
                for _ in range(budget.AT_A_TIME):
                    nbytes, carry_out = opcodes[read(1)]
                    memory += nbytes
                    carry_out(self)
                self.budget.spend(opcodes=budget.AT_A_TIME, memory=memory)
        except pickle._Stop as stop:  # type: ignore[attr-defined] # noqa: SLF001 - STOP raises it
            return stop.value

    def readline(self) -> bytes:
        """Read what some of the first protocols' opcodes are followed by."""
        line = self._file.readline(_LONGEST_LINE)
        if len(line) == _LONGEST_LINE:
            refuse("a line without end")
        return line

    def pop_mark(self) -> list[Any]:
        """Return what is on the stack above the last mark, and remove it."""
        items = self.stack
        self.stack = self.metastack.pop()
        self.append = self.stack.append
        self.budget.memory -= budget.COSTS[pickle.MARK]
        return items

    def find_class(self, module: str, name: str) -> object:
        """Return what stands for a global. Nothing is imported."""
        self.budget.spend(calls=1)
        if (module, name) not in self._globals:
            if len(self._globals) >= _MOST_GLOBALS:
                refuse("too many kinds of objects")
            if len(module) + len(name) > _LONGEST_GLOBAL:
                refuse("a global with an endless name")
            self._globals[module, name] = stand_in(module, name)
        return self._globals[module, name]

    def persistent_load(self, pid: object) -> object:
        """Return the storage that `("storage", type, key, device, size)` names."""
        self.budget.spend(calls=budget.CALLS_OF_STORAGE)
        match pid:
            case ("storage", kind, str(key), _, int()):
                return Storage(key, kind if isinstance(kind, DType) else None)
        return refuse("an unknown persistent id")

    def call(self, function: object, arguments: object) -> Any:  # noqa: ANN401
        """Call what stands for a global. Nothing else in a pickle can be called."""
        if not isinstance(arguments, tuple):
            refuse("a call without a tuple of arguments")
        if isinstance(function, Placeholder):
            self.budget.spend(calls=1)
            return Placeholder(function.origin, arguments)
        if not isinstance(function, FunctionType):
            refuse(f"a call of a {type(function).__name__}")
        if len(arguments) > _MOST_ARGUMENTS:  # the call copies them
            refuse("a call with too many arguments")
        # Calls copy, and the arguments can be the same big list each time.
        items = 0
        for part in arguments:
            if type(part) in _COPIED:
                items += len(part)
        self.budget.spend(calls=1, memory=budget.ITEM * items)
        return function(self, *arguments)

    def _remember(self, index: int) -> None:
        """Keep the top of the stack for `_recall`. Indices follow one another, from 0."""
        if index == len(self._memo):
            self._memo.append(self.stack[-1])
        elif index < len(self._memo):
            self._memo[index] = self.stack[-1]
        else:  # those of Python 2 begin with 1
            self.budget.memory += 2 * budget.ENTRY
            self.memo[index] = self.stack[-1]

    def _recall(self, index: int) -> None:
        self.append(self._memo[index] if index < len(self._memo) else self.memo[index])

    def _memoize(self) -> None:
        if self.memo:
            self._remember(len(self._memo) + len(self.memo))
        else:
            self._memo.append(self.stack[-1])

    def _binput(self) -> None:
        self._remember(self.read(1)[0])

    def _long_binput(self) -> None:
        [index] = _UINT4.unpack(self.read(4))
        if index == len(self._memo):
            self._memo.append(self.stack[-1])
        else:
            self._remember(index)

    def _binget(self) -> None:
        self._recall(self.read(1)[0])

    def _long_binget(self) -> None:
        [index] = _UINT4.unpack(self.read(4))
        self._recall(index)

    def _frame(self) -> None:
        self.read(8)  # how much is to be read at once

    def _binunicode(self) -> None:
        [size] = _UINT4.unpack(self.read(4))
        self._text(size)

    def _binunicode8(self) -> None:
        self._text(int.from_bytes(self.read(8), "little"))

    def _text(self, size: int) -> None:
        data = self.read(size)
        if not data.isascii():
            # Each character takes up to four bytes, and more while it is read.
            is_wide = bool(data.translate(None, _NARROW))
            self.budget.spend(calls=1, memory=12 * len(data) * is_wide)
        self.append(str(data, "utf-8", "surrogatepass"))

    def _decode_string(self, value: bytes) -> str:
        """The text of a string of Python 2, in which any byte may become four characters."""
        if not value.isascii():
            self.budget.spend(calls=1, memory=30 * len(value))
        return value.decode(self.encoding, self.errors)

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
            pairs = iter(items)
            fill(target, zip(pairs, pairs, strict=True))
            each = budget.ENTRY if len(target) < budget.MANY else budget.ENTRY_OF_MANY
            self.budget.memory += each * max(len(items) // 2, 2)
        elif not isinstance(target, Placeholder):
            refuse(f"an item for a {type(target).__name__}")

    def _additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            self.budget.memory += budget.MEMBER * len(items)
            target |= as_set(items)
        elif not isinstance(target, Placeholder):
            refuse(f"an item for a {type(target).__name__}")

    def _frozenset(self) -> None:
        items = self.pop_mark()  # first, as it gives `append` another stack
        self.budget.memory += budget.MEMBER * len(items)
        self.append(frozenset(as_set(items)))

    def _bytearray8(self) -> None:
        """Read as many bytes as there are, whatever length is claimed."""
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    def _refuse(self) -> None:
        refuse("an opcode")

    def _end(self) -> NoReturn:
        raise EOFError

    dispatch |= {
        pickle.MEMOIZE[0]: _memoize,
        pickle.BINPUT[0]: _binput,
        pickle.LONG_BINPUT[0]: _long_binput,
        pickle.BINGET[0]: _binget,
        pickle.LONG_BINGET[0]: _long_binget,
        pickle.FRAME[0]: _frame,
        pickle.BINUNICODE[0]: _binunicode,
        pickle.BINUNICODE8[0]: _binunicode8,
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


# What each opcode makes takes so many bytes, and how it is carried out. No byte is the end.
_OPCODES: dict[bytes, tuple[int, Callable[[Any], None]]] = {
    bytes([code]): (budget.memory_of(bytes([code])), carry_out)
    for code, carry_out in InertUnpickler.dispatch.items()
} | {b"": (0, InertUnpickler._end)}  # noqa: SLF001
