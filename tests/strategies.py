"""Strategies for containers of checkpoints: sound ones, and ones that are wrong in a few places."""

from __future__ import annotations

import json
import math
import pickle
import pickletools
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from ckptavg.formats.tensors import BY_CODE
from tests.fuzz.containers import (
    Record,
    safetensors_of,
    zip64_extra,
    zip_of,
    zip_records,
)
from tests.pickle_bombs import named, text

ODD_NAMES = st.sampled_from(
    ["", "\0", "\n", "\x1b[2J", "\ud800", "\u2028", "__metadata__", "a.b", "\\", '"', "x" * 5000]
)
NAMES = st.sampled_from(["a", "b", "a.weight", "b.running_mean"]) | st.text(max_size=8) | ODD_NAMES
EDGES = st.sampled_from(
    [
        *(0, 1, 2, 8, 64, -1),
        *(2**bits + more for bits in (31, 32, 61, 62, 63, 64) for more in (-1, 0)),
    ]
)
SHAPES = st.lists(st.integers(0, 3), max_size=4)
ODD_SHAPES: st.SearchStrategy[object] = st.sampled_from(
    [
        [2**62, 4, 0],
        [2**32, 2**32],
        [2**63],
        [1] * 64,
        [1] * 65,
        [0, -1],
        [2.0],
        [True],
        {},
        None,
        "2",
    ]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | EDGES | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
KEY = "\N{DAGGER}"
"""Before a key that comes twice: JSON has such, dicts have not."""


def as_json(value: object) -> str:
    """The text; the keys of dicts may begin with `KEY`s, which are left out."""
    return json.dumps(value).replace(json.dumps(KEY)[1:-1], "")


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A sound header of safetensors, and how long what follows it has to be."""
    entries: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(NAMES.filter(_is_sound), unique=True, max_size=4)):
        code, shape = draw(st.sampled_from([*BY_CODE])), draw(SHAPES)
        begin, end = end, end + BY_CODE[code].itemsize * math.prod(shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    if draw(st.booleans()):
        texts = st.text(max_size=5)
        entries["__metadata__"] = draw(st.dictionaries(texts, texts, max_size=2))
    return {name: entries[name] for name in draw(st.permutations([*entries]))}, end


def _is_sound(name: str) -> bool:
    return name not in ("__metadata__", "\ud800") and KEY not in name


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """A file: sound, or with a header that is wrong in some places, or of another length."""
    entries, end = draw(headers())
    for _ in range(draw(st.integers(0, 2))):
        if entries:
            _spoil(draw, entries)
    body = bytes(max(0, end + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))))
    return safetensors_of(as_json(entries), body)


def _spoil(draw: st.DrawFn, entries: dict[str, Any]) -> None:
    """Make one entry of a header wrong."""
    name = draw(st.sampled_from([*entries]))
    entry = entries[name] if isinstance(entries[name], dict) else {}
    match draw(st.integers(0, 6)):
        case 0:
            entries[KEY + name] = entry  # the same name twice
        case 1:
            entries[draw(NAMES)] = entry  # the same bytes twice
        case 2 if "shape" in entry:
            entry["shape"] = draw(ODD_SHAPES)
        case 3 if "data_offsets" in entry:
            entry["data_offsets"] = draw(st.lists(EDGES, max_size=3))
        case 4 if "data_offsets" in entry:
            entry["data_offsets"] = entry["data_offsets"][::-1]
        case 5:
            entries[name] = {**entry, draw(NAMES): draw(JSON)}
        case _:
            entries[name] = draw(JSON)


@st.composite
def zips(draw: st.DrawFn, archive: bytes) -> bytes:
    """A torch zip with records that have odd names, sizes, places, or ways of being packed."""
    records = zip_records(archive)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(records) - 1))
        records[place] = draw(_records(records[place]))
    if draw(st.booleans()):
        records.insert(draw(st.integers(0, len(records))), draw(st.sampled_from(records)))
    return zip_of(records, draw(st.sampled_from([b"", b"PK\5\6", b"comment"])))


@st.composite
def _records(draw: st.DrawFn, record: Record) -> Record:
    """A record like it, with something else about it."""
    fields = {"name": record.name, "data": record.data}
    odd = draw(EDGES)
    names = st.sampled_from(
        [b"x/data.pkl", b"x/data/0", b"x/byteorder", b"x/ckptavg", b"\xff\x1b", b"", b"/", b"../x"]
    )
    more: Mapping[str, Any] = draw(
        st.one_of(
            st.fixed_dictionaries({"name": names | st.binary(max_size=9)}),
            st.fixed_dictionaries({"data": st.binary(max_size=70) | st.just(b"big")}),
            st.fixed_dictionaries({"method": st.sampled_from([8, 9, 12, 14, 99])}),
            st.fixed_dictionaries({"flags": st.sampled_from([1, 8, 64, 0x800])}),
            st.fixed_dictionaries({"size": st.just(odd)}),
            st.fixed_dictionaries({"offset": st.just(odd)}),
            st.fixed_dictionaries({"extra": st.binary(max_size=12)}),
            st.just({"size": 2**32 - 1, "offset": 2**32 - 1, "extra": zip64_extra(odd, odd)}),
        )
    )
    return Record(**{**fields, **more})


PATHS = st.sampled_from(
    [
        *(
            "..",
            ".",
            "",
            "/",
            "a/b",
            "../model-00001-of-00002.safetensors",
            "C:\\x",
            "a\0b",
            "\ud800",
        ),
        *("model-00001-of-00002.safetensors", "./model-00002-of-00002.safetensors", "x" * 5000),
        *("x/" * 3000, "~", "\udc80", "model.safetensors.index.json", "\x1b[2J", "x//y"),
    ]
)


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    """The files beside shards, as the target `index` divides them, with odd paths and values."""
    tensors = st.sampled_from(["a", "b"]) | NAMES
    index = {"metadata": draw(JSON), "weight_map": draw(st.dictionaries(tensors, PATHS | JSON))}
    entry = st.dictionaries(
        st.sampled_from(["step", "loss", "learning_rate"]) | NAMES, EDGES | JSON, max_size=4
    )
    state = {
        "global_step": draw(EDGES | JSON),
        "log_history": draw(st.lists(entry, max_size=3) | JSON),
    }
    patterns = st.sampled_from(
        ["q_proj", ".*", "(", "a|b", "[[a]", "\\1", "(?i)x", "{", "x{99999}"]
    )
    adapter = {
        "peft_type": "LORA",
        "lora_alpha": draw(EDGES | JSON),
        "alpha_pattern": draw(st.dictionaries(patterns | NAMES, EDGES | JSON, max_size=3) | JSON),
        "use_rslora": draw(st.booleans()),
    }
    texts = [draw(st.just("") | st.just(as_json(value))) for value in (index, state, adapter)]
    return b"\0".join(text.encode() for text in texts)


def _value(value: object) -> bytes:
    """A piece of a pickle, which leaves a value on the machine's stack."""
    return pickle.dumps(value, 3)[2:-1]


VALUES: st.SearchStrategy[bytes] = (
    st.none()
    | st.booleans()
    | st.integers(0, 4)
    | EDGES
    | st.floats()
    | NAMES
    | st.binary(max_size=9)
).map(_value)
KEYS = (
    st.sampled_from(
        [
            *(
                "state_dict",
                "state_dict_ema",
                "model",
                "optimizer",
                "epoch",
                "global_step",
                "metrics",
            ),
            *("lr_scheduler", "_last_lr", "callbacks", "best_k_models", "monitor", "param_groups"),
            *("module", "ds_config", "param_shapes", "loss", "lr", "_extra_state", "_metadata"),
            *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
        ]
    )
    | NAMES
).map(_value)


def _tuple(*pieces: bytes) -> bytes:
    return b"(" + b"".join(pieces) + b"t"


@st.composite
def tensors(draw: st.DrawFn) -> bytes:
    """A tensor of 64 bytes at most, or one with an odd number."""
    shape = draw(SHAPES.filter(lambda shape: math.prod(shape) <= 16))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    numbers = [0, *shape, *strides]
    if draw(st.booleans()):
        numbers[draw(st.integers(0, len(numbers) - 1))] = draw(EDGES)
    kind = draw(st.sampled_from(["FloatStorage", "ByteStorage", "ComplexDoubleStorage", "Untyped"]))
    key = draw(st.sampled_from(["0", "1", "8", "x"]))
    storage = (
        _tuple(text("storage"), named("torch", kind), text(key), text("cpu"), _value(16)) + b"Q"
    )
    offset, *rest = (_value(number) for number in numbers)
    extents, steps = _tuple(*rest[: len(shape)]), _tuple(*rest[len(shape) :])
    function: bytes = named("torch._utils", "_rebuild_tensor_v2")
    return function + _tuple(storage, offset, extents, steps, b"\x89N") + b"R"


def _mapping(entries: list[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in entries) + b"u"


PICKLED: st.SearchStrategy[bytes] = st.recursive(
    VALUES | tensors(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: b"](" + b"".join(items) + b"e"),
        st.lists(inner, max_size=3).map(lambda items: _tuple(*items)),
        st.lists(st.tuples(KEYS, inner), max_size=4).map(_mapping),
        inner.map(lambda state: named("m", "f") + b")R" + state + b"b"),
        inner.map(lambda inner: named("builtins", "getattr") + b"N" + inner + b"\x86R"),
    ),
    max_leaves=15,
)
PICKLES = st.lists(st.tuples(KEYS, PICKLED), max_size=6).map(
    lambda entries: b"\x80\x02" + _mapping(entries) + b"."
)


@st.composite
def respelled(draw: st.DrawFn, pickled: bytes) -> bytes:
    """A pickle in which some numbers and texts are others."""
    found = [*pickletools.genops(pickled)]
    starts = [place or 0 for _, _, place in found]
    opcodes = [pickled[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    places = [
        place
        for place, (opcode, argument, _) in enumerate(found)
        if isinstance(argument, int | str) and opcode.name.startswith(("BININT", "LONG", "BINUNI"))
    ]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places))
        value = draw(st.one_of(EDGES, NAMES, st.sampled_from(places).map(lambda at: found[at][1])))
        opcodes[place] = _value(value)
    return b"".join(opcodes)
