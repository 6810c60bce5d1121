"""The demo: what it trains, what it leaves, and what it says."""

import dataclasses
import errno
import importlib
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ckptavg.cli.console import Console
from ckptavg.cli.demo import _say
from ckptavg.demo import train
from ckptavg.demo.run import run
from ckptavg.errors import CkptAvgError, OutputError
from ckptavg.landscape.rays import rays
from tests import helpers, ranks

TINY = train.Budget(epochs=8, common=6, cycle=40)
EPOCH = 20  # steps: 1,000 examples in batches of 50
START, END = 6 * EPOCH, 8 * EPOCH
NAMES = [
    "last iterate",
    "mean of the 2 members",
    "decayed rate, same budget",
    "average, averaged BN statistics",
    "average, last model's BN statistics",
    "average, refreshed BN statistics",
]


TRAINED, TESTED = 1_000, 1_000  # examples, instead of 2,000 and 10,000


@pytest.fixture(scope="module", autouse=True)
def _little_work():
    """Fewer examples, and landscapes of a step in one direction."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptavg.demo.run._STEPS", 1)
        patch.setattr("ckptavg.demo.run.rays", partial(rays, directions=1))
        patch.setattr(train, "TRAIN_EXAMPLES", TRAINED)
        patch.setattr(train, "STEPS_PER_EPOCH", EPOCH)
        patch.setattr(train, "TEST_EXAMPLES", TESTED)
        train.load_data.cache_clear()
        yield
    train.load_data.cache_clear()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A short demo in a directory whose name needs quotes.

    Its report, the directory, the rate of each step, and what the progress was told.
    """
    directory = tmp_path_factory.mktemp("demo") / "it's here"
    rates, heard = [], []
    original = torch.optim.SGD.step

    def step(optimizer, *arguments, **keywords):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(optimizer, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        report = run(directory, budget=TINY, seed=3, progress=lambda *told: heard.append(told))
    return report, directory, rates, heard


def formula(i, c, a1, a2):
    t = ((i - 1) % c + 1) / c
    return (1 - t) * a1 + t * a2


def naive_score(state):
    """Accuracy and NLL of a state dict, by the textbook."""
    model = train.make_model()
    model.load_state_dict(state)
    model.eval()
    data = train.load_data()
    with torch.no_grad(), train.one_thread():
        probabilities = model(data.test_signals).double().softmax(dim=1)
    right = probabilities.argmax(dim=1) == data.test_labels
    likelihood = probabilities[torch.arange(len(right)), data.test_labels]
    return 100 * right.double().mean().item(), -likelihood.log().mean().item()


def state_of(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)["state_dict"]


def test_data_are_few_and_a_fifth_of_the_labels_is_wrong():
    data = train.load_data()
    assert data.train_signals.shape == (TRAINED, 1, 40)
    assert data.test_signals.shape[0] == data.test_labels.shape[0] == TESTED
    clean = np.tile(np.arange(10), 200)
    noisy = train.with_noise(clean)
    assert (noisy != clean).sum() == 400
    assert set(noisy) == set(range(10))


def test_loader_shuffles_in_the_same_way_each_time():
    one, again, other = (
        torch.cat([signals for signals, _ in train.train_loader(seed)]) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, train.load_data().train_signals)


def test_cycles_take_the_last_quarter_of_the_budget():
    budget = train.Budget()
    assert (budget.epochs, budget.common) == (64, 48)


def test_rates_are_conventional_then_cyclical(tiny):
    rates = tiny[2]
    conventional, cycles = rates[:END], rates[END:]
    expected = [
        0.2 * max(0.01, 1 - 0.99 * max(0, step / END - 0.5) / 0.4) for step in range(1, END + 1)
    ]
    assert conventional == pytest.approx(expected)
    assert cycles == pytest.approx([formula(i, 40, 0.2, 0.02) for i in range(1, 41)])


def test_every_epoch_is_saved(tiny):
    directory = tiny[1]
    saved = {
        path.name: torch.load(path, weights_only=True)
        for path in (directory / "checkpoints").iterdir()
    }
    assert sorted(saved) == [f"epoch_{epoch}.pt" for epoch in range(1, 9)]
    for name, checkpoint in saved.items():
        assert name == f"epoch_{checkpoint['epoch']}.pt"
        assert checkpoint["global_step"] == EPOCH * checkpoint["epoch"]
    last = saved["epoch_8.pt"]["optimizer"]["param_groups"][0]["lr"]
    assert last == pytest.approx(0.02)


def test_the_minima_of_the_rate_are_picked_from_them(tiny):
    report = tiny[0]
    # Of the last quarter: its start, before the rate rises again, and the end of its one cycle.
    picked = tuple(f"checkpoints/epoch_{epoch}.pt" for epoch in (6, 8))
    assert report.rows[1].files == picked


def test_both_ends_go_on_from_the_same_start(tiny):
    directory = tiny[1]
    start = directory / "checkpoints" / "epoch_6.pt"
    decayed = torch.load(directory / "decayed.pt", weights_only=True)
    steps = torch.load(start, weights_only=True)["global_step"], decayed["global_step"]
    assert steps == (START, END)
    run = train.Run(seed=3)
    run.resume(start)
    with train.one_thread():
        for _ in range(2):
            run.train_epoch(lambda step: train.decayed_rate(step, END))
    assert all(
        torch.equal(value, decayed["state_dict"][name])
        for name, value in run.model.state_dict().items()
    )


def test_rows_are_the_scores_of_the_files(tiny):
    report, directory = tiny[:2]
    assert [row.name for row in report.rows] == NAMES
    for row in (report.rows[1], report.rows[-1]):
        scores = [naive_score(state_of(directory / file)) for file in row.files]
        accuracy, nll = torch.tensor(scores).mean(dim=0).tolist()
        assert row.accuracy == pytest.approx(
            accuracy, abs=0.15
        )  # an example of 1,000, in one of two models
        assert row.nll == pytest.approx(nll, rel=1e-3)


def test_averages_differ_in_their_statistics_only(tiny):
    report, directory = tiny[:2]
    members = [state_of(directory / file) for file in report.rows[1].files]
    averaged, last, refreshed = (state_of(directory / row.files[0]) for row in report.rows[3:])
    for name, value in averaged.items():
        if not name.endswith("num_batches_tracked"):
            mean = torch.stack([member[name].double() for member in members]).mean(dim=0)
            assert torch.equal(value, mean.float())
        if "running_" in name:
            assert torch.equal(last[name], members[-1][name])
            assert not torch.equal(refreshed[name], value)
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(last[name], value)
            assert torch.equal(refreshed[name], value)


def test_commands_work_as_printed_and_repeat_the_result(tiny, tmp_path):
    report, directory = tiny[:2]
    script = directory / "train.py"
    code = script.read_text()
    assert code.count(" 2_000, 10_000,") == 1
    script.write_text(code.replace(" 2_000, 10_000,", f" {TRAINED}, {TESTED},"))
    for line in report.commands:
        program, *words = shlex.split(line)
        assert program == "ckptavg"
        ranks.Job([ranks.command(*words)], tmp_path).finish(0)
    script.write_text(code)
    again, refreshed = (directory / f"{name}.safetensors" for name in ("swa", "refreshed-bn"))
    assert again.read_bytes() == refreshed.read_bytes()


def test_directory_has_the_script_that_made_it(tiny):
    directory = tiny[1]
    assert (directory / "train.py").read_bytes() == Path(train.__file__).read_bytes()


def test_same_seed_gives_the_same_figures_and_stages_are_said_on_stderr(
    tiny, tmp_path, monkeypatch
):
    report = tiny[0]
    monkeypatch.setattr(train, "Budget", lambda: TINY)
    seen = report.rise, report.pictures  # landscapes have tests of their own
    monkeypatch.setattr("ckptavg.demo.run.look_around", lambda *_: seen)
    result = helpers.run("demo", tmp_path / "new", "--seed", "3", "--json")
    document = json.loads(result.stdout)
    again = dataclasses.asdict(report)["rows"]
    assert document["rows"] == json.loads(json.dumps(again))
    stages = [line.split()[1] for line in result.stderr.splitlines()]
    assert stages == ["training", "averaging", "evaluating"]


def test_table_is_aligned_and_ends_with_the_commands(tiny, capsys):
    report = tiny[0]
    _say(Console(as_json=False, quiet=False), report)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(tuple(NAMES))]
    assert len(table) == len(NAMES)
    assert len({len(line) for line in table}) == 1
    assert [line.strip() for line in lines[-2:]] == list(report.commands)


