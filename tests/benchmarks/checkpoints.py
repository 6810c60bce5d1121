"""Make checkpoints to average: safetensors, or files as `torch.save` writes them.

They are random, normally distributed values, written piece by piece: memory does not grow with
them. (`torch.save` needs the model in memory.)
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.generic]
Shapes = dict[str, tuple[int, ...]]

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_PIECE = 64 << 20
_WIDEST = 1024
_SPREAD = 0.02


def main() -> None:
    """Make them as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoints", type=int, default=6)
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--dtype", choices=CODES, default="float32")
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--container", choices=["safetensors", "torch"], default="safetensors")
    parser.add_argument("--vectors", action="store_true", help="all tensors are alike, and 1-D")
    parser.add_argument("--shuffled", action="store_true", help="each file in an order of its own")
    parser.add_argument("--adam", action="store_true", help="with an optimizer's state (torch)")
    options = parser.parse_args()
    nbytes, itemsize = int(options.gigabytes * 1e9), _dtype(options.dtype).itemsize
    shapes = model(nbytes, itemsize, options.tensors)
    if options.vectors:
        count = max(1, nbytes // itemsize // options.tensors)
        shapes = {f"model.layers.{number}.weight": (count,) for number in range(options.tensors)}
    pieces = Pieces(_dtype(options.dtype))
    for number in range(1, options.checkpoints + 1):
        path = options.folder / f"step_{number * 1000}.safetensors"
        if options.shuffled:
            names = list(shapes)
            np.random.default_rng(number).shuffle(names)
            shapes = {name: shapes[name] for name in names}
        write(path, CODES[options.dtype], shapes, pieces)
        if options.container == "torch":
            as_torch_file(path, adam=options.adam)


def model(nbytes: int, itemsize: int, tensors: int) -> Shapes:
    """Names and shapes of a model of about `nbytes`: matrices and vectors in turn, as in layers."""
    elements = max(tensors, nbytes // itemsize)
    layers = max(1, tensors // 2)
    width = max(1, min(_WIDEST, math.isqrt(elements // layers)))
    rows = max(1, (elements // layers - width) // width)
    names = [
        (f"model.layers.{layer}.weight", (rows, width)) if kind == 0 else
        (f"model.layers.{layer}.norm.weight", (width,))
        for layer in range((tensors + 1) // 2)
        for kind in range(2)
    ]  # fmt: skip
    return dict(names[:tensors])


class Pieces:
    """Random bytes without end, of finite values: one piece, changed a little every time."""

    def __init__(self, dtype: np.dtype[np.generic]) -> None:
        self._random = np.random.default_rng(0)
        self._dtype = dtype
        self._values = self._random.standard_normal(_PIECE // dtype.itemsize, np.float32) * _SPREAD

    def next(self, size: int) -> memoryview:
        """Some bytes: a piece, or `size` of them where that is less."""
        count = min(size // self._dtype.itemsize, len(self._values))
        start = int(self._random.integers(len(self._values) - count + 1))
        scale = np.float32(self._random.uniform(0.9, 1.1))
        values: Values = (self._values[start : start + count] * scale).astype(self._dtype)
        return values.view(np.uint8).data


def write(path: Path, code: str, shapes: Shapes, pieces: Pieces) -> None:
    """Write one safetensors file: header first, then the values."""
    itemsize = _dtype({value: key for key, value in CODES.items()}[code]).itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while end:
            end -= file.write(pieces.next(end))


def as_torch_file(path: Path, *, adam: bool) -> None:
    """Put what `torch.save` makes of it in the place of a safetensors file.

    Args:
        path: the file.
        adam: make it a training checkpoint, with two moments of each weight.
    """
    import torch
    from safetensors.torch import load_file

    weights = load_file(path)
    moments = {
        number: {"step": torch.tensor(1.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight**2}
        for number, weight in enumerate(weights.values())
    }
    groups = [{"lr": 1e-3, "params": list(moments)}]
    state = {"state_dict": weights, "optimizer": {"state": moments, "param_groups": groups}}
    torch.save({**state, "epoch": 1} if adam else weights, path.with_suffix(".pt"))
    path.unlink()


def _dtype(name: str) -> np.dtype[np.generic]:
    return np.dtype(getattr(ml_dtypes, name, name))


if __name__ == "__main__":
    main()
