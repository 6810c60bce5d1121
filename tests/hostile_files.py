"""Files that are damaged or made to do harm, and a process that gives each to the command line.

`python -m tests.hostile_files FOLDER` makes each, averages it in a fork of its own, and prints what
came of it as JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.pickle_bombs import (
    BOMBS,
    BUDGETS,
    LONG,
    NEARLY,
    STORAGE,
    TELLING,
    answer,
    named,
    nearly_too_much,
    stop,
    text,
    tuple_dag,
)

SECONDS = 10  # of a core; 5 are aimed at, which other processors need twice
MEMORY = 250 << 20  # beside the 50 MB of the program
U8 = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
_LONG = 99_000_000  # the format's limit is 100 MB
_ENTRY = b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def _safetensors(header: object, data: bytes = b"ab", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# Each would be a fault even of a single file; the names say what is wrong.
SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "a header of 2**63 bytes": lambda: _safetensors({"a": U8}, length=1 << 63),
    "a header of 2**64 - 1 bytes": lambda: _safetensors({"a": U8}, length=(1 << 64) - 1),
    "overlapping offsets": lambda: _safetensors({"a": U8, "b": U8}),
    "reversed offsets": lambda: _safetensors({"a": _entry("U8", [2], 2, 0)}),
    "offsets beyond the file": lambda: _safetensors({"a": _entry("U8", [9], 0, 9)}),
    "metadata twice, apart": lambda: _safetensors(
        b"{%s}"
        % b",".join(
            [
                _ENTRY % 1,
                b'"__metadata__":{}',
                *(_ENTRY % index for index in range(9, 9_999)),
                b'"__metadata__":{"a":"b"}',
            ]
        ),
        data=b"",
    ),
    "a name with a newline": lambda: _safetensors({"a\n\x1b[2J": _entry("U8", [3], 0, 2)}),
    "a name with a NUL": lambda: _safetensors({"a\0": _entry("U8", [3], 0, 2)}),
    "a name of 10 MB": lambda: _safetensors({"n" * 10_000_000: _entry("U8", [3], 0, 2)}),
    "names of 50 MB in all": lambda: _safetensors(
        {f"{index}{'n' * 500_000}": _entry("U8", [3], 0, 2) for index in range(100)}
    ),
    "no UTF-8": lambda: _safetensors(b'{"\xff":%s}' % json.dumps(U8).encode()),
    "a shape that overflows": lambda: _safetensors({"a": _entry("U8", [1 << 32, 1 << 32], 0, 2)}),
    "a shape of 50,000 dimensions": lambda: _safetensors({"a": _entry("U8", [2] * 50_000, 0, 2)}),
    "digits without end": lambda: _safetensors(
        b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,2]}}' % (b"9" * 900_000)
    ),
    "99 MB of brackets": lambda: _safetensors(b'{"a":[%s]}' % (b"[]," * (_LONG // 3))),
    "99 MB of nesting": lambda: _safetensors(b'{"a":' + b"[" * _LONG),
    "99 MB of lists in the metadata": lambda: _safetensors(
        b'{"__metadata__":{"a":[%s[]]}}' % (b"[]," * (_LONG // 3))
    ),
    "99 MB of pairs in the metadata": lambda: _safetensors(
        b'{"__metadata__":{%s}}' % b",".join(b'"%07x":""' % index for index in range(_LONG // 13))
    ),
    "99 MB of quotes": lambda: _safetensors(b'{"__metadata__":{' + b'"' * _LONG),
    "99 MB that look like ends of entries": lambda: _safetensors(b'{"a":' + b'},"' * (_LONG // 3)),
    "100,001 tensors": lambda: _safetensors(
        b"{%s}" % b",".join(_ENTRY % index for index in range(100_001)), data=b""
    ),
    "17 MB of metadata": lambda: _safetensors({"__metadata__": {"a": "x" * 17_000_000}, "b": U8}),
    "90 MB of metadata": lambda: _safetensors({"__metadata__": {"a": "x" * 90_000_000}, "b": U8}),
    "1.7 million tensors": lambda: _safetensors(
        b"{%s}" % b",".join(_ENTRY % index for index in range(_LONG // 58))
    ),
    "400,000 tensors and a bad one": lambda: _safetensors(
        b"{%s}" % b",".join([*(_ENTRY % index for index in range(400_000)), b'"bad":{}'])
    ),
    "110,000 tensors and a bad one": lambda: _safetensors(
        b"{%s}" % b",".join([*(_ENTRY % index for index in range(110_000)), b'"bad":{}'])
    ),
    "110,000 tensors and bytes that nobody has": lambda: _safetensors(
        b"{%s}" % b",".join(_ENTRY % index for index in range(110_000))
    ),
    "390,000 entries in the metadata, and a bad tensor": lambda: _safetensors(
        b'{"__metadata__":{%s},"a":{}}' % b",".join(b'"%x":""' % index for index in range(390_000))
    ),
    "an array of 1.9 million numbers": lambda: _safetensors(
        b'{"a":{"dtype":"U8","shape":[%s1],"data_offsets":[0,1]}}' % (b"1," * 1_900_000)
    ),
}


def _many_state_dicts(count: int) -> bytes:
    """A torch file of so many, each of one tensor."""
    body = (
        named("torch._utils", "_rebuild_tensor") + b"q\0" + STORAGE + b"q\1" + b"00}("
        + b"".join(text(f"m{n}") + b"}" + text("w") + b"h\0(h\1K\0))tRs" for n in range(count))
        + b"u"
    )  # fmt: skip
    return _torch(stop(body))


def _tensors(
    key: str = "0", size: int = 4, shape: str = "K\4\x85", strides: str = "K\1\x85"
) -> bytes:
    """A state dict of one tensor."""
    return (
        b"\x80\2}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
        + b"M" + struct.pack("<H", size) + b"tQK\0" + shape.encode("latin-1")
        + strides.encode("latin-1") + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def _record(
    name: bytes, data: bytes, *, size: int | None = None, method: int = 0
) -> tuple[bytes, ...]:
    """A record's name, method, claimed size and bytes."""
    return (
        name,
        method.to_bytes(2, "little"),
        struct.pack("<I", len(data) if size is None else size),
        data,
    )


