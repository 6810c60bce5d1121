"""Pickles are data: what they describe is built, nothing that they name is run, none is a bomb."""

from __future__ import annotations

import argparse
import ast
import builtins
import collections
import contextlib
import dataclasses
import datetime as dt
import enum
import functools
import io
import os
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.errors import CkptAvgError, printable
from ckptavg.formats import budget
from ckptavg.formats.budget import PickleError
from ckptavg.formats.pickled import Placeholder, UnreadableTensor
from ckptavg.formats.recorded import training_record
from ckptavg.formats.statedict import find_state_dicts
from ckptavg.formats.unpickler import InertUnpickler, load, run
from tests.helpers import all_but_slow
from tests.pickle_bombs import (
    ALIKE,
    BOMBS,
    BUDGETS,
    Asked,
    assert_bounded,
    get,
    named,
    stack_global,
    stop,
    text,
)

PROTOCOLS = range(1, pickle.HIGHEST_PROTOCOL + 1)


def built(pickled) -> Any:
    """What `load` makes of it, whatever that is."""
    return load(pickled)


# What it builds


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**31,
        -(2**63),
        2**200,
        1.5,
        float("inf"),
        "",
        "ж😀\n",
        "long" * 100_000,
        [],
        [1, [2, [3]]],
        (),
        (1,),
        (1, 2, 3, 4),
        {},
        {"a": 1, 2: "b", None: None, 1.5: []},
        {"a": {"b": {"c": [1, 2, {"d": (3,)}]}}},
        {1, 2, 300},
        frozenset({"y"}),
        list(range(3_000)),
        {str(index): index for index in range(3_000)},
    ],
    ids=lambda value: repr(value)[:30],
)
def test_plain_values_come_as_they_are(value, protocol):
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("value", [b"", b"bytes" * 100, {b"key": 1}, bytearray(b"abc")])
def test_bytes_come_as_they_are(value, protocol):
    found = built(pickle.dumps(value, protocol))
    assert found == value or (isinstance(value, bytearray) and protocol < 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_shared_stays_shared(protocol):
    inner = ["x"]
    first, second = built(pickle.dumps([inner, inner], protocol))
    assert first is second


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_and_default_dicts_are_dicts_in_order(protocol):
    ordered = collections.OrderedDict([("z", 1), ("a", 2)])
    default = collections.defaultdict(list, {"k": [1]})
    found = built(pickle.dumps([ordered, default], protocol))
    assert list(found[0].items()) == [("z", 1), ("a", 2)]
    assert found[1] == {"k": [1]}


def test_the_metadata_of_a_state_dict_is_kept():
    state: Any = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    plain: Any = collections.OrderedDict((name, 0) for name in state)
    plain._metadata = state._metadata
    found = built(pickle.dumps(plain, 2))
    assert found.module_versions == dict(state._metadata)


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    width: int = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    width: int = 3


class Outer:
    class Inner:
        def __init__(self):
            self.x = 1


class ListLike(list):
    pass


class DictLike(dict):
    pass


class WithNewArguments:
    def __getnewargs_ex__(self):
        return (1,), {"cls": 2, "self": 3}

    def __new__(cls, *_, **__):
        return super().__new__(cls)


class Rebuilt:
    def __reduce__(self):
        return Rebuilt, (), {"state": 1}, iter([1, 2]), iter([("k", "v")])

    def append(self, item):
        pass

    def __setitem__(self, key, value):
        pass


def list_like():
    made = ListLike([1, 2])
    made.extra = 3  # type: ignore[attr-defined]
    return made


OBJECTS = {
    "Namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=1)),
    "path": pathlib.PurePosixPath("/a/b"),
    "enum": Colour.RED,
    "dataclass": Settings(),
    "slotted dataclass": Slotted(),
    "nested class": Outer.Inner(),
    "class": Outer.Inner,
    "bound method": list_like().append,
    "function": os.system,
    "partial": functools.partial(print, 1, end=""),
    "list-like": list_like(),
    "dict-like": DictLike(a=1),
    "new arguments": WithNewArguments(),
    "rebuilt": Rebuilt(),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], maxlen=3),
    "date": dt.datetime(2024, 1, 2, tzinfo=dt.UTC),
    "complex": 1 + 2j,
    "range": range(3),
    "slice": slice(1, 2),
    "ellipsis": ...,
    "bytearray": bytearray(b"abc"),
    "exception": ValueError("x"),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(6).reshape(2, 3),
    "numpy object array": np.array([None, "x"], dtype=object),
    "numpy dtype": np.dtype("float32"),
    "numpy generator": np.random.default_rng(0),
    "torch dtype": torch.float32,
    "torch device": torch.device("cpu"),
    "torch size": torch.Size([1, 2]),
    "type of None": type(None),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_all_kinds_pass_inertly(name, protocol):
    found = built(pickle.dumps({"object": OBJECTS[name], "as key": {}, "after": 7}, protocol))
    assert found["after"] == 7
    assert type(found["object"]).__module__.split(".")[0] in {"builtins", "ckptavg"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [b"", b"a\xff\0", bytearray(), bytearray(b"a\xff\0")], ids=repr)
