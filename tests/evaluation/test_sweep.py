"""Sweeps, held against naive averages, refreshes and evaluations with state dicts in memory."""

from __future__ import annotations

import csv
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg import Selection
from ckptavg.batchnorm.options import RefreshOptions
from ckptavg.errors import CkptAvgError, OutputError, RefreshError, SelectionError, UserCodeError
from ckptavg.evaluation.swept import Sweep
from ckptavg.formats import open_checkpoint
from ckptavg.merge.weights import decay, ema, linear, uniform
from tests.held_out import naive_metrics, save_trained
from tests.helpers import run
from tests.oracle import save_run
from tests.ranks import Job, command

OUT = Path("best.safetensors")
REFRESH = RefreshOptions(model="train.py:Net", loader="train.py:training", device="cpu")
LAST = (2, 4, None)
TEST: dict[str, Any] = {"test_loader": "train.py:batches", "test_loader_args": {"seed": 9}}
TEST_WORDS = ("--test-loader", "train.py:batches", "--test-loader-arg", "seed=9")


@pytest.fixture(autouse=True)
def states(train):
    return save_trained(Path("run"), count=6)


def swept(inputs: object = "run", *, last: object = LAST, **others: Any) -> Sweep:
    fields: dict[str, Any] = {"model": "train.py:Net", "loader": "train.py:batches"}
    fields |= {"metric": "loss", "device": "cpu", "refresh": REFRESH, **others}
    return ckptavg.sweep(inputs, select=Selection(last=last), **fields)  # type: ignore[arg-type]


def weighted(states, weights):
    """`sum(w x) / divisor` in float64, the oldest first; of counters the last."""
    found = {}
    for name, value in states[-1].items():
        if value.is_floating_point():
            total = sum(w * s[name].double() for w, s in zip(weights.values, states, strict=True))
            found[name] = (total / weights.divisor).to(value.dtype)
        else:
            found[name] = value
    return found


def refreshed(train, state):
    """Batches weighted by their size: the paper's estimator, by torch's own batch norm."""
    model = train.Net()
    model.load_state_dict(state)
    model.eval()
    model.bn.train()
    mean = var = torch.zeros(6)
    count = 0
    with torch.no_grad():
        for x, _ in train.training():
            hidden = model.conv(x)
            share = len(x) / (count + len(x))
            mean = (1 - share) * mean + share * hidden.mean((0, 2, 3))
            var = (1 - share) * var + share * hidden.var((0, 2, 3))
            count += len(x)
    return {**state, "bn.running_mean": mean, "bn.running_var": var}


FORMULAS = {
    "uniform": uniform,
    "linear": linear,
    "ema:0.9": lambda count: ema(count, 0.9),
    "decay:cosine": lambda count: decay(count, "cosine"),
}


