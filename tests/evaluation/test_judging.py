"""Whether a refresh has helped: evaluated before and after, and written down."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ckptavg import cli
from ckptavg.errors import CkptAvgError
from ckptavg.formats import open_checkpoint
from tests.held_out import naive_metrics

TRAIN = """
import torch
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def data(count, seed, shift=0.0):
    made = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.randn(count, 4, generator=made) + labels[:, None] * 3 + shift, labels


def training(shift=0.0):
    return list(zip(*(part.split(50) for part in data(300, 0, shift))))


def held_out(seed=1):
    return list(zip(*(part.split(40) for part in data(150, seed))))


def unlike():
    return training(shift=40.0)


def right(model, batches):
    return sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in batches)


def several(model, batches):
    return {"loss": 0.5, "other": 1}


def nan(model, batches):
    return float("nan")


def constant(model, batches):
    return 0.5


def trained():
    torch.default_generator.manual_seed(0)
    model = Net().train()
    steps = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(30):
        for inputs, labels in training():
            steps.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            steps.step()
    return model.eval()
"""
MODEL = ("--model", "train.py:Net")
REFRESH = (*MODEL, "--loader", "train.py:training")
EVAL = ("--eval-loader", "train.py:held_out")


@pytest.fixture(autouse=True)
def _folder(user_folder):
    (user_folder / "train.py").write_text(TRAIN)


@pytest.fixture
def train():
    import train  # type: ignore[import-not-found]

    return train


def save(model, *, stale):
    """A checkpoint, with statistics that are good or of no use."""
    if stale:
        model[1].running_mean.fill_(30)
        model[1].running_var.fill_(0.1)
    torch.save(model.state_dict(), "a.pt")
    return digest()


def digest():
    return hashlib.sha256(Path("a.pt").read_bytes()).hexdigest()


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.cli, ["bn-refresh", "a.pt", *map(str, arguments)])
    if isinstance(result.exception, CkptAvgError):
        assert code == 1
        return str(result.exception)
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def load(path="o.pt"):
    return torch.load(path, weights_only=True)


class TestVerdict:
    def test_has_the_metrics_of_both(self, train):
        model = train.trained()
        save(model, stale=True)
        found = json.loads(run("-o", "o.pt", *REFRESH, *EVAL, "--json"))["verdict"]
        for name, path in (("before", "a.pt"), ("after", "o.pt")):
            expected = naive_metrics(train.Net(), load(path), train.held_out())
            assert found[name] == pytest.approx(expected, rel=1e-5)
        assert found["before"]["accuracy"] < 0.5
        assert found["after"]["accuracy"] > 0.9
        assert found["kept"] == "new"

    def test_is_told(self, train):
        save(train.trained(), stale=True)
        lines = run("-o", "o.pt", *REFRESH, *EVAL, "--metric", "accuracy").splitlines()
        assert [line for line in lines if line.startswith("  accuracy: 0.33333 before, ")]
        assert not any("are kept" in line for line in lines)

    def test_may_be_of_a_function_with_arguments_of_the_loader(self, train):
        save(train.trained(), stale=True)
        given = ("--metric", "train.py:right", "--eval-loader-arg", "seed=5", "--json")
        found = json.loads(run("-o", "o.pt", *REFRESH, *EVAL, *given))["verdict"]
        expected = naive_metrics(train.Net(), load(), train.held_out(5))["accuracy"] * 150
        assert found["after"] == {"right": pytest.approx(expected)}

    def test_without_being_asked_is_none(self, train):
        save(train.trained(), stale=True)
        assert json.loads(run("-o", "o.pt", *REFRESH, "--json"))["verdict"] is None


class TestKeepBetter:
    @pytest.mark.parametrize("metric", [(), ("--metric", "accuracy"), ("--metric", "loss")])
    def test_keeps_the_new_ones_where_they_are(self, metric, train):
        save(train.trained(), stale=True)
        output = run("-o", "o.pt", *REFRESH, *EVAL, *metric, "--keep-better")
        assert "are kept" not in output
        assert not torch.equal(load()["1.running_mean"], load("a.pt")["1.running_mean"])
        entry = open_checkpoint_provenance("o.pt")
        assert entry["norm_stats"]["state"] == "refreshed"

    @pytest.mark.parametrize("metric", [(), ("--metric", "train.py:right", "--mode", "max")])
    def test_keeps_the_old_ones_where_they_are(self, metric, train):
        save(train.trained(), stale=False)
        bad = (*MODEL, "--loader", "train.py:unlike")
        output = run("-o", "o.pt", *bad, *EVAL, *metric, "--keep-better")
        name = "right" if metric else "loss"
        assert f"  the old statistics have the better {name}, and are kept" in output
        assert output.splitlines()[-1] == "  wrote o.pt"
        for name, value in load("a.pt").items():
            assert torch.equal(load()[name], value)
        assert open_checkpoint_provenance("o.pt")["norm_stats"] == {"state": "unknown"}

    def test_leaves_the_file_alone_in_place(self, train):
        before = save(train.trained(), stale=False)
        bad = (*MODEL, "--loader", "train.py:unlike")
        output = run("--in-place", *bad, *EVAL, "--keep-better")
        assert output.splitlines()[-1] == "  left a.pt"
        assert digest() == before

    def test_without_it_the_new_ones_are_written_even_if_worse(self, train):
        save(train.trained(), stale=False)
        found = json.loads(
            run("-o", "o.pt", *MODEL, "--loader", "train.py:unlike", *EVAL, "--json")
        )
        verdict = found["verdict"]
        assert verdict["after"]["loss"] > verdict["before"]["loss"]
        assert (verdict["kept"], found["converged"]) == ("new", None)
        assert load()["1.running_mean"].std() > 5 * load("a.pt")["1.running_mean"].std()

    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_of_a_tie_takes_the_new_ones(self, mode, train):
        save(train.trained(), stale=True)
        tie = ("--metric", "train.py:constant", "--mode", mode, "--keep-better", "--json")
        found = json.loads(run("-o", "o.pt", *REFRESH, *EVAL, *tie))
        assert found["verdict"]["kept"] == "new"
        assert not torch.equal(load()["1.running_mean"], load("a.pt")["1.running_mean"])

    def test_takes_the_new_ones_over_nan(self, train):
        model = train.trained()
        model[1].running_var.fill_(math.nan)
        save(model, stale=False)
        found = json.loads(run("-o", "o.pt", *REFRESH, *EVAL, "--keep-better", "--json"))
        assert found["verdict"]["before"] == {"loss": None, "accuracy": None}
        assert found["verdict"]["kept"] == "new"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--metric", "train.py:right"), "whether right should be low or high is not certain"),
            (("--metric", "train.py:several", "--mode", "min"), "several is none of the metrics"),
        ],
    )
    def test_that_cannot_tell_is_an_error(self, arguments, message, train):
        save(train.trained(), stale=True)
        with_it = (*REFRESH, *EVAL, "--keep-better", *arguments)
        assert message in run("-o", "o.pt", *with_it, code=1)

    @pytest.mark.parametrize(
        ("arguments", "option"),
        [
            (("--keep-better",), "--keep-better"),
            (("--metric", "loss"), "--metric"),
            (("--mode", "min"), "--mode"),
            (("--eval-loader-arg", "seed=1"), "--eval-loader-arg"),
        ],
    )
    def test_needs_held_out_batches(self, arguments, option, train):
        save(train.trained(), stale=True)
        assert f"{option} has no effect without --eval-loader" in run(*REFRESH, *arguments, code=2)


def open_checkpoint_provenance(path):
    return open_checkpoint(Path(path)).provenance


class TestReport:
    def test_has_the_old_and_the_new_statistics(self, train):
        save(train.trained(), stale=True)
        found = json.loads(run("-o", "o.pt", *REFRESH, *EVAL, "--json"))
        [layer] = found["layers"]
        for state, held in ((load("a.pt"), layer["old"]), (load(), layer["new"])):
            assert held["mean"] == state["1.running_mean"].tolist()
            assert held["variance"] == state["1.running_var"].tolist()
            assert held["batches"] == int(state["1.num_batches_tracked"])
        assert {"name", "calls", "mean_error"} <= layer.keys()
        assert found["verdict"]["kept"] == "new"

    def test_of_nan_has_null(self, train):
        model = train.trained()
        model[1].running_mean[2] = math.nan
        save(model, stale=False)
        found = json.loads(run("-o", "o.pt", *REFRESH, "--json"))
        assert found["layers"][0]["old"]["mean"][2] is None
        assert found["layers"][0]["mean_change"] is None


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "key", "value"),
        [
            (("--tol", "0.9"), "tol", 0.9),
            (("--layers", "1"), "kept", []),
            (("--amp", "bf16"), "nonfinite", 0),
            (("--strict",), "nonfinite", 0),
        ],
        ids=str,
    )
    def test_reach_the_pass(self, arguments, key, value, train):
        save(train.trained(), stale=True)
        found = json.loads(run("-o", "o.pt", *REFRESH, *arguments, "--json"))
        assert found[key] == value

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("--skip-layers", "."), 1, "no norm layer was refreshed: '1' (as asked)"),
            (("--layers", "x"), 1, "`layers` 'x' matches no norm layer's name; the names are 1"),
            (("--tol", "0"), 2, "--tol"),
            (("--amp", "fp16"), 2, "--amp"),
        ],
        ids=str,
    )
    def test_that_are_wrong_are_an_error(self, arguments, code, message, train):
        save(train.trained(), stale=True)
        assert message in run("-o", "o.pt", *REFRESH, *arguments, code=code)

    def test_convergence_is_said(self, train):
        save(train.trained(), stale=True)
        lines = run("-o", "o.pt", *REFRESH, "--tol", "0.001").splitlines()
        assert lines[2].startswith("  remaining error: mean ")
        assert lines[3] == "  the data ended before both were within 0.001"
