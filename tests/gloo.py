"""Four processes that save sharded checkpoints with torch.distributed itself."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests.oracle import StateDict
from tests.ranks import Job

RANKS = 4
SHAPES: dict[str, tuple[int, ...]] = {
    "grid": (8, 6),
    "uneven": (7, 5),
    "few": (2, 9),
    "deep": (5, 3, 4, 2),
    "long": (300_001,),
    "one": (1,),
    "empty": (0, 3),
    "scalar": (),
}
DTYPES = {"": torch.float32, "_bf16": torch.bfloat16, "_f64": torch.float64}


def whole_state(step: int) -> StateDict:
    """The model's state before it is sharded, at a step."""
    made = torch.Generator().manual_seed(step)
    state = {
        name + suffix: torch.randn(shape, generator=made, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
        for suffix, dtype in DTYPES.items()
    }
    return state | {"ids": torch.arange(24).reshape(6, 4), "mask": torch.arange(9) % 2 == 0}


def model() -> nn.Module:
    """A model of rows that do not divide by the ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 700), nn.LayerNorm(700), nn.Linear(700, 33, bias=False))


def save_all(folder: Path) -> None:
    """Save every kind; the folders are named after it."""
    Job([partial(main, rank, folder) for rank in range(RANKS)], folder).finish(*[0] * RANKS)


def sharded(state: StateDict, mesh: DeviceMesh, *placements: Placement) -> dict[str, Any]:
    """Shard what has the dimensions for it, replicate the rest."""
    return {
        name: distribute_tensor(
            tensor,
            mesh,
            [
                p if isinstance(p, Shard) and p.dim < tensor.dim() else Replicate()
                for p in placements
            ],
        )
        for name, tensor in state.items()
    }


def turn(tensor: DTensor) -> DTensor:
    """The same, each piece in memory as the transpose of a contiguous one; so it is stored."""
    local = tensor.to_local().t().contiguous().t()
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def main(rank: int, folder: Path) -> None:
    """What each process does."""
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    two = DeviceMesh("cpu", [0, 1])
    four = DeviceMesh("cpu", list(range(RANKS)))
    grid = DeviceMesh("cpu", [[0, 1], [2, 3]])
    if rank < 2:
        state = sharded(whole_state(2), two, Shard(0))
        save(
            {"model": state, "step": 2},
            checkpoint_id=folder / "rows2",
            process_group=two.get_group(),
        )
    if rank == 0:
        state = {"model": whole_state(1), "step": 1}
        save(state, checkpoint_id=folder / "rows1", no_dist=True)
    layouts: dict[str, tuple[DeviceMesh, tuple[Placement, ...]]] = {
        "rows4": (four, (Shard(0),)),
        "columns4": (four, (Shard(1),)),
        "copies4": (four, (Replicate(),)),
        "grid4": (grid, (Shard(0), Shard(1))),
        "strided4": (grid, (Shard(0), Shard(0))),
        "hybrid4": (grid, (Replicate(), Shard(0))),
    }
    for number, (name, (mesh, placements)) in enumerate(layouts.items(), 3):
        state = sharded(whole_state(number), mesh, *placements)
        save({"model": state, "step": number}, checkpoint_id=folder / name)
    turned = {
        name: turn(tensor)
        for name, tensor in sharded(whole_state(9), four, Shard(0)).items()
        if tensor.dim() == 2
    }
    save({"model": turned}, checkpoint_id=folder / "turned4")
    train(folder, four, rank)
    dist.destroy_process_group()


def train(folder: Path, mesh: DeviceMesh, rank: int) -> None:
    """Two steps of FSDP2, each saved with the optimizer, and whole by rank 0."""
    network = model()
    fully_shard(network, mesh=mesh)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for step in (1, 2):
        network(torch.randn(4, 30)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights, moments = get_state_dict(network, optimizer)
        state = {"model": weights, "optimizer": moments, "global_step": step, "rng": b"0" * 100}
        save(state, checkpoint_id=folder / f"fsdp-{step}")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_model_state_dict(network, options=options)
        if rank == 0:
            torch.save(full, folder / f"fsdp-{step}.pt")
