"""Several processes that share a pass: gloo's, with the environment that `torchrun` gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from ckptavg import distributed
from ckptavg.distributed import Ranks
from ckptavg.model.feeding import Feed
from tests.oracle import same_bits
from tests.ranks import LOOPBACK, Job, command, variables

TRAIN = """
import os
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

RANK = int(os.environ.get("RANK", "0"))


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), nn.ReLU()),
            *(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)),
            nn.InstanceNorm2d(6, track_running_stats=True),
            *(nn.Flatten(), nn.Linear(96, 4), nn.BatchNorm1d(4)),
        )


def data():
    made = torch.Generator().manual_seed(1)
    scale = torch.rand(203, 1, 1, 1, generator=made) * 4
    images = torch.randn(203, 3, 8, 8, generator=made) * scale
    return TensorDataset(images, torch.arange(203) % 4)


def loader(size=16, workers=0, shuffle=True):
    return DataLoader(data(), size, shuffle=shuffle, num_workers=workers)


def generator():
    yield from loader()


def dealt():
    return DataLoader(data(), 16, sampler=DistributedSampler(data(), shuffle=False, drop_last=True))


def with_nan():
    for number, (images, labels) in enumerate(loader()):
        yield images * (float("nan") if number in (3, 4) else 1), labels


def own_seed():
    torch.manual_seed(RANK)
    return loader()


class Slow(Dataset):
    def __len__(self):
        return 4000

    def __getitem__(self, index):
        if RANK == 1 and index > 200:
            raise ValueError("process one cannot read this")
        time.sleep(0.002)
        return torch.randn(3, 8, 8)


def slow():
    return DataLoader(Slow(), 16, shuffle=True)


def waiting():
    for _ in range(3):
        if RANK == 1:
            open("begun1", "w").close()
            time.sleep(60)  # until it is killed
        yield torch.randn(4, 3, 8, 8)


def long():
    for number in range(200):
        if RANK == 1 and number > 5:
            raise ValueError("process one is tired")
        if RANK == 0:
            time.sleep(0.05)
            with open("drawn", "a") as file:
                print("one", file=file)
        yield torch.randn(4, 3, 8, 8)


def bad_model():
    raise ValueError("no model today")


def bad_model_of_one():
    if RANK == 1:
        raise ValueError("no model in process one")
    return Net()


def score(model, batches):
    print("evaluated in", RANK)
    return 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(TRAIN)
    space: dict[str, Any] = {}
    exec(TRAIN, space)  # noqa: S102
    torch.manual_seed(0)
    torch.save(space["Net"]().state_dict(), folder / "a.pt")
    return folder


def start(folder, *arguments, size):
    """The processes."""
    call = command("bn-refresh", "a.pt", "--model", "train.py:Net", *arguments)
    return Job([call] * size, folder)


def run(folder, output, *arguments, size, code=0):
    arguments = ("-o", output, "--force", "--json", *arguments)
    return start(folder, *arguments, size=size).finish(*[code] * size)


