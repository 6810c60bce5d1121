"""Pickles that are small and want much time or memory, and a process to set them off in.

`python -m tests.pickle_bombs` loads those that it is asked for, each in a fork of its own, and
prints what came of it as JSON.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptavg.errors import FormatError
from ckptavg.formats import budget
from ckptavg.formats.budget import PickleError
from ckptavg.formats.parts import open_source
from ckptavg.formats.statedict import find_state_dicts
from ckptavg.formats.torchlegacy import LegacyFile
from ckptavg.formats.unpickler import InertUnpickler, load, run

SECONDS = 20  # of a core
MEMORY = 300 << 20


def text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def named(module, name):
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def stack_global(module, name):
    return text(module) + text(name) + pickle.STACK_GLOBAL


def stop(body: bytes, protocol: int = 4) -> bytes:
    return pickle.PROTO + bytes([protocol]) + body + pickle.STOP


def put(index):
    return pickle.LONG_BINPUT + struct.pack("<I", index)


def get(index):
    return pickle.LONG_BINGET + struct.pack("<I", index)


def nested(opening, closing, depth):
    return opening * depth + closing * depth


def tuple_dag(depth: int) -> bytes:
    """A tuple of 2 ** depth leaves out of 3 * depth bytes."""
    return b")" + b"2\x86" * depth


def laughs(width, depth, fill):
    """Lists of the same list, `width` times, `depth` levels deep."""
    body = b"]" + put(0)
    for level in range(1, depth):
        body += b"](" + get(level - 1) * width + fill + put(level)
    return body


STORAGE = (
    b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\1tQ"
)
BIG_LIST = b"](" + b"N" * 300_000 + b"e" + put(0)
BIG_TUPLE = b"(" + b"N" * 300_000 + b"t" + put(0)
BIG_TEXT = text("x" * 5_000_000) + put(0)
COLLIDING = [index * (2**61 - 1) for index in range(60_000)]

BODIES = {
    "LONG_BINPUT": b"N" + put(2**28) + b"N" + put(2**32 - 1),
    "BYTEARRAY8": pickle.BYTEARRAY8 + struct.pack("<Q", 2**40) + b"x",
    "BYTEARRAY8 of 2**63": pickle.BYTEARRAY8 + struct.pack("<Q", 2**63) + b"x",
    "BINBYTES8": pickle.BINBYTES8 + struct.pack("<Q", 2**40) + b"x",
    "BINUNICODE8": pickle.BINUNICODE8 + struct.pack("<Q", 2**62) + b"x",
    "BINBYTES": pickle.BINBYTES + struct.pack("<I", 2**32 - 1) + b"x",
    "LONG4": pickle.LONG4 + struct.pack("<i", 2**31 - 1) + b"x",
    "FRAME": pickle.FRAME + struct.pack("<Q", 2**62) + b"N",
    "frames": (pickle.FRAME + struct.pack("<Q", 1) + b"N") * 50_000,
    "deep lists": b"]" + nested(b"]", b"a", 300_000),
    "deep tuples": nested(b"(", b"t", 300_000),
    "deep dicts": b"}" + b"K\0}" * 200_000 + b"s" * 200_000,
    "deep tuple as key": b"}" + nested(b"(", b"t", 300_000) + b"Ns",
    "deep tuple as member": b"\x8f(" + nested(b"(", b"t", 300_000) + b"\x90",
    "deep tuple in a frozenset": b"(" + nested(b"(", b"t", 300_000) + b"\x91",
    "DAG as key": b"}" + tuple_dag(200) + b"Ns",
    "DAG in DICT": b"(" + tuple_dag(200) + b"Nd",
    "DAG as key of SETITEMS": b"}(" + tuple_dag(200) + b"Nu",
    "DAG as member": b"\x8f(" + tuple_dag(200) + b"\x90",
    "DAG in a frozenset": b"(" + tuple_dag(200) + b"\x91",
    "DAG of frozensets": b"(\x91" + (put(1) + b"(" + get(1) + b"K\1\x91") * 200 + b"0N",
    "DAG in set()": named("builtins", "set") + b"](" + tuple_dag(200) + b"e\x85R",
    "DAG in dict()": named("builtins", "dict") + b"](" + tuple_dag(200) + b"N\x86e\x85R",
    "DAG in OrderedDict()": named("collections", "OrderedDict")
    + b"](]("
    + tuple_dag(200)
    + b"Nee\x85R",
    "DAG as a shape that is a key": b"}"
    + named("torch._utils", "_rebuild_tensor")
    + b"("
    + STORAGE
    + b"K\0"
    + tuple_dag(200)
    + b")tRNs",
    "DAG to be printed": named("m", "f") + tuple_dag(40) + b"b" + b"2Q",
    "colliding members": b"\x8f("
    + b"".join(pickle.dumps(index, 2)[2:-1] for index in COLLIDING)
    + b"\x90",
    "DAG as a dtype": named("torch._utils", "_rebuild_tensor_v3")
    + b"("
    + STORAGE
    + b"K\0))\x89N"
    + tuple_dag(200)
    + b"tR",
    "laughing parameters": named("torch._utils", "_rebuild_parameter")
    + put(9)
    + BIG_TUPLE
    + (get(9) + get(0) + b"R") * 50_000,
    "DAG as a call": tuple_dag(200) + b")R",
    "huge integers as keys": b"}("
    + b"".join(
        pickle.LONG4 + struct.pack("<i", 500_000) + bytes([index]) * 500_000 + b"N"
        for index in range(1, 20)
    )
    + b"u",
    "integers of one hash": b"}("
    + b"".join(pickle.dumps(index, 2)[2:-1] + b"N" for index in COLLIDING)
    + b"u",
    "tuples of one hash": b"}("
    + b"".join(b"(" + pickle.dumps(index, 2)[2:-1] + b"tN" for index in COLLIDING)
    + b"u",
    "a memo of one hash": b"N" + b"".join(b"p%d\n" % index for index in COLLIDING),
    "digits without end": b"L" + b"9" * 2_000_000 + b"L\n",
    "laughing lists": laughs(10, 40, b"e"),
    "laughing dicts": b"}"
    + b"".join(put(n) + b"}(K\0" + get(n) + b"K\1" + get(n) + b"u" for n in range(100)),
    "laughing set()": named("builtins", "set")
    + put(9)
    + BIG_LIST
    + (get(9) + get(0) + b"\x85R") * 500,
    "laughing Size()": named("torch", "Size")
    + put(9)
    + BIG_LIST
    + (get(9) + get(0) + b"\x85R") * 500,
    "laughing Size() of text": named("torch", "Size")
    + put(9)
    + BIG_TEXT
    + (get(9) + get(0) + b"\x85R") * 100,
    "laughing dict()": named("builtins", "dict")
    + put(9)
    + b"}("
    + b"".join(b"J" + struct.pack("<i", index) + b"N" for index in range(100_000))
    + b"u"
    + put(0)
    + (get(9) + get(0) + b"\x85R") * 500,
    "laughing calls": named("m", "f") + put(9) + BIG_TUPLE + (get(9) + get(0) + b"R") * 500,
    "laughing instances": named("m", "f") + put(9) + BIG_TUPLE + (get(9) + get(0) + b"\x81") * 500,
    "laughing shapes": named("torch._utils", "_rebuild_tensor")
    + put(9)
    + STORAGE
    + put(8)
    + BIG_LIST
    + (get(9) + b"(" + get(8) + b"K\0" + get(0) * 2 + b"tR") * 200,
    "laughing shapes, wrapped": named("torch._tensor", "_rebuild_from_type_v2")
    + put(9)
    + named("torch", "Size")
    + put(8)
    + BIG_LIST
    + (get(9) + b"(" + get(8) + b"N" + get(0) + b"\x85NtR") * 500,
    "laughing names": BIG_TEXT
    + b"".join(get(0) + text(str(index)) + b"\x93" for index in range(2_000)),
    "laughing attributes": named("builtins", "getattr")
    + put(9)
    + named("m", "f")
    + b"".join(get(9) + b"N" + text(str(index)) + b"\x86R" for index in range(100_000)),
    "DAG as the name of an attribute": named("builtins", "getattr")
    + b"N"
    + tuple_dag(200)
    + b"\x86R",
    "a key without end in many dicts": b"}("
    + BIG_TEXT
    + b"N"
    + b"".join(text(str(index)) + b"}" + get(0) + b"Ns" for index in range(2_000))
    + b"u",
    "state dicts below a key without end": b"}"
    + BIG_TEXT
    + b"}("
    + b"".join(
        text(str(index))
        + b"}"
        + text("w")
        + named("torch._utils", "_rebuild_tensor")
        + b"("
        + STORAGE
        + b"K\0))tRs"
        for index in range(900)
    )
    + b"us",
    "a chain of attributes": named("builtins", "getattr")
    + put(9)
    + named("m", "f")
    + put(1)
    + (get(9) + get(1) + text("x" * 100) + b"\x86R" + put(1)) * 50_000,
    "wrapped without end": named("torch._tensor", "_rebuild_from_type_v2")
    + put(9)
    + b")"
    + (put(1) + b"(" + get(9) + b"N" + get(1) + b"Nt") * 100_000
    + put(1)
    + get(9)
    + get(1)
    + b"R",
    "a wrapper of itself": named("torch._tensor", "_rebuild_from_type_v2")
    + put(9)
    + b"]("
    + get(9)
    + b"NNNe"
    + put(1)
    + get(9)
    + b"("
    + get(9)
    + b"N"
    + get(1)
    + b"NtR",
}


BUDGETS: dict[str, Callable[[], bytes]] = {
    "sets without end": lambda: b"(" + pickle.EMPTY_SET * 30_000_000,
    "lists without end": lambda: b"(" + pickle.EMPTY_LIST * 30_000_000,
    "dicts without end": lambda: b"(" + pickle.EMPTY_DICT * 30_000_000,
    "marks without end": lambda: pickle.MARK * 31_000_000,
    "None without end": lambda: b"(" + pickle.NONE * 31_000_000,
    "MEMOIZE without end": lambda: b"N" + pickle.MEMOIZE * 31_000_000,
    "a memo with gaps": lambda: b"N" + b"".join(map(put, range(5, 6_000_000, 2))),
    "tensors of one storage without end": lambda: (
        named("torch._utils", "_rebuild_tensor") + b"q\0" + STORAGE + b"q\1("
        + b"h\0(h\1K\0))tR" * 2_000_000
    ),
    "calls without end": lambda: named("m", "f") + b"q\0(" + b"h\0)R" * 5_000_000,
    "globals without end": lambda: b"cm\nf\n" * 5_000_000,
    "storages without end": lambda: text("x" * 10_000_000) + STORAGE[:-1] + b"q\0"
    + b"h\0Q" * 1_200_000,
    "a text that takes four bytes a character": lambda: text("x" * 31_000_000 + "\U0001f600"),
    "a string of Python 2 that is all escapes": lambda: (
        pickle.BINSTRING + struct.pack("<i", 31_000_000) + b"\xff" * 31_000_000
    ),
}  # fmt: skip
"""Bodies that each take more than a pickle of its size needs."""
_CALL, _SET_UP = named("m", "f") + b"q\0(", named("torch._utils", "_rebuild_tensor") + b"q\0"
NEARLY: dict[str, tuple[bytes, Callable[[int], bytes]]] = {
    "None": (b"(", lambda _: pickle.NONE),
    "lists": (b"(", lambda _: pickle.EMPTY_LIST),
    "dicts": (b"(", lambda _: pickle.EMPTY_DICT),
    "sets": (b"(", lambda _: pickle.EMPTY_SET),
    "bytearrays": (b"(", lambda _: pickle.BYTEARRAY8 + struct.pack("<Q", 1) + b"a"),
    "floats": (b"(", lambda _: pickle.BINFLOAT + bytes(8)),
    "texts": (b"(", lambda _: text("\U0001f600")),
    "strings of Python 2": (b"(", lambda _: pickle.SHORT_BINSTRING + b"\1\xff"),
    "lines": (b"(", lambda _: b"Va\n"),
    "items": (b"}", lambda _: b"NNs"),
    "keys": (b"}(", lambda index: pickle.BININT + struct.pack("<i", index) + b"N"),
    "puts": (b"N", lambda _: put(0)),
    "globals": (b"(", lambda _: b"cm\nf\n"),
    "calls": (_CALL, lambda _: b"h\0)R"),
    "instances": (b"(", lambda _: b"(im\nf\n"),
    "ordered dicts": (_CALL.replace(b"m\nf", b"collections\nOrderedDict"), lambda _: b"h\0)R"),
    "storages": (STORAGE[:-1] + b"q\0(", lambda _: b"h\0Q"),
    "tensors": (_SET_UP + STORAGE + b"q\1(", lambda _: b"h\0(h\1K\0))tR"),
}
"""What to begin with, and what to go on with as long as the limits allow."""


def nearly_too_much(kind: str) -> bytes:
    """A pickle that comes up to the limits, behind a text that makes it as long as it may be."""
    begin, go_on = NEARLY[kind]
    few = 10_000
    machine = InertUnpickler(io.BytesIO(stop(begin + b"".join(map(go_on, range(few))) + b"N")))
    run(machine)
    spent = machine.budget
    counts = [
        budget._OPCODES.most / spent.opcodes,
        budget._CALLS.most / max(spent.calls, 1),
        budget._MEMORY.most / spent.memory,
        budget.LARGEST_PICKLE / (few * len(go_on(0))),
    ]
    body = begin + b"".join(map(go_on, range(int(0.98 * few * min(counts))))) + b"N"
    return stop(text("x" * (budget.LARGEST_PICKLE - len(body) - 100)) + body)


BOMBS = {kind: stop(body) for kind, body in BODIES.items()}
TELLING = (
    *("LONG_BINPUT", "BINBYTES8", "deep dicts", "DAG as key", "DAG to be printed"),
    *("colliding members", "digits without end", "laughing parameters", "laughing Size() of text"),
    *("a chain of attributes", "wrapped without end"),
)
"""One for each bound. Whatever is within a file, the unpickler's own tests set off all of them."""
LONG = ("deep dicts", "laughing parameters", "wrapped without end")
"""Those of them that take longest."""
ALIKE = (
    *("laughing set()", "deep tuple as member", "deep tuple in a frozenset", "deep tuples"),
    *("deep lists", "tuples of one hash"),
)
"""Those that meet the same bounds as others: `laughing dict()`, `deep tuple as key`, `deep dicts`,
`integers of one hash`.
"""