def test_progress_counts_every_epoch(tiny):
    assert tiny[3] == 10 * [(1, 10)]


def test_used_directory_is_refused_before_anything_is_done(tmp_path):
    kept = tmp_path / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(OutputError, match="not empty; choose another directory"):
        run(tmp_path)
    with pytest.raises(OutputError, match="not a directory; choose another directory"):
        run(kept)
    assert list(tmp_path.iterdir()) == [kept]


def test_number_of_threads_is_put_back(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.set_num_threads(2)
    try:
        with pytest.raises(FileExistsError):
            train.train(tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_missing_data_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    monkeypatch.delitem(sys.modules, "ckptavg.demo.run")
    monkeypatch.delitem(sys.modules, "ckptavg.demo.train")
    monkeypatch.delattr("ckptavg.demo.train")
    with pytest.raises(CkptAvgError, match=r"mnist1d.*; pip install 'ckptavg\[demo\]'$"):
        importlib.import_module("ckptavg.demo.run")


@pytest.mark.slow
def test_refreshed_average_beats_the_models_it_is_made_of(tmp_path):
    report = run(tmp_path / "demo")
    last, members, decayed, averaged, _, refreshed = report.rows
    assert len(members.files) == 9
    assert members.files[-1:] == last.files
    assert refreshed.accuracy > max(last.accuracy, members.accuracy, averaged.accuracy)
    assert refreshed.nll < min(last.nll, members.nll, averaged.nll)
    # The baseline is the better of the others, whether or not it is beaten.
    assert decayed.accuracy > members.accuracy


def test_a_full_disk_is_the_system_s_error():
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        train.Run(0).save(Path("/dev/full"))