def assert_near(folder, one, other, tolerance=1e-6):
    """Means to so many standard deviations, variances relatively."""
    found, expected = (torch.load(folder / name) for name in (one, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("running_mean"):
            variance = expected[name.replace("_mean", "_var")].double()
            apart = (found[name].double() - value.double()).abs() / variance.sqrt()
            assert float(apart.max()) <= tolerance, name
        elif name.endswith("running_var"):
            assert float((found[name].double() / value.double() - 1).abs().max()) <= tolerance, name
        else:
            assert same_bits(found[name], value), name


class TestResult:
    @pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
    def test_is_that_of_one_process(self, folder, estimator):
        arguments = ("--loader", "train.py:loader", "--estimator", estimator)
        [(alone, _)] = run(folder, "one.pt", *arguments, size=1)
        outputs = run(folder, "three.pt", *arguments, size=3)  # 13 batches: unequal shares
        assert_near(folder, "three.pt", "one.pt")
        one, three = json.loads(alone), json.loads(outputs[0][0])
        assert [out for out, _ in outputs[1:]] == ["", ""]
        assert [error for _, error in outputs] == [""] * 3
        assert (one.pop("processes"), three.pop("processes")) == (1, 3)
        for layer, other in zip(one.pop("layers"), three.pop("layers"), strict=True):
            assert layer.pop("name") == other.pop("name")
            for held in ("old", "new"):
                one_held, other_held = layer.pop(held), other.pop(held)
                assert one_held["batches"] == other_held["batches"]
                for name in ("mean", "variance"):
                    assert other_held[name] == pytest.approx(one_held[name], rel=1e-4, abs=1e-5)
            assert other == pytest.approx(layer, rel=1e-3, abs=1e-6)
        assert one == three

    @pytest.mark.parametrize(
        ("size", "arguments"),
        [
            pytest.param(2, ("--loader", "train.py:generator"), marks=pytest.mark.slow),
            (2, ("--loader", "train.py:loader", "--loader-arg", "workers=2")),
            (2, ("--loader", "train.py:with_nan")),
            pytest.param(
                3, ("--loader", "train.py:loader", "--max-samples", "50"), marks=pytest.mark.slow
            ),
            (3, ("--loader", "train.py:loader", "--loader-arg", "size=150")),  # one has no batch
            (2, ("--loader", "train.py:generator", "--max-samples", "1")),
            (2, ("--loader", "train.py:loader", "--train-mode", "full")),
        ],
        ids=str,
    )
    def test_is_so_whatever_the_loader_and_the_limits(self, folder, size, arguments):
        [(alone, _)] = run(folder, "one.pt", *arguments, size=1)
        shared, _ = run(folder, "more.pt", *arguments, size=size)[0]
        assert_near(folder, "more.pt", "one.pt")
        one, more = json.loads(alone), json.loads(shared)
        for name in ("batches", "samples", "nonfinite", "notices"):
            assert one[name] == more[name], name

    def test_is_that_of_what_a_distributed_sampler_has_dealt_out(self, folder):
        arguments = ("--loader", "train.py:dealt", "--estimator", "exact")
        [(output, error), _] = run(folder, "two.pt", *arguments, size=2)
        found = json.loads(output)
        assert (found["batches"], found["samples"]) == (14, 202)  # 101 each
        assert "the loader splits the batches among the processes" in error
        run(folder, "one.pt", "--loader", "train.py:loader", "--loader-arg", "shuffle=False",
            "--loader-arg", "size=202", "--max-samples", "202", "--estimator", "exact",
            size=1)  # fmt: skip
        # The first layer's inputs alone do not depend on what else is in a batch.
        found, expected = (torch.load(folder / name) for name in ("two.pt", "one.pt"))
        for name in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)

    def test_ends_for_all_when_the_tolerance_is_reached(self, folder):
        arguments = ("--loader", "train.py:loader", "--loader-arg", "size=5", "--tol", "0.5")
        (output, _), (nothing, _) = run(folder, "two.pt", *arguments, size=2)
        assert json.loads(output)["converged"] is False  # fewer than 2,048 examples
        assert nothing == ""

    def test_is_judged_by_the_first_alone(self, folder):
        judging = ("--eval-loader", "train.py:loader", "--metric", "train.py:score")
        outputs = run(folder, "two.pt", "--loader", "train.py:loader", *judging, size=2)
        assert json.loads(outputs[0][0])["verdict"]["after"] == {"score": 1}
        assert [error.count("evaluated in 0") for _, error in outputs] == [2, 0]
        assert "evaluated in 1" not in outputs[1][1]


class TestFailure:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--loader", "train.py:slow"), "ValueError: process one cannot read this"),
            (
                ("--loader", "train.py:loader", "--model", "train.py:bad_model_of_one"),
                "ValueError: no model in process one",
            ),
        ],
        ids=["loader", "model"],
    )
    def test_of_one_ends_all_with_its_message(self, folder, arguments, message):
        outputs = run(folder, "bad.pt", *arguments, size=2, code=1)
        assert not (folder / "bad.pt").exists()
        assert message in outputs[1][1]
        assert outputs[1][1].splitlines()[-1].startswith("ckptavg: error: ")
        assert outputs[0] == ("", "")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--loader", "train.py:loader", "--model", "train.py:bad_model"), "no model today"),
            (("--loader", "train.py:nothing"), "has no 'nothing'"),
            (("--loader", "train.py:loader", "--key", "none"), "none"),
            (("--loader", "train.py:loader", "--layers", "none"), "matches no norm layer's name"),
            (("--loader", "train.py:own_seed"), "draw the examples in different orders"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_of_all_is_told_once(self, folder, arguments, message):
        outputs = run(folder, "bad.pt", *arguments, size=3, code=1)
        assert message in outputs[0][1]
        assert [error for _, error in outputs[1:]] == ["", ""]
        assert not (folder / "bad.pt").exists()

    def test_of_one_ends_the_pass_of_the_others_at_once(self, folder):
        (folder / "drawn").unlink(missing_ok=True)
        outputs = run(folder, "bad.pt", "--loader", "train.py:long", size=2, code=1)
        assert "process one is tired" in outputs[1][1]
        assert len((folder / "drawn").read_text().splitlines()) < 150

    def test_of_the_writing_is_one_of_all(self, folder):
        run(folder, folder / "none" / "o.pt", "--loader", "train.py:loader", size=2, code=1)

    def test_that_kills_one_is_noticed(self, folder):
        (folder / "begun1").unlink(missing_ok=True)
        job = start(folder, "-o", "bad.pt", "--loader", "train.py:waiting", size=3)
        while not (folder / "begun1").exists():
            assert job.processes[1].is_alive()
            time.sleep(0.05)
        job.processes[1].kill()
        outputs = job.finish(1, -9, 1)
        # Two are left: the one that notices first says so, and the other ends with it.
        assert any("lost the connection to another process" in error for _, error in outputs)
        assert "Traceback" not in outputs[0][1]

    def test_to_come_is_told_with_what_to_do(self, folder):
        call = partial(impatient, "bn-refresh", "a.pt", "-o", "o.pt", "--model", "train.py:Net",
                       "--loader", "train.py:loader")  # fmt: skip
        [(_, error)] = Job([call], folder, **variables(2), RANK="0").finish(1)
        [line] = [one for one in error.splitlines() if one.startswith("ckptavg: ")]
        assert "the 2 processes did not connect" in line
        assert line.endswith("start it with torchrun --no-python, or unset RANK to run it alone")


def impatient(*words):
    """The command, if it waited for the other processes for a second alone."""
    distributed._START_TIMEOUT = timedelta(seconds=1)
    command(*words)()


@pytest.mark.slow
def test_torchrun_starts_them(folder):
    command = (
        *(Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", 2),
        *("--no-python", Path(sys.executable).with_name("ckptavg"), "bn-refresh", "a.pt"),
        *("--model", "train.py:Net", "--loader", "train.py:loader", "-o", "two.pt", "--force"),
    )
    environment = os.environ | {"GLOO_SOCKET_IFNAME": LOOPBACK}
    found = subprocess.run(
        [str(one) for one in command], cwd=folder, env=environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "13 batches of 203 samples in all in 2 processes" in found.stdout
    run(folder, "one.pt", "--loader", "train.py:loader", size=1)
    assert_near(folder, "two.pt", "one.pt", 1e-5)


class Rank(Ranks):
    """One of several, without the others."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


class TestFeed:
    @pytest.mark.parametrize(
        "limits",
        [
            {},
            {"max_samples": 1},
            {"max_samples": 33},
            {"max_samples": 1000},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("size", [2, 3, 20])
    @pytest.mark.parametrize("kind", ["loader", "batch sampler", "list"])
    def test_deals_out_what_one_process_would_have(self, kind, size, limits):
        data = TensorDataset(torch.arange(75))

        def make():
            made = torch.Generator().manual_seed(4)
            if kind == "batch sampler":
                sampler = BatchSampler(RandomSampler(data, generator=made), 8, drop_last=False)
                return DataLoader(data, batch_sampler=sampler)
            loader = DataLoader(data, 8, shuffle=True, generator=made)
            return loader if kind == "loader" else list(loader)

        def drawn(ranks):
            return [(number, batch[0].tolist()) for number, batch in Feed(make(), ranks, **limits)]

        together = [one for rank in range(size) for one in drawn(Rank(rank, size))]
        assert sorted(together) == drawn(Ranks())

    def test_loads_nothing_that_is_another_processes(self):
        class Data(TensorDataset):
            def __getitem__(self, index):
                loaded.append(index)
                return super().__getitem__(index)

        loaded: list[int] = []
        for rank in range(3):
            list(Feed(DataLoader(Data(torch.arange(50)), 8), Rank(rank, 3)))
        assert sorted(loaded) == list(range(50))

    def test_has_a_fingerprint_of_the_whole_order(self):
        def fingerprint(rank, seed):
            made = torch.Generator().manual_seed(seed)
            feed = Feed(DataLoader(range(50), 8, shuffle=True, generator=made), Rank(rank, 3))  # type: ignore[arg-type]
            list(feed)
            return feed.fingerprint()

        assert fingerprint(0, 1) == fingerprint(1, 1) != fingerprint(1, 2)


def test_the_order_of_ranks_is_that_of_the_pass():
    """Numbers of batches that were left out come sorted, whoever left them out."""
    from collections import Counter

    from ckptavg.batchnorm.moments import Channels, Moments
    from ckptavg.batchnorm.totals import PassTotals

    made = [
        PassTotals(
            Moments.empty(Channels(("a",), (1,), (False,), (0.0,))),
            nonfinite=[number * 7 % 10, 5 - number],
            unfit=Counter(a=1),
        )
        for number in range(3)
    ]
    merged = made[0].merged(made[1]).merged(made[2])
    assert merged.nonfinite == sorted(merged.nonfinite)
    assert len(merged.nonfinite) == 6
    assert merged.unfit.total() == 3
