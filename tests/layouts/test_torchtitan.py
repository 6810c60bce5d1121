"""Checkpoints that torchtitan's own manager saves and loads: `pip install --no-deps torchtitan`."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import ckptavg
from ckptavg.formats import open_checkpoint
from tests import gloo
from tests.helpers import assert_same
from tests.oracle import StateDict, assert_mean
from tests.ranks import Job

checkpoint: Any = pytest.importorskip("torchtitan.components.checkpoint", exc_type=ImportError)

STEPS = (2, 4)
NAMES = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight")


class State:
    """The optimizer, flat as torchtitan has it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._optimizer = torch.optim.AdamW(model.parameters())
        self._options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> Any:
        return get_optimizer_state_dict(self._model, self._optimizer, options=self._options)

    def load_state_dict(self, state: Any) -> None:
        set_optimizer_state_dict(self._model, self._optimizer, state, options=self._options)


class Counter:
    """The loader, or the trainer."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def state_dict(self) -> dict[str, Any]:
        return {self.name: torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = int(state[self.name])


class Adapter:
    """Names of Hugging Face's files, in two of them."""

    fqn_to_index_mapping = {name: 1 + number // 3 for number, name in enumerate(NAMES)}  # noqa: RUF012

    def to_hf(self, state: StateDict) -> StateDict:
        return state


def manager(folder: Path, seed: int, **config: Any) -> tuple[Any, torch.nn.Module]:
    """The manager of a model that the ranks share."""
    warnings.simplefilter("ignore")
    rank, size = (int(os.environ.get(n, alone)) for n, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    model = gloo.model()
    torch.manual_seed(seed)
    fully_shard(model, mesh=DeviceMesh("cpu", list(range(size))))
    return checkpoint.CheckpointManager(
        checkpoint.CheckpointManager.Config(enable=True, interval=2, keep_latest_k=0, **config),
        dataloader=Counter("read"),
        model_parts=[model],
        optimizers=State(model),
        lr_schedulers=Counter("last_epoch"),
        states={"train_state": Counter("step")},
        sd_adapter=Adapter(),
        base_folder=str(folder),
    ), model


def full(model: torch.nn.Module) -> StateDict:
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def save(folder: Path) -> None:
    """Two steps, and a last one of weights alone in the layout of Hugging Face."""
    saver, model = manager(folder, 0, last_save_in_hf=True)
    for step in (*STEPS, 6):
        for value in model.parameters():
            value.data.add_(torch.randn(()))
        saver.states["train_state"].count = step
        assert saver.save(step, last_step=step == 6)
        whole = full(model)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{step}.pt")
    dist.destroy_process_group()


def load(folder: Path) -> None:
    """Begin another run with the average."""
    loader, model = manager(
        folder / "new", 99, initial_load_path=str(folder / "out"), initial_load_model_only=True
    )
    assert loader.load()
    assert_mean(full(model), [torch.load(folder / f"{step}.pt") for step in STEPS])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchtitan")
    Job([partial(save, folder)] * 2, folder).finish(0, 0)
    return folder


def test_averages_are_loaded_by_any_number_of_ranks(run, tmp_path):
    for step in STEPS:
        (tmp_path / f"{step}.pt").symlink_to(run / f"{step}.pt")
    members = [run / "checkpoint" / f"step-{step}" for step in STEPS]
    summary = ckptavg.average(members, tmp_path / "out", format="dcp", fsync=False)
    assert [source.step for source in summary.sources] == [("step", step) for step in STEPS]
    (tmp_path / "new").mkdir()
    for size in (1, 3):
        (tmp_path / "new" / "rendezvous").unlink(missing_ok=True)
        Job([partial(load, tmp_path)] * size, tmp_path).finish(*[0] * size)


@pytest.mark.parametrize("folder", ["step-6", "step-6/sharded"])
def test_the_last_checkpoint_in_the_layout_of_hugging_face(run, folder):
    assert_same(open_checkpoint(run / "checkpoint" / folder), torch.load(run / "6.pt"))