def test_bytes_are_bytes_whatever_the_protocol(value, protocol):
    found = built(pickle.dumps([value], protocol))
    assert found == [value]
    assert type(found[0]) is type(value)


@pytest.mark.parametrize(
    "call",
    [
        "_codecs encode (3, 'latin1')", "_codecs encode ('a', 'rot13')", "builtins bytes (10,)",
        "builtins bytearray (10,)", "builtins bytearray ('a', 'utf-16')",
    ],
)  # fmt: skip
def test_what_only_looks_like_bytes_is_a_placeholder(call):
    module, name, arguments = call.split(" ", 2)
    pickled = pickle.dumps(ast.literal_eval(arguments), 2)[2:-1]
    found = built(b"\x80\2c" + f"{module}\n{name}\n".encode() + pickled + b"R.")
    assert isinstance(found, Placeholder)
    assert found.origin == f"{module}.{name}"


@pytest.mark.parametrize("key", [Colour.RED, (1, ("a", (2, (3,)))), frozenset({1}), 2**100])
def test_keys_that_are_no_scalars_pass(key):
    found = built(pickle.dumps({"d": {key: "value"}, "s": {key}}))
    assert list(found["d"].values()) == ["value"]
    assert len(found["s"]) == 1


def test_a_placeholder_keeps_what_it_was_to_be_made_of():
    settings_object = built(pickle.dumps(Settings(width=5)))
    assert isinstance(settings_object, Placeholder)
    assert settings_object.origin.endswith("test_unpickler.Settings")
    assert settings_object.state == {"width": 5}
    rebuilt = built(pickle.dumps(Rebuilt()))
    assert rebuilt.state == {"state": 1}
    path = built(pickle.dumps(pathlib.PurePosixPath("/a/b"), 2))
    # Its parts; from Python 3.14 on, its text.
    assert path.arguments in (("/", "a", "b"), ("/a/b",))


def test_a_nested_class_and_an_enum_member_are_placeholders_of_their_own_name():
    pickled = stop(named("builtins", "getattr") + named("m", "Outer") + text("Inner") + b"\x86R")
    assert built(pickled).origin == "m.Outer.Inner"


def test_what_a_list_refers_to_may_be_the_list_itself():
    cycle: list[object] = []
    cycle.append(cycle)
    found = built(pickle.dumps(cycle))
    assert found[0] is found


# Of a stream


def test_a_stream_is_left_where_the_pickle_ends():
    values = [{"a": [1, 2]}, Settings(), "text" * 50_000, 3]
    for protocol in PROTOCOLS:
        stream = io.BytesIO(b"head" + b"".join(pickle.dumps(value, protocol) for value in values))
        stream.seek(4)
        for value in values:
            found = run(InertUnpickler(stream))
            assert found == value or isinstance(found, Placeholder)
        assert stream.read() == b""


def test_what_calls_may_copy_goes_by_the_pickle_and_not_by_what_follows_it():
    bomb = BOMBS["laughing dict()"]
    with pytest.raises(PickleError, match="bytes of memory"):
        run(InertUnpickler(io.BytesIO(bomb + bytes(100_000_000))))


@pytest.mark.parametrize(
    "kind", all_but_slow(BUDGETS, [kind for kind in BUDGETS if kind != "sets without end"])
)
def test_a_pickle_takes_no_more_than_one_of_its_size_needs(kind):
    with pytest.raises(PickleError, match=r"(opcodes|calls|bytes of memory) in [\d,]+ bytes"):
        load(stop(BUDGETS[kind]()))