class TestValues:
    def test_of_averages_are_those_of_naive_ones_that_are_refreshed(self, train, states):
        found = swept(weights=",".join(FORMULAS), metric=None)
        assert len(found.averages) == len(LAST) * len(FORMULAS)
        for row in found.averages:
            window = states[-row.count :]
            average = weighted(window, FORMULAS[row.scheme](row.count))
            expected = naive_metrics(train.Net(), refreshed(train, average), train.batches())
            assert row.metrics == pytest.approx(expected, rel=1e-5)
            assert (row.last, row.newest) == (None if row.count == 6 else row.count, "step_5.pt")
            assert row.oldest == f"step_{6 - row.count}.pt"
        best = min(found.averages, key=lambda row: row.metrics["loss"])
        assert (found.best, found.metric, found.mode) == (best, "loss", "min")

    def test_of_checkpoints_are_their_own_without_a_refresh(self, train, states):
        found = swept(metric=None)
        expected = [naive_metrics(train.Net(), state, train.batches()) for state in states]
        for row, values in zip(found.checkpoints, expected, strict=True):
            assert row.metrics == pytest.approx(values, rel=1e-5)
        place = int(np.argmin([values["loss"] for values in expected]))
        assert found.best_checkpoint == found.checkpoints[place]
        assert found.last_checkpoint.newest == "step_5.pt"

    def test_no_members_leaves_the_last_one(self):
        found = swept(members=False)
        assert [row.newest for row in found.checkpoints] == ["step_5.pt"]
        assert found.best_checkpoint is None

    def test_a_model_without_norm_layers_needs_no_refresh(self, train):
        states = save_trained(Path("linear"), "Linear", count=4)
        found = swept("linear", model="train.py:Linear", refresh=None, metric="accuracy")
        values = [
            naive_metrics(train.Linear(), weighted(states[-n:], uniform(n)), train.batches())
            for n in (2, 4)
        ]
        assert [row.metrics["accuracy"] for row in found.averages] == pytest.approx(
            [each["accuracy"] for each in values]
        )

    def test_numbers_for_each_checkpoint_are_a_scheme_too(self, train, states):
        found = swept(last=3, weights=(0.5, 0.0, 1.5))
        [row] = found.averages
        average = weighted([states[3], states[5]], ckptavg.merge.weights.Weights((0.5, 1.5), 2.0))
        expected = naive_metrics(train.Net(), refreshed(train, average), train.batches())
        assert row.metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert (row.count, row.oldest) == (2, "step_3.pt")

    def test_layers_frozen_within_a_window_are_not_refreshed_there(self, train, states):
        for state in states[3:]:
            state["bn.running_mean"] = torch.full((6,), 0.3)
            state["bn.running_var"] = torch.full((6,), 2.0)
            state["bn.num_batches_tracked"] = torch.tensor(40)
        save_run(Path("run"), states, "pt")
        found = swept(last=(2, 5))
        for row, is_frozen in zip(found.averages, (True, False), strict=True):
            average = weighted(states[-row.count :], uniform(row.count))
            state = average if is_frozen else refreshed(train, average)
            expected = naive_metrics(train.Net(), state, train.batches())
            assert row.metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)

    def test_the_same_average_counts_once(self, notices):
        found = swept(last=(4, 6, 7, None), weights="uniform,decay:linear")
        assert len(found.averages) == 2
        assert "last7-uniform is the same average as last6-uniform" in notices.text

    def test_nan_in_a_checkpoint_is_no_winner(self, states):
        states[1]["head.bias"][0] = torch.nan
        save_run(Path("run"), states, "pt")
        found = swept(output=OUT)
        assert [np.isnan(row.metrics["loss"]) for row in found.averages] == [False, False, True]
        assert found.best.count < 5
        assert open_checkpoint(OUT).provenance["sweep"]["rows"][2]["loss"] is None  # type: ignore[index]


class TestReading:
    @pytest.fixture
    def large(self):
        """Checkpoints in which headers and samples hardly count."""
        Path("wide.py").write_text(
            "from torch import nn\n"
            "def make():\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(72, 3000), nn.Linear(3000, 4),\n"
            "                         nn.BatchNorm1d(4))\n"
        )
        Path("large").mkdir()
        from wide import make  # type: ignore[import-not-found]

        for step in range(8):
            state = {name: value.clone() for name, value in make().state_dict().items()}
            state["3.running_mean"] = torch.randn(4)
            state["3.running_var"] = torch.rand(4)
            save_file(state, f"large/step_{step}.safetensors")
        return Path("large")

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"output": OUT},
            TEST,
            {"output": OUT, **TEST},
        ],
    )
    @pytest.mark.parametrize("last", [(2, 3, None), (8,)])
    def test_each_checkpoint_is_read_at_most_twice(self, large, last, more, monkeypatch):
        counts: dict[str, int] = {}

        def counted(original: Any) -> Any:
            def read(descriptor: int, *arguments: Any) -> Any:
                found = original(descriptor, *arguments)
                path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
                size = found if isinstance(found, int) else len(found)
                counts[path] = counts.get(path, 0) + size
                return found

            return read

        monkeypatch.setattr(os, "preadv", counted(os.preadv))
        monkeypatch.setattr(os, "pread", counted(os.pread))
        refresh = RefreshOptions(model="wide.py:make", loader="train.py:training", device="cpu")
        weights = "uniform,ema:0.9,linear"
        swept(large, last=last, weights=weights, model="wide.py:make", refresh=refresh, **more)
        sizes = {str(path.resolve()): path.stat().st_size for path in large.iterdir()}
        assert sizes.keys() <= counts.keys()
        for path, size in sizes.items():
            assert counts[path] <= 2.05 * size  # with headers and samples


