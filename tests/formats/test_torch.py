"""The torch reader against torch: plain state dicts, what trainers write, and damage."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import hashlib
import io
import json
import pathlib
import pickle
import struct
import sys
import tarfile
import types
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptavg.errors import CkptAvgError, NoStateDictError, SelectionError
from ckptavg.formats import open_checkpoint
from tests.helpers import (
    DTYPES,
    assert_read_or_refused,
    assert_same,
    random_tensor,
    refusal,
    save_torch,
    small_model,
    tensors_and_views,
)
from tests.pickle_bombs import get, named, put, stop, text

# State dicts and tensors of all kinds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_bit_for_bit(tmp_path, dtype):
    state = tensors_and_views(dtype)
    assert_same(open_checkpoint(save_torch(state, tmp_path / "x.pt")), state)


def test_a_file_saved_to_a_path_and_one_saved_to_a_stream_are_read(tmp_path):
    state = small_model().state_dict()
    save_torch(state, tmp_path / "some.name.pt")
    buffer = io.BytesIO()
    save_torch(state, buffer)
    (tmp_path / "stream").write_bytes(buffer.getvalue())
    for name in ("some.name.pt", "stream"):
        opened = open_checkpoint(tmp_path / name)
        assert_same(opened, state)
        assert opened.container == "torch"
        assert opened.key == ""
        assert not opened.other_content


@pytest.mark.parametrize("stem", ["ж日本", "with space", "data", "archive"])
def test_the_name_of_the_archive_does_not_matter(tmp_path, stem):
    state = {"w": random_tensor((3,))}
    assert_same(open_checkpoint(save_torch(state, tmp_path / f"{stem}.pt")), state)


@pytest.mark.parametrize("protocol", range(1, 6))
def test_every_pickle_protocol_is_read(tmp_path, protocol):
    state = small_model().state_dict()
    path = save_torch(
        {"state_dict": state, "epoch": 3}, tmp_path / "x.pt", pickle_protocol=protocol
    )
    opened = open_checkpoint(path)
    assert_same(opened, state)
    assert opened.training.steps == {"epoch": 3}


def test_the_versions_of_modules_come_along(tmp_path):
    state: Any = small_model().state_dict()
    opened = open_checkpoint(save_torch(state, tmp_path / "x.pt"))
    assert opened.module_versions == dict(state._metadata)
    assert opened.module_versions is not None
    assert opened.module_versions["1"]["version"] == 2


def test_strange_versions_of_modules_are_left_out(tmp_path):
    state: Any = collections.OrderedDict(w=torch.ones(2))
    state._metadata = {"a": {"version": 1}, 3: {"version": 1}, "b": 7}
    opened = open_checkpoint(save_torch(state, tmp_path / "x.pt"))
    assert opened.module_versions == {"a": {"version": 1}}
    state._metadata = "none"
    assert open_checkpoint(save_torch(state, tmp_path / "x.pt")).module_versions is None


def test_parameters_buffers_and_tensors_with_attributes_are_tensors(tmp_path):
    parameter = torch.nn.Parameter(random_tensor((3, 2)))
    with_state: Any = torch.nn.Parameter(random_tensor((2,), seed=1))
    with_state.tag = "x"
    attributed = random_tensor((2, 2), seed=2)
    attributed.tag = "x"
    state = {
        "parameter": parameter,
        "with_state": with_state,
        "buffer": torch.nn.Buffer(random_tensor((4,), seed=3)),
        "attributed": attributed,
        "frozen": torch.nn.Parameter(random_tensor((2,), torch.int64), requires_grad=False),
        "hooked": torch.ones(2, requires_grad=True),
    }
    assert_same(open_checkpoint(save_torch(state, tmp_path / "x.pt")), state)


class Subclass(torch.Tensor):
    pass


def test_a_subclass_of_tensor_is_read_as_the_tensor_it_is(tmp_path):
    plain = random_tensor((2, 3))
    path = save_torch({"w": plain.as_subclass(Subclass)}, tmp_path / "x.pt")
    assert_same(open_checkpoint(path), {"w": plain})


def test_tied_tensors_have_one_place(tmp_path):
    shared = random_tensor((5, 4))
    state = {"embed": shared, "head": shared, "rows": shared[1:3], "other": shared.clone()}
    opened = open_checkpoint(save_torch(state, tmp_path / "x.pt"))
    assert_same(opened, state)
    assert opened.tensors["embed"] == opened.tensors["head"]
    assert opened.tensors["rows"].offset == opened.tensors["embed"].offset + 4 * 4
    assert opened.tensors["other"].offset != opened.tensors["embed"].offset


def test_strided_tensors_of_every_kind_are_read_in_c_order(tmp_path):
    image = random_tensor((2, 3, 4, 5))
    state = {
        "channels_last": image.to(memory_format=torch.channels_last),
        "permuted": image.permute(3, 1, 0, 2),
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 4),
        "expanded scalar": torch.tensor(7).expand(3, 3),
        "every third": torch.arange(20)[1::3],
        "diagonal": torch.arange(16).reshape(4, 4).diagonal(),
        "unfolded": torch.arange(8).unfold(0, 4, 2),
        "of extent one": torch.arange(6).reshape(2, 3).t()[:1],
        "empty, strided": torch.empty(4, 0).t(),
        "one, strided": torch.as_strided(torch.arange(4), (1, 1), (7, 9)),
        "last": torch.arange(10)[9:],
        "one, far from the next": torch.as_strided(torch.arange(4), (1, 2, 2), (2**61, 1, 2)),
    }
    opened = open_checkpoint(save_torch(state, tmp_path / "x.pt"))
    assert_same(opened, state)
    assert opened.tensors["channels_last"].strides == (60, 1, 15, 3)
    assert opened.tensors["expanded"].strides == (1, 0)
    assert opened.tensors["one, strided"].strides is None
    assert opened.tensors["last"].strides is None


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    state = {f"layer{index}": random_tensor((100,), seed=index) for index in range(12)}
    state = {"view": state["layer7"][50:], "part": state["layer3"][9:20]} | state
    opened = open_checkpoint(save_torch(state, tmp_path / "x.pt"))
    offsets = [tensor.offset for tensor in opened.tensors.values()]
    assert offsets == sorted(offsets)
    assert_same(opened, state)


def test_a_tensor_of_elements_smaller_than_a_byte_is_named(tmp_path):
    packed = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    text = refusal(save_torch({"layer.w": packed}, tmp_path / "x.pt"))
    assert "layer.w" in text
    assert "float4_e2m1fn_x2" in text


def test_entries_that_are_no_tensors_are_named(tmp_path):
    state = {"w": torch.ones(2), "layer._extra_state": {"a": torch.ones(1)}, "count": 3}
    opened = open_checkpoint(save_torch(state, tmp_path / "x.pt"))
    assert list(opened.tensors) == ["w"]
    assert set(opened.other_entries) == {"layer._extra_state", "count"}


def test_names_may_be_any_text(tmp_path):
    state = {name: torch.ones(2) for name in ("", "ж.вес", "a\nb", "😀", "__metadata__")}
    assert_same(open_checkpoint(save_torch(state, tmp_path / "x.pt")), state)


def test_the_digest_is_that_of_the_pickle(tmp_path):
    path = save_torch({"w": torch.ones(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        expected = hashlib.sha256(archive.read("x/data.pkl")).hexdigest()
    assert open_checkpoint(path).digest == expected


# Tensors that have no plain bytes


def quantised():
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


# What the message must say, and how to make one.
UNREADABLE = [
    ("conj", lambda: torch.ones(2, dtype=torch.complex64).conj()),
    ("neg", lambda: torch.ones(2, dtype=torch.complex64).conj().imag),
    ("sparse", lambda: torch.eye(3).to_sparse()),
    ("sparse", lambda: torch.eye(3).to_sparse_csr()),
    ("qtensor", quantised),
    ("nested", lambda: nested(torch.strided)),
    ("NestedTensor", lambda: nested(torch.jagged)),
    ("meta", lambda: torch.ones(2, device="meta")),
    ("complex32", lambda: torch.ones(2, dtype=torch.complex32)),
    ("bits8", lambda: torch.arange(4, dtype=torch.uint8).view(torch.bits8)),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("word", "make"), UNREADABLE)
def test_a_tensor_without_plain_bytes_is_refused_by_name(tmp_path, word, make):
    path = save_torch({"good": torch.ones(1), "layer.bad": make()}, tmp_path / "x.pt")
    message = refusal(path)
    assert ": layer.bad: cannot be averaged" in message
    assert word in message


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_without_plain_bytes_elsewhere_does_no_harm(tmp_path):
    state = {"w": torch.ones(2)}
    for index, (_, make) in enumerate(UNREADABLE):
        root = {"state_dict": state, "other": [make()], "ema": {"v": make()}}
        opened = open_checkpoint(save_torch(root, tmp_path / f"{index}.pt"))
        assert_same(opened, state)
        assert opened.other_keys == ("ema",)


# What else is called a torch file


def test_a_program_is_called_one(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(small_model()), tmp_path / "x.pt")
    assert "TorchScript" in refusal(tmp_path / "x.pt")


def test_a_plain_zip_is_no_checkpoint(tmp_path):
    for index, names in enumerate(([], ["a.txt"], ["data.pkl"], ["a/b/data.pkl"])):
        path = tmp_path / f"{index}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
        refusal(path)


def test_a_tar_is_called_one(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    assert "tar archive" in refusal(tmp_path / "x.tar")


@pytest.mark.parametrize("ending", ["pt", "safetensors", "bin"])
def test_an_empty_file_is_called_empty(tmp_path, ending):
    (tmp_path / f"x.{ending}").touch()
    assert "empty" in refusal(tmp_path / f"x.{ending}")


@pytest.mark.parametrize(
    "content",
    [b"\x80", b"\x80\2", b"PK", b"PK\3\4", b"PK\5\6" + bytes(18), bytes(999)],
    ids=lambda content: repr(content[:8]),
)
def test_anything_else_is_nothing_known(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("content", ["x", "hello \n" * 99])
def test_text_holds_no_state_dict(tmp_path, content):
    (tmp_path / "x.pt").write_text(content)
    assert "is a text file" in refusal(tmp_path / "x.pt", NoStateDictError)


def test_what_is_no_file_is_an_error_too(tmp_path):
    refusal(tmp_path / "missing.pt", CkptAvgError)
    refusal(tmp_path, CkptAvgError)


def test_a_file_of_another_byte_order_is_refused(tmp_path):
    path = save_torch({"w": torch.ones(2)}, tmp_path / "x.pt")
    rezip(path, {"byteorder": b"big"})
    assert "big-endian" in refusal(path)


# Damage


def rezip(path, changed: dict[str, bytes | None], compression=zipfile.ZIP_STORED):
    """Write the archive anew with some records changed or left out."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(records)).split("/")[0]
    records |= {f"{folder}/{name}": data for name, data in changed.items()}  # type: ignore[misc]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            if data is not None:
                archive.writestr(name, data)
    return path


