"""Several processes that share an average: as `torchrun` starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.distributed import launched_ranks
from ckptavg.errors import CkptAvgError
from ckptavg.formats import open_checkpoint
from tests.helpers import run
from tests.oracle import same_bits
from tests.ranks import LOOPBACK, Job, command, variables

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


def start(folder, *arguments, **environment):
    """Start the command in so many processes."""
    return Job([command("average", *arguments)] * RANKS, folder, **environment)


def launch(folder, *arguments, code=0, **environment):
    """Run the command in so many processes; returns what each has printed."""
    return start(folder, *arguments, **environment).finish(*[code] * RANKS)


@pytest.mark.parametrize("name", ["o.safetensors", "o.pt", "o/"])
def test_the_same_bytes_as_those_of_one_process(checkpoints, tmp_path, name):
    output, alone = tmp_path / "many", tmp_path / "one"
    output.mkdir()
    alone.mkdir()
    sharded = ["--max-shard-size", "3MB"] if name.endswith("/") else []
    outputs = launch(tmp_path, checkpoints, "-o", f"{output}/{name}", "--quiet", *sharded)
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
    outputs = launch(tmp_path, checkpoints, "-o", tmp_path / "o.safetensors")
    assert outputs[0][0].startswith("averaged 3 checkpoints")
    assert [out for out, _ in outputs[1:]] == ["", ""]


@pytest.mark.parametrize("anew", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_failure_of_one_ends_all_and_leaves_nothing(checkpoints, tmp_path, anew):
    """Started anew they show, too, that interpreters of which one failed end well."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in checkpoints.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with (folder / "step_1.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)  # NaN in the last chunk alone
    arguments = ["average", folder, "-o", tmp_path / "o.safetensors"]
    if anew:
        common = os.environ | variables(2)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "ckptavg", *arguments],
                env=common | {"RANK": rank}, stderr=subprocess.PIPE, text=True,
            )
            for rank in ("0", "1")
        ]  # fmt: skip
        errors = [process.communicate(timeout=120)[1] for process in processes]
        assert [process.returncode for process in processes] == [1, 1], errors
    else:
        outputs = Job([command(*arguments)] * 2, tmp_path).finish(1, 1)
        errors = [err for _, err in outputs]
    [error] = [err for err in errors if err]
    assert "step_1.safetensors" in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_error_keeps_nothing_alive_that_its_frames_held(tmp_path):
    """What torch's frames held would live until the interpreter exits, which then may abort."""
    outputs = Job([fail_by_holding] * RANKS, tmp_path).finish(*[0] * RANKS)
    assert [out.split()[-1] for out, _ in outputs] == ["True"] * RANKS


def fail_by_holding():
    """Fail in a frame that holds something, and print whether it is gone afterwards."""

    class Held:
        pass

    held = []

    def failing():
        local = Held()
        held.append(weakref.ref(local))
        raise ValueError("first")

    def second():
        try:
            failing()
        except ValueError as error:
            raise KeyError("second") from error

    try:
        with launched_ranks():
            second()
    except (ValueError, KeyError, CkptAvgError) as error:
        print(error, held[0]() is None)


def test_what_a_rank_starts_by_itself_is_alone():
    code = "from ckptavg.distributed import is_launched; print(is_launched())"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    ours = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment = os.environ | ours
    for program, expected in ((script, "False"), (code, "True")):
        if expected == "False" and not Path("/proc/self").is_dir():
            continue
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert result.stdout.strip() == expected


