"""Inputs much larger than the memory that a run may have, and more than the files it may open."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

MB = 1 << 20


def limited(root: Path, what: int, most: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a limit on what it may take of the system."""
    return subprocess.run(
        [sys.executable, "-m", "ckptavg", *arguments],
        cwd=root, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(what, (most, most)),
    )  # fmt: skip


def save_sparse(path: Path, tensors: int, elements: int, last: float) -> None:
    """A file of zeros that takes no room on the disk, but for the last value."""
    size = 4 * elements
    header = {
        f"layer.{number}.weight": {
            "dtype": "F32",
            "shape": [elements],
            "data_offsets": [number * size, number * size + size],
        }
        for number in range(tensors)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(tensors * size - 4, 1)
        file.write(torch.tensor([last]).numpy().tobytes())


@pytest.mark.parametrize("tensors", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_gigabytes_of_checkpoints_take_256_mb_of_memory(tmp_path, tensors):
    """Half a GB, and 5 GB."""
    (tmp_path / "run").mkdir()
    for step in range(5):
        save_sparse(tmp_path / "run" / f"{step}.safetensors", tensors, 25 * MB, float(step))
    arguments = ("average", "run", "-o", "o.safetensors", "--no-fsync", "-j", "4")
    done = limited(tmp_path, resource.RLIMIT_DATA, 256 * MB, *arguments)
    output = tmp_path / "o.safetensors"
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert output.stat().st_size > 100 * MB * tensors
        with output.open("rb") as file:
            file.seek(-8, 2)
            assert torch.frombuffer(bytearray(file.read()), dtype=torch.float32).tolist() == [0, 2]
    finally:
        output.unlink(missing_ok=True)


@pytest.mark.parametrize("most", [8, 32, 72])
def test_a_run_with_too_little_memory_leaves_nothing_or_the_whole(tmp_path, most):
    """Too little of it for the interpreter, for numpy, for the threads, as the machine has it."""
    (tmp_path / "run").mkdir()
    for step in range(2):
        save_file({"w": torch.ones(MB)}, tmp_path / "run" / f"{step}.safetensors")
    arguments = ("average", "run", "-o", "o.safetensors", "-j", "4")
    done = limited(tmp_path, resource.RLIMIT_DATA, most * MB, *arguments)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == (["run"] if done.returncode else ["o.safetensors", "run"])
    if not done.returncode:
        assert load_file(tmp_path / "o.safetensors")["w"].unique().tolist() == [1]


@pytest.mark.parametrize("kind", ["pt", pytest.param("safetensors", marks=pytest.mark.slow)])
def test_300_checkpoints_take_128_open_files(tmp_path, kind):
    (tmp_path / "run").mkdir()
    for step in range(300):
        path = tmp_path / "run" / f"step_{step}.{kind}"
        weights = {"w": torch.full((3,), float(step))}
        if kind == "pt":
            torch.save(weights, path)
        else:
            save_file(weights, path)
    arguments = ("average", "run", "-o", "o.safetensors", "--expect", "300", "-q")
    done = limited(tmp_path, resource.RLIMIT_NOFILE, 128, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file(tmp_path / "o.safetensors")["w"].tolist() == [149.5] * 3


def test_more_shards_than_files_may_be_open_is_one_line(tmp_path):
    folder = tmp_path / "run" / "checkpoint-1"
    folder.mkdir(parents=True)
    save_file({f"w{number}": torch.zeros(3) for number in range(200)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    arguments = ("average", "run", "-o", "out/", "--max-shard-size", "12", "-q")
    done = limited(tmp_path, resource.RLIMIT_NOFILE, 128, *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ckptavg: error: out/model-00")
    assert done.stderr.endswith(
        "cannot write it: Too many open files; a larger --max-shard-size makes fewer files\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
