"""How others average, in a few lines each: load all with torch or safetensors, sum, save.

Their arithmetic and their order of work, without their command lines.
"""

from __future__ import annotations

import collections
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def timm(paths: list[str], output: str) -> None:
    """timm's `avg_checkpoints.py`: sums in float64, cast to float32 at the end."""
    sums: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in load_file(path).items():
            if name in sums:
                sums[name] += tensor.to(dtype=torch.float64)
            else:
                sums[name] = tensor.to(dtype=torch.float64)
    for total in sums.values():
        total.div_(len(paths))
    largest = torch.finfo(torch.float32)
    save_file(
        {k: v.clamp(largest.min, largest.max).to(torch.float32) for k, v in sums.items()}, output
    )


def fairseq(paths: list[str], output: str) -> None:
    """fairseq's `average_checkpoints.py`, for torch files: clones, sums in float32 at least."""
    sums: collections.OrderedDict[str, torch.Tensor] = collections.OrderedDict()
    for path in paths:
        for name, tensor in torch.load(path, map_location="cpu").items():
            value = tensor.float() if tensor.dtype == torch.float16 else tensor
            if name in sums:
                sums[name] += value
            else:
                sums[name] = value.clone()
    for total in sums.values():
        total.div_(len(paths))
    torch.save(sums, output)


def mergekit(paths: list[str], output: str) -> None:
    """mergekit's linear merge: tensor by tensor, stacked, times their weights, summed."""
    files = [safe_open(path, "pt") for path in paths]
    merged: dict[str, torch.Tensor] = {}
    for name in files[0].keys():  # noqa: SIM118 - no dictionary
        tensors = torch.stack([file.get_tensor(name) for file in files])
        weights = torch.tensor([1.0] * len(files), dtype=tensors.dtype)
        weights = weights.reshape(-1, *[1] * (tensors.dim() - 1))
        merged[name] = (tensors * weights).sum(dim=0) / weights.sum(dim=0)
    save_file(merged, output)


if __name__ == "__main__":
    WAYS = {"timm": timm, "fairseq": fairseq, "mergekit": mergekit}
    WAYS[sys.argv[1]](sys.argv[2:-1], sys.argv[-1])