class TestWriting:
    @pytest.mark.parametrize("name", ["best.safetensors", "best.pt", "best/"])
    def test_has_the_bytes_of_average_and_refresh(self, name):
        found = swept(weights="uniform,ema:0.9", output=name)
        assert found.summary is not None
        ckptavg.average("run", "a.safetensors", select=Selection(last=found.best.last),
                        weights=found.best.scheme)  # fmt: skip
        ckptavg.refresh_checkpoint("a.safetensors", "other.safetensors", **vars(REFRESH))
        written, other = open_checkpoint(Path(name)), open_checkpoint(Path("other.safetensors"))
        assert written.tensors.keys() == other.tensors.keys()
        for tensor in other.tensors:
            assert written.read(tensor).tobytes() == other.read(tensor).tobytes()
        provenance = written.provenance
        assert provenance is not None
        table = provenance.pop("sweep")
        assert provenance == other.provenance
        assert table["metric"] == "loss"
        assert [row["loss"] for row in table["rows"]] == [
            row.metrics["loss"] for row in (*found.averages, *found.checkpoints)
        ]

    def test_one_file_differs_in_its_header_alone(self):
        swept(output=OUT)
        best = swept().best
        ckptavg.average("run", "a.safetensors", select=Selection(last=best.last))
        ckptavg.refresh_checkpoint("a.safetensors", None, **vars(REFRESH))
        data = [
            raw[8 + int.from_bytes(raw[:8], "little") :]
            for raw in (OUT.read_bytes(), Path("a.safetensors").read_bytes())
        ]
        assert data[0] == data[1]

    def test_what_is_evaluated_has_the_bits_that_are_written(self):
        """The order of the additions does not matter where float64 holds the sum."""
        found = swept(output=OUT, weights="uniform,ema:0.5")
        written = load_file(OUT)
        train: Any = __import__("train")
        value = naive_metrics(train.Net(), written, train.batches())["loss"]
        assert found.best.metrics["loss"] == pytest.approx(value, rel=1e-6)

    def test_may_be_the_last_training_checkpoint(self, train, states):
        Path("whole").mkdir()
        for epoch, state in enumerate(states):
            torch.save({"state_dict": state, "epoch": epoch}, f"whole/epoch_{epoch}.pt")
        found = swept("whole", output="best.pt", container="last")
        written = torch.load("best.pt", weights_only=True)
        assert written["epoch"] == len(states) - 1
        metrics = naive_metrics(train.Net(), written["state_dict"], train.batches())
        assert found.best.metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)

    def test_is_verified_and_inspected(self):
        found = swept(output=OUT)
        assert ckptavg.verify(OUT, ["run"]).compared > 0
        text = run("inspect", OUT).stdout
        assert f"best of {len(found.averages)} averages by loss" in text

    def test_an_existing_output_stays(self, train):
        OUT.write_text("old")
        with pytest.raises(OutputError, match="exists already"):
            swept(output=OUT)
        assert OUT.read_text() == "old"
        assert train.MADE == []
        swept(output=OUT, force=True)
        assert load_file(OUT)

    def test_nothing_is_written_without_an_output(self):
        before = sorted(os.listdir())
        swept(**TEST)
        assert sorted(os.listdir()) == before
        assert sorted(os.listdir("run")) == [f"step_{step}.pt" for step in range(6)]


