"""`--container last`: the last checkpoint's torch file, with the average in its weights' places."""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptavg
from ckptavg.errors import OutputError, SelectionError, ValueRangeError
from ckptavg.formats import open_checkpoint
from tests import oracle
from tests.helpers import outcome, run
from tests.oracle import StateDict, naive_mean, random_state_dicts, same_bits, save_run

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(path: Path, root: object, *, legacy: bool = False) -> Path:
    torch.save(root, path, _use_new_zipfile_serialization=not legacy)
    return path


def average(folder: Path, **options: Any) -> Any:
    """Average `folder` into a container beside it, and load that."""
    out = folder.with_name(f"{folder.name}.pt")
    ckptavg.average(folder, out, container="last", fsync=False, **options)
    return torch.load(out, weights_only=False)


def save_states(
    folder: Path, make: Callable[[int], dict[str, Any]], *, legacy: bool = False, count: int = 3
) -> list[dict[str, Any]]:
    """Save so many state dicts, each within a training checkpoint."""
    folder.mkdir()
    states = []
    for step in range(count):
        torch.manual_seed(step)
        states.append(make(step))
        root = {"step": step, "model": states[-1], "note": "x" * step}
        save(folder / f"step_{step}.pt", root, legacy=legacy)
    return states


def assert_mean(result: dict[str, Any], states: list[dict[str, Any]]) -> None:
    oracle.assert_mean(result, states)
    assert list(result) == list(states[-1])
    for name, tensor in states[-1].items():
        assert result[name].stride() == tensor.stride(), name


