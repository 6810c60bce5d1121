"""Four processes of which each saves a file of its own, with torch.distributed itself."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.gloo import sharded, whole_state
from tests.oracle import StateDict
from tests.ranks import Job

RANKS = 4
LAYOUTS = ("rows2", "rows3", "columns3", "grid4", "twice4", "hybrid4")
"""What each process saves of its own, in the order of their steps, in folders of these names."""


def state_at(step: int) -> StateDict:
    """What is saved at a step: rows that do not divide by the ranks, and a buffer."""
    state = whole_state(step)
    state = {name: state[name] for name in state if "long" not in name}
    return {**state, "buffer": torch.full((3,), float(step))}


def save_all(folder: Path) -> None:
    """Save every kind; the folders are named after it."""
    Job([partial(main, rank, folder) for rank in range(RANKS)], folder).finish(*[0] * RANKS)


def main(rank: int, folder: Path) -> None:
    """What each process does."""
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    lines = {size: DeviceMesh("cpu", list(range(size))) for size in (2, 3, 4)}
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts: list[tuple[DeviceMesh, tuple[Placement, ...]]] = [
        (lines[2], (Shard(0),)),
        (lines[3], (Shard(0),)),
        (lines[3], (Shard(1),)),
        (grid, (Shard(0), Shard(1))),
        (grid, (Shard(0), Shard(0))),
        (grid, (Replicate(), Shard(0))),
    ]
    for step, (name, (mesh, placements)) in enumerate(zip(LAYOUTS, layouts, strict=True), 1):
        if mesh.get_coordinate() is None:
            continue
        state = {**sharded(state_at(step), mesh, *placements), "buffer": state_at(step)["buffer"]}
        save_file(folder / "fsdp2" / name, state, rank, mesh.size())
        if mesh is not grid:
            state = sharded(state_at(step + len(LAYOUTS)), mesh, *placements)
            save_hf(folder / "hf" / name, state, mesh)
    # Torch's consolidation takes no integers, and loses scalars.
    floats = {k: v for k, v in state_at(0).items() if v.is_floating_point() and v.dim()}
    save_hf(folder / "whole", sharded(floats, lines[4], Shard(0)), lines[4], whole=True)
    train(folder, rank, lines[3], grid)
    dist.destroy_process_group()


def save_file(folder: Path, state: dict[str, Any], rank: int, ranks: int) -> None:
    """Save a file under the name that verl gives it, and beside it the optimizer."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"model_world_size_{ranks}_rank_{rank}.pt")
    for kind in ("optim", "extra_state"):
        torch.save({"state": {}}, folder / f"{kind}_world_size_{ranks}_rank_{rank}.pt")


def save_hf(folder: Path, state: dict[str, Any], mesh: DeviceMesh, *, whole: bool = False) -> None:
    """Save safetensors files of the ranks; `whole` joins them in the folder above."""
    indices = {name: 1 + (number % 2) for number, name in enumerate(state)}
    writer = HuggingFaceStorageWriter(
        str(folder), indices, save_distributed=True, enable_consolidation=whole
    )
    save(state, storage_writer=writer, process_group=mesh.get_group())


def train(folder: Path, rank: int, line: DeviceMesh, grid: DeviceMesh) -> None:
    """A step of FSDP of both versions, and of FSDP with tensor parallelism."""
    torch.manual_seed(0)
    if line.get_coordinate() is not None:
        model = FullyShardedDataParallel(
            network(), process_group=line.get_group(), device_id=torch.device("cpu")
        )
        model(torch.ones(2, 7)).sum().backward()
        whole = model.state_dict()
        FullyShardedDataParallel.set_state_dict_type(
            model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()
        )
        save_file(folder / "fsdp1", model.state_dict(), rank, 3)
        if rank == 0:
            torch.save(whole, folder / "fsdp1.pt")
    parallel = network()
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(parallel, grid["tp"], plan)
    fully_shard(parallel, mesh=grid["dp"])
    state = parallel.state_dict()
    save_file(folder / "fsdp2-tp", state, rank, RANKS)
    full = {name: tensor.full_tensor() for name, tensor in state.items()}
    if rank == 0:
        torch.save(full, folder / "fsdp2-tp.pt")


def network() -> nn.Module:
    """Two layers, of which no size divides by 3."""
    return nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 2))
