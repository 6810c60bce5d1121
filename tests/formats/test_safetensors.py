"""The safetensors reader against the reference library, and against damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptavg.errors import CkptAvgError, FormatError, SelectionError
from ckptavg.formats import open_checkpoint
from tests.helpers import DTYPES, refusal

# What the reference library's own error message lists, with the bits of an element.
SMALLER_THAN_A_BYTE = {"F4", "F6_E2M3", "F6_E3M2"}
ALL_CODES = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
TORCH_DTYPES = [dtype for dtype in DTYPES if dtype != torch.complex128]
U8 = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def random_bytes(count, seed=0):
    return np.random.default_rng(seed).bytes(count)


def write(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file from its pieces; `header` is bytes, text or an object."""
    if not isinstance(header, bytes | str):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def entry(dtype="U8", shape=(2,), offsets=(0, 2)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def reference_accepts(path):
    try:
        with safetensors.safe_open(path, "np"):
            return True
    except safetensors.SafetensorError:
        return False


# What it reads


def test_the_list_of_dtypes_is_the_reference_library_s(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": entry("NONE")}, b"12")
    with pytest.raises(safetensors.SafetensorError) as caught, safetensors.safe_open(path, "np"):
        pass
    listed = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    assert set(listed.replace("`", "").split(", ")) == {*ALL_CODES, *SMALLER_THAN_A_BYTE}


@pytest.mark.parametrize("code", ALL_CODES)
def test_every_dtype_of_the_format_is_read(tmp_path, code):
    data = random_bytes(24 * ALL_CODES[code] // 8)
    header = {"first": entry(code, (0, 7), (0, 0)), "w": entry(code, (4, 6), (0, len(data)))}
    path = write(tmp_path / "x.safetensors", header, data)
    assert reference_accepts(path)
    opened = open_checkpoint(path)
    assert opened.tensors["w"].dtype.code == code
    assert opened.tensors["w"].shape == (4, 6)
    assert opened.tensors["w"].nbytes == len(data)
    assert opened.read("w").tobytes() == data
    assert opened.read("first").size == 0


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_what_safetensors_torch_saved_is_read_bit_for_bit(tmp_path, dtype):
    size = 2 if dtype == torch.bool else 256
    values = torch.from_numpy(
        np.random.default_rng(1).integers(0, size, 24 * dtype.itemsize, np.uint8)
    ).view(dtype)
    tensors = {
        "matrix": values.reshape(2, 3, 4),
        "scalar": values[5].clone(),
        "empty": values[:0].reshape(3, 0).clone(),
        "one": values[7:8].clone(),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path)
    opened = open_checkpoint(path)
    assert set(opened.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert opened.tensors[name].dtype.name == str(dtype).removeprefix("torch.")
        assert opened.read(name).shape == tuple(tensor.shape)
        assert opened.read(name).tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", ["float64", "float16", "uint16", "uint64", "complex64", "bool"])
def test_what_safetensors_numpy_saved_is_read(tmp_path, name):
    array = np.arange(6).reshape(2, 3).astype(name)
    safetensors.numpy.save_file(
        {"w": array, "scalar": np.array(array[1, 2])}, tmp_path / "x.safetensors"
    )
    opened = open_checkpoint(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(opened.read("w"), array, strict=True)
    np.testing.assert_array_equal(opened.read("scalar"), array[1, 2])
    assert opened.read("scalar").shape == ()


@pytest.mark.parametrize("code", sorted(SMALLER_THAN_A_BYTE))
def test_a_tensor_of_elements_smaller_than_a_byte_is_named(tmp_path, code):
    size = 4 * int(code[1])  # 32 elements of 4 or 6 bits
    path = write(tmp_path / "x.safetensors", {"w": entry(code, (4, 8), (0, size))}, bytes(size))
    assert reference_accepts(path)
    assert f"w: is of {code}" in refusal(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_without_tensors_is_read(tmp_path, metadata):
    safetensors.numpy.save_file({}, tmp_path / "x.safetensors", metadata)
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert opened.tensors == {}
    assert opened.metadata == (metadata or {})


@pytest.mark.parametrize("header", ["{}", '{"__metadata__":{}}', '{"__metadata__":{},"a":%s}'])
def test_empty_metadata_and_empty_headers_are_read(tmp_path, header):
    text = header % json.dumps(entry("U8", (0,), (0, 0))) if "%s" in header else header
    path = write(tmp_path / "x.safetensors", text)
    assert reference_accepts(path)
    assert open_checkpoint(path).metadata == {}


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {
        "last": entry("U8", (2,), (3, 5)),
        "first": entry("U8", (3,), (0, 3)),
        "end": entry("U8", (0,), (5, 5)),
        "middle": entry("U8", (0,), (3, 3)),
    }
    opened = open_checkpoint(write(tmp_path / "x.safetensors", header, b"abcde"))
    assert list(opened.tensors) == ["first", "middle", "last", "end"]
    assert opened.read("last").tobytes() == b"de"


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    values = np.array([1.5, -2.5])
    header = {"b": entry("U8", (1,), (0, 1)), "f": entry("F64", (2,), (1, 17))}
    opened = open_checkpoint(write(tmp_path / "x.safetensors", header, b"\1" + values.tobytes()))
    np.testing.assert_array_equal(opened.read("f"), values)


def test_names_may_be_any_text(tmp_path):
    names = ["", "ж.вес", "日本", "a\nb", "\x00", "😀", "__metadata", 'q"\\']
    tensors = {name: np.full(2, index, np.int8) for index, name in enumerate(names)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert {name: opened.read(name).tolist() for name in opened.tensors} == {
        name: array.tolist() for name, array in tensors.items()
    }


def test_any_ending_will_do(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "weights.bin")
    assert open_checkpoint(tmp_path / "weights.bin").container == "safetensors"


def test_metadata_is_read_wherever_it_stands_and_however_it_is_spaced(tmp_path):
    metadata = {"format": "pt", "step": "12", "ünï": '{"nested": "\\u0041"}'}
    first = {"__metadata__": metadata, "a": U8}
    last = {"a": U8, "__metadata__": metadata}
    spaced = ' {\n "__metadata__"\t: ' + json.dumps(metadata) + ' , "a": ' + json.dumps(U8) + "}\n"
    alone = json.dumps({"__metadata__": metadata}, indent=1)
    for index, header in enumerate(
        [
            json.dumps(first),
            json.dumps(first, separators=(",", ":")),
            json.dumps(last),
            json.dumps(first, indent=2),
            spaced,
        ]
    ):
        path = write(tmp_path / f"{index}.safetensors", header, b"ab")
        with safetensors.safe_open(path, "np") as reference:
            assert open_checkpoint(path).metadata == reference.metadata() == metadata
        assert open_checkpoint(path).training.steps == {"step": 12}
        assert open_checkpoint(path).read("a").tobytes() == b"ab"
    assert open_checkpoint(write(tmp_path / "alone.safetensors", alone)).metadata == metadata


def test_metadata_that_is_null_is_none_at_all(tmp_path):
    for index, header in enumerate(
        ({"__metadata__": None, "a": U8}, {"a": U8, "__metadata__": None})
    ):
        path = write(tmp_path / f"{index}.safetensors", header, b"ab")
        assert reference_accepts(path)
        assert open_checkpoint(path).metadata == {}


def test_only_steps_that_are_whole_numbers_are_facts(tmp_path):
    metadata = {"step": "1e3", "epoch": "7", "global_step": "9" * 5_000, "other": "3"}
    safetensors.numpy.save_file({"w": np.ones(1)}, tmp_path / "x.safetensors", metadata)
    assert open_checkpoint(tmp_path / "x.safetensors").training.steps == {"epoch": 7}


def test_empty_tensors_at_one_place_come_in_the_order_of_their_names(tmp_path):
    names = [f"empty.{index}" for index in range(9)]
    header = {name: entry("U8", (0,), (0, 0)) for name in names[::-1]} | {"a": U8}
    opened = open_checkpoint(write(tmp_path / "x.safetensors", header, b"ab"))
    assert list(opened.tensors) == [*names, "a"]


def test_an_empty_tensor_behind_the_one_that_begins_with_it(tmp_path):
    header = {"w": entry("F32", (1024,), (0, 4096)), "e": entry("F32", (0,), (0, 0))}
    opened = open_checkpoint(write(tmp_path / "x.safetensors", header, bytes(4096)))
    assert {name: tensor.shape for name, tensor in opened.tensors.items()} == {
        "e": (0,),
        "w": (1024,),
    }


def test_headers_that_differ_otherwise_do_not_share_tensors(tmp_path):
    one = open_checkpoint(write(tmp_path / "1.safetensors", {"a": U8}, b"ab"))
    other = open_checkpoint(write(tmp_path / "2.safetensors", {"b": U8}, b"ab"))
    assert list(one.tensors) == ["a"]
    assert list(other.tensors) == ["b"]


def test_the_digest_is_that_of_the_header(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": U8}, b"ab")
    assert (
        open_checkpoint(path).digest == hashlib.sha256(json.dumps({"a": U8}).encode()).hexdigest()
    )


def test_a_file_holds_one_state_dict_and_no_other(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": U8}, b"ab")
    with pytest.raises(SelectionError, match="ema"):
        open_checkpoint(path, key="ema")


@pytest.mark.parametrize(
    "header",
    [
        '{"a":%s,"a":%s}',
        '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":%s,"b":%s}',
        '{"__metadata__":{"x":"1","x":"2"},"a":%s}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"compression":"zstd"}}',
    ],
)
def test_repeated_and_unknown_entries_are_read_as_the_reference_reads_them(tmp_path, header):
    entries = [json.dumps(U8), json.dumps(entry("U8", (1,), (2, 3)))][: header.count("%s")]
    if header.count('"a"') == 2 and '"b"' not in header:
        entries = entries[:1] * 2
    path = write(
        tmp_path / "x.safetensors", header % tuple(entries), b"abc"[: 2 + ('"b"' in header)]
    )
    opened = open_checkpoint(path)
    with safetensors.safe_open(path, "np") as reference:
        assert opened.metadata == (reference.metadata() or {})
        assert sorted(opened.tensors) == sorted(reference.keys())
        for name in opened.tensors:
            np.testing.assert_array_equal(opened.read(name), reference.get_tensor(name))


# What it refuses

DEEP = 200_000
DAMAGED_HEADERS = {
    "not JSON": "{abc}",
    "nothing": "",
    "a list": "[]",
    "a string": '"a"',
    "null": "null",
    "not UTF-8": b'{"\xff":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "a string on the second line": '\n"a"',
    "half a character as UTF-8": b'"\xed\xa0\x80"',
    "UTF-16": json.dumps({"a": U8}).encode("utf-16"),
    "a byte order mark": "\ufeff" + json.dumps({"a": U8}),
    "half a character": '{"\\ud800":' + json.dumps(U8) + "}",
    "half a character in the metadata": '{"__metadata__":{"\\udfff":"x"},"a":'
    + json.dumps(U8)
    + "}",
    "padding with zeros": json.dumps({"a": U8}) + "\0\0",
    "something after it": json.dumps({"a": U8}) + "{}",
    "a trailing comma": '{"a":' + json.dumps(U8) + ",}",
    "a trailing comma after the metadata": '{"a":' + json.dumps(U8) + ',"__metadata__":{},}',
    "no comma after the metadata": '{"__metadata__":{} "a":' + json.dumps(U8) + "}",
    "metadata alone, not closed": '{"__metadata__":{}',
    "metadata twice": '{"__metadata__":{},"__metadata__":{},"a":' + json.dumps(U8) + "}",
    "metadata first and last": '{"__metadata__":{},"a":' + json.dumps(U8) + ',"__metadata__":{}}',
    "metadata that is a list": {"__metadata__": [], "a": U8},
    "metadata of numbers": {"__metadata__": {"step": 3}, "a": U8},
    "metadata of numbers, last": {"a": U8, "__metadata__": {"step": 3}},
    "the same field twice": '{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "an entry that is a number": {"a": 3},
    "an entry that is null": {"a": None},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 2]}},
    "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 2]}},
    "no offsets": {"a": {"dtype": "U8", "shape": [2]}},
    "an unknown dtype": {"a": entry("F128")},
    "a dtype in small letters": {"a": entry("u8")},
    "a dtype that is a list": {"a": U8 | {"dtype": ["U8"]}},
    "a dtype that is null": {"a": U8 | {"dtype": None}},
    "a shape that is a number": {"a": U8 | {"shape": 2}},
    "a shape of bools": {"a": U8 | {"shape": [True, 2]}},
    "a shape of floats": {"a": U8 | {"shape": [2.0]}},
    "a shape of strings": {"a": U8 | {"shape": ["2"]}},
    "a negative shape": {"a": U8 | {"shape": [-1, -2]}},
    "a huge shape": {"a": U8 | {"shape": [2**64 + 2]}},
    "a shape whose product overflows": {"a": U8 | {"shape": [2**32, 2**32, 1]}},
    "a shape whose product overflows to 2": {"a": U8 | {"shape": [2**63 - 1, 2, 2**63]}},
    "an overflow of bytes that a zero hides": {"a": entry("F64", (2**61, 0), (0, 0)), "b": U8},
    "an overflow that a zero hides": {"a": entry("U8", (2**62, 4, 0), (0, 0)), "b": U8},
    "digits without end": '{"a":{"dtype":"U8","shape":[' + "9" * 5_000 + '],"data_offsets":[0,2]}}',
    "more dimensions than numpy has": {"a": U8 | {"shape": [2] + [1] * 100}},
    "a shape without end": {"a": U8 | {"shape": [2**62] * 50_000}},
    "NaN": '{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}',
    "offsets that are three": {"a": U8 | {"data_offsets": [0, 2, 2]}},
    "offsets that are one": {"a": U8 | {"data_offsets": [2]}},
    "negative offsets": {"a": U8 | {"data_offsets": [-2, 0]}},
    "offsets of bools": {"a": entry("U8", (1,), (False, True))},
    "reversed offsets": {"a": U8 | {"data_offsets": [2, 0]}},
    "offsets that do not fit the shape": {"a": U8 | {"shape": [3]}},
    "offsets that do not fit the dtype": {"a": entry("F16")},
    "offsets beyond the file": {"a": entry("U8", (9,), (0, 9))},
    "huge offsets": {"a": entry("U8", (2,), (2**64 - 2, 2**64))},
    "a hole at the start": {"a": entry("U8", (1,), (1, 2))},
    "a hole in the middle": {"a": entry("U8", (1,), (0, 1)), "b": entry("U8", (0,), (2, 2))},
    "an overlap": {"a": U8, "b": U8},
    "an overlap by one": {"a": U8, "b": entry("U8", (1,), (1, 2))},
    "half a byte": {"a": entry("F4", (3,), (0, 2))},
    "bytes that nobody has": {"a": entry("U8", (1,), (0, 1))},
    "bytes and no tensor": {},
    "lists without end": "[" * DEEP,
    "objects without end": '{"a":' * DEEP,
    "metadata without end": '{"__metadata__":' + "[" * DEEP,
}
# Here we are stricter than the reference library, and mean to be.
STRICTER = {
    "more dimensions than numpy has",
    "an overflow of bytes that a zero hides",
}


@pytest.mark.parametrize("damage", DAMAGED_HEADERS)
def test_a_damaged_header_is_refused_in_one_line_that_names_the_file(tmp_path, damage):
    path = write(tmp_path / "x.safetensors", DAMAGED_HEADERS[damage], b"ab")
    assert reference_accepts(path) == (damage in STRICTER)
    refusal(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"layer.w": entry("F128")}, ["layer.w", "F128"]),
        ({"layer.w": entry("U8", (3,))}, ["shape"]),
        ({"layer.w": entry("U8", (1,), (1, 2))}, ["layer.w", "offset"]),
        ({"layer.w": {}}, ["layer.w", "dtype"]),
        ({"n" * 9_000: {}}, ["nnn", "dtype"]),
        ('{"\x1b[2J": {}}', [r"\x1b"]),
        ({"a": U8 | {"dtype": "\x1b[2J\n"}}, [r"\x1b[2J\n"]),
        ({"__metadata__": {"a": 1}}, ["metadata"]),
        ({}, ["followed by"]),
        ({"a": entry("U8", (3,), (0, 3))}, ["truncated"]),
    ],
)
def test_the_error_says_what_is_wrong_and_with_what(tmp_path, header, words):
    text = refusal(write(tmp_path / "x.safetensors", header, b"ab"))
    for word in words:
        assert word in text


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**31, 100_000_001, 1_000])
def test_a_header_longer_than_the_file_is_refused_unread(tmp_path, length):
    path = write(tmp_path / "x.safetensors", {"a": U8}, b"ab", length=length)
    assert not reference_accepts(path)
    assert str(length) in refusal(path)


def test_a_header_beyond_the_format_s_limit_is_refused_unread(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)
    assert not reference_accepts(path)
    assert "100000001" in refusal(path)


@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_header_shorter_than_it_should_be_is_refused(tmp_path, length):
    refusal(write(tmp_path / "x.safetensors", {"a": U8}, b"ab", length=length))


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = safetensors.torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, {"format": "pt"})
    for length in range(len(whole)):
        path = tmp_path / "x.safetensors"
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole)
    assert open_checkpoint(path).read("a").tolist() == [1, 1, 1]


