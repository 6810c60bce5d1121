"""What modules keep in a state dict beside tensors (`get_extra_state`): it comes along in a .pt."""

from __future__ import annotations

import collections
import io
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ckptavg
from ckptavg.errors import SelectionError
from tests.helpers import outcome, run
from tests.oracle import naive_mean, same_bits, save_run

LEFT_OUT = "left out entries that are not tensors: "


class Counting(nn.Module):
    """A layer with state of its own."""

    def __init__(self, state: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Unknown:
    """An object that no other program knows; it would leave a trace if it were made."""

    made = 0

    def __reduce__(self) -> tuple[object, ...]:
        return Unknown._make, ()

    @staticmethod
    def _make() -> None:
        Unknown.made += 1


def tensors(step: int) -> dict[str, Any]:
    return {
        "scale": torch.full((4,), step + 0.5),
        "history": [torch.arange(6).reshape(2, 3), torch.zeros(0, 2), torch.tensor(step)],
        "turned": torch.arange(12.0).reshape(3, 4).t(),
        "half": torch.randn(5).bfloat16(),
    }


PLAIN: dict[str, Any] = {
    "nothing": None,
    "numbers": {"a": 1, "b": -(1 << 70), "c": 1.5, "d": float("inf"), "e": True},
    "text": ["", "ж", "a\nb", "half\ud800"],
    "bytes": [bytes(range(256)), b""],
    "bytearray": [bytearray(range(256)), bytearray()],
    "containers": ({1, 2}, (), [], {}, ((),)),
    "frozenset": frozenset({"x", "y"}),
    "ordered": collections.OrderedDict([("z", 1), ("a", 2)]),
    "dtype": torch.bfloat16,
    "deep": [[[[[[[[[["x"]]]]]]]]]],
}


def train(folder: Path, state: Any, *, bare: bool = True) -> list[dict[str, Any]]:
    """Three steps of a model whose second layer has such a state."""
    folder.mkdir()
    saved = []
    for step in range(3):
        torch.manual_seed(step)
        model = nn.Sequential(nn.Linear(2, 2), Counting(state(step) if callable(state) else state))
        saved.append(model.state_dict())
        root = saved[-1] if bare else {"epoch": step, "state_dict": saved[-1]}
        torch.save(root, folder / f"step_{step}.pt")
    return saved


def needs_trust(folder: Path) -> bool:
    """Whether torch itself does not load such a file as mere weights."""
    try:
        torch.load(folder / "step_2.pt", weights_only=True)
    except pickle.UnpicklingError:
        return True
    return False


def same(one: Any, other: Any) -> bool:
    """Equality that goes into containers, types of keys and values included."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same_bits(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(mine, its) for mine, its in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("bare", [True, False], ids=["state dict", "training checkpoint"])
@pytest.mark.parametrize(
    "state",
    [tensors, *PLAIN.values(), PLAIN],
    ids=["tensors", *PLAIN, "all of them"],
)
def test_the_last_one_s_is_kept_in_a_torch_file_and_said(tmp_path, state, bare, notices):
    saved = train(tmp_path / "run", state, bare=bare)
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    [said] = [line for line in notices.messages if "entries that are not tensors" in line]
    assert re.fullmatch(r"entries that are not tensors are copied from \S+: 1\._extra_state", said)
    result = torch.load(tmp_path / "out.pt", weights_only=not needs_trust(tmp_path / "run"))
    assert result.keys() == saved[0].keys()
    assert same(result["1._extra_state"], saved[-1]["1._extra_state"])
    for name in ("0.weight", "0.bias", "1.weight"):
        assert same_bits(result[name], naive_mean([state[name] for state in saved]))


def test_the_result_is_loaded_strictly(tmp_path):
    saved = train(tmp_path / "run", tensors)
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    layer = Counting(None)
    model = nn.Sequential(nn.Linear(2, 2), layer)
    model.load_state_dict(torch.load(tmp_path / "out.pt"), strict=True)
    assert same(layer.state, saved[-1]["1._extra_state"])


def test_a_stream_of_bytes_comes_along(tmp_path):
    def state(step):
        stream = io.BytesIO()
        torch.save({"amax": torch.full((3,), float(step))}, stream)
        stream.seek(2)
        return stream

    train(tmp_path / "run", state)
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    kept = torch.load(tmp_path / "out.pt", weights_only=False)["1._extra_state"]
    assert kept.tell() == 2
    kept.seek(0)
    assert torch.equal(torch.load(kept)["amax"], torch.full((3,), 2.0))


def test_a_tensor_that_is_also_a_weight_is_the_last_one_s_in_it(tmp_path):
    """An average of the weight's history is none of the layer's own business."""
    (tmp_path / "run").mkdir()
    weights = [torch.randn(4) for _ in range(3)]
    for step, weight in enumerate(weights):
        state = {"weight": weight, "_extra_state": {"initial": weight}}
        torch.save(state, tmp_path / "run" / f"step_{step}.pt")
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    result = torch.load(tmp_path / "out.pt")
    assert same_bits(result["weight"], naive_mean(weights))
    assert same_bits(result["_extra_state"]["initial"], weights[-1])


def test_the_file_with_it_is_a_sound_zip_and_the_same_each_time(tmp_path):
    train(tmp_path / "run", tensors)
    for name in ("one.pt", "two.pt"):
        ckptavg.average(tmp_path / "run", tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.pt") as archive:
        assert archive.testzip() is None


def test_an_average_of_averages_keeps_it(tmp_path):
    saved = train(tmp_path / "run", {**PLAIN, **tensors(1)})
    earlier = tmp_path / "run" / "step_3.pt"
    ckptavg.average(tmp_path / "run", earlier)
    ckptavg.average([earlier, tmp_path / "run" / "step_2.pt"], tmp_path / "again.pt")
    kept = torch.load(tmp_path / "again.pt", weights_only=False)["1._extra_state"]
    assert same(kept, saved[-1]["1._extra_state"])


def test_a_safetensors_file_is_without_it_and_a_notice_says_so(tmp_path):
    train(tmp_path / "run", tensors)
    result = run("average", tmp_path / "run", "-o", tmp_path / "out.safetensors")
    assert result.stderr == f"ckptavg: {LEFT_OUT}1._extra_state\n"
    assert load_file(tmp_path / "out.safetensors").keys() == {"0.weight", "0.bias", "1.weight"}


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def shared(depth: int) -> list[Any]:
    """A list that takes a byte or two for each level, and is written out as 2^depth of them."""
    value: list[Any] = ["x" * 100]
    for _ in range(depth):
        value = [value, value]
    return value


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = {
    "itself": itself(),
    "an object": Unknown(),
    "an object within": {"a": [1, (Unknown(),)]},
    "a function": print,
    "endless": shared(60),
    "deep": nested(150),
    "a subclass of dict": {"call": collections.Counter("abc")},
}


@pytest.mark.parametrize("state", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_plain_value_is_left_out_and_never_made(tmp_path, state):
    (tmp_path / "run").mkdir()
    for step in range(2):
        root = {"weight": torch.full((2,), float(step)), "_extra_state": state}
        torch.save(root, tmp_path / "run" / f"step_{step}.pt")
    before = Unknown.made
    result = run("average", tmp_path / "run", "-o", tmp_path / "out.pt")
    assert result.stderr == f"ckptavg: {LEFT_OUT}_extra_state\n"
    loaded = torch.load(tmp_path / "out.pt")
    assert loaded.keys() == {"weight"}
    assert loaded["weight"].tolist() == [0.5, 0.5]
    assert Unknown.made == before


def test_one_that_cannot_be_kept_does_not_take_the_others_with_it(tmp_path):
    (tmp_path / "run").mkdir()
    for step in range(2):
        root = {
            "weight": torch.full((2,), float(step)),
            "a._extra_state": {"step": step},
            "b._extra_state": Unknown(),
            "c._extra_state": None,
        }
        torch.save(root, tmp_path / "run" / f"step_{step}.pt")
    result = run("average", tmp_path / "run", "-o", tmp_path / "out.pt")
    kept = "entries that are not tensors are copied from step_1.pt: a._extra_state, c._extra_state"
    assert result.stderr == f"ckptavg: {LEFT_OUT}b._extra_state\nckptavg: {kept}\n"
    loaded = torch.load(tmp_path / "out.pt")
    assert loaded.keys() == {"weight", "a._extra_state", "c._extra_state"}
    assert loaded["a._extra_state"] == {"step": 1}
    assert loaded["c._extra_state"] is None


def test_a_name_in_it_that_looks_like_code_is_but_text(tmp_path):
    state = {"cos\nsystem\n(S'true'\ntR.": pickle.dumps(Unknown())}
    saved = train(tmp_path / "run", state)
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    assert same(torch.load(tmp_path / "out.pt")["1._extra_state"], saved[-1]["1._extra_state"])


class Odd:
    """Pickled as a tensor whose shape and strides are no tuples of numbers."""

    def __init__(self, shape: object) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple[object, ...]:
        storage = torch.zeros(4)._typed_storage()
        arguments: tuple[object, ...] = (
            storage,
            0,
            self.shape,
            self.shape,
            False,
            collections.OrderedDict(),
        )
        return torch._utils._rebuild_tensor_v2, arguments


def pairs(depth: int) -> tuple[Any, ...]:
    """A tuple that holds the same one twice, and so on: to hash it takes 2^depth steps."""
    value: tuple[Any, ...] = (1, 1)
    for _ in range(depth):
        value = (value, value)
    return value


def save_odd(folder: Path, shape: object) -> None:
    folder.mkdir()
    for step in range(2):
        root = {"weight": torch.full((2,), float(step)), "_extra_state": {"x": [Odd(shape)]}}
        torch.save(root, folder / f"step_{step}.pt")


@pytest.mark.parametrize(
    "shape",
    [([1], 2), ({"a": 1},), (1.5,), ("4",), (None,), (True,)],
    ids=["a list", "a dict", "a fraction", "text", "nothing", "a bool"],
)
def test_a_tensor_of_an_odd_shape_is_left_out(tmp_path, shape):
    save_odd(tmp_path / "run", shape)
    code, _, said = outcome("average", tmp_path / "run", "-o", tmp_path / "out.pt")
    assert (code, said) == (0, f"ckptavg: {LEFT_OUT}_extra_state\n")
    assert torch.load(tmp_path / "out.pt")["weight"].tolist() == [0.5, 0.5]


def test_a_tensor_of_a_shape_without_end_is_left_out_at_once(tmp_path):
    save_odd(tmp_path / "run", pairs(60))
    done = subprocess.run(
        [sys.executable, "-m", "ckptavg", "average", tmp_path / "run", "-o", tmp_path / "out.pt"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, f"ckptavg: {LEFT_OUT}_extra_state\n")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module.module."])
def test_a_wrapper_s_prefix_is_taken_off_its_name(tmp_path, prefix):
    (tmp_path / "run").mkdir()
    for step in range(2):
        weight = torch.full((2,), float(step))
        root = {f"{prefix}weight": weight, f"{prefix}_extra_state": {"step": step}}
        torch.save(root, tmp_path / "run" / f"step_{step}.pt")
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    result = torch.load(tmp_path / "out.pt")
    assert result.keys() == {"weight", "_extra_state"}
    assert result["_extra_state"] == {"step": 1}
    ckptavg.average(tmp_path / "run", tmp_path / "kept.pt", keep_prefix=True)
    assert f"{prefix}_extra_state" in torch.load(tmp_path / "kept.pt")


def test_where_the_last_one_is_not_known_it_is_an_error(tmp_path):
    inputs = [tmp_path / "a.pt", tmp_path / "step_1.pt"]
    for path, value in zip(inputs, (0.0, 1.0), strict=True):
        torch.save({"weight": torch.full((2,), value), "_extra_state": {"of": path.name}}, path)
    with pytest.raises(
        SelectionError,
        match=r"other entries of the last one: a\.pt, step_1\.pt; leave out a\.pt: no step",
    ):
        ckptavg.average(inputs, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    # Which one it is does not matter for the weights alone.
    ckptavg.average(inputs, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["weight"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_one_that_is_a_tensor_of_bytes_is_the_last_one_s(tmp_path, kind):
    """As TransformerEngine keeps its pickled recipe."""
    states = []
    for step in range(3):
        recipe = pickle.dumps({"amax": [float(step)] * 3})
        state = torch.tensor(list(recipe), dtype=torch.uint8)
        states.append({"fc.weight": torch.randn(3), "fc._extra_state": state})
    save_run(tmp_path / "run", states, kind)
    ckptavg.average(tmp_path / "run", tmp_path / f"out.{kind}")
    load = load_file if kind == "safetensors" else torch.load
    result = load(tmp_path / f"out.{kind}")
    assert same_bits(result["fc._extra_state"], states[-1]["fc._extra_state"])
    assert same_bits(result["fc.weight"], naive_mean([state["fc.weight"] for state in states]))


def test_one_that_is_a_tensor_of_floats_is_not_averaged(tmp_path):
    states = [{"w": torch.randn(3), "_extra_state": torch.randn(4)} for _ in range(3)]
    save_run(tmp_path / "run", states)
    summary = ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")["_extra_state"]
    assert same_bits(found, states[-1]["_extra_state"])
    assert summary.roles == {"averaged": 1, "last": 1}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_torch_file_has_the_names_in_the_order_of_the_last_checkpoint(tmp_path, prefix, legacy):
    def state(step: int) -> dict[str, Any]:
        tied = torch.full((3,), float(step))
        halves = {f"{number}.half": torch.ones(2).half() for number in range(12)}
        state: dict[str, Any] = {"z": tied, **halves, "bn.num_batches_tracked": torch.tensor(step)}
        state |= {"_extra_state": {"step": step}, "wide": torch.ones(2, 2).double(), "a": tied}
        # Not the order of the first one.
        return state if step else dict(sorted(state.items()))

    (tmp_path / "run").mkdir()
    for step in range(3):
        named = {prefix + name: value for name, value in state(step).items()}
        path = tmp_path / "run" / f"step_{step}.pt"
        torch.save(named, path, _use_new_zipfile_serialization=not legacy)
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(result) == list(state(2))
    assert result["a"].data_ptr() == result["z"].data_ptr()
    assert result["_extra_state"] == {"step": 2}


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_a_dtype_does_not_round_it(tmp_path, name):
    states = [{"w": torch.randn(4), "m._extra_state": torch.randn(5)} for _ in range(2)]
    save_run(tmp_path / "run", states)
    ckptavg.average(tmp_path / "run", tmp_path / name, dtype="bfloat16")
    result = torch.load(tmp_path / name) if name.endswith(".pt") else load_file(tmp_path / name)
    assert result["w"].dtype == torch.bfloat16
    assert same_bits(result["m._extra_state"], states[-1]["m._extra_state"])