class TestTest:
    def test_compares_with_the_last_and_the_best_checkpoint(self, train, states):
        found = swept(metric=None, **TEST)
        batches = train.batches(9)
        average = weighted(states[-found.best.count :], uniform(found.best.count))
        assert found.best_checkpoint is not None
        others = {
            "last checkpoint": states[-1],
            "best checkpoint": states[int(found.best_checkpoint.newest[5])],
        }
        mine = naive_metrics(train.Net(), refreshed(train, average), batches)
        assert [(each.against, each.metric) for each in found.test] == [
            (against, metric)
            for against in others
            if against == "last checkpoint" or found.best_checkpoint != found.last_checkpoint
            for metric in ("loss", "accuracy")
        ]
        for each in found.test:
            theirs = naive_metrics(train.Net(), others[each.against], batches)[each.metric]
            assert each.average == pytest.approx(mine[each.metric], rel=1e-5)
            assert each.other == pytest.approx(theirs, rel=1e-5)
            difference = each.difference
            assert difference.value == pytest.approx(mine[each.metric] - theirs, abs=1e-6)
            assert difference.low <= difference.value <= difference.high
            assert (difference.units, each.unit) == (83, "example")

    def test_of_one_state_dict_in_a_training_checkpoint_is_of_that_one(self, train, states):
        Path("whole").mkdir()
        for epoch, state in enumerate(states):
            both = {"state_dict": states[0], "ema": state, "epoch": epoch}
            torch.save(both, f"whole/epoch_{epoch}.pt")
        found = swept("whole", key="ema", output="best.pt", container="last", **TEST)
        written = torch.load("best.pt", weights_only=True)["ema"]
        value = naive_metrics(train.Net(), written, train.batches(9))["loss"]
        assert found.test[0].average == pytest.approx(value, rel=1e-5)

    @pytest.mark.parametrize("output", [None, OUT])
    def test_evaluates_each_once(self, output):
        Path("own.py").write_text(
            "import train\n"
            "calls = []\n"
            "def batches():\n"
            "    calls.append(1)\n"
            "    return train.batches(9)\n"
        )
        found = swept(test_loader="own.py:batches", output=output)
        from own import calls  # type: ignore[import-not-found]

        assert len(calls) == 1 + len(found.baselines)

    def test_the_best_is_chosen_by_an_entry_of_what_a_function_returns(self):
        Path("own.py").write_text(
            "def measure(model, batches):\n"
            "    rows = [(int((model(x).argmax(1) == y).sum()), len(y)) for x, y in batches]\n"
            "    hits, all_of_them = map(sum, zip(*rows))\n"
            "    return {'constant': 1.0, 'top.accuracy': hits / all_of_them}\n"
        )
        found = swept(metric="own.py:measure:top.accuracy")
        expected = swept(metric="accuracy")
        assert (found.metric, found.mode) == ("top.accuracy", "max")
        values = [row.metrics["accuracy"] for row in expected.averages]
        assert [row.metrics["top.accuracy"] for row in found.averages] == pytest.approx(values)
        assert found.best.newest == expected.best.newest
        assert found.best.count == expected.best.count

    def test_a_function_is_drawn_again_by_batch(self):
        Path("own.py").write_text(
            "def loss(model, batches):\n"
            "    found = [float((model(x).argmax(1) != y).float().mean()) for x, y in batches]\n"
            "    return sum(found) / len(found)\n"
        )
        found = swept(
            metric="own.py:loss", test_loader="train.py:batches", test_loader_args={"size": 7}
        )
        assert {(each.difference.units, each.unit) for each in found.test} == {(12, "batch")}

    def test_a_function_that_takes_no_single_batch_has_no_interval(self, notices):
        Path("own.py").write_text(
            "def loss(model, batches):\n"
            "    assert len(batches) > 1, 'too few'\n"
            "    return float(sum((model(x).argmax(1) != y).float().mean() for x, y in batches))\n"
        )
        found = swept(metric="own.py:loss", **TEST)
        assert "no interval: the metric cannot be computed for one batch: too few" in notices.text
        assert {each.verdict for each in found.test} == {"no interval"}

    def test_with_few_batches_there_is_no_interval_and_it_says_so(self):
        Path("own.py").write_text(
            "def loss(model, batches):\n"
            "    found = [float((model(x).argmax(1) != y).float().mean()) for x, y in batches]\n"
            "    return sum(found) / len(found)\n"
        )
        test = ("--test-loader", "train.py:batches", "--test-loader-arg", "size=28")
        said = run("sweep", "run", *WORDS, "--metric", "own.py:loss", *test).stdout
        assert "on the test loader (3 batches), no interval: fewer than 10 batches:" in said
        assert "nan" not in said
        assert "told apart" not in said


