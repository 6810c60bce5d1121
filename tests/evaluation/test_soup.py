"""The greedy soup, held against the recipe written down naively with state dicts in memory."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptavg
from ckptavg import Selection
from ckptavg.batchnorm.options import RefreshOptions
from ckptavg.errors import CkptAvgError, OutputError, SelectionError, UserCodeError, ValueRangeError
from ckptavg.evaluation.evaluate import evaluate
from ckptavg.evaluation.soup import Soup, soup
from ckptavg.formats import open_checkpoint
from tests.held_out import naive_average, naive_greedy, naive_metrics, save_trained
from tests.helpers import run
from tests.oracle import same_bits, save_run

OUT = Path("soup.safetensors")


@pytest.fixture(autouse=True)
def states(train):
    return save_trained(Path("run"), count=6)


def options(metric="loss", loader="train.py:batches", **others) -> dict[str, Any]:
    model = others.pop("model", "train.py:Net")
    return dict(model=model, loader=loader, metric=metric, device="cpu", **others)


def made(metric="loss", output=OUT, folder="run", **others) -> Soup:
    return soup([Path(folder)], output, **options(metric), **others)


def kept(found: Soup) -> list[int]:
    """The places in the training of those that stayed."""
    return sorted(int(one.checkpoint[5:-3]) for one in found.steps if one.kept)


def assert_is_mean(path, states) -> None:
    found = load_file(path)
    expected = naive_average(states)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert same_bits(found[name], value), name


def no_litter() -> bool:
    return not [name for name in os.listdir() if name.startswith(".ckptavg")]


class TestRecipe:
    @pytest.mark.parametrize("kind", ["Net", "Linear"])
    @pytest.mark.parametrize("metric", ["loss", "accuracy"])
    def test_keeps_and_writes_what_the_naive_one_does(self, kind, metric, train):
        """Low is good for the one, high for the other."""
        states = save_trained(Path("run"), kind, count=6)
        model, batches = getattr(train, kind)(), train.batches()
        expected = naive_greedy(
            states,
            lambda state: naive_metrics(model, state, batches)[metric],
            high=metric == "accuracy",
        )
        found = soup([Path("run")], OUT, **options(metric, model=f"train.py:{kind}"))
        assert kept(found) == expected
        assert len(expected) < len(states)
        members = [states[place] for place in expected]
        assert_is_mean(OUT, members)
        value = naive_metrics(model, naive_average(members), batches)[metric]
        assert found.value == pytest.approx(value, rel=1e-6)
        uniform = naive_metrics(model, naive_average(states), batches)[metric]
        assert found.uniform == pytest.approx(uniform, rel=1e-6)
        assert no_litter()

    def test_leaves_the_random_numbers_alone(self):
        state = torch.get_rng_state()
        made()
        assert torch.equal(torch.get_rng_state(), state)

    def test_tells_of_each_step_best_first(self, train, states):
        found = made()
        model, batches = train.Net(), train.batches()
        alone = [naive_metrics(model, state, batches)["loss"] for state in states]
        places = [int(step.checkpoint[5:-3]) for step in found.steps]
        assert places == sorted(range(6), key=lambda place: alone[place])
        members: list[int] = []
        best = math.inf
        for place, step in zip(places, found.steps, strict=True):
            trial = naive_average([states[one] for one in sorted([*members, place])])
            assert step.alone == pytest.approx(alone[place], rel=1e-6)
            assert step.soup == pytest.approx(naive_metrics(model, trial, batches)["loss"], 1e-6)
            assert step.kept == (step.soup <= best)
            if step.kept:
                members, best = [*members, place], step.soup
        assert {step.kept for step in found.steps} == {True, False}
        assert (found.metric, found.mode, found.value) == ("loss", "min", best)

    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_keeps_ties(self, mode, states):
        """It does not get worse."""
        found = made("train.py:constant_score", mode=mode)
        assert kept(found) == list(range(6))
        assert (found.value, found.uniform) == (1.0, 1.0)
        assert found.steps[0].checkpoint == "step_5.pt"  # of equals the later one
        assert_is_mean(OUT, states)

    def test_keeps_one_alone_if_no_other_helps(self, states, caplog):
        """A function that knows the checkpoint by its bias: what is mixed is worse."""
        Path("own.py").write_text(
            "import torch\n"
            "known = torch.load('run/step_2.pt')['head.bias']\n"
            "def distance(model, batches):\n"
            "    return float((model.head.bias - known).abs().sum())\n"
        )
        caplog.set_level(logging.INFO, "ckptavg")
        assert kept(made("own.py:distance", mode="min")) == [2]
        assert_is_mean(OUT, [states[2]])
        assert sum("only one checkpoint" in text for text in caplog.messages) == 1

    def test_takes_the_mode_that_is_given(self, train, states):
        """The worst by loss is the best where high is good."""
        model, batches = train.Net(), train.batches()
        expected = naive_greedy(
            states, lambda state: naive_metrics(model, state, batches)["loss"], high=True
        )
        assert kept(made(mode="max")) == expected

    def test_makes_one_model(self, train):
        made()
        assert len(train.MADE) == 1

    def test_chooses_among_what_the_rules_leave(self):
        found = made("train.py:constant_score", mode="max", select=Selection(last=4, every=2))
        assert kept(found) == [3, 5]

    def test_of_one_candidate_is_that(self, states):
        found = made(folder="run/step_3.pt")
        assert (found.value, len(found.steps)) == (found.uniform, 1)
        assert_is_mean(OUT, [states[3]])


class TestTensorsByName:
    """Buffers that only some checkpoints have, and a head that differs in its shape."""

    @pytest.fixture
    def unlike(self, states):
        for step in (0, 2):
            state = {**states[step], "inv_freq": torch.arange(4.0) + step}
            torch.save(state, f"run/step_{step}.pt")
        return states

    def test_that_are_skipped_may_be_in_some(self, unlike):
        with pytest.raises(CkptAvgError, match=r"inv_freq: missing in .* `skip` 'inv_freq\$'"):
            made()
        found = made(skip=["inv_freq$"])
        assert_is_mean(OUT, [unlike[place] for place in kept(found)])
        state = load_file(OUT)
        assert ckptavg.verify(OUT, ["run"]).compared == len(state)
        with pytest.raises(SelectionError, match="`skip` 'nope' matches no tensor's name"):
            made(skip=["nope"], force=True)

    def test_that_are_taken_from_the_last_are_its_own(self, states):
        found = made(take_last="head")
        places = kept(found)
        assert len(places) > 1
        state = load_file(OUT)
        assert same_bits(state["head.weight"], states[places[-1]]["head.weight"])
        wanted = naive_average([states[place] for place in places])
        others = [name for name in state if "head" not in name]
        assert all(same_bits(state[name], wanted[name]) for name in others)
        ckptavg.verify(OUT, ["run"])

    @pytest.mark.usefixtures("unlike")
    def test_by_the_command(self):
        specs = ("--model", "train.py:Net", "--loader", "train.py:batches", "--metric", "loss")
        named = ("--skip", "inv_freq$", "--take-last", "^head")
        run("soup", "run", "-o", OUT, *specs, "--device", "cpu", *named)
        assert "inv_freq" not in load_file(OUT)


class TestNaN:
    def test_is_never_kept(self, train, states):
        states[3]["bn.weight"][0] = torch.nan
        save_run(Path("run"), states, "pt")
        found = made()
        rest = [state for place, state in enumerate(states) if place != 3]
        model, batches = train.Net(), train.batches()
        expected = naive_greedy(
            rest, lambda state: naive_metrics(model, state, batches)["loss"], high=False
        )
        assert kept(found) == [place + (place >= 3) for place in expected]
        last = found.steps[-1]
        assert (last.checkpoint, last.kept) == ("step_3.pt", False)
        assert math.isnan(last.alone)
        assert math.isnan(last.soup)
        assert math.isnan(found.uniform)

    def test_of_a_soup_alone_leaves_the_candidate_out(self):
        Path("own.py").write_text(
            "calls = []\n"
            "def score(model, batches):\n"
            "    calls.append(1)\n"
            "    return float('nan') if len(calls) in (7, 9) else 1.0\n"
        )
        found = made("own.py:score", mode="max")
        assert [step.kept for step in found.steps] == [True, False, True, False, True, True]

    def test_in_all_is_an_error(self, states):
        for state in states:
            state["head.bias"][0] = torch.nan
        save_run(Path("run"), states, "pt")
        with pytest.raises(SelectionError, match="loss is not finite for any of 6"):
            made()
        assert not OUT.exists()
        assert no_litter()

    def test_in_the_weights_of_a_member_is_an_error(self, states):
        """A function may not see it, but the average would have it."""
        states[0]["conv.bias"][0] = torch.nan
        save_run(Path("run"), states, "pt")
        with pytest.raises(ValueRangeError, match=r"step_0\.pt: conv\.bias"):
            made("train.py:constant_score", mode="max")
        assert not OUT.exists()
        assert no_litter()


class TestMetricsFile:
    def test_spares_the_evaluations_of_the_candidates(self):
        Path("own.py").write_text(
            "from train import CALLS, right\n"
            "def accuracy(model, batches):\n"
            "    CALLS.append(1)\n"
            "    return right(model, batches) / 83\n"
        )
        table = {
            one.checkpoint: one.metrics["accuracy"]
            for one in evaluate([Path("run")], **options("own.py:accuracy"))
        }
        Path("values.json").write_text(json.dumps(table))
        from train import CALLS  # type: ignore[import-not-found]

        CALLS.clear()
        plain = made("own.py:accuracy")
        first = len(CALLS)
        CALLS.clear()
        found = made("own.py:accuracy", metrics=Path("values.json"), force=True)
        assert first == 6 + 5 + 1
        assert len(CALLS) == 1 + 5 + 1
        assert (found.steps, found.value) == (plain.steps, plain.value)

    def test_decides_the_order(self):
        Path("values.csv").write_text(
            "name,loss\n" + "".join(f"step_{place}.pt,{place}\n" for place in range(5))
        )
        found = made(metrics=Path("values.csv"))
        assert [step.checkpoint for step in found.steps] == [f"step_{i}.pt" for i in range(6)]
        assert [step.alone for step in found.steps[:5]] == [0, 1, 2, 3, 4]
        last = found.steps[5]  # which the file lacks
        assert math.isnan(last.alone)
        assert not last.kept

    def test_holds_trials_against_what_was_measured_alike(self, train, states):
        """The file says 99 % of the first one, as no other code here would."""
        Path("values.json").write_text(
            json.dumps({f"step_{i}.pt": 0.99 - 0.01 * i for i in range(6)})
        )
        found = made("accuracy", metrics=Path("values.json"))
        own = naive_metrics(train.Net(), states[0], train.batches())["accuracy"]
        assert found.steps[0].alone == 0.99
        assert found.steps[0].soup == own

    def test_without_any_of_them_is_an_error(self):
        Path("values.json").write_text('{"other.pt": 1.0}')
        with pytest.raises(SelectionError, match="none of the checkpoints has the metric loss"):
            made(metrics=Path("values.json"))


class TestRefresh:
    def test_is_of_every_trial_and_of_the_output(self, train, states):
        model, batches = train.Net(), train.batches()

        def refreshed(state):
            model.load_state_dict(state)
            ckptavg.refresh_norm(model, train.training())
            return {name: value.clone() for name, value in model.state_dict().items()}

        expected = naive_greedy(
            states,
            lambda state: naive_metrics(model, refreshed(state), batches)["loss"],
            high=False,
        )
        refresh = RefreshOptions(model="train.py:Net", loader="train.py:training", device="cpu")
        found = soup([Path("run")], OUT, **options(refresh=refresh))
        assert kept(found) == expected
        assert kept(found) != kept(made(output=Path("stale.safetensors")))
        state = refreshed(naive_average([states[place] for place in expected]))
        for name, value in load_file(OUT).items():
            assert same_bits(value, state[name]), name
        assert found.refresh is not None
        assert found.refresh.batches == 5
        assert found.summary.norm_stats == "refreshed"
        assert found.summary.output == str(OUT)
        assert found.summary.bytes_written == OUT.stat().st_size
        assert no_litter()

    def test_makes_the_very_file_that_was_evaluated(self):
        """Shuffled data: the refresh of the output draws them as that of the trial did."""
        Path("own.py").write_text("import torch\ntorch.rand(3)\nfrom train import Net\n")
        refresh = RefreshOptions(model="own.py:Net", loader="train.py:shuffled", device="cpu")
        found = soup([Path("run")], OUT, **options(model="own.py:Net", refresh=refresh))
        [again] = evaluate([OUT], **options())
        assert again.metrics == {"loss": found.value}

    def test_may_make_a_torch_file(self, states):
        refresh = RefreshOptions(model="train.py:Net", loader="train.py:training", device="cpu")
        soup([Path("run")], Path("soup.pt"), **options(refresh=refresh))
        [again] = evaluate([Path("soup.pt")], **options())
        assert sorted(torch.load("soup.pt", weights_only=True)) == sorted(states[0])
        assert math.isfinite(again.metrics["loss"])


class TestOutput:
    def test_says_what_it_is_made_of(self):
        found = made()
        entry = open_checkpoint(OUT).provenance
        assert entry is not None
        assert entry["scheme"] == found.summary.scheme == "greedy soup"
        names = [f"step_{place}.pt" for place in kept(found)]
        assert [source["name"] for source in entry["sources"]] == names
        assert [source["weight"] for source in entry["sources"]] == [1] * len(names)
        assert entry["divisor"] == len(names)
        assert entry["norm_stats"] == {"state": "stale"}

    def test_is_refused_where_there_is_one_before_anything_is_evaluated(self, train, states):
        OUT.write_text("mine")
        with pytest.raises(OutputError, match="exists already"):
            made()
        assert OUT.read_text() == "mine"
        assert train.MADE == []
        made(force=True)
        assert len(load_file(OUT)) == len(states[0])

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("soup.txt", "is not that of a format"),
            ("no/soup.pt", "there is no directory"),
            ("run/step_2.pt", "is itself one of the checkpoints"),
        ],
    )
    def test_that_cannot_be_is_found_out_before_anything_is_evaluated(self, output, message, train):
        before = Path("run/step_2.pt").read_bytes()
        with pytest.raises(OutputError, match=message):
            made(output=output, force=True)
        assert train.MADE == []
        assert Path("run/step_2.pt").read_bytes() == before
        assert no_litter()

    def test_in_the_directory_of_the_checkpoints_is_no_candidate_the_next_time(self):
        first = made(output=Path("run/soup.safetensors"))
        again = made(output=Path("run/soup.safetensors"), force=True)
        assert first.steps == again.steps
        assert sorted(os.listdir("run")) == [
            "soup.safetensors",
            *(f"step_{i}.pt" for i in range(6)),
        ]

    def test_is_the_same_every_time(self):
        made()
        first = OUT.read_bytes()
        made(force=True)
        assert OUT.read_bytes() == first

    @pytest.mark.parametrize("error", ["ZeroDivisionError", "KeyboardInterrupt"])
    def test_is_not_there_after_a_failure_and_nor_is_anything_else(self, error):
        Path("own.py").write_text(
            "import os\n"
            "calls, seen = [], []\n"
            "def score(model, batches):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 9:\n"
            "        [folder] = [name for name in os.listdir() if name.startswith('.ckptavg')]\n"
            "        seen.extend(os.listdir(folder))\n"
            f"        raise {error}\n"
            "    return 1.0\n"
        )
        with pytest.raises((UserCodeError, KeyboardInterrupt)):
            made("own.py:score", mode="max")
        from own import seen  # type: ignore[import-not-found]

        assert len(seen) == 1  # never more than one trial
        assert not OUT.exists()
        assert no_litter()


class TestRefusals:
    def test_of_a_metric_whose_mode_is_not_certain(self, train):
        with pytest.raises(SelectionError, match=r"whether right should be low or high .*`mode`"):
            made("train.py:right")
        assert train.MADE == []

    def test_of_several_metrics(self):
        Path("own.py").write_text("def loss(*_):\n    return {'a': 1.0, 'b': 2.0}\n")
        message = r"loss is none of the metrics that were returned: a, b; .*`metric` own.py:loss:a"
        with pytest.raises(CkptAvgError, match=message):
            made("own.py:loss")

    def test_without_a_metric_the_loss_counts(self):
        assert made(None).value == made("loss", output=Path("by_loss.safetensors")).value

    def test_of_checkpoints_of_two_models_come_before_anything_is_evaluated(self, train, states):
        torch.save({**states[0], "more": torch.zeros(3)}, "run/step_9.pt")
        with pytest.raises(CkptAvgError, match="do not have the same tensors"):
            made()
        assert train.MADE == []

    def test_of_an_empty_loader(self):
        Path("own.py").write_text("empty = []\n")
        with pytest.raises(CkptAvgError, match="returned no examples"):
            soup([Path("run")], OUT, **options(loader="own.py:empty"))
        assert not OUT.exists()
        assert no_litter()


COMMON = ("--model", "train.py:Net", "--loader", "train.py:batches", "--device", "cpu")


class TestCommand:
    def test_prints_a_table_of_the_steps_and_the_uniform_average(self):
        lines = run("soup", "run", "-o", OUT, *COMMON, "--metric", "loss").stdout.splitlines()
        found = made(output=Path("other.safetensors"))
        assert lines[0].split("  ")[0] == "checkpoint"
        assert "loss of the soup with it" in lines[0]
        for line, step in zip(lines[1:7], found.steps, strict=True):
            assert line.split() == [
                step.checkpoint,
                f"{step.alone:.5g}",
                f"{step.soup:.5g}",
                "yes" if step.kept else "no",
            ]
        assert lines[7] == f"kept {len(kept(found))} of 6 checkpoints: loss {found.value:.5g}"
        assert lines[8] == f"  uniform average of all: loss {found.uniform:.5g}"
        assert lines[9].startswith("  wrote soup.safetensors (")

    def test_json_has_it_all(self, states):
        states[5]["head.bias"][0] = torch.nan
        save_run(Path("run"), states, "pt")
        result = run("soup", "run", "-o", OUT, *COMMON, "--metric", "loss", "--json")
        document = json.loads(result.stdout)
        found = made(output=Path("other.safetensors"))
        assert document["value"] == found.value
        assert document["uniform"] is None
        assert (document["metric"], document["mode"]) == ("loss", "min")
        steps = document["steps"]
        assert [one["kept"] for one in steps] == [one.kept for one in found.steps]
        assert steps[-1] == {
            "checkpoint": "step_5.pt",
            "path": "run/step_5.pt",
            "alone": None,
            "soup": None,
            "kept": False,
        }
        assert document["summary"]["scheme"] == "greedy soup"
        assert document["refresh"] is None

    def test_takes_the_rules_and_every_option(self):
        Path("values.json").write_text(
            run("evaluate", "run", *COMMON, "--json", "--metric", "accuracy").stdout
        )
        OUT.write_text("old")
        result = run(
            *(
                "soup",
                "run",
                "-o",
                OUT,
                *COMMON,
                "--metric",
                "accuracy",
                "--metrics",
                "values.json",
            ),
            *("--mode", "max", "--force", "--no-fsync", "-j", 1, "--seed", 1, "--last", 3),
            *("--refresh-loader", "train.py:training", "--estimator", "exact"),
        )
        lines = result.stdout.splitlines()
        assert len(lines) == 10
        assert "of 3 checkpoints: accuracy" in lines[4]
        assert lines[6].startswith("refreshed 1 norm layer with 5 batches")

    def test_takes_the_mode_and_the_metrics_that_are_given(self):
        Path("values.json").write_text(json.dumps({f"step_{i}.pt": i + 100 for i in range(6)}))
        given = ("--metric", "train.py:constant_score", "--metrics", "values.json")
        result = run("soup", "run", "-o", OUT, *COMMON, *given, "--mode", "min", "--json")
        document = json.loads(result.stdout)
        assert document["mode"] == "min"
        assert [step["alone"] for step in document["steps"]] == [100, 101, 102, 103, 104, 105]

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (COMMON, 2, "Missing option '--metric'"),
            ((*COMMON, "--metric", "f1"), 2, "not of the form"),
            (("--metric", "loss"), 2, "Missing option '--model'"),
            ((*COMMON, "--metric", "loss", "--metrics", "none.csv"), 2, "does not exist"),
        ],
    )
    def test_refuses_wrong_usage(self, arguments, code, message):
        assert message in run("soup", "run", "-o", OUT, *arguments, code=code).output
        assert not OUT.exists()
