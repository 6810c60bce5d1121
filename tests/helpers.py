"""Helpers that several test modules share."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch.distributed.checkpoint.state_dict_saver import save

from ckptavg import cli
from ckptavg.errors import CkptAvgError, FormatError
from ckptavg.formats import open_checkpoint

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process, and expect an exit code of it."""
    result = CliRunner().invoke(cli.cli, [str(argument) for argument in arguments])
    if code == 0 and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def outcome(*arguments: object, is_expected: bool = True) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command as a shell has them, without a process.

    Args:
        arguments: the words of the command.
        is_expected: whether an exception that the package does not expect is a bug of it.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", ["ckptavg", *map(str, arguments)]),
        mock.patch("signal.signal"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        cli.main()
    assert isinstance(end.value.code, int)
    assert not (is_expected and "ckptavg: error: unexpected " in err.getvalue()), err.getvalue()
    return end.value.code, out.getvalue(), err.getvalue()


def process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ckptavg", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def all_but_slow(kinds: Iterable[object], slow: Collection[object]) -> list[Any]:
    """Parameters, of which those that are slow are marked so."""
    return [pytest.param(kind, marks=pytest.mark.slow) if kind in slow else kind for kind in kinds]


def random_tensor(shape, dtype=torch.float32, seed=0):
    """A tensor of random bits, with NaNs of all kinds."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = np.random.default_rng(seed).integers(0, high, count, np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def tensors_and_views(dtype):
    """State dict of random tensors of `dtype`: whole ones of several shapes, and views of one."""
    whole = random_tensor((4, 6), dtype)
    return {
        "matrix": random_tensor((2, 3, 4), dtype, 1),
        "scalar": random_tensor((), dtype, 2),
        "empty": random_tensor((0, 3), dtype),
        "one": random_tensor((1, 1), dtype, 3),
        "whole": whole,
        "rows": whole[1:3],
        "column": whole[:, 2],
        "block": whole[1:, ::2],
        "transposed": whole.t(),
        "element": whole[2, 3],
        "expanded": whole[1:2].expand(3, 6),
    }


def bits(tensor):
    """Bytes of the elements in C order."""
    copied = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return copied.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(opened, state):
    """A checkpoint has the names, dtypes, shapes and bits of a state dict."""
    assert set(opened.tensors) == set(state)
    for name, tensor in state.items():
        found = opened.tensors[name]
        assert found.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert found.shape == tuple(tensor.shape)
        array = opened.read(name)
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == bits(tensor)


def save_torch(root, path, **options):
    """`torch.save`, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(root, path, **options)
    return path


def assert_read_or_refused(path: Path) -> None:
    """A checkpoint opens and all its tensors are read, or an error in one line names the file."""
    message = str(path)
    try:
        opened = open_checkpoint(path)
        for name in opened.tensors:
            opened.read(name)
    except CkptAvgError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert message.isprintable()


def refusal(path, kind: type[CkptAvgError] = FormatError, key=None):
    """The error of opening a file, without its path, which it begins with."""
    with pytest.raises(kind) as caught:
        open_checkpoint(path, key=key)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 2_000
    return message.removeprefix(str(path))


def small_model() -> torch.nn.Module:
    """A convolution, a norm layer and a linear layer."""
    torch.default_generator.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
    )


def save_dcp(state: dict[str, Any], folder: Path) -> Path:
    """A DCP directory, saved by one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=folder, no_dist=True)
    return folder


def save_engine(folder: Path, weights, *, ranks: int = 1, step: int = 1) -> Path:
    """A DeepSpeed directory; the content of its optimizer is made up."""
    folder.mkdir(parents=True)
    states = {
        "module": weights,
        "ds_version": "0.17.0",
        "ds_config": {"zero_optimization": {"stage": 2}},
        "param_shapes": [{name: value.shape for name, value in weights.items()}],
        "global_steps": step,
        "optimizer": None,
    }
    for rank in range(ranks):
        torch.save(states, folder / f"mp_rank_{rank:02}_model_states.pt")
        optimizer = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {"exp_avg": torch.ones(50)}}, optimizer)
    return folder
