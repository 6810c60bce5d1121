"""Directories that Lightning's `ModelParallelStrategy` saves and loads, with its own functions."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric.strategies.fsdp import _distributed_checkpoint_save
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import ckptavg
from tests import gloo
from tests.oracle import assert_mean
from tests.ranks import Job

STEPS = (1, 2)


def sharded(folder: Path, seed: int) -> torch.nn.Module:
    """A model that the ranks share."""
    warnings.simplefilter("ignore")
    if not dist.is_initialized():
        rank, size = (
            int(os.environ.get(n, alone)) for n, alone in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        meeting = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    model = gloo.model()
    torch.manual_seed(seed)
    for value in model.parameters():
        value.data += torch.randn_like(value)
    fully_shard(model, mesh=DeviceMesh("cpu", list(range(dist.get_world_size()))))
    return model


def save(folder: Path) -> None:
    """What the strategy does in `save_checkpoint`."""
    for step in STEPS:
        state = get_model_state_dict(sharded(folder, step))
        path = folder / "run" / f"epoch={step}-step={step}.ckpt"
        _distributed_checkpoint_save({"state_dict": state}, path)
        whole = {name: value.full_tensor() for name, value in state.items()}  # type: ignore[union-attr]
        if dist.get_rank() == 0:
            torch.save({"epoch": step, "global_step": step}, path / "meta.pt")
            torch.save(whole, folder / f"{step}.pt")
    dist.destroy_process_group()


def load(folder: Path) -> None:
    """What the strategy does in `load_checkpoint`."""
    model = sharded(folder, 99)
    rest = _load_checkpoint(folder / "out", {"state_dict": model})
    assert rest == {"epoch": STEPS[-1], "global_step": STEPS[-1]}
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    assert_mean(whole, [torch.load(folder / f"{step}.pt") for step in STEPS])
    dist.destroy_process_group()


def test_averages_are_loaded_by_any_number_of_ranks(tmp_path):
    Job([partial(save, tmp_path)] * 2, tmp_path).finish(0, 0)
    ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp", fsync=False)
    for size in (1, 3):
        (tmp_path / "rendezvous").unlink(missing_ok=True)
        Job([partial(load, tmp_path)] * size, tmp_path).finish(*[0] * size)
