"""Checkpoints of timm's training script, averaged, refreshed, and loaded by timm."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3

import ckptavg
from ckptavg import Selection
from ckptavg.errors import SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.select.rules import chosen, select
from ckptavg.select.run import find_run
from tests import oracle
from tests.helpers import run
from tests.oracle import StateDict, same_bits

MODEL = "test_resnet"
NORM = ("running_mean", "running_var", "num_batches_tracked")


def make() -> Any:
    return timm.create_model(MODEL, pretrained=False, num_classes=3)


def images() -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 32, 32, generator=made) for _ in range(3)]


def load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=False))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five epochs, of which the saver keeps the three best, the last one and the best one."""
    folder: Path = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = make()
    average = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arguments = argparse.Namespace(model=MODEL, lr=0.1)
    saver = CheckpointSaver(
        model, optimizer, arguments, average, checkpoint_dir=str(folder), max_history=3
    )
    for epoch, metric in enumerate((10.0, 30.0, 20.0, 50.0, 40.0)):
        optimizer.zero_grad()
        model(images()[0]).square().mean().backward()
        optimizer.step()
        average.update(model)
        saver.save_checkpoint(epoch, metric)
    return folder


def states(folder: Path, key: str = "state_dict") -> list[StateDict]:
    return [load(folder / f"checkpoint-{epoch}.pth.tar")[key] for epoch in (1, 3, 4)]


def assert_mean(result: dict[str, torch.Tensor], saved: list[StateDict]) -> None:
    oracle.assert_mean(result, saved)
    assert any(not torch.equal(result[name], saved[-1][name]) for name in result)


def test_hard_links_count_once(trained, tmp_path):
    best, last = trained / "model_best.pth.tar", trained / "last.pth.tar"
    assert best.samefile(trained / "checkpoint-3.pth.tar")
    assert last.samefile(trained / "checkpoint-4.pth.tar")
    result = run("average", trained, "-o", tmp_path / "out.safetensors", "--expect", 3)
    assert "last.pth.tar is the same checkpoint as checkpoint-4.pth.tar" in result.stderr
    assert "model_best.pth.tar is the same checkpoint as checkpoint-3.pth.tar" in result.stderr


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth.tar"])
def test_the_mean_is_loaded_by_timm(trained, tmp_path, name):
    summary = ckptavg.average(trained, tmp_path / name)
    assert [source.step for source in summary.sources] == [("epoch", n) for n in (1, 3, 4)]
    model = make()
    load_checkpoint(model, str(tmp_path / name))
    assert_mean(model.state_dict(), states(trained))


def test_timm_s_own_average_is_averaged_by_its_key(trained, tmp_path):
    out = tmp_path / "out.safetensors"
    run("average", trained, "-o", out, "--key", "state_dict_ema")
    assert_mean(load_file(out), states(trained, "state_dict_ema"))


def test_equals_timm_s_avg_checkpoints(trained, tmp_path):
    """Its script: sum in float64, divide, clamp to float32. It averages counters too: not we."""
    total: StateDict = {}
    for state in states(trained):
        for name, value in state.items():
            total[name] = total[name] + value.double() if name in total else value.double()
    ckptavg.average(trained, tmp_path / "out.safetensors")
    result = load_file(tmp_path / "out.safetensors")
    for name, value in total.items():
        if not name.endswith("num_batches_tracked"):
            assert same_bits(result[name], (value / 3).float()), name


def test_the_container_is_loaded_by_timm_and_resumes(trained, tmp_path):
    out = tmp_path / "out.pth.tar"
    result = run("average", trained, "-o", out, "--container", "last")
    assert "warning: state_dict_ema in the container stays the last checkpoint's" in result.stderr
    model = make()
    load_checkpoint(model, str(out), use_ema=False, weights_only=False)
    assert_mean(model.state_dict(), states(trained))
    last, found = load(trained / "last.pth.tar"), load(out)
    assert found.keys() == last.keys()
    assert (found["epoch"], found["arch"], found["args"]) == (4, MODEL, last["args"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.load_state_dict(found["optimizer"])
    buffers = zip(
        optimizer.state_dict()["state"].values(), last["optimizer"]["state"].values(), strict=True
    )
    assert all(torch.equal(*(state["momentum_buffer"] for state in pair)) for pair in buffers)


def test_refreshed_statistics_are_those_of_update_bn(trained, tmp_path):
    out = tmp_path / "swa.safetensors"
    ckptavg.average(trained, out)
    model = make()
    load_checkpoint(model, str(out))
    reference = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(images(), reference)
    report = ckptavg.refresh_norm(model, images(), memory_format="contiguous")
    assert report.batches == 3
    wanted = reference.state_dict()
    for name, value in model.state_dict().items():
        if name.endswith(NORM):
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)
        else:
            assert same_bits(value, wanted[name])


def test_bn_refresh_of_a_file_is_loaded_by_timm(trained, tmp_path):
    out, code = tmp_path / "swa.safetensors", tmp_path / "setup_run.py"
    code.write_text(
        "import timm, torch\n"
        f"model = lambda: timm.create_model({MODEL!r}, pretrained=False, num_classes=3)\n"
        "made = torch.Generator().manual_seed(0)\n"
        "loader = [torch.randn(4, 3, 32, 32, generator=made) for _ in range(3)]\n"
    )
    run("average", trained, "-o", out)
    averaged = load_file(out)
    run("bn-refresh", out, "--model", f"{code}:model", "--loader", f"{code}:loader")
    model = make()
    load_checkpoint(model, str(out))
    reference = make()
    reference.load_state_dict(averaged)
    torch.optim.swa_utils.update_bn(images(), reference)
    for name, value in reference.state_dict().items():
        found = model.state_dict()[name]
        if name.endswith(NORM):
            # Convolutions in channels_last round otherwise.
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)
        else:
            assert same_bits(found, averaged[name])
    made = open_checkpoint(out).provenance or {}
    assert made["norm_stats"]["state"] == "refreshed"


def taken(folder: Path, **rules: Any) -> list[str]:
    found = find_run([folder])
    return [verdict.checkpoint.path.name for verdict in chosen(select(found, Selection(**rules)))]


def numbered(*epochs: int) -> list[str]:
    return [f"checkpoint-{epoch}.pth.tar" for epoch in epochs]


def test_the_rules_of_selection(trained):
    # Epochs 1, 3 and 4, counted from 0: two, four and five were done.
    assert taken(trained, last=2) == numbered(3, 4)
    assert taken(trained, cycle=2) == numbered(1, 3)
    assert taken(trained, start="80%") == numbered(3, 4)
    assert taken(trained, steps="1,4") == numbered(1, 4)
    assert taken(trained, every=2) == numbered(1, 4)
    assert taken(trained, best=2, metric="metric", mode="max") == numbered(3, 4)
    assert taken(trained, best=1, metric="metric", mode="min") == numbered(1)
    assert taken(trained, lr_minima=True) == numbered(1, 3, 4)  # the rate was constant
    with pytest.raises(SelectionError, match="`mode`"):
        taken(trained, best=1, metric="metric")