class Asked:
    """A small process of its own that answers what comes of a kind.

    Args:
        module: runs `answer`.
        arguments: of the process.
    """

    def __init__(self, module: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, kind: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(kind, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def answer(what_comes_of: Callable[[str], Any]) -> None:
    """What such a process does."""
    for line in sys.stdin:
        print(json.dumps(what_comes_of(line.rstrip("\n"))), flush=True)


def write_legacy(path, pickled, storages, **changed):
    """A legacy file of this pickle and storages: key to number of elements and bytes."""
    parts = {
        "magic": 0x1950A86A20F9469CFC6C,
        "version": 1001,
        "system": {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
        "keys": list(storages),
    } | changed
    content = b"".join(pickle.dumps(parts[name], 2) for name in ("magic", "version", "system"))
    content += pickled + pickle.dumps(parts["keys"], 2)
    for count, data in storages.values():
        content += struct.pack("<q", count) + data
    path.write_bytes(content)
    return path


def load_legacy(pickled):
    """What comes of the pickle within such a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_legacy(Path(folder, "x.pt"), pickled, {"0": (1, bytes(4))})
        # A budget that went by the size of the file would be none.
        os.truncate(path, 1 << 40)
        try:
            return LegacyFile(open_source(path)).root
        except FormatError as error:
            raise PickleError(str(error)) from error


def explode(pickled, load):
    """Load it within bounds; returns the outcome, seconds of a core and bytes of memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(4 * SECONDS)
    started = time.process_time()
    try:
        find_state_dicts(load(pickled))
        outcome = "loaded"
    except PickleError as error:
        outcome = str(error)
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return outcome, seconds, grown


def in_a_fork(pickled, load=load):
    """What `explode` returns, or how the process died."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        os.write(writing, json.dumps(explode(pickled, load)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(told) if told else [f"died with status {status}", 0, 0]


def assert_bounded(outcome, seconds, memory):
    """What `in_a_fork` tells of a bomb: it was loaded or refused, within bounds."""
    assert not outcome.startswith("died"), outcome
    assert outcome.isprintable()
    assert seconds < SECONDS
    assert memory < MEMORY


if __name__ == "__main__":
    answer(lambda kind: in_a_fork(BOMBS[kind], load_legacy if "legacy" in sys.argv else load))
