"""What people write by hand: load every checkpoint, add it in place, divide, save.

The shape of timm's `avg_checkpoints.py` and fairseq's `average_checkpoints.py`, without what makes
those slower: one checkpoint is in memory beside the sum, which is float32 and not float64.
"""

from __future__ import annotations

import os
import sys

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def main() -> None:
    """`torch_loop.py INPUT... OUTPUT [--fsync]`."""
    *paths, output = [argument for argument in sys.argv[1:] if argument != "--fsync"]
    total: State = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in paths:
        for name, tensor in load(path).items():
            dtypes[name] = tensor.dtype
            wide = tensor.float() if tensor.dtype.itemsize < 4 else tensor
            if name in total:
                total[name].add_(wide)
            else:
                total[name] = wide
    for name, tensor in total.items():
        total[name] = tensor.div_(len(paths)).to(dtypes[name])
    save(total, output)
    if "--fsync" in sys.argv:
        with open(output, "rb") as file:  # noqa: PTH123 - as by hand
            os.fsync(file.fileno())


def load(path: str) -> State:
    """A checkpoint in memory."""
    if path.endswith(".safetensors"):
        return load_file(path)
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def save(state: State, path: str) -> None:
    """Write a checkpoint."""
    if path.endswith(".safetensors"):
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)


if __name__ == "__main__":
    main()