def test_a_training_checkpoint_of_ten_thousand_tensors_needs_a_fifth_of_what_it_may_take():
    parameters = [torch.nn.Parameter(torch.ones(())) for _ in range(1_000)]
    for parameter in parameters:
        parameter.grad = torch.ones(())
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    optimizer.step()
    state = {f"layers.{index}.weight": value for index, value in enumerate(parameters)}
    file = io.BytesIO()
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, file)
    with zipfile.ZipFile(file) as archive:
        machine = InertUnpickler(io.BytesIO(archive.read("archive/data.pkl")))
    run(machine)
    # The opcodes are counted by the thousand.
    for spent, limit in (
        (machine.budget.opcodes, budget._OPCODES),
        (machine.budget.calls, budget._CALLS),
        (machine.budget.memory, budget._MEMORY),
    ):
        assert 10 * 5 * spent < limit.most


def test_a_file_that_cannot_be_read_is_no_fault_of_the_pickle():
    def unreadable(_):
        raise CkptAvgError("cannot read it")

    file = mock.Mock(wraps=io.BytesIO(b"N."), read=unreadable)
    file.tell.return_value = 0
    machine = InertUnpickler(file)
    with pytest.raises(CkptAvgError, match="cannot read it"):
        run(machine)


def test_strings_of_python_2_are_text_whatever_bytes_they_have():
    short = pickle.SHORT_BINSTRING
    assert load(stop(short + b"\1a", 2)) == "a"
    assert load(stop(short + b"\2\xc3\xa9", 2)) == "é"
    assert load(stop(b"(" + short + b"\1\xff" + short + b"\1\xfet", 2)) == ("\\xff", "\\xfe")


# What it never does: anything


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_pickles(sentinel):
    """Pickles each of which would make `sentinel` if it were run."""
    command = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"
    yield "os.system", pickle.dumps(Call(os.system, command))
    yield "subprocess", pickle.dumps(Call(subprocess.check_call, ["touch", str(sentinel)]))
    yield "Popen", pickle.dumps(Call(subprocess.Popen, ("touch", str(sentinel))))
    for name in ("eval", "exec"):
        yield name, stop(named("builtins", name) + text(code) + b"\x85R")
        yield f"{name} in Python 2", stop(named("__builtin__", name) + text(code) + b"\x85R", 2)
        yield f"{name} on the stack", stop(stack_global("builtins", name) + text(code) + b"\x85R")
        yield f"{name} by OBJ", stop(b"(" + named("builtins", name) + text(code) + b"o")
        yield f"{name} by INST", stop(b"(" + text(code) + f"ibuiltins\n{name}\n".encode())
        yield f"{name} by NEWOBJ", stop(named("builtins", name) + text(code) + b"\x85\x81")
        yield f"{name} by NEWOBJ_EX", stop(named("builtins", name) + text(code) + b"\x85}\x92")
        yield (
            f"{name} by getattr",
            stop(
                named("builtins", "getattr")
                + named("builtins", "__import__")
                + text("builtins")
                + b"\x85R"
                + text(name)
                + b"\x86R"
                + text(code)
                + b"\x85R"
            ),
        )
        yield (
            f"{name} by rebuild",
            stop(
                named("torch._tensor", "_rebuild_from_type_v2")
                + b"("
                + named("builtins", name)
                + b"N("
                + text(code)
                + b"tNtR"
            ),
        )
    yield "open", pickle.dumps(Call(open, str(sentinel), "w"))
    yield "path", pickle.dumps(Call(pathlib.Path.touch, pathlib.Path(sentinel)))
    yield "a file's own reduce", pickle.dumps([Call(os.mkdir, str(sentinel))])
    yield "a map", pickle.dumps(Call(list, Call(map, os.mkdir, [str(sentinel)])))
    yield (
        "a default factory",
        stop(
            named("collections", "defaultdict")
            + named("functools", "partial")
            + named("os", "mkdir")
            + text(str(sentinel))
            + b"\x86R\x85R"
        ),
    )
    yield (
        "set a state",
        stop(named("os", "system") + text(command) + b"b"),
    )
    yield (
        "a descriptor set by BUILD",
        stop(
            named("collections", "OrderedDict")
            + b")R}"
            + text("__class__")
            + named("os", "system")
            + b"sb"
            + text(command)
            + b"\x85R"
        ),
    )
    yield (
        "load from bytes",
        stop(
            named("torch.storage", "_load_from_bytes")
            + pickle.BINBYTES
            + struct.pack("<I", len(inner := pickle.dumps(Call(os.system, command))))
            + inner
            + b"\x85R"
        ),
    )
    for kind in (b"Ptext\n", text("text") + b"Q", named("os", "system") + b"Q"):
        yield "a persistent id", stop(kind)
    yield (
        "a storage whose type is a function",
        stop(
            b"(" + text("storage") + named("os", "system") + text(command) + text("cpu") + b"K\1tQ"
        ),
    )