class TestResuming:
    def test_goes_on_from_what_is_there(self):
        Path("own.py").write_text(
            "calls = []\n"
            "def loss(model, batches):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 5:\n"
            "        raise KeyboardInterrupt\n"
            "    return float(sum((model(x).argmax(1) != y).float().mean() for x, y in batches))\n"
        )
        with pytest.raises(KeyboardInterrupt):
            swept(metric="own.py:loss", journal="kept")
        from own import calls

        found = swept(metric="own.py:loss", journal="kept")
        assert len(calls) == 5 + 9 - 4
        assert swept(metric="own.py:loss").averages == found.averages
        more = swept(metric="own.py:loss", journal="kept", last=(2, 3, 4, None), output=OUT)
        assert len(calls) == 10 + 9 + 1
        assert more.checkpoints == found.checkpoints
        with pytest.raises(OutputError, match="has points of other checkpoints, options or code"):
            swept(metric="loss", journal="kept")

    @pytest.mark.parametrize(
        "other", [{"loader": "train.py:shuffled"}, {"loader_args": {"size": 5}}, {"tol": 0.1}]
    )
    def test_another_refresh_is_another_sweep(self, other):
        swept(journal="kept")
        with pytest.raises(OutputError, match="has points of other checkpoints, options or code"):
            swept(journal="kept", refresh=replace(REFRESH, **other))

    def test_other_weights_under_the_same_names_are_evaluated_anew(self, states):
        first = swept(journal="kept")
        states[5]["head.bias"][0] += 1
        save_run(Path("run"), states, "pt")
        second = swept(journal="kept")
        assert first.checkpoints[:5] == second.checkpoints[:5]
        assert first.checkpoints[5] != second.checkpoints[5]
        assert not {row.metrics["loss"] for row in first.averages} & {
            row.metrics["loss"] for row in second.averages
        }


WORDS = ("--model", "train.py:Net", "--loader", "train.py:batches", "--device", "cpu", "--metric",
         "loss", "--refresh-loader", "train.py:training", "--last", "2,4,all")  # fmt: skip


