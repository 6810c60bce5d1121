"""Torch files from before the zip against torch: all that they hold, and damage to them."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import struct
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptavg
from ckptavg.errors import SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.parts import File
from tests.helpers import (
    DTYPES,
    all_but_slow,
    assert_read_or_refused,
    assert_same,
    random_tensor,
    refusal,
    save_torch,
    small_model,
    tensors_and_views,
)
from tests.oracle import naive_mean, random_state_dicts, same_bits
from tests.pickle_bombs import (
    BOMBS,
    LONG,
    TELLING,
    Asked,
    assert_bounded,
    named,
    stop,
    text,
)
from tests.pickle_bombs import (
    write_legacy as write,
)


def save_legacy(root, path, **options):
    """`torch.save`, as it wrote before 1.6."""
    return save_torch(root, path, _use_new_zipfile_serialization=False, **options)


def train(model, steps=2, seed=0):
    """A few steps of Adam; returns the optimizer."""
    made = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5, 5, generator=made)).square().sum().backward()
        optimizer.step()
    return optimizer


def network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 2),
    )


# What torch writes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_bit_for_bit(tmp_path, dtype):
    state = tensors_and_views(dtype)
    assert_same(open_checkpoint(save_legacy(state, tmp_path / "x.pt")), state)


@pytest.mark.parametrize("protocol", range(1, 6))
def test_every_protocol_that_can_name_a_storage_is_read(tmp_path, protocol):
    state = small_model().state_dict()
    path = save_legacy({"epoch": 3, "model": state}, tmp_path / "x.pt", pickle_protocol=protocol)
    opened = open_checkpoint(path)
    assert_same(opened, state)
    assert opened.container == "torch"
    assert opened.training.steps == {"epoch": 3}


def test_protocol_0_is_refused_in_one_line_as_torch_cannot_load_it(tmp_path):
    refusal(save_legacy({"w": torch.ones(2)}, tmp_path / "x.pt", pickle_protocol=0))


def test_the_versions_of_modules_come_along(tmp_path):
    state: Any = small_model().state_dict()
    opened = open_checkpoint(save_legacy(state, tmp_path / "x.pt"))
    assert opened.module_versions == dict(state._metadata)


def test_tied_tensors_have_one_place_and_others_have_their_own(tmp_path):
    shared = random_tensor((5, 4))
    state = {"embed": shared, "head": shared, "rows": shared[1:3], "other": shared.clone()}
    opened = open_checkpoint(save_legacy(state, tmp_path / "x.pt"))
    assert_same(opened, state)
    assert opened.tensors["embed"] == opened.tensors["head"]
    assert opened.tensors["rows"].offset == opened.tensors["embed"].offset + 4 * 4
    assert opened.tensors["other"].offset != opened.tensors["embed"].offset


def test_a_training_checkpoint_gives_its_state_dict(tmp_path):
    model = network()
    optimizer = train(model)
    root = {
        "epoch": 12,
        "arch": "resnet",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "args": argparse.Namespace(lr=0.02, path=pathlib.PurePosixPath("/data")),
        "seen": {1, 2},
    }
    opened = open_checkpoint(save_legacy(root, tmp_path / "x.pth.tar"))
    assert_same(opened, model.state_dict())
    assert opened.key == "state_dict"
    assert opened.training.steps == {"epoch": 12}
    assert opened.training.learning_rate == 0.02
    assert opened.other_content


def test_the_layout_of_the_paper_on_swa_is_read(tmp_path):
    model, averaged = network(), network()
    root = {
        "epoch": 161,
        "state_dict": model.state_dict(),
        "optimizer": train(model).state_dict(),
        "swa_state_dict": averaged.state_dict(),
        "swa_n": torch.tensor(3),
    }
    path = save_legacy(root, tmp_path / "checkpoint-161.pt")
    opened = open_checkpoint(path)
    assert_same(opened, model.state_dict())
    assert opened.other_keys == ("swa_state_dict",)
    assert opened.step == ("epoch", 161)
    assert_same(open_checkpoint(path, key="swa_state_dict"), averaged.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_bytes_elsewhere_do_no_harm(tmp_path):
    others = [
        torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint32),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(3).untyped_storage(),
        torch.ones(2, device="meta"),
    ]
    state = small_model().state_dict()
    path = save_legacy({"before": others, "state_dict": state, "after": others}, tmp_path / "x.pt")
    assert_same(open_checkpoint(path), state)


# Averages of them


def runs_of(folder, kinds):
    """Checkpoints of one training, in files of these kinds; returns their state dicts."""
    folder.mkdir()
    model = network()
    states = []
    for step, kind in enumerate(kinds):
        optimizer = train(model, seed=step)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        root = {"optimizer": optimizer.state_dict(), "state_dict": states[-1], "epoch": step}
        (save_legacy if kind == "legacy" else save_torch)(root, folder / f"epoch_{step}.pt")
    return states


@pytest.mark.parametrize("kinds", [["legacy"] * 3, ["legacy", "zip", "legacy"], ["zip", "legacy"]])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_average_is_the_naive_mean_bit_for_bit_and_loads(tmp_path, kinds, ending):
    states = runs_of(tmp_path / "run", kinds)
    output = tmp_path / f"out.{ending}"
    ckptavg.average(tmp_path / "run", output)
    if ending == "pt":
        result = torch.load(output)
    else:
        from safetensors.torch import load_file

        result = load_file(output)
    network().load_state_dict(result)
    for name, last in states[-1].items():
        column = [state[name] for state in states]
        wanted = naive_mean(column) if last.is_floating_point() else last
        assert same_bits(result[name], wanted), name


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
def test_odd_shapes_and_transposed_tensors_average_like_any(tmp_path, dtype):
    states = random_state_dicts(3, dtype)
    paths = []
    for step, state in enumerate(states):
        state["transposed"] = state["embed.weight"].t()
        paths.append(save_legacy(state, tmp_path / f"step_{step}.pt"))
    ckptavg.average(paths, tmp_path / "out.pt")
    result = torch.load(tmp_path / "out.pt")
    assert result.keys() == states[0].keys()
    for name, last in states[-1].items():
        is_int = not (last.is_floating_point() or last.is_complex())
        wanted = last if is_int else naive_mean([state[name] for state in states])
        assert same_bits(result[name], wanted), name


def test_nothing_of_the_optimizer_is_read(tmp_path, monkeypatch):
    counted = collections.Counter[str]()
    read = File._read

    def counting(self, fd, offset, out):
        counted[self.path.name] += len(out)
        read(self, fd, offset, out)

    inputs = []
    moments = {index: {"exp_avg": torch.ones(700, 700)} for index in range(8)}
    optimizer = {"state": moments, "param_groups": []}
    for step in range(3):
        state = torch.nn.Sequential(*(torch.nn.Linear(700, 700) for _ in range(4))).state_dict()
        root = {"optimizer": optimizer, "state_dict": state, "epoch": step}
        inputs.append(save_legacy(root, tmp_path / f"step_{step}.pt"))
    monkeypatch.setattr(File, "_read", counting)
    ckptavg.average(inputs, tmp_path / "out.safetensors")
    model_bytes = sum(value.nbytes for value in state.values())
    for path in inputs:
        assert model_bytes <= counted[path.name] <= 1.05 * model_bytes


# Files that older versions wrote, made by hand


def plain(value):
    return pickle.dumps(value, 2)[2:-1]


def short(value):
    """A string as Python 2 pickles it."""
    return pickle.SHORT_BINSTRING + bytes([len(value)]) + value.encode()


def storage(key="7", size=4, view: object = None, kind="FloatStorage", module="torch"):
    return (
        b"("
        + short("storage")
        + named(module, kind)
        + (short if len(key) < 256 else text)(key)
        + short("cuda:0")
        + plain(size)
        + plain(view)
        + b"tQ"
    )


def tensor(stored, offset=0, shape=(4,), strides=(1,)):
    return (
        named("torch._utils", "_rebuild_tensor")
        + b"("
        + stored
        + plain(offset)
        + plain(shape)
        + plain(strides)
        + b"tR"
    )


def state_of(**tensors):
    """A state dict as Python 2 pickles it: an OrderedDict of lists of pairs."""
    pairs = b"".join(b"](" + short(name) + made + b"e" for name, made in tensors.items())
    return stop(named("collections", "OrderedDict") + b"](" + pairs + b"e\x85R", 2)


FOUR = {"7": (4, np.arange(4, dtype="<f4").tobytes())}


def test_a_file_of_python_2_is_read_as_torch_reads_it(tmp_path):
    path = write(
        tmp_path / "x.pt", state_of(w=tensor(storage()), v=tensor(storage(), 1, (3,))), FOUR
    )
    theirs = torch.load(path, map_location="cpu", weights_only=False)
    assert_same(open_checkpoint(path), theirs)
    assert theirs["v"].tolist() == [1, 2, 3]


def test_bytes_that_are_no_text_in_a_string_of_python_2_do_no_harm(tmp_path):
    odd = stop(b"}(" + short("w") + tensor(storage()) + pickle.SHORT_BINSTRING + b"\2\xff\xfeNu", 2)
    assert_same(open_checkpoint(write(tmp_path / "x.pt", odd, FOUR)), {"w": torch.arange(4.0)})


def test_variables_from_before_0_4_are_their_data(tmp_path):
    made = b"".join(
        short(name) + named(module, kind) + tensor(storage()) + b"\x85R(\x88\x89NtbN0"
        for name, module, kind in (
            ("w", "torch.nn.parameter", "Parameter"),
            ("v", "torch.autograd.variable", "Variable"),
        )
    )
    opened = open_checkpoint(write(tmp_path / "x.pt", stop(b"}(" + made + b"u", 2), FOUR))
    assert_same(opened, {"w": torch.arange(4.0), "v": torch.arange(4.0)})


def test_a_module_s_class_comes_with_its_source_and_is_not_run(tmp_path):
    pid = b"(" + text("module") + named("gone", "Net") + text("/a.py") + text("1/0") + b"tQ"
    pickled = stop(b"}(" + text("w") + tensor(storage()) + text("net") + pid + b")\x81}bu", 2)
    assert_same(open_checkpoint(write(tmp_path / "x.pt", pickled, FOUR)), {"w": torch.arange(4.0)})


# Damage


GOOD = state_of(w=tensor(storage()))


@pytest.mark.parametrize(
    ("word", "pickled", "storages", "changed"),
    [
        ("start", GOOD, FOUR, {"version": 1000}),
        ("start", GOOD, FOUR, {"system": [1]}),
        ("big-endian", GOOD, FOUR, {"system": {"little_endian": False}}),
        ("storages", GOOD, FOUR, {"keys": []}),
        ("storages", GOOD, FOUR, {"keys": ["7", "7"]}),
        ("storages", GOOD, FOUR, {"keys": ["8"]}),
        ("storages", GOOD, FOUR, {"keys": [7]}),
        ("storages", GOOD, FOUR, {"keys": [["7"]]}),
        ("storages", GOOD, FOUR, {"keys": "7"}),
        ("storages", GOOD, FOUR | {"8": (4, bytes(16))}, {}),
        ("w: is damaged: storage 7 has 5 elements", GOOD, {"7": (5, bytes(20))}, {}),
        ("w: is damaged: storage 7 has 3 elements", GOOD, {"7": (3, bytes(16))}, {}),
        ("truncated", GOOD, {"7": (4, bytes(15))}, {}),
        ("truncated", state_of(w=tensor(storage(size=10**15))), FOUR, {}),
        ("impossible", state_of(w=tensor(storage(size=-4))), FOUR, {}),
        ("impossible", state_of(w=tensor(storage(size=10**5_000))), FOUR, {}),
        ("unknown type", state_of(w=tensor(storage(kind="OddStorage"))), FOUR, {}),
        ("two sizes", state_of(w=tensor(storage()), v=tensor(storage(size=5))), FOUR, {}),
        ("view of a storage", state_of(w=tensor(storage(view=("8", 1, 2)))), FOUR, {}),
        ("beyond", state_of(w=tensor(storage(), 1)), FOUR, {}),
        ("persistent id", stop(text("x") + b"Q"), FOUR, {}),
        ("persistent id", stop(b"(" + text("storage") + b"NNNNNtQ"), FOUR, {}),
        ("damaged pickle", stop(b"\xff"), FOUR, {}),
        ("opcode", stop(b"Pid\n"), FOUR, {}),
    ],
)
def test_what_torch_does_not_write_is_refused(tmp_path, word, pickled, storages, changed):
    assert word in refusal(write(tmp_path / "x.pt", pickled, storages, **changed))


def test_the_file_that_is_damaged_above_is_sound_but_for_that(tmp_path):
    assert_same(open_checkpoint(write(tmp_path / "x.pt", GOOD, FOUR)), {"w": torch.arange(4.0)})


def test_a_file_without_a_state_dict_is_an_error(tmp_path):
    refusal(save_legacy({"a": 3}, tmp_path / "x.pt"), SelectionError)


def whole_checkpoint():
    with tempfile.TemporaryDirectory() as folder:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        root = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        return save_legacy(root, pathlib.Path(folder, "x.pt")).read_bytes()


WHOLE = whole_checkpoint()
MAGIC_ENDS = 15


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    for length in {*range(0, len(WHOLE), 23), *range(300), *range(len(WHOLE) - 600, len(WHOLE))}:
        path.write_bytes(WHOLE[:length])
        message = refusal(path)
        assert length <= MAGIC_ENDS or "truncated" in message, length
    path.write_bytes(WHOLE)
    assert open_checkpoint(path).training.steps["epoch"] == 3


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_flipped_bytes_are_read_or_refused_in_one_line(tmp_path, flips):
    data = bytearray(WHOLE)
    for place, value in flips:
        data[place] = value
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    assert_read_or_refused(path)


# Hostile files


class Command:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.filterwarnings("ignore")
def test_no_command_is_run(tmp_path):
    root = {"state_dict": {"w": torch.ones(2)}, "x": Command(tmp_path / "run")}
    path = save_legacy(root, tmp_path / "x.pt")
    assert_same(open_checkpoint(path), root["state_dict"])
    assert not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["magic", "version", "system", "keys"])
def test_no_command_is_run_wherever_it_stands(tmp_path, name):
    path = write(tmp_path / "x.pt", GOOD, FOUR, **{name: Command(tmp_path / "run")})
    refusal(path)
    assert not (tmp_path / "run").exists()


def test_a_pickle_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("ckptavg.formats.budget.LARGEST_PICKLE", 200_000)
    path = write(tmp_path / "x.pt", stop(b"N0" * 200_000), {})
    assert "its pickle has more than 200000 bytes" in refusal(path)


def test_a_string_as_long_as_a_huge_file_is_not_read(tmp_path):
    path = write(tmp_path / "x.pt", pickle.BINBYTES8 + struct.pack("<Q", 1 << 30), {})
    os.truncate(path, 1 << 40)
    assert "its pickle has more than" in refusal(path)


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    """What comes of a bomb, in a process that may take no more than it should."""
    asked = Asked("tests.pickle_bombs", "legacy")
    yield asked
    asked.close()


@pytest.mark.parametrize("kind", all_but_slow(BOMBS, {*BOMBS} - {*TELLING} | {*LONG}))
def test_no_pickle_takes_more_than_its_share(asked, kind):
    assert_bounded(*asked(kind))