def test_trailing_bytes_are_refused(tmp_path):
    whole = safetensors.torch.save({"a": torch.ones(3)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole + b"\0")
    assert not reference_accepts(path)
    assert "followed by" in refusal(path)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "x.safetensors").touch()
    assert "empty" in refusal(tmp_path / "x.safetensors")


def test_a_file_cut_off_after_it_was_opened_is_an_error_too(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(30)}, path)
    opened = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CkptAvgError, match="truncated"):
        opened.read("a")


def test_a_refused_file_does_not_spoil_the_next_one(tmp_path):
    good = write(tmp_path / "good.safetensors", {"a": U8}, b"ab")
    first = open_checkpoint(good)
    refusal(write(tmp_path / "bad.safetensors", {"a": entry("F128")}, b"ab"))
    refusal(write(tmp_path / "short.safetensors", {"a": U8}, b"a"))
    assert open_checkpoint(good).tensors == first.tensors


WHOLE = safetensors.torch.save(
    {"a.weight": torch.ones(2, 3), "a.steps": torch.tensor(7), "b": torch.zeros(0)},
    {"format": "pt", "step": "3"},
)
HEADER_END = 8 + int.from_bytes(WHOLE[:8], "little")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1))
def test_flipped_bytes_are_refused_or_read_as_the_reference_reads_them(tmp_path, flips):
    data = bytearray(WHOLE)
    for place, value in flips:
        data[place] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        opened = open_checkpoint(path)
    except CkptAvgError:
        return
    with safetensors.safe_open(path, "np") as reference:
        assert set(reference.keys()) == set(opened.tensors)
        assert (reference.metadata() or {}) == opened.metadata
        for name, tensor in opened.tensors.items():
            piece = reference.get_slice(name)
            assert (piece.get_dtype(), tuple(piece.get_shape())) == (
                tensor.dtype.code,
                tensor.shape,
            )
            assert opened.read(name).shape == tensor.shape


PIECES: st.SearchStrategy[object] = st.sampled_from(
    [0, 1, 2, 3, 8, -1, True, 1.0, None, "U8", "F16", 2**64, [], {}]
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BOOL", "F16", "F8_E4M3"]) | PIECES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(PIECES, max_size=3) | PIECES,
        "data_offsets": st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted)
        | st.lists(PIECES, max_size=3),
    }
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), ENTRIES, max_size=3), st.integers(0, 4))
def test_the_reader_and_the_reference_library_take_the_same_headers(tmp_path, header, size):
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    try:
        open_checkpoint(path)
    except FormatError:
        accepted = False
    else:
        accepted = True
    assert accepted == reference_accepts(path)