def test_no_hostile_pickle_runs_anything(tmp_path):
    sentinel = tmp_path / "run"
    modules = set(sys.modules)
    for name, pickled in hostile_pickles(sentinel):
        try:
            found = built(pickled)
        except PickleError:
            found = None
        assert not sentinel.exists(), name
        assert isinstance(found, Placeholder | UnreadableTensor | dict | list | None) or type(
            found
        ).__module__.startswith("ckptavg"), name
    assert set(sys.modules) == modules


def test_the_hostile_pickles_are_hostile(tmp_path):
    made = 0
    for index, (_, pickled) in enumerate(hostile_pickles(tmp_path / "run")):
        sentinel = tmp_path / "run"
        code = f"import pickle, sys; pickle.loads({pickled!r})"
        if index not in {0, 1, 3, 4, 6, 7}:
            continue
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
        made += sentinel.exists()
        sentinel.unlink(missing_ok=True)
    assert made == 6


def test_a_module_that_a_pickle_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert built(stop(named("trap_module", "Class") + b")R")).origin == "trap_module.Class"
    assert not (tmp_path / "run").exists()
    assert "trap_module" not in sys.modules


def test_a_registered_extension_is_not_looked_up():
    import copyreg

    copyreg.add_extension("os", "system", 77)
    try:
        with pytest.raises(PickleError):
            load(stop(pickle.EXT1 + b"\x4d" + text("true") + b"\x85R"))
    finally:
        copyreg.remove_extension("os", "system", 77)


