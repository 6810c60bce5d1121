"""Directories of accelerate's `save_state`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from torch import nn

import ckptavg
from tests.layouts.libraries import differ
from tests.oracle import StateDict, assert_mean


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate's state is the process's: take none from other tests, and leave them none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def prepare(folder: Path) -> tuple[Any, Any, Any]:
    """An accelerator, and a model and an optimizer that it has taken charge of."""
    naming = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True)
    accelerator = accelerate.Accelerator(project_config=naming, cpu=True)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(folder: Path, *, safe: bool = True) -> list[StateDict]:
    """Save the whole state three times."""
    accelerator, model, optimizer = prepare(folder)
    states = []
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(6, 4)).square().sum())
        optimizer.step()
        accelerator.save_state(safe_serialization=safe)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickled"])
def test_the_average_takes_the_place_of_a_model_and_is_loaded(tmp_path, safe):
    states = train(tmp_path, safe=safe)
    assert differ(states)
    run = tmp_path / "checkpoints"
    resumed = tmp_path / "resumed"
    shutil.copytree(run / "checkpoint_2", resumed)
    name = "model.safetensors" if safe else "pytorch_model.bin"
    summary = ckptavg.average(run, resumed / name, force=True)
    assert [source.name for source in summary.sources] == [f"checkpoint_{n}" for n in range(3)]
    accelerator, model, optimizer = prepare(tmp_path)
    accelerator.load_state(str(resumed))
    assert_mean(model.state_dict(), states)
    assert {int(moments["step"]) for moments in optimizer.state_dict()["state"].values()} == {3}


def test_a_directory_holds_the_model_alone(tmp_path):
    states = train(tmp_path)
    ckptavg.average(tmp_path / "checkpoints", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    model = make()
    accelerate.load_checkpoint_in_model(model, str(tmp_path / "out"))
    assert_mean(model.state_dict(), states)


def test_a_model_in_shards_is_loaded(tmp_path):
    states = []
    for step in range(3):
        accelerator, model, _ = prepare(tmp_path)
        torch.manual_seed(step)
        nn.init.normal_(model[0].weight)
        accelerator.save_model(model, tmp_path / "run" / f"step_{step}", max_shard_size=150)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert (tmp_path / "run" / "step_0" / "model.safetensors.index.json").is_file()
    ckptavg.average(tmp_path / "run", tmp_path / "out", max_shard_size=100)
    model = make()
    accelerate.load_checkpoint_in_model(model, str(tmp_path / "out"))
    assert_mean(model.state_dict(), states)