def digests(path: Path) -> dict[str, bytes]:
    """The records of a torch zip by their names in it."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        weight = self.conv.weight.detach()
        self.conv.weight = nn.Parameter(weight.to(memory_format=torch.channels_last))
        self.norm = nn.BatchNorm2d(8)
        self.embed = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.embed.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.norm(self.conv(images)).mean((2, 3))
        logits: torch.Tensor = self.head(features)
        return logits


def train(folder: Path, *, legacy: bool = False) -> list[dict[str, Any]]:
    """Three steps with Adam; what was saved after each."""
    folder.mkdir()
    torch.manual_seed(0)
    model = Tower()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    saved = []
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        root = {
            "epoch": step,
            "hyper_parameters": argparse.Namespace(width=8, rates=[0.01]),
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        path = save(folder / f"epoch_{step}.ckpt", root, legacy=legacy)
        saved.append(torch.load(path, weights_only=False))
    return saved


@LEGACY
def test_the_weights_are_the_mean_and_all_else_is_the_last_one_s(tmp_path, legacy):
    saved = train(tmp_path / "run", legacy=legacy)
    result = average(tmp_path / "run")
    assert_mean(result["state_dict"], [root["state_dict"] for root in saved])
    assert result.keys() == saved[-1].keys()
    assert (result["epoch"], result["hyper_parameters"]) == (2, saved[-1]["hyper_parameters"])
    assert torch.equal(result["rng"], saved[-1]["rng"])
    assert result["optimizer"]["param_groups"] == saved[-1]["optimizer"]["param_groups"]
    for number, moments in saved[-1]["optimizer"]["state"].items():
        for name, value in moments.items():
            assert same_bits(result["optimizer"]["state"][number][name], value)


@LEGACY
def test_the_training_goes_on_from_it(tmp_path, legacy):
    train(tmp_path / "run", legacy=legacy)
    result = average(tmp_path / "run")
    model = Tower()
    optimizer = torch.optim.Adam(model.parameters())
    model.load_state_dict(result["state_dict"], strict=True)
    optimizer.load_state_dict(result["optimizer"])
    model(torch.randn(4, 3, 5, 5)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.head.bias]["step"] == 4


def test_every_record_but_those_of_weights_is_the_last_one_s_byte_for_byte(tmp_path):
    train(tmp_path / "run")
    average(tmp_path / "run")
    before, after = digests(tmp_path / "run" / "epoch_2.ckpt"), digests(tmp_path / "run.pt")
    assert after.keys() - before.keys() == {"ckptavg"}
    weights = 2 + 4 + 1 + 1  # conv; norm without its counter; the tied one; head.bias
    changed = {name for name, content in before.items() if after[name] != content}
    assert len(changed) == weights
    assert all(name.startswith("data/") for name in changed)


def test_a_legacy_file_keeps_its_length_and_a_notice_says_what_it_lacks(tmp_path):
    train(tmp_path / "run", legacy=True)
    out = tmp_path / "out.pt"
    result = run("average", tmp_path / "run", "-o", out, "--container", "last")
    assert "no place for the provenance" in result.stderr
    assert out.stat().st_size == (tmp_path / "run" / "epoch_2.ckpt").stat().st_size


@LEGACY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_shape_and_dtype_is_put_into_its_place(tmp_path, dtype, legacy):
    states = random_state_dicts(3, dtype)
    save_states(tmp_path / "run", lambda step: dict(states[step]), legacy=legacy)
    result = average(tmp_path / "run")["model"]
    assert_mean(result, [dict(state) for state in states])


def strided(step: int) -> StateDict:
    """Tensors whose elements do not lie in order."""
    half = torch.randn(3, 5, 7).bfloat16()
    return {
        "transposed": torch.randn(300, 200).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "permuted": half.permute(2, 0, 1),
        "stepped": torch.randn(20, 9)[::2, ::3],
        "row": torch.randn(4, 6)[:, 2],
        "offset": torch.randn(100)[7:31].reshape(4, 6),
        "complex": torch.randn(3, 4, dtype=torch.complex64).t(),
        "ids": torch.arange(6).reshape(2, 3).t(),
    }


@LEGACY
def test_tensors_keep_their_strides(tmp_path, legacy):
    states = save_states(tmp_path / "run", strided, legacy=legacy)
    assert_mean(average(tmp_path / "run")["model"], states)


def test_strides_may_differ_between_the_checkpoints(tmp_path):
    def make(step: int) -> StateDict:
        value = torch.randn(6, 4)
        return {"w": value.t().contiguous().t() if step == 2 else value}

    states = save_states(tmp_path / "run", make)
    assert_mean(average(tmp_path / "run")["model"], states)


@LEGACY
def test_what_lies_between_the_elements_of_a_strided_tensor_stays(tmp_path, legacy):
    """Such as the other columns, which nothing in the state dict names."""
    (tmp_path / "run").mkdir()
    whole = [torch.randn(6, 4) for _ in range(3)]
    for step, value in enumerate(whole):
        root = {"step": step, "model": {"w": value[:, 1]}, "all": [value]}
        save(tmp_path / "run" / f"step_{step}.pt", root, legacy=legacy)
    result = average(tmp_path / "run")
    wanted = whole[-1].clone()
    wanted[:, 1] = naive_mean([value[:, 1] for value in whole])
    assert same_bits(result["all"][0], wanted)


@LEGACY
def test_tied_tensors_stay_tied(tmp_path, legacy):
    train(tmp_path / "run", legacy=legacy)
    state = average(tmp_path / "run")["state_dict"]
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()


@LEGACY
def test_views_side_by_side_in_one_storage(tmp_path, legacy):
    def make(step: int) -> StateDict:
        flat = torch.randn(100)
        return {"a": flat[:30], "c": flat[70:], "b": flat[30:70].reshape(8, 5)}

    states = save_states(tmp_path / "run", make, legacy=legacy)
    result = average(tmp_path / "run")["model"]
    assert_mean(result, states)
    assert result["a"].untyped_storage().data_ptr() == result["b"].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda flat: flat[:60], lambda flat: flat[40:]),
        (lambda flat: flat, lambda flat: flat[10:20]),
        (lambda flat: flat[::2], lambda flat: flat[1::2]),
        (lambda flat: flat.reshape(10, 10), lambda flat: flat),
    ],
    ids=["overlapping", "within", "between each other's elements", "another shape"],
)
def test_views_that_share_bytes_are_an_error_that_names_both(tmp_path, one, other):
    def make(step: int) -> StateDict:
        flat = torch.randn(100)
        return {"one": one(flat), "other": other(flat)}

    save_states(tmp_path / "run", make)
    out = tmp_path / "out.pt"
    code, _, said = outcome("average", tmp_path / "run", "-o", out, "--container", "last")
    assert code == 1
    [line] = said.splitlines()
    pairs = ("one: shares bytes with other", "other: shares bytes with one")
    assert line.startswith(tuple(f"ckptavg: error: {out}: {pair} in the last" for pair in pairs))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    ckptavg.average(tmp_path / "run", out)


def test_a_wrapper_s_prefix_stays_in_the_container(tmp_path):
    states = save_states(tmp_path / "run", lambda _: {"module.w": torch.randn(3)})
    assert_mean(average(tmp_path / "run")["model"], states)


def test_the_others_may_be_of_another_kind(tmp_path):
    states = random_state_dicts(3)
    save_run(tmp_path / "run", states[:2])
    save(tmp_path / "run" / "step_2.pt", {"model": states[2], "note": "x"})
    result = average(tmp_path / "run")
    assert result["note"] == "x"
    assert_mean(result["model"], [dict(state) for state in states])


def test_the_last_is_that_of_the_training_not_of_the_names(tmp_path):
    (tmp_path / "run").mkdir()
    for name, step in (("b.pt", 1), ("a.pt", 2)):
        save(tmp_path / "run" / name, {"step": step, "model": {"w": torch.full((2,), 1.0 * step)}})
    result = average(tmp_path / "run")
    assert result["step"] == 2
    assert result["model"]["w"].tolist() == [1.5, 1.5]


@LEGACY
def test_fairseq_s_checkpoint_is_kept_whole(tmp_path, legacy):
    def make(step: int) -> dict[str, Any]:
        return {
            "args": None,
            "cfg": {"model": argparse.Namespace(arch="transformer")},
            "model": collections.OrderedDict(
                {"encoder.w": torch.randn(4, 3).half(), "decoder.version": torch.tensor([3.0])}
            ),
            "optimizer_history": [{"num_updates": step, "optimizer_name": "Adam"}],
            "extra_state": {"train_iterator": {"epoch": step}, "best": 1.5},
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.randn(4, 3)}}},
        }

    (tmp_path / "run").mkdir()
    saved = []
    for step in range(3):
        saved.append(make(step))
        save(tmp_path / "run" / f"checkpoint{step + 1}.pt", saved[-1], legacy=legacy)
    result = average(tmp_path / "run")
    assert result.keys() == saved[-1].keys()
    assert_mean(result["model"], [root["model"] for root in saved])
    for name in ("args", "cfg", "optimizer_history", "extra_state"):
        assert result[name] == saved[-1][name]
    moments = result["last_optimizer_state"]["state"][0]["exp_avg"]
    assert same_bits(moments, saved[-1]["last_optimizer_state"]["state"][0]["exp_avg"])


def test_a_bare_state_dict_is_a_container_too(tmp_path):
    save_run(tmp_path / "run", random_state_dicts(3), "pt")
    ckptavg.average(tmp_path / "run", tmp_path / "plain.pt")
    result, plain = average(tmp_path / "run"), torch.load(tmp_path / "plain.pt")
    assert result.keys() == plain.keys()
    assert all(same_bits(result[name], plain[name]) for name in plain)


def test_another_state_dict_stays_the_last_one_s_with_a_warning(tmp_path):
    (tmp_path / "run").mkdir()
    averages = [torch.randn(3) for _ in range(2)]
    for step, value in enumerate(averages):
        root = {"state_dict": {"w": torch.randn(3)}, "state_dict_ema": {"w": value}}
        save(tmp_path / "run" / f"checkpoint-{step}.pth.tar", root)
    out = tmp_path / "out.tar"
    result = run("average", tmp_path / "run", "-o", out, "--container", "last")
    assert "warning: state_dict_ema in the container stays the last checkpoint's" in result.stderr
    assert same_bits(torch.load(out)["state_dict_ema"]["w"], averages[-1])


@pytest.mark.parametrize("same_dict", [True, False])
def test_a_state_dict_that_shares_the_weights_has_the_average_and_a_warning(tmp_path, same_dict):
    (tmp_path / "run").mkdir()
    for step in range(2):
        state = {"w": torch.full((3,), 1.0 * step)}
        root = {"state_dict": state, "best_ema": state if same_dict else dict(state)}
        save(tmp_path / "run" / f"step_{step}.pt", root)
    out = tmp_path / "out.pt"
    result = run("average", tmp_path / "run", "-o", out, "--container", "last")
    assert (
        "warning: best_ema in the container shares 1 of 1 tensors with the weights" in result.stderr
    )
    assert torch.load(out)["best_ema"]["w"].tolist() == [0.5] * 3


def test_the_key_says_which_state_dict_takes_the_average(tmp_path):
    (tmp_path / "run").mkdir()
    saved: list[dict[str, Any]] = [
        {"state_dict": {"w": torch.randn(3)}, "state_dict_ema": {"w": torch.randn(3)}}
        for _ in range(3)
    ]
    for step, root in enumerate(saved):
        save(tmp_path / "run" / f"checkpoint-{step}.pt", root)
    result = average(tmp_path / "run", key="state_dict_ema")
    wanted = naive_mean([root["state_dict_ema"]["w"] for root in saved])
    assert same_bits(result["state_dict_ema"]["w"], wanted)
    assert same_bits(result["state_dict"]["w"], saved[-1]["state_dict"]["w"])


def test_inspect_shows_what_it_is_made_of(tmp_path):
    train(tmp_path / "run")
    average(tmp_path / "run")
    lines = run("inspect", tmp_path / "run.pt").stdout
    assert "uniform average of 3 checkpoints, norm statistics stale" in lines
    assert "epoch 2, learning_rate 0.01" in lines
    [found] = json.loads(run("inspect", "--json", tmp_path / "run.pt").stdout)["checkpoints"]
    assert [source["name"] for source in found["provenance"]["sources"]] == [
        f"epoch_{step}.ckpt" for step in range(3)
    ]


def test_an_average_is_the_container_of_the_next(tmp_path):
    saved = train(tmp_path / "run")
    average(tmp_path / "run")
    last = tmp_path / "run" / "epoch_2.ckpt"
    earlier = (tmp_path / "run.pt").rename(tmp_path / "run" / "epoch_3.ckpt")
    out = tmp_path / "again.pt"
    ckptavg.average([last, earlier], out, container="last")
    assert open_checkpoint(out).provenance != open_checkpoint(earlier).provenance
    records = digests(out)
    assert list(records).count("ckptavg") == 1
    first = torch.load(earlier, weights_only=False)["state_dict"]
    result = torch.load(out, weights_only=False)
    assert_mean(result["state_dict"], [saved[-1]["state_dict"], first])
    assert result["epoch"] == 2


def test_an_average_in_the_directory_is_no_input(tmp_path):
    train(tmp_path / "run")
    out = tmp_path / "run" / "swa.pt"
    ckptavg.average(tmp_path / "run", out, container="last")
    summary = ckptavg.average(tmp_path / "run", tmp_path / "again.pt", container="last")
    assert len(summary.sources) == 3


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    train(tmp_path / "run")
    for name, threads in (("one.pt", 1), ("two.pt", 3)):
        ckptavg.average(tmp_path / "run", tmp_path / name, container="last", threads=threads)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_the_summary_counts_what_is_written(tmp_path):
    train(tmp_path / "run")
    done: list[int] = []
    summary = ckptavg.average(
        tmp_path / "run",
        tmp_path / "out.pt",
        container="last",
        progress=lambda count, _: done.append(count),
    )
    dry = ckptavg.average(tmp_path / "run", tmp_path / "no.pt", container="last", dry_run=True)
    assert summary.bytes_written == dry.bytes_written == (tmp_path / "out.pt").stat().st_size
    assert not (tmp_path / "no.pt").exists()
    assert sum(done) <= summary.bytes_written


def test_a_safetensors_file_at_the_end_is_no_container(tmp_path):
    save_run(tmp_path / "run", random_state_dicts(2))
    with pytest.raises(OutputError, match=r"step_1\.safetensors, is no torch file"):
        average(tmp_path / "run")


@pytest.mark.parametrize("name", ["out.safetensors", "out", "out/"])
def test_the_output_is_called_as_a_torch_file(tmp_path, name):
    save_run(tmp_path / "run", random_state_dicts(2), "pt")
    with pytest.raises(OutputError, match="not the name of a torch file"):
        ckptavg.average(tmp_path / "run", f"{tmp_path}/{name}", container="last")


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"max_shard_size": 1000}])
def test_what_a_container_cannot_change_is_refused(tmp_path, option):
    save_run(tmp_path / "run", random_state_dicts(2), "pt")
    with pytest.raises(SelectionError, match="the last checkpoint's container"):
        average(tmp_path / "run", **option)


def test_a_nan_leaves_nothing_behind(tmp_path):
    save_states(tmp_path / "run", lambda _: {"w": torch.randn(3)})
    bad = {"step": 3, "model": {"w": torch.tensor([1.0, torch.nan, 0])}}
    save(tmp_path / "run" / "step_3.pt", bad)
    with pytest.raises(ValueRangeError, match=r"step_3\.pt: w: "):
        average(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, legacy):
    """40 MB of weights, and 40 MB of optimizer state, in what the interpreter takes and a bit."""
    (tmp_path / "run").mkdir()
    for step in range(2):
        root = {
            "step": step,
            "model": {"w": torch.full((5_000, 2_000), float(step)), "b": torch.ones(3)},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(10_000_000)}}},
        }
        save(tmp_path / "run" / f"step_{step}.pt", root, legacy=legacy)
    code = (
        "import re, sys, ckptavg\n"
        "ckptavg.average(*sys.argv[1:3], container='last', fsync=False)\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run", tmp_path / "out.pt"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) << 10 < 70 << 20
    result = torch.load(tmp_path / "out.pt", mmap=not legacy)
    assert bool((result["model"]["w"] == 0.5).all())


def test_a_last_checkpoint_without_weight_may_be_of_any_kind(tmp_path):
    (tmp_path / "run").mkdir()
    states = random_state_dicts(2)
    save(tmp_path / "run" / "step_0.pt", {"model": states[0], "note": "x"})
    save_file(states[1], tmp_path / "run" / "step_1.safetensors")
    result = average(tmp_path / "run", weights=[1, 0])
    assert result["note"] == "x"
    assert all(same_bits(result["model"][name], value) for name, value in states[0].items())
    with pytest.raises(OutputError, match=r"step_1\.safetensors, is no torch file"):
        ckptavg.average(tmp_path / "run", tmp_path / "o.pt", container="last", weights=[0, 1])


@LEGACY
@pytest.mark.parametrize(
    "view",
    [
        lambda flat: flat[50:150],
        lambda flat: flat[90:],
        lambda flat: flat[10:20],
        lambda flat: flat[::10],
    ],
    ids=["across its end", "its last elements", "within", "some elements"],
)
def test_a_state_dict_that_overlaps_the_weights_is_not_said_to_stay(tmp_path, view, legacy):
    (tmp_path / "run").mkdir()
    for step in range(2):
        flat = torch.full((200,), 1.0 * step)
        root = {"state_dict": {"w": flat[:100]}, "best_ema": {"x": view(flat)}}
        save(tmp_path / "run" / f"step_{step}.pt", root, legacy=legacy)
    result = run("average", tmp_path / "run", "-o", tmp_path / "o.pt", "--container", "last")
    assert (
        "warning: best_ema in the container shares 1 of 1 tensors with the weights" in result.stderr
    )
    assert "stays" not in result.stderr
    assert 0.5 in torch.load(tmp_path / "o.pt")["best_ema"]["x"].tolist()


@LEGACY
def test_a_state_dict_beside_the_weights_in_their_storage_stays(tmp_path, legacy):
    (tmp_path / "run").mkdir()
    for step in range(2):
        flat = torch.full((200,), 1.0 * step)
        root = {"state_dict": {"w": flat[:100]}, "best_ema": {"x": flat[100:]}}
        save(tmp_path / "run" / f"step_{step}.pt", root, legacy=legacy)
    result = run("average", tmp_path / "run", "-o", tmp_path / "o.pt", "--container", "last")
    assert "warning: best_ema in the container stays the last checkpoint's" in result.stderr
    assert torch.load(tmp_path / "o.pt")["best_ema"]["x"].tolist() == [1.0] * 100


def save_weight_averaging(folder: Path, count: int) -> list[dict[str, StateDict]]:
    """What Lightning's WeightAveraging leaves: its average under another name than the weights."""
    folder.mkdir()
    saved: list[dict[str, StateDict]] = []
    for step in range(count):
        root = {
            "current_model_state": {"w": torch.randn(3), "b": torch.randn(2)},
            "state_dict": {"w": torch.randn(3), "b": torch.randn(2)},
            "averaging_state": {"n_averaged": torch.tensor(step)},
        }
        saved.append(root)
        save(folder / f"step={step}.ckpt", {"global_step": step, **root})
    return saved


def test_an_average_of_several_is_also_what_lightning_loads(tmp_path):
    saved = save_weight_averaging(tmp_path / "run", 3)
    result = average(tmp_path / "run")
    for name in ("current_model_state", "state_dict"):
        for tensor, value in result[name].items():
            mean = naive_mean([root["current_model_state"][tensor] for root in saved])
            assert same_bits(value, mean), (name, tensor)
    assert result["averaging_state"] == {"n_averaged": torch.tensor(2)}


def test_an_average_of_one_leaves_what_lightning_loads(tmp_path):
    [saved] = save_weight_averaging(tmp_path / "run", 1)
    result = average(tmp_path / "run")
    for name in ("current_model_state", "state_dict"):
        assert all(same_bits(result[name][one], value) for one, value in saved[name].items())