REFUSED = {
    "nothing": b"",
    "no pickle": b"hello",
    "an unknown opcode": stop(b"\xff"),
    "protocol 9": pickle.PROTO + b"\x09N.",
    "no end": pickle.PROTO + b"\2N",
    "an empty stack": stop(b""),
    "a pop of nothing": stop(b"0"),
    "a memo that is not there": stop(get(7)),
    "a mark that is not there": stop(b"t"),
    "EXT1": stop(pickle.EXT1 + b"\1"),
    "EXT2": stop(pickle.EXT2 + b"\1\0"),
    "EXT4": stop(pickle.EXT4 + b"\1\0\0\0"),
    "NEXT_BUFFER": stop(pickle.NEXT_BUFFER),
    "READONLY_BUFFER": stop(pickle.EMPTY_LIST + pickle.READONLY_BUFFER),
    "PERSID": stop(b"Pid\n"),
    "PUT": stop(b"Np0\n"),
    "GET": stop(b"g0\n"),
    "a persistent id that is a string": stop(text("x") + b"Q"),
    "a persistent id that is a number": stop(b"K\1Q"),
    "a persistent id that is a dict": stop(b"}Q"),
    "a persistent id of two": stop(b"(" + text("storage") + b"NtQ"),
    "a persistent id with a list as its key": stop(b"(" + text("storage") + b"N]" + b"NK\1tQ"),
    "a persistent id with a string as size": stop(
        b"(" + text("storage") + b"N" + text("0") + b"N" + text("1") + b"tQ"
    ),
    "a persistent id of a module": stop(b"(" + text("module") + b"NNNNtQ"),
    "a call of a string": stop(text("f") + b")R"),
    "a call of a dict": stop(b"})R"),
    "a call of None": stop(b"N)R"),
    "a call of a dtype": stop(named("torch", "float32") + b")R"),
    "a call with a list": stop(named("m", "f") + b"]R"),
    "a call with a string": stop(named("m", "f") + text("abc") + b"R"),
    "a tensor of too few arguments": stop(named("torch._utils", "_rebuild_tensor_v2") + b")R"),
    "an instance of a string": stop(text("f") + b")\x81"),
    "an instance of a list": stop(b"])\x81"),
    "an instance with keywords of a list": stop(b"])}\x92"),
    "a state for a list": stop(b"]}b"),
    "a state for a string": stop(text("x") + b"}b"),
    "a state for a dict": stop(b"}}b"),
    "a state for a number": stop(b"K\1}b"),
    "a state for a builder": stop(named("collections", "OrderedDict") + b"}b"),
    "a state for a dtype": stop(named("torch", "float32") + b"}" + text("name") + b"Nsb"),
    "an item for a list": stop(b"]K\0Ns"),
    "an item for a tuple": stop(b")K\0Ns"),
    "an item for a dtype": stop(named("torch", "float32") + b"K\0Ns"),
    "items without a value": stop(b"}(K\0u"),
    "members for a list": stop(b"](K\0\x90"),
    "an append to a tuple": stop(b")K\0a"),
    "an append to a dict": stop(b"}K\0a"),
    "an append to a string": stop(text("x") + b"K\0a"),
    "a global of numbers": stop(b"K\1K\2\x93"),
    "bytes that are no text": stop(pickle.BINUNICODE + b"\1\0\0\0\xff"),
    "a long that is shorter": stop(pickle.LONG4 + b"\xff\xff\xff\xff"),
    "a number that is none": stop(b"Iabc\n"),
    "a float that is none": stop(b"Fabc\n"),
    "a set of pairs that are none": stop(named("builtins", "dict") + text("abc") + b"\x85R"),
    "getattr with one argument": stop(named("builtins", "getattr") + b"N\x85R"),
    "getattr with a number": stop(named("builtins", "getattr") + b"NK\1\x86R"),
    "a name without end": stop(named("m" * 100_000, "f")),
    "kinds without end": stop(b"".join(named("m", str(index)) for index in range(10_001))),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_checkpoint_has_is_refused_in_one_line(kind):
    with pytest.raises(PickleError) as caught:
        load(REFUSED[kind])
    message = str(caught.value)
    assert len(message) < 500
    assert message.isprintable()


def test_a_truncated_pickle_is_refused_wherever_it_ends():
    whole = pickle.dumps(
        {"a": [1, 2.5, "text", b"bytes", (1, 2, 3)], "b": Settings(), "c": {1, 2}}, 4
    )
    assert built(whole)["a"][2] == "text"
    for length in range(len(whole)):
        with pytest.raises(PickleError):
            load(whole[:length])


def test_a_pickle_longer_than_any_is_refused_unread(monkeypatch):
    monkeypatch.setattr("ckptavg.formats.budget.LARGEST_PICKLE", 10)
    with pytest.raises(PickleError, match="11 bytes"):
        load(b"N" * 11)


# What cannot blow up


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    """What comes of a bomb, in a process that may take no more than it should."""
    asked = Asked("tests.pickle_bombs")
    yield asked
    asked.close()


@pytest.mark.parametrize("kind", all_but_slow(BOMBS, ALIKE))
def test_no_pickle_takes_more_than_its_share(asked, kind):
    assert_bounded(*asked(kind))


# What chance makes of it

OPCODES = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
TOKENS = st.one_of(
    OPCODES,
    st.binary(max_size=9),
    st.sampled_from(
        [
            b"(",
            b"(",
            b"]",
            b"}",
            b")",
            b"\x8f",
            b"N",
            b"K\1",
            b"R",
            b"b",
            b"h\0",
            b"q\0",
            b"\x94",
            named("torch._utils", "_rebuild_tensor_v2"),
            named("torch._tensor", "_rebuild_from_type_v2"),
            named("collections", "OrderedDict"),
            named("builtins", "getattr"),
            named("builtins", "set"),
            named("torch", "FloatStorage"),
            named("torch", "float32"),
            named("os", "system"),
            text("x"),
            text("storage"),
        ]
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(TOKENS, max_size=40), st.sampled_from([b"", b"\x80\2", b"\x80\4"]))
def test_opcode_soup_gives_a_result_or_a_pickle_error(tokens, head):
    with contextlib.suppress(PickleError):
        load(head + b"".join(tokens) + b".")


def a_checkpoints_pickle():
    buffer = io.BytesIO()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.save(
        {
            "epoch": 3,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "args": OBJECTS["Namespace"],
        },
        buffer,
    )
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


WHOLE = a_checkpoints_pickle()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(WHOLE) - 1),
            st.integers(0, 255).map(lambda value: bytes([value])) | OPCODES | st.just(b""),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_flipped_bytes_give_a_result_or_a_pickle_error(flips):
    data = WHOLE
    for place, value in flips:
        data = data[:place] + value + data[place + 1 :]
    try:
        root = load(data)
    except PickleError as error:
        printed = str(error)
    else:
        found = find_state_dicts(root)
        training_record(root, "x.pt", lambda _: {}, whole=False)
        printed = ", ".join(map(printable, found))
    assert printed.isprintable()


@pytest.mark.parametrize("call", [b"\x85R", b"\x85}\x92"])
def test_a_call_of_any_builtin_does_nothing(call, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    code = text("open('ran', 'w').write(input())")
    for name in dir(builtins):
        for start in (stack_global("builtins", name), named("builtins", name)):
            with contextlib.suppress(PickleError):
                made = load(stop(start + code + call))
                assert isinstance(made, Placeholder | set | frozenset | dict), (name, type(made))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