def _zip(
    records: list[tuple[bytes, ...]], *, cut: int = 0, places: dict[bytes, int] | None = None
) -> bytes:
    """A zip of them, with whatever they claim."""
    body, central = bytearray(), bytearray()
    for name, method, size, data in records:
        facts = method + b"\0\0\0\0" + struct.pack("<I", zlib.crc32(data)) + size + size
        place = (places or {}).get(name, len(body))
        central += (
            b"PK\1\2\x14\0\x14\0\0\0" + facts
            + struct.pack("<5H2I", len(name), 0, 0, 0, 0, 0, place)
            + name
        )  # fmt: skip
        body += b"PK\3\4\x14\0\0\0" + facts + struct.pack("<2H", len(name), 0) + name + data
    end = struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, len(records), len(records), len(central), len(body), 0
    )
    whole = bytes(body + central + end)
    return whole[: len(whole) - cut]


def _torch(pickled: bytes, *more: tuple[bytes, ...]) -> bytes:
    return _zip([_record(b"x/data.pkl", pickled), _record(b"x/data/0", bytes(16)), *more])


def _nearly(kind: str) -> bytes:
    return _torch(nearly_too_much(kind))


def _of_body(body: Callable[[], bytes]) -> bytes:
    return _torch(stop(body()))


def _bomb() -> bytes:
    """A pickle of 250 MB that deflates to one or two."""
    pickled = b"\x80\2]" + b"]a" * 125_000_000 + b"."
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(pickled) + packer.flush()
    return _zip([_record(b"x/data.pkl", packed, size=len(packed), method=8)])


