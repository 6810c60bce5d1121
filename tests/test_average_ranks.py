"""Several processes that share an average: as `torchrun` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptavg
from tests.gloo import LOOPBACK

RANKS = 3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Enough for several chunks, and some small tensors."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    folder.mkdir()
    for step in range(3):
        torch.manual_seed(step)
        state = {f"layer.{number}": torch.randn(500, 400) for number in range(9)}
        state |= {"half": torch.randn(700_001).half(), "count": torch.tensor(step)}
        save_file(state, folder / f"step_{step}.safetensors")
    return folder


_PYTHON = (sys.executable, "-m", "ckptavg", "average")


def launch(*arguments, code=0, by_rank=False):
    """Run the command in so many processes; returns what each has printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ours = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ours |= {"TORCHELASTIC_RUN_ID": "none"}
    ours |= {"GLOO_SOCKET_IFNAME": LOOPBACK}
    processes = [
        subprocess.Popen(
            [*_PYTHON, *map(str, arguments[rank] if by_rank else arguments)],
            env=os.environ | ours | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [code] * RANKS, outputs
    return outputs


@pytest.mark.parametrize("name", ["o.safetensors", "o.pt", "o/"])
def test_the_same_bytes_as_those_of_one_process(checkpoints, tmp_path, name):
    output, alone = tmp_path / "many", tmp_path / "one"
    output.mkdir()
    alone.mkdir()
    sharded = ["--max-shard-size", "3MB"] if name.endswith("/") else []
    outputs = launch(checkpoints, "-o", f"{output}/{name}", "--quiet", *sharded)
    assert all(out == "" for out, _ in outputs)
    ckptavg.average(checkpoints, f"{alone}/{name}", max_shard_size=3_000_000 if sharded else None)
    found, expected = (
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (output, alone)
    )
    assert len(expected) > (2 if sharded else 0)
    assert found == expected


def test_one_of_them_speaks(checkpoints, tmp_path):
    outputs = launch(checkpoints, "-o", tmp_path / "o.safetensors")
    assert outputs[0][0].startswith("averaged 3 checkpoints")
    assert [out for out, _ in outputs[1:]] == ["", ""]


def test_a_failure_of_one_ends_all_and_leaves_nothing(checkpoints, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for path in checkpoints.iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    with (run / "step_1.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)  # NaN in the last chunk alone
    outputs = launch(run, "-o", tmp_path / "o.safetensors", code=1)
    [error] = [err for _, err in outputs if err]
    assert "step_1.safetensors" in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_rank_starts_by_itself_is_alone():
    code = "from ckptavg.distributed import is_launched; print(is_launched())"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    ours = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment = os.environ | ours
    for command, expected in ((script, "False"), (code, "True")):
        if expected == "False" and not Path("/proc/self").is_dir():
            continue
        result = subprocess.run(
            [sys.executable, "-c", command],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert result.stdout.strip() == expected


def test_processes_that_see_other_checkpoints_end_at_once(checkpoints, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    for path in sorted(checkpoints.iterdir())[1:]:
        (more / path.name).hardlink_to(path)
    output = tmp_path / "o.safetensors"
    each = [(folder, "-o", output) for folder in (checkpoints, more, checkpoints)]
    outputs = launch(*each, code=1, by_rank=True)
    assert any("not the same" in err for _, err in outputs), outputs
    assert [path.name for path in tmp_path.iterdir()] == ["more"]


def test_variables_of_something_else_are_no_reason_to_wait(checkpoints, tmp_path):
    ours = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [*_PYTHON, checkpoints, "-o", tmp_path / "o.safetensors", "--quiet"]
    subprocess.run(command, env=os.environ | ours, check=True, timeout=30)
    assert (tmp_path / "o.safetensors").exists()
