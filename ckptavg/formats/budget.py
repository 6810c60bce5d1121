"""What a pickle may take of time and memory, in proportion to its bytes, and at most in all.

A training checkpoint with the Adam state of 10,000 tensors has a pickle of 3.3 MB. It takes 1.2
million opcodes, 300,000 calls and 30 MB of memory; with a group of the optimizer for each tensor
42 MB, and with the module and the optimizer as objects 51 MB, 1.8 million opcodes and 365,000
calls. The most that is allowed is three to seven times that. 100,000 tensors alone take less than
half of it. What comes up to the limits takes 3 seconds of a core, and with the bytes of the file
and of the texts in it less than 300 MB.
"""

from __future__ import annotations

import pickle
from typing import BinaryIO, NamedTuple, NoReturn

from ckptavg.errors import FormatError

LARGEST_PICKLE = 32_000_000


class PickleError(FormatError):
    """The pickle is damaged, hostile, or of a kind that torch does not write."""


def refuse(what: str) -> NoReturn:
    """Raise `PickleError` for what no checkpoint has."""
    raise PickleError(f"its pickle has {what}, which torch does not write")


class Limit(NamedTuple):
    """How much of something a pickle may take: so much for each byte, and more; `most` in all."""

    free: int
    per_byte: float
    most: int


# What torch writes has at most half an opcode for each byte, a tenth of a call, and 12 bytes of
# memory. A call takes a microsecond, as much as five to ten opcodes.
_OPCODES = Limit(2_000_000, 0.75, 8_000_000)
_CALLS = Limit(300_000, 0.125, 1_600_000)
_MEMORY = Limit(64 << 20, 24, 180 << 20)
AT_A_TIME = 1_000  # opcodes
CALLS_OF_TENSOR, CALLS_OF_STORAGE = 4, 2

ITEM = 8  # bytes of a reference, on the stack and in the memo
ENTRY = 64  # bytes of an entry of a dict
ENTRY_OF_MANY, MANY = 96, 1_000  # of a large one, while it grows
MEMBER = 200  # of a member of a set, which is copied while the set is made
_TEXT, _NUMBER, _CALL = 64, 40, 80
_LINE = 200  # and much time
COSTS = {
    pickle.MARK: 128, pickle.EMPTY_LIST: 80, pickle.LIST: 80, pickle.APPEND: 32,
    pickle.TUPLE: 72, pickle.TUPLE1: 72, pickle.TUPLE2: 80, pickle.TUPLE3: 88,
    pickle.EMPTY_DICT: 88, pickle.DICT: 88,
    pickle.EMPTY_SET: 224, pickle.FROZENSET: 224, pickle.BINPERSID: 56,
    pickle.BINUNICODE: _TEXT, pickle.SHORT_BINUNICODE: _TEXT, pickle.BINUNICODE8: _TEXT,
    pickle.UNICODE: _LINE, pickle.STRING: _LINE, pickle.BINSTRING: _TEXT,
    pickle.SHORT_BINSTRING: _TEXT, pickle.BINBYTES: _TEXT, pickle.SHORT_BINBYTES: _TEXT,
    pickle.BINBYTES8: _TEXT, pickle.BYTEARRAY8: 96,
    pickle.BINFLOAT: _NUMBER, pickle.BININT: _NUMBER, pickle.BININT2: _NUMBER,
    pickle.FLOAT: _LINE, pickle.INT: _LINE, pickle.LONG: _LINE,
    pickle.LONG1: _TEXT, pickle.LONG4: _TEXT,
    pickle.REDUCE: _CALL, pickle.NEWOBJ: _CALL, pickle.NEWOBJ_EX: _CALL, pickle.OBJ: _CALL,
    pickle.INST: _CALL,
}  # fmt: skip


class Budget:
    """What a pickle has taken; an error when that is more than such a pickle needs.

    Args:
        file: the stream that it is read from, at its start.
        scale: how many times the most that is allowed to a torch file it may take.

    Attributes:
        memory: bytes of objects; what is added here is checked with the next `spend`.
    """

    def __init__(self, file: BinaryIO, scale: int) -> None:
        self._file, self._start, self._scale = file, file.tell(), scale
        self.opcodes = self.calls = self.memory = 0
        self._allow(0)

    def _allow(self, read: int) -> None:
        """Set what may be taken after so many bytes."""
        limits = (_OPCODES, _CALLS, _MEMORY)
        self._most = [min(free + each * read, most * self._scale) for free, each, most in limits]

    def spend(self, *, opcodes: int = 0, calls: int = 0, memory: int = 0) -> None:
        """Add to what was taken.

        Raises:
            PickleError: it is too much.
        """
        self.opcodes += opcodes
        self.calls += calls
        self.memory += memory
        most_opcodes, most_calls, most_memory = self._most
        if self.opcodes > most_opcodes or self.calls > most_calls or self.memory > most_memory:
            self._refuse()

    def _refuse(self) -> None:
        # How long the pickle is becomes known only at its end: go by what was read so far.
        read = self._file.tell() - self._start
        self._allow(read)
        taken = {"opcodes": self.opcodes, "calls": self.calls, "bytes of memory": self.memory}
        for (what, count), most in zip(taken.items(), self._most, strict=True):
            if count > most:
                message = f"its pickle takes more than {int(most):,} {what} in {read:,} bytes"
                remedy = "load it with torch, and save the model's state_dict() alone"
                raise PickleError(message, remedy=remedy)


def memory_of(opcode: bytes) -> int:
    """Bytes of what an opcode makes, without the text or the bytes that follow it."""
    return COSTS.get(opcode, ITEM)