TORCH: dict[str, Callable[[], bytes]] = {
    "a compressed pickle": _bomb,
    "a compressed storage": lambda: _zip(
        [_record(b"x/data.pkl", _tensors()), _record(b"x/data/0", bytes(16), method=8)]
    ),
    "a record twice": lambda: _torch(_tensors(), _record(b"x/data/0", bytes(16))),
    "a record larger than the file": lambda: _zip(
        [_record(b"x/data.pkl", _tensors()), _record(b"x/data/0", bytes(16), size=1 << 31)]
    ),
    "a pickle larger than the file": lambda: _zip(
        [_record(b"x/data.pkl", _tensors(), size=1 << 31)]
    ),
    "a storage smaller than its tensor": lambda: _zip(
        [_record(b"x/data.pkl", _tensors()), _record(b"x/data/0", bytes(8))]
    ),
    "a record at the end of the file": lambda: _zip(
        [_record(b"x/data.pkl", _tensors()), _record(b"x/data/0", bytes(16))],
        places={b"x/data/0": 1 << 31},
    ),
    "an absolute name": lambda: _zip(
        [_record(b"/data.pkl", _tensors()), _record(b"/data/0", bytes(16)),
         _record(b"/etc/passwd", b"root"), _record(b"../../x", b"")]
    ),
    "a storage outside": lambda: _torch(_tensors(key="../../etc/passwd")),
    "a storage of a huge size": lambda: _torch(
        _tensors(shape="\x8a\x08" + "\xff" * 7 + "\x3f\x85")
    ),
    "negative strides": lambda: _torch(_tensors(strides="J\xff\xff\xff\xff\x85")),
    "strides that repeat 16 bytes to 4 TB": lambda: _torch(
        _tensors(shape="\x8a\x06" + "\0" * 5 + "\1\x85", strides="K\0\x85")
    ),
    "a directory of 60,000 records and no pickle": lambda: _zip(
        [_record(b"x/%d" % index, b"") for index in range(60_000)]
    ),
    "no end": lambda: _zip([_record(b"x/data.pkl", _tensors())], cut=30),
    "a comment of 64 KB without end": lambda: b"PK\3\4" + b"PK\5\6" * 20_000,
    "1,000 state dicts": lambda: _many_state_dicts(1_000),
    "60,000 state dicts": lambda: _many_state_dicts(60_000),
    "a million empty dicts": lambda: _torch(b"\x80\2](" + b"}" * 1_000_000 + b"e."),
    "a persistent id of a wrong type": lambda: _torch(
        stop(b"}" + text("w") + tuple_dag(60) + b"Qs")
    ),
    "INST": lambda: _torch(stop(b"(ios\nsystem\n")),
    "OBJ": lambda: _torch(stop(b"(cos\nsystem\n" + text("true") + b"o")),
    "EXT": lambda: _torch(stop(b"\x82\1")),
    "__setstate__": lambda: _torch(stop(b"cos\nsystem\n)R}" + text("a") + b"Nsb")),
    **{f"pickle: {kind}": partial(_torch, bomb) for kind, bomb in BOMBS.items()},
    **{f"pickle: {kind}": partial(_of_body, body) for kind, body in BUDGETS.items()},
    **{
        f"a pickle of nearly too many {kind}": partial(_nearly, kind) for kind in NEARLY
    },
    "a third pickle of sets without end": lambda: (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        + stop(BUDGETS["sets without end"]())
    ),
    **{
        f"builtins.{name}": partial(
            _torch, stop(text("builtins") + text(name) + b"\x93" + text("print(1)") + b"\x85R")
        )
        for name in ("eval", "exec", "open", "__import__", "compile", "input", "breakpoint", "exit")
    },
}  # fmt: skip