def with_pickle(path, pickled):
    """A torch file whose pickle is this one, with a storage of eight bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", b"little")
        archive.writestr("x/data/0", bytes(8))
        archive.writestr("x/version", b"3\n")
    return path


def pickled_tensor(shape, strides, offset=0, *, key="0", storage="FloatStorage", size=2):
    """A pickle of `{"w": tensor}` with such numbers in it."""

    def value(plain):
        return pickle.dumps(plain, 2)[2:-1]

    persistent_id = (
        b"("
        + text("storage")
        + named("torch", storage)
        + text(key)
        + text("cpu")
        + value(size)
        + b"tQ"
    )
    return stop(
        b"}"
        + text("w")
        + named("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + persistent_id
        + value(offset)
        + value(shape)
        + value(strides)
        + b"\x89N"
        + b"tRs",
        protocol=2,
    )


def test_the_damaged_pickles_are_sound_but_for_their_damage(tmp_path):
    path = with_pickle(tmp_path / "x.pt", pickled_tensor((2,), (1,)))
    assert_same(open_checkpoint(path), {"w": torch.zeros(2)})
    assert torch.load(path)["w"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "pickled",
    [
        pickled_tensor((3,), (1,)),
        pickled_tensor((2,), (2,)),
        pickled_tensor((2,), (1,), 1),
        pickled_tensor((0,), (1,), 3),
        pickled_tensor((2,), (1,), storage="DoubleStorage"),
        pickled_tensor((2,), (1,), size=10**9, offset=2),
        pickled_tensor((2, 1), (1,)),
        pickled_tensor((2,), (1, 1)),
        pickled_tensor((-2,), (1,)),
        pickled_tensor((2,), (-1,), 1),
        pickled_tensor((2,), (1,), -1),
        pickled_tensor((2.0,), (1,)),
        pickled_tensor((True,), (1,)),
        pickled_tensor((2,), (None,)),
        pickled_tensor(("2",), (1,)),
        pickled_tensor("2", "1"),
        pickled_tensor((2,), (1,), 0.0),
        pickled_tensor((2,), (1,), None),
        pickled_tensor((2**62,), (1,)),
        pickled_tensor((2**40, 2**40), (0, 0)),
        pickled_tensor((2**61, 4, 0), (0, 0, 0)),
        pickled_tensor((2,) + (1,) * 99, (1,) * 100),
        pickled_tensor((10**5_000,), (1,)),
        pickled_tensor((1,), (1,), 10**5_000),
        pickled_tensor((((((1,),),),),), (1,)),
        pickled_tensor((2,), (1,), key="1"),
        pickled_tensor((2,), (1,), key="../data.pkl"),
        pickled_tensor((2,), (1,), key="\x1b[2J\n" * 9_000),
        pickled_tensor((2,), (1,), storage="LargeStorage\x1b[2J"),
        pickled_tensor((2,), (1,), storage="Size"),
        pickled_tensor([[]] * 100_000, (1,)),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path, pickled):
    assert ": w: " in refusal(with_pickle(tmp_path / "x.pt", pickled))


def test_a_damaged_pickle_is_refused_with_the_file_s_name(tmp_path):
    for index, pickled in enumerate((b"", b"hello", pickle.dumps({"a": 1})[:-3], stop(b"\xff"))):
        refusal(with_pickle(tmp_path / f"{index}.pt", pickled))


def test_a_cyclic_structure_does_not_hold_us_up(tmp_path):
    listed = stop(b"]" + put(0) + get(0) + b"a")
    mapped = stop(b"}" + put(0) + text("state_dict") + get(0) + b"s")
    nested = stop(b"}" + put(0) + text("a") + b"}" + text("b") + get(0) + b"ss")
    for index, pickled in enumerate((listed, mapped, nested)):
        message = refusal(with_pickle(tmp_path / f"{index}.pt", pickled), SelectionError)
        assert "no state dict" in message


def test_a_record_that_is_missing_is_named(tmp_path):
    path = save_torch({"a": torch.ones(2), "layer.b": torch.ones(3)}, tmp_path / "x.pt")
    message = refusal(rezip(path, {"data/1": None}))
    assert "layer.b" in message
    assert "data/1 is missing" in message


def test_a_record_that_is_too_short_is_refused(tmp_path):
    path = save_torch({"a": torch.ones(2)}, tmp_path / "x.pt")
    assert "beyond its storage" in refusal(rezip(path, {"data/0": b"1234567"}))


def test_compressed_records_are_refused(tmp_path):
    path = save_torch({"a": torch.ones(2)}, tmp_path / "x.pt")
    assert "compressed" in refusal(rezip(path, {}, zipfile.ZIP_DEFLATED))


def test_two_records_of_one_name_are_refused(tmp_path):
    path = save_torch({"a": torch.ones(2)}, tmp_path / "x.pt")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("x/data.pkl", b"")
    assert "two records" in refusal(path)


def test_two_checkpoints_in_one_zip_are_refused(tmp_path):
    path = save_torch({"a": torch.ones(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y/data.pkl", b"")
    refusal(path)


def test_a_directory_without_end_is_refused_unread(tmp_path):
    path = tmp_path / "x.pt"
    size = 200 << 20
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(1 << 30)
        file.seek(0, io.SEEK_END)
        file.write(struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, 0, 0, size, 4, 0))
    assert "its zip directory has more than 16777216 bytes" in refusal(path)


def test_a_record_elsewhere_than_the_directory_says_is_refused(tmp_path):
    path = save_torch({"layer.w": torch.ones(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        header = archive.getinfo("x/data/0").header_offset
    content = bytearray(path.read_bytes())
    content[header : header + 2] = b"XX"
    path.write_bytes(content)
    message = refusal(path)
    assert "layer.w" in message
    assert "data/0 is not where" in message


def test_a_record_that_reaches_beyond_the_file_is_refused(tmp_path):
    path = save_torch({"layer.w": torch.ones(2)}, tmp_path / "x.pt")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"x/data/0") - 46
    content[entry + 20 : entry + 28] = struct.pack("<2I", 1 << 30, 1 << 30)
    path.write_bytes(content)
    message = refusal(path)
    assert "layer.w" in message
    assert "data/0 is not where" in message


def test_a_pickle_without_end_is_refused_unread(tmp_path, monkeypatch):
    path = save_torch({"a": torch.ones(2)}, tmp_path / "x.pt")
    monkeypatch.setattr("ckptavg.formats.budget.LARGEST_PICKLE", 10)
    assert "data.pkl" in refusal(path)


def whole_checkpoint():
    buffer = io.BytesIO()
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.save(
        {"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer
    )
    return buffer.getvalue()


WHOLE = whole_checkpoint()


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    for length in {*range(0, len(WHOLE), 37), *range(200), *range(len(WHOLE) - 300, len(WHOLE))}:
        path.write_bytes(WHOLE[:length])
        refusal(path)
    path.write_bytes(WHOLE)
    assert open_checkpoint(path).training.steps["epoch"] == 3


def test_a_file_cut_off_in_the_middle_is_called_truncated(tmp_path):
    (tmp_path / "x.pt").write_bytes(WHOLE[: len(WHOLE) // 2])
    assert "truncated" in refusal(tmp_path / "x.pt")


HEADERS_END = WHOLE.index(b"data.pkl") + 64
DIRECTORY = WHOLE.index(b"PK\1\2")
PLACES = st.one_of(
    st.integers(0, len(WHOLE) - 1),
    st.integers(0, HEADERS_END),
    st.integers(DIRECTORY, len(WHOLE) - 1),
    st.integers(len(WHOLE) - 100, len(WHOLE) - 1),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_are_read_or_refused_in_one_line(tmp_path, flips):
    data = bytearray(WHOLE)
    for place, value in flips:
        data[place] = value
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    assert_read_or_refused(path)


# What trainers write


def unimportable(name, **attributes):
    """An instance of a class in a module that is gone when the file is read."""
    module = types.ModuleType("gone_trainer")
    made = type(name, (), {"__module__": "gone_trainer"})
    setattr(module, name, made)
    instance = made()
    instance.__dict__.update(attributes)
    return module, instance


def save_and_forget(root, modules, path):
    """Save, with modules that are there only meanwhile."""
    sys.modules |= {module.__name__: module for module in modules}
    try:
        return save_torch(root, path)
    finally:
        for module in modules:
            del sys.modules[module.__name__]


class Precision(enum.Enum):
    HALF = "16"


@dataclasses.dataclass
class DataSettings:
    root: pathlib.Path
    width: int = 3


def optimizer_state(model, rate=0.05):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def trained():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3).eval())
    return model, optimizer_state(model)


def scaled(state, factor):
    return collections.OrderedDict((name, value * factor) for name, value in state.items())


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "module", "net", "weights", "anything"]
)
def test_a_state_dict_beside_an_optimizer_is_found(tmp_path, key):
    model, optimizer = trained()
    root = {
        "epoch": 12,
        "arch": "resnet",
        "best_acc1": torch.tensor(0.5),
        key: model.state_dict(),
        "optimizer": optimizer,
        "scheduler": {"last_epoch": 12, "base_lrs": [0.05]},
        "rng_state": torch.get_rng_state(),
        "scaler": {"scale": torch.tensor(2.0)},
        "args": argparse.Namespace(lr=0.05, path=pathlib.PurePosixPath("/data")),
    }
    opened = open_checkpoint(save_torch(root, tmp_path / "x.pt"))
    assert_same(opened, model.state_dict())
    assert opened.key == key
    assert opened.other_keys == ()
    assert opened.other_content
    assert opened.training.steps == {"epoch": 12}
    assert opened.training.learning_rate == 0.05
    assert opened.step == ("epoch", 12)


def test_a_distributed_model_keeps_its_prefix_here(tmp_path):
    state = {f"module.{name}": value for name, value in small_model().state_dict().items()}
    assert_same(open_checkpoint(save_torch({"model": state}, tmp_path / "x.pt")), state)


@pytest.mark.parametrize(
    "average", ["state_dict_ema", "swa_state_dict", "model_ema", "ema", "ema_model", "teacher"]
)
def test_an_average_beside_the_weights_is_left_where_it_is(tmp_path, average):
    model, optimizer = trained()
    state = model.state_dict()
    root = {average: scaled(state, 2), "state_dict": state, "swa_n": 3, "optimizer": optimizer}
    path = save_torch(root, tmp_path / "x.pt")
    opened = open_checkpoint(path)
    assert_same(opened, state)
    assert opened.other_keys == (average,)
    asked_for = open_checkpoint(path, key=average)
    assert_same(asked_for, scaled(state, 2))
    assert asked_for.other_keys == ("state_dict",)


def test_an_average_alone_is_taken(tmp_path):
    state = small_model().state_dict()
    opened = open_checkpoint(save_torch({"ema_state_dict": state}, tmp_path / "x.pt"))
    assert opened.key == "ema_state_dict"
    assert_same(opened, state)


def lightning_root(state, optimizer):
    config, omega = unimportable("DictConfig", _content={"lr": 0.1}, _parent=None)
    hook, callback = unimportable("Callback")
    hook.__name__ = callback.__class__.__module__ = "gone_callbacks"
    root = {
        "epoch": 4,
        "global_step": 1_234,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "weights": {"w": torch.ones(1)}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.1)},
            callback.__class__: callback,
        },
        "optimizer_states": [optimizer],
        "lr_schedulers": [{"_last_lr": [0.05]}],
        "MixedPrecision": {"scale": 65536.0, "_growth_tracker": 0},
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "namespace": argparse.Namespace(x=1),
            "path": pathlib.PurePosixPath("/data"),
            "precision": Precision.HALF,
            "data": DataSettings(pathlib.PurePosixPath("/d")),  # type: ignore[arg-type]
            "scalar": np.float64(0.5),
            "array": np.arange(10),
            "strings": np.array(["a", "b"]),
            "counts": collections.defaultdict(int, {"a": 1}),
            "queue": collections.deque([1, 2], maxlen=2),
            "config": omega,
            "loss": torch.nn.CrossEntropyLoss(),
            ("tuple", "key"): 1,
            Precision.HALF: 2,
        },
    }
    return root, [config, hook]


def test_a_lightning_checkpoint_with_unknown_classes_opens(tmp_path):
    model, optimizer = trained()
    root, modules = lightning_root(model.state_dict(), optimizer)
    path = save_and_forget(root, modules, tmp_path / "epoch=4.ckpt")
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(path, weights_only=False)
    opened = open_checkpoint(path)
    assert_same(opened, model.state_dict())
    assert opened.training.steps == {"epoch": 4, "global_step": 1_234}
    assert opened.training.learning_rate == 0.05
    assert opened.step == ("global_step", 1_234)
    assert opened.other_keys == ()
    assert not any(module.__name__ in sys.modules for module in modules)


def test_lightning_s_weight_averaging_gives_the_current_weights(tmp_path):
    model, optimizer = trained()
    root, modules = lightning_root(scaled(model.state_dict(), 3), optimizer)
    root["current_model_state"] = model.state_dict()
    root["averaging_state"] = {"n_averaged": torch.tensor(3)}
    opened = open_checkpoint(save_and_forget(root, modules, tmp_path / "x.ckpt"))
    assert opened.key == "current_model_state"
    assert_same(opened, model.state_dict())
    assert "state_dict" in opened.other_keys


def test_fairseq_s_checkpoint_gives_its_model(tmp_path):
    model, optimizer = trained()
    configuration, omega = unimportable("DictConfig", _content={"lr": [0.1]}, _parent=None)
    root = {
        "args": argparse.Namespace(arch="transformer", lr=[0.05]),
        "cfg": omega,
        "model": model.state_dict(),
        "criterion": {"weight": torch.ones(3)},
        "optimizer_history": [
            {"criterion_name": "CrossEntropyCriterion", "num_updates": 70, "lr_scheduler_state": {}}
        ],
        "task_state": {"vocabulary": {"counts": [1, 2]}},
        "extra_state": {
            "metrics": [("default", [{"priority": 10, "value": torch.tensor(2.0)}])],
            "previous_training_time": 3.5,
            "train_iterator": {"epoch": 4, "shuffle": True, "version": 2},
            "val_loss": 2.5,
        },
        "last_optimizer_state": optimizer,
    }
    opened = open_checkpoint(save_and_forget(root, [configuration], tmp_path / "checkpoint4.pt"))
    assert opened.key == "model"
    assert opened.other_keys == ()
    assert_same(opened, model.state_dict())


def test_wenet_s_checkpoint_gives_its_model(tmp_path):
    model, optimizer = trained()
    root = {
        "model": model.state_dict(),
        "optimizer": optimizer,
        "lr_scheduler": {"_step_count": 3},
        "step": 700,
        "epoch": 4,
        "lrs": [0.05],
        "loss_dict": {"loss": torch.tensor(2.0), "acc": torch.tensor(0.5)},
    }
    opened = open_checkpoint(save_torch(root, tmp_path / "step_700.pt"))
    assert opened.key == "model"
    assert opened.step == ("step", 700)
    assert_same(opened, model.state_dict())


def test_two_models_are_an_error_that_lists_them_and_tells_of_key(tmp_path):
    state = small_model().state_dict()
    root = {"generator": state, "discriminator": scaled(state, 2), "epoch": 1}
    path = save_torch(root, tmp_path / "x.pt")
    message = refusal(path, SelectionError)
    assert "generator" in message
    assert "discriminator" in message
    assert "`key`" in message
    with pytest.raises(SelectionError) as caught:
        open_checkpoint(path)
    assert set(caught.value.choices) == {"generator", "discriminator"}
    assert_same(open_checkpoint(path, key="discriminator"), scaled(state, 2))


def test_a_key_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path):
    path = save_torch(
        {"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}}, tmp_path / "x.pt"
    )
    message = refusal(path, SelectionError, key="swa")
    assert "'swa'" in message
    assert "model, ema" in message
    save_torch({"w": torch.ones(1)}, path)
    assert "the whole file" in refusal(path, SelectionError, key="model")


def test_a_state_dict_two_levels_down_is_found_by_its_path(tmp_path):
    state = small_model().state_dict()
    opened = open_checkpoint(save_torch({"trainer": {"model": state}, "n": 1}, tmp_path / "x.pt"))
    assert opened.key == "trainer.model"
    assert_same(opened, state)


@pytest.mark.parametrize(
    "root", [{}, [], None, 3, "text", [torch.ones(1)], torch.ones(1), {1: torch.ones(1)}]
)
def test_a_file_without_a_state_dict_is_an_error(tmp_path, root):
    assert "no state dict" in refusal(save_torch(root, tmp_path / "x.pt"), SelectionError)


def test_our_own_provenance_is_read_from_its_record(tmp_path):
    path = save_torch({"w": torch.ones(2)}, tmp_path / "x.pt")
    assert open_checkpoint(path).provenance is None
    rezip(path, {"ckptavg": json.dumps({"scheme": "uniform"}).encode()})
    assert open_checkpoint(path).provenance == {"scheme": "uniform"}
    rezip(path, {"ckptavg": b"\xff[[["})
    assert open_checkpoint(path).provenance is None