class TestCommand:
    def test_prints_the_table_with_the_best_marked(self):
        result = run("sweep", "run", *WORDS, "--weights", "uniform,ema:0.9",
                     *TEST_WORDS, "-o", OUT)  # fmt: skip
        lines = result.stdout.splitlines()
        found = swept(weights="uniform,ema:0.9")
        assert lines[0].split() == ["average", "last", "checkpoints", "loss"]
        for line, row in zip(lines[1:7], found.averages, strict=True):
            last = "all" if row.last is None else str(row.last)
            star = ["*"] if row == found.best else []
            value = f"{row.metrics['loss']:.5g}"
            span = [f"{row.count}:", row.oldest, "to", row.newest]
            assert line.split() == [row.scheme, last, *span, value, *star]
        assert lines[7].split()[:3] == ["last", "checkpoint", "step_5.pt"]
        assert (
            "best of 6 averages by loss, which was measured on the data that chose it"
            in result.stdout
        )
        assert "on the test loader (83 examples), with 95 % intervals:" in result.stdout
        assert "of their norm apart" in result.stdout
        assert "  wrote best.safetensors (" in result.stdout

    def test_json_csv_and_plot(self):
        result = run("sweep", "run", *WORDS, "--json", "--csv", "t.csv", "--plot", "p.svg")
        document = json.loads(result.stdout)
        found = swept()
        assert document["best"]["count"] == found.best.count
        assert [each["loss"] for each in document["checkpoints"]] == [
            row.metrics["loss"] for row in found.checkpoints
        ]
        rows = [*csv.DictReader(Path("t.csv").read_text().splitlines())]
        assert [float(row["loss"]) for row in rows] == [
            row.metrics["loss"] for row in (*found.averages, *found.checkpoints)
        ]
        assert {row["kind"] for row in rows} == {"average", "checkpoint"}
        picture = Path("p.svg").read_text()
        assert picture.startswith("<?xml")
        for text in (1, 2, 4, 6, "uniform", "best of 3"):  # 1 is the last checkpoint by itself
            assert f"<!-- {text} -->" in picture
        assert sorted(os.listdir()) == ["p.svg", "run", "t.csv", "train.py"]

    def test_a_metric_that_an_average_does_not_have_is_empty_in_csv(self, states):
        states[1]["conv.bias"][0] = torch.nan
        save_run(Path("run"), states, "pt")
        words = [word for word in WORDS if word not in ("--metric", "loss")]
        run("sweep", "run", *words, "--last", "all,2", "--csv", "t.csv")
        first, second, *_ = csv.DictReader(Path("t.csv").read_text().splitlines())
        assert (first["count"], first["loss"], first["accuracy"]) == ("6", "nan", "")
        assert float(second["accuracy"]) > 0

    @pytest.mark.parametrize(
        ("more", "code", "message"),
        [
            (("--last", "0"), 2, "neither a positive number"),
            (("--plot", "x.txt"), 2, "does not end with .png"),
            (("--test-loader-arg", "a=1"), 2, "no effect without --test-loader"),
        ],
    )
    def test_refuses_wrong_usage(self, more, code, message):
        assert message in run("sweep", "run", *WORDS, *more, code=code).output

    def test_of_a_metric_whose_mode_is_not_certain(self, train):
        with pytest.raises(SelectionError, match=r"whether right should be low or high .*`mode`"):
            swept(metric="train.py:right")
        assert train.MADE == []

    def test_a_test_loader_that_is_not_there_is_said_before_anything_is_evaluated(self, train):
        with pytest.raises(CkptAvgError, match="valid"):
            swept(test_loader="train.py:valid")
        assert train.MADE == []

    def test_of_the_same_batches_as_test_data(self):
        with pytest.raises(RefreshError, match="`loader` and `test_loader` are the same batches"):
            swept(test_loader="train.py:batches")

    def test_without_a_refresh_it_says_what_is_needed(self, train):
        with pytest.raises(SelectionError, match=r"stale.*`refresh_loader`"):
            swept(refresh=None)
        assert train.MADE == []

    def test_several_metrics_of_which_none_is_named(self):
        Path("own.py").write_text("def loss(*_):\n    return {'a': 1.0, 'b': 2.0}\n")
        message = r"loss is none of the metrics that were returned: a, b; .*`metric` own.py:loss:a"
        with pytest.raises(CkptAvgError, match=message):
            swept(metric="own.py:loss")

    def test_a_function_that_may_return_several_is_told_how_to_name_one(self, train):
        with pytest.raises(SelectionError, match=r"dict, name the entry .*train\.py:right:NAME"):
            swept(metric="train.py:right")
        assert train.MADE == []


def test_processes_share_the_evaluations(tmp_path):
    """Each of two does half, and both have it all."""
    Path("own.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "def loss(model, batches):\n"
        "    with Path('log-' + os.environ.get('RANK', '0')).open('a') as log:\n"
        "        log.write('x')\n"
        "    return float(sum((model(x).argmax(1) != y).float().mean() for x, y in batches))\n"
    )
    words = ("sweep", "run", *WORDS, "--metric", "own.py:loss", "--weights", "uniform,linear")
    more = ("-o", OUT, "--json", *TEST_WORDS, "--journal", "kept")
    job = Job([command(*words, *more)] * 2, tmp_path)
    [(text, _), (other, _)] = job.finish(0, 0)
    assert other == ""
    document = json.loads(text)
    assert [len(Path(f"log-{rank}").read_text()) >= 6 for rank in range(2)] == [True, True]
    found = swept(metric="own.py:loss", weights="uniform,linear")
    assert [row["loss"] for row in document["averages"]] == pytest.approx(
        [row.metrics["loss"] for row in found.averages]
    )
    assert ckptavg.verify(OUT, ["run"]).compared > 0
    assert len(document["test"]) == len(found.baselines)


def test_notices_come_once(notices, caplog):
    swept()
    texts = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert len(texts) == len(set(texts))


def test_an_error_of_the_users_code_is_one(states):
    Path("own.py").write_text("def loss(*_):\n    raise ZeroDivisionError\n")
    with pytest.raises(UserCodeError):
        swept(metric="own.py:loss")