def test_processes_that_see_other_checkpoints_end_at_once(checkpoints, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    for path in sorted(checkpoints.iterdir())[1:]:
        (more / path.name).hardlink_to(path)
    output = tmp_path / "o.safetensors"
    calls = [
        command("average", folder, "-o", output) for folder in (checkpoints, more, checkpoints)
    ]
    outputs = Job(calls, tmp_path).finish(1, 1, 1)
    assert any("not the same" in err for _, err in outputs), outputs
    assert [path.name for path in tmp_path.iterdir()] == ["more"]


def test_variables_of_something_else_are_no_reason_to_wait(checkpoints, tmp_path):
    ours = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    call = command("average", checkpoints, "-o", tmp_path / "o.safetensors", "--quiet")
    Job([call], tmp_path, **ours).finish(0)
    assert (tmp_path / "o.safetensors").exists()


TRAIN = """
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

RANK = int(os.environ.get("RANK", "0"))


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 300_000))


def late():
    # A model without norm layers; process one is slow in opening the average for it.

    def wait(event, arguments):
        if event == "open" and RANK == 1 and ".ckptavg-" in str(arguments[0]):
            time.sleep(2 if str(arguments[0]).endswith("/o.pt") else 0)

    sys.addaudithook(wait)
    return nn.Linear(6, 8)


LATE = late() if os.environ.get("LATE") else None


def loader():
    made = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(96, 6, generator=made)), 8, shuffle=True)


class Slow(Dataset):
    def __len__(self):
        return 4000

    def __getitem__(self, index):
        if RANK == 1 and index > 100:
            raise ValueError("process one cannot read this")
        return torch.randn(6)


def failing():
    return DataLoader(Slow(), 8)


def circular():
    try:
        raise KeyError("first")
    except KeyError as first:
        second = ValueError("its cause is its effect")
        first.__cause__ = second
        raise second from first


class Long(Dataset):
    def __len__(self):
        return 960  # seconds of work for each of three

    def __getitem__(self, index):
        Path(__file__).with_name(f"begun{RANK}").touch()
        time.sleep(0.01)
        return torch.randn(6)


def long():
    return DataLoader(Long(), 8)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of a model with norm layers, and its code."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.py").write_text(TRAIN)
    (folder / "run").mkdir()
    space: dict[str, Any] = {"__file__": str(folder / "train.py")}
    exec(TRAIN, space)  # noqa: S102
    for step in range(3):
        torch.manual_seed(step)
        torch.save(space["Net"]().state_dict(), folder / "run" / f"step_{step}.pt")
    return folder


def specs(folder, loader="loader", model="Net"):
    spec = folder / "train.py"
    return ("--model", f"{spec}:{model}", "--loader", f"{spec}:{loader}", "--device", "cpu")


class TestRefresh:
    """The processes share the average, and then the pass."""

    @pytest.mark.parametrize("name", ["o.pt", "o/"])
    def test_makes_what_one_process_makes(self, trained, tmp_path, name):
        arguments = (trained / "run", "-o", f"{tmp_path}/{name}", *specs(trained))
        outputs = launch(tmp_path, *arguments)
        assert outputs[0][0].startswith("averaged 3 checkpoints")
        assert "12 batches of 96 samples in all in 3 processes" in outputs[0][0]
        assert outputs[1:] == [("", "")] * 2
        assert [path.name for path in tmp_path.iterdir()] == [name.rstrip("/")]
        alone = tmp_path / "alone.safetensors"
        run("average", trained / "run", "-o", alone, *specs(trained))
        path = tmp_path / name
        found = torch.load(path) if name == "o.pt" else load_file(path / "model.safetensors")
        expected = load_file(alone)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key.startswith("1.running"):
                torch.testing.assert_close(found[key], value)
            else:
                assert same_bits(found[key], value), key

    def test_replaces_the_average_that_is_updated(self, trained, tmp_path):
        swa = tmp_path / "swa.safetensors"
        old = [trained / "run" / f"step_{step}.pt" for step in range(2)]
        ckptavg.average(old, swa)
        new = trained / "run" / "step_2.pt"
        launch(tmp_path, swa, new, "--update", "-o", swa, "--force", *specs(trained))
        entry = open_checkpoint(swa).provenance
        assert entry is not None
        assert len(entry["sources"]) == 3
        assert entry["norm_stats"]["state"] == "refreshed"

    @pytest.mark.parametrize("loader", ["failing", "absent", "circular"])
    def test_that_fails_ends_all_with_one_message(self, trained, tmp_path, loader):
        outputs = launch(
            tmp_path, trained / "run", "-o", tmp_path / "o.pt", *specs(trained, loader), code=1
        )
        lines = [line for _, error in outputs for line in error.splitlines()]
        [message] = [line for line in lines if line.startswith("ckptavg: error: ")]
        what = {
            "failing": "process one cannot read this",
            "absent": "has no 'absent'",
            "circular": "its cause is its effect",
        }
        assert what[loader] in message
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("rank", "number", "codes"),
        [(1, signal.SIGKILL, [1, -9, 1]), (2, signal.SIGTERM, [1, 1, 143])],
        ids=["killed", "terminated"],
    )
    def test_of_which_one_is_killed_ends_all_and_leaves_nothing(
        self, trained, tmp_path, rank, number, codes
    ):
        begun = [trained / f"begun{each}" for each in range(RANKS)]
        for path in begun:
            path.unlink(missing_ok=True)
        output = tmp_path / "o.pt"
        job = start(tmp_path, trained / "run", "-o", output, *specs(trained, "long"))
        while not all(path.exists() for path in begun):
            assert all(process.is_alive() for process in job.processes)
            time.sleep(0.05)
        assert len(list(tmp_path.iterdir())) == 1  # the average waits for its statistics
        os.kill(job.processes[rank].pid, number)
        outputs = job.finish(*codes)
        assert "lost the connection to another process" in outputs[0][1]
        assert "Traceback" not in "".join(error for _, error in outputs)
        assert list(tmp_path.iterdir()) == []

    def test_writes_when_all_have_found_the_place_free(self, trained, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        for step in range(2):
            torch.save(torch.nn.Linear(6, 8).state_dict(), folder / f"step_{step}.pt")
        launch(tmp_path, folder, "-o", tmp_path / "o.pt", *specs(trained, model="LATE"), LATE="1")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["o.pt", "run"]


@pytest.mark.slow
def test_torchrun_starts_them(trained, tmp_path):
    command = (
        *(Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", 2),
        *("--no-python", Path(sys.executable).with_name("ckptavg"), "average", trained / "run"),
        *("-o", tmp_path / "o.pt", *specs(trained)),
    )
    environment = os.environ | {"GLOO_SOCKET_IFNAME": LOOPBACK}
    result = subprocess.run(
        [str(word) for word in command], env=environment, check=True, capture_output=True, text=True
    )
    assert "12 batches of 96 samples in all in 2 processes" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["o.pt"]