def _index(weight_map: dict[str, str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir()
        (folder / "model-00001-of-00002.safetensors").write_bytes(_safetensors({"a": U8}))
        content = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(content)
        return folder

    return make


def _with(make: Callable[[Path], object], name: str, index: str) -> Callable[[Path], Path]:
    """A directory whose index names something that is made otherwise than by writing."""

    def made(folder: Path) -> Path:
        _index({"a": index})(folder)
        make(folder / name)
        return folder

    return made


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A sound checkpoint but for one of its files."""

    def made(folder: Path) -> Path:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(_safetensors({"a": U8}))
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        return folder

    return made


def _link(target: str) -> Callable[[Path], Path]:
    def made(path: Path) -> Path:
        path.symlink_to(target)
        return path

    return made


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _text(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


OTHERS: dict[str, Callable[[Path], Path]] = {
    "an index that names ../": _index({"a": "../x.safetensors"}),
    "an index that names /etc/passwd": _index({"a": "/etc/passwd"}),
    "an index that names /dev/zero": _index({"a": "/dev/zero"}),
    "an index that names a directory": _with(Path.mkdir, "d", "d"),
    "an index that names a FIFO": _with(_fifo, "model-f.safetensors", "model-f.safetensors"),
    "an index that names a link to /dev/zero": _with(
        _link("/dev/zero"), "z.safetensors", "z.safetensors"
    ),
    "an index that names a loop of links": _with(
        _link("l.safetensors"), "l.safetensors", "l.safetensors"
    ),
    "an index that names itself": _index({"a": "model.safetensors.index.json"}),
    "an index with a name of 5,000 letters": _index({"a": "n" * 5_000}),
    "an index of 60 MB of brackets": _replaced(
        "model.safetensors",
        lambda path: path.with_name("model.safetensors.index.json").write_bytes(
            b'{"weight_map":[%s[]]}' % (b"[]," * 20_000_000)
        ),
    ),
    "an index of 1 TB": _replaced(
        "model.safetensors",
        lambda path: _sparse(path.with_name("model.safetensors.index.json")),
    ),
    "weights that are a FIFO": _replaced("model.safetensors", _fifo),
    "weights that are a link to /dev/zero": _replaced("model.safetensors", _link("/dev/zero")),
    "weights that are a link to a terminal": _replaced("model.safetensors", _link("/dev/tty")),
    "weights that are a directory": _replaced("model.safetensors", Path.mkdir),
    "a state of the Trainer that is no JSON": _replaced("trainer_state.json", _text(b"{")),
    "a FIFO": _fifo,
    "a link to /dev/zero": _link("/dev/zero"),
    "a link to nothing": _link("nowhere"),
}  # fmt: skip


def _every_cut(folder: Path) -> None:
    """A sound file and all of its beginnings."""
    folder.mkdir()
    whole = _safetensors({"__metadata__": {"step": "3"}, "a": U8, "b": _entry("U8", [0], 2, 2)})
    for length in range(len(whole)):
        (folder / f"{length}.safetensors").write_bytes(whole[:length])


def make(folder: Path, kind: str) -> Path:
    """The hostile file or directory of a kind."""
    if kind in OTHERS:
        return OTHERS[kind](folder / "x")
    ending = "safetensors" if kind in SAFETENSORS else "pt"
    path = folder / f"x.{ending}"
    path.write_bytes((SAFETENSORS | TORCH)[kind]())
    return path


KINDS = (*SAFETENSORS, *TORCH, *OTHERS)
ALIKE = (
    *("99 MB of brackets", "99 MB of lists in the metadata"),
    *("99 MB of pairs in the metadata", "99 MB of quotes"),
    *("99 MB that look like ends of entries", "1.7 million tensors"),
    *("110,000 tensors and bytes that nobody has", "names of 50 MB in all"),
    *("390,000 entries in the metadata, and a bad tensor", "90 MB of metadata"),
    *("60,000 state dicts", *(f"pickle: {kind}" for kind in BUDGETS)),
    *(f"pickle: {kind}" for kind in BOMBS if kind not in TELLING),
    *(f"pickle: {kind}" for kind in TELLING if kind in LONG),
    *(f"a pickle of nearly too many {kind}" for kind in NEARLY if kind != "storages"),
    *(f"builtins.{name}" for name in ("compile", "input", "breakpoint", "exit")),
)
"""Those that meet the same bounds as others."""


def average(path: Path, output: Path) -> tuple[str, str, float, int]:
    """How the command ends, what it says on stderr, seconds of a core, and bytes of memory.

    The memory is what it takes beside that of this process, with which the fork begins.
    """
    own = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(4 * SECONDS)
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.close(reading)
        sys.argv = ["ckptavg", "average", "--quiet", str(path), "-o", str(output)]
        from ckptavg.cli import main

        try:
            main()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 99)
        os._exit(98)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return str(code), said, usage.ru_utime + usage.ru_stime, (usage.ru_maxrss << 10) - own


def _made(folder: Path, kind: str) -> Path:
    """The same, made by a fork, so that this process stays small."""
    child = os.fork()
    if not child:
        make(folder, kind)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(kind)
    [path] = folder.iterdir()
    return path


def main() -> None:
    """Average those that are asked for, and print what comes of it."""
    import ckptavg.average
    import ckptavg.cli  # noqa: F401 - once, and not in every fork

    def what_comes_of(kind: str) -> tuple[object, ...]:
        folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
        path = _made(folder, kind)
        before = sorted(folder.iterdir())
        ended = average(path, folder / "o.safetensors")
        nothing_left = sorted(folder.iterdir()) == before
        if path.is_file():
            path.unlink()
        return (*ended, nothing_left)

    answer(what_comes_of)


if __name__ == "__main__":
    main()
