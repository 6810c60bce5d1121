"""A naive average, written without a look at the code under test, and the real writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

StateDict = dict[str, torch.Tensor]


def naive_mean(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sum in float64 one after the other, divide once, cast as `Tensor.to` does."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    total = tensors[0].to(wide).clone()
    for tensor in tensors[1:]:
        total += tensor.to(wide)
    return (total / len(tensors)).to(dtype or tensors[0].dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree: -0.0 is not 0.0, NaN is itself."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8),
            other.contiguous().reshape(-1).view(torch.uint8),
        )
    )


def assert_mean(
    found: Mapping[str, torch.Tensor],
    states: Sequence[Mapping[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
) -> None:
    """A state dict is the naive mean of others, in a dtype; what is no float is the last one's."""
    assert found.keys() == states[-1].keys()
    for name, last in states[-1].items():
        wanted = last
        if last.is_floating_point() or last.is_complex():
            wanted = naive_mean([state[name] for state in states], dtype)
        assert same_bits(found[name], wanted), name


def save_run(
    folder: Path, state_dicts: Sequence[StateDict], kind: str = "safetensors"
) -> list[Path]:
    """Save a run's state dicts with the real libraries, one file a step."""
    folder.mkdir(exist_ok=True)
    paths = []
    for step, state in enumerate(state_dicts):
        path = folder / f"step_{step}.{kind}"
        if kind == "safetensors":
            save_file({name: value.contiguous() for name, value in state.items()}, path)
        else:
            torch.save(state, path)
        paths.append(path)
    return paths


def random_state_dicts(
    count: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[StateDict]:
    """State dicts of odd shapes: 0-d, empty, more than one chunk, and a counter."""
    made = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (300, 1001),
        "scalar": (),
        "empty": (0, 3),
        "one": (1,),
        "layer.weight": (7, 5, 3),
        "layer.bias": (7,),
    }
    return [
        {
            name: torch.randn(shape, generator=made, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }
        | {"layer.num_batches_tracked": torch.tensor(10 * step), "layer.ids": torch.arange(6)}
        for step in range(count)
    ]
