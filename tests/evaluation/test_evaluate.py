"""Checkpoints are evaluated one after the other, each as if it were alone."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import ckptavg
from ckptavg import Selection
from ckptavg.batchnorm.options import RefreshOptions
from ckptavg.errors import CkptAvgError, MismatchError, SelectionError, UserCodeError
from ckptavg.evaluation.evaluate import Evaluation, evaluate, winners
from ckptavg.select.metrics import read_metrics
from tests.held_out import naive_metrics, save_trained, trained
from tests.helpers import run
from tests.oracle import naive_mean, save_run


@pytest.fixture(autouse=True)
def states(train):
    return save_trained(Path("run"))


def options(model="train.py:Net", loader="train.py:batches", **others) -> dict[str, Any]:
    return dict(model=model, loader=loader, device="cpu", **others)


def refresh(loader="train.py:training", **others) -> RefreshOptions:
    return RefreshOptions(model="train.py:Net", loader=loader, device="cpu", **others)


def metrics(path="run", made: dict[str, Any] | None = None, **others) -> list[dict[str, float]]:
    found = evaluate([Path(path)], **(made or options(**others)))
    return [dict(one.metrics) for one in found]


class TestValues:
    @pytest.mark.parametrize("kind", ["Net", "Linear"])
    def test_are_those_of_a_plain_loop_over_examples(self, kind, train):
        """83 examples in batches of 16: the last one has 3."""
        states = save_trained(Path("run"), kind)
        found = metrics(model=f"train.py:{kind}")
        for state, one in zip(states, found, strict=True):
            expected = naive_metrics(getattr(train, kind)(), state, train.batches())
            assert one == pytest.approx(expected, rel=1e-6)
        assert len({one["loss"] for one in found}) == len(states)

    def test_do_not_depend_on_how_the_data_are_batched(self):
        whole = metrics(loader_args={"size": 83})
        ragged = metrics(loader_args={"size": 41})  # 41, 41 and 1
        assert [one["accuracy"] for one in ragged] == [one["accuracy"] for one in whole]
        losses = [one["loss"] for one in ragged]
        assert losses == pytest.approx([one["loss"] for one in whole], rel=1e-6)

    def test_of_dense_outputs_count_every_target_but_those_to_be_ignored(self, train):
        model = train.Dense()
        torch.save(model.state_dict(), "dense.pt")
        [found] = metrics("dense.pt", model="train.py:Dense", loader="train.py:dense")
        images, classes = (torch.cat(list(part)) for part in zip(*train.dense(), strict=True))
        with torch.no_grad():
            outputs = model(images)
        counted = classes != -100
        assert found["loss"] == pytest.approx(float(cross_entropy(outputs, classes)), rel=1e-6)
        hits = (outputs.argmax(1) == classes)[counted].double().mean()
        assert found["accuracy"] == pytest.approx(float(hits), abs=1e-12)

    def test_of_one_metric_are_of_that_alone(self):
        both = metrics()
        for name in ("loss", "accuracy"):
            assert metrics(metric=name) == [{name: one[name]} for one in both]

    def test_of_nan_outputs_are_nan(self, states):
        states[1]["head.bias"][2] = torch.nan
        save_run(Path("run"), states, "pt")
        found = metrics()
        assert math.isnan(found[1]["loss"])
        assert math.isnan(found[1]["accuracy"])
        assert all(math.isfinite(value) for value in found[2].values())

    def test_of_half_precision_outputs_are_computed_in_single(self, train, states):
        Path("half.py").write_text(
            "from train import Net\n"
            "def make():\n    return Net().bfloat16()\n"
            "def forward(model, batch):\n    return model(batch[0].bfloat16())\n"
        )
        made = options(model="half.py:make", forward="half.py:forward")
        model = train.Net().bfloat16()
        model.load_state_dict(states[0])
        model.eval()
        with torch.no_grad():
            outputs = [model(images.bfloat16()).float() for images, _ in train.batches()]
        classes = torch.cat([labels for _, labels in train.batches()])
        expected = float(cross_entropy(torch.cat(outputs), classes))
        assert metrics("run/step_0.pt", made)[0]["loss"] == pytest.approx(expected, rel=1e-6)

    def test_of_a_function_are_what_it_returns_for_the_model_in_eval_mode(self, train, states):
        found = metrics(metric="train.py:right")
        expected = [
            naive_metrics(train.Net(), state, train.batches())["accuracy"] * 83 for state in states
        ]
        assert [one["right"] for one in found] == pytest.approx(expected)

    def test_of_a_function_may_be_several(self):
        Path("own.py").write_text(
            "import numpy as np, torch\n"
            "def both(model, batches):\n"
            "    return {'a': np.float32(0.5), 'b/c': torch.tensor(2), 'd': float('inf')}\n"
        )
        assert metrics("run/step_0.pt", metric="own.py:both") == [
            {"a": 0.5, "b/c": 2.0, "d": math.inf}
        ]


class TestEachCheckpoint:
    def test_leaves_the_random_numbers_alone(self):
        state = torch.get_rng_state()
        metrics()
        assert torch.equal(torch.get_rng_state(), state)

    def test_comes_out_as_if_it_were_alone(self, states):
        """Whatever came before: norm statistics, buffers in no file, shuffled data, dropout."""
        Path("own.py").write_text(
            "def all_of_it(model, batches):\n"
            "    before = float(model.seen)\n"
            "    model.train()\n"
            "    noise = sum(float(model(x).sum()) for x, _ in batches)\n"
            "    model.bn.running_mean.fill_(9)\n"
            "    return {'noise': noise, 'seen': before, 'bn': float(model.bn.running_var.sum())}\n"
        )
        made = options(
            loader="train.py:shuffled",
            metric="own.py:all_of_it",
            refresh=refresh(estimator="exact"),
        )
        together = metrics("run", made)
        alone = [metrics(f"run/step_{step}.pt", made)[0] for step in range(len(states))]
        assert together == alone
        assert [one["seen"] for one in together] == [0.0] * len(states)
        assert len({one["noise"] for one in together}) == len(states)

    def test_is_merged_anew_by_a_model_that_merges_weights_for_eval_mode(self, train, states):
        """As LoRA layers do, which remember that they have."""
        Path("own.py").write_text(
            "from train import Net\n"
            "class Merging(Net):\n"
            "    merged = False\n"
            "    def train(self, mode=True):\n"
            "        if mode == self.merged:\n"
            "            self.head.bias.data += -1 if mode else 1\n"
            "            self.head.bias.data[0] += -5 if mode else 5\n"
            "        self.merged = not mode\n"
            "        return super().train(mode)\n"
        )
        found = metrics(model="own.py:Merging")
        for state, one in zip(states, found, strict=True):
            state["head.bias"][0] += 5
            assert one == pytest.approx(naive_metrics(train.Net(), state, train.batches()), 1e-5)

    def test_is_loaded_into_the_one_model_that_is_made(self, train):
        metrics()
        assert len(train.MADE) == 1

    def test_has_its_step_though_an_average_has_none(self):
        ckptavg.average("run", "swa.pt")
        for step in range(5):  # later ones have names that come first
            state = torch.load(f"run/step_{step}.pt")
            Path(f"run/step_{step}.pt").unlink()
            torch.save({"model": state, "step": step}, f"run/loss{9 - step}_step{step}.pt")
        found = evaluate(["swa.pt", "run"], **options())
        steps = [(one.checkpoint, one.step) for one in found]
        assert steps[0] == ("swa.pt", None)
        assert steps[1:] == [(f"run/loss{9 - step}_step{step}.pt", step) for step in range(5)]

    def test_stands_where_it_was_named_if_one_has_no_step(self, states):
        state = {name: naive_mean([each[name] for each in states[:2]]) for name in states[0]}
        torch.save(state, "an_average.pt")
        for number, name in enumerate(("b.ckpt", "c.ckpt")):
            torch.save({"state_dict": states[2 + number], "global_step": 10 * (1 - number)}, name)
        paths = [Path("b.ckpt"), Path("c.ckpt"), Path("an_average.pt")]
        for order in (paths, paths[::-1]):
            found = evaluate(order, **options())
            assert [one.checkpoint for one in found] == [path.name for path in order]
        found = evaluate(["an_average.pt", "run"], **options())
        assert [one.checkpoint for one in found][:2] == ["an_average.pt", "run/step_0.pt"]

    def test_stands_where_it_was_named_if_steps_are_equal(self, states):
        """Fine-tunes that were trained equally long."""
        names = ["small_lr.pt", "big_lr.pt", "no_decay.pt"]
        for name, state in zip(names, states, strict=False):
            torch.save({"state_dict": state, "global_step": 500}, name)
        for order in (names, names[::-1]):
            found = evaluate(order, **options(metric="loss"))
            assert [(one.checkpoint, one.step) for one in found] == [(name, 500) for name in order]

    def test_is_evaluated_in_the_order_of_training_and_named(self):
        paths = [Path("run/step_3.pt"), Path("run/step_0.pt")]
        found = evaluate(paths, **options(metric="loss"))
        assert [(one.checkpoint, one.path, one.step) for one in found] == [
            ("step_0.pt", "run/step_0.pt", 0),
            ("step_3.pt", "run/step_3.pt", 3),
        ]

    def test_is_chosen_by_the_rules(self):
        found = evaluate([Path("run")], **options(), select=Selection(last=3, every=2))
        assert [one.checkpoint for one in found] == ["step_2.pt", "step_4.pt"]

    def test_may_have_a_prefix_and_be_an_average_or_one_of_several_state_dicts(
        self, states, caplog
    ):
        save_file({f"module.{name}": v for name, v in states[0].items()}, "a_0.safetensors")
        torch.save({"ema": states[1], "model": states[0]}, "a_1.pt")
        ckptavg.average("run", "swa.safetensors")
        expected = metrics()
        caplog.clear()
        assert metrics("a_0.safetensors") == [expected[0]]
        found = evaluate([Path("a_1.pt")], **options(), key="ema")
        assert found[0].metrics == expected[1]
        assert len(metrics("swa.safetensors")) == 1

    def test_says_the_same_notice_once(self, states, caplog):
        save_run(Path("ddp"), [{f"net.{n}": v for n, v in s.items()} for s in states], "pt")
        caplog.set_level(logging.INFO, "ckptavg")
        assert metrics("ddp") == metrics("run")
        assert sum("matched the model's names" in text for text in caplog.messages) == 1

    def test_hears_of_progress(self):
        heard: list[tuple[int, int | None]] = []
        evaluate([Path("run")], **options(), progress=lambda done, all_: heard.append((done, all_)))
        assert heard == [(1, 5)] * 5


class TestRefresh:
    def test_comes_before_the_evaluation(self, train, states):
        made = options(refresh=refresh(estimator="exact"))
        for state, found in zip(states, metrics("run", made), strict=True):
            model = train.Net()
            model.load_state_dict(state)
            ckptavg.refresh_norm(model, train.training(), estimator="exact")
            expected = naive_metrics(train.Net(), model.state_dict(), train.batches())
            assert found == pytest.approx(expected, rel=1e-5)
        assert metrics("run", made) != metrics("run")

    def test_leaves_the_files_alone(self):
        before = Path("run/step_0.pt").read_bytes()
        metrics("run", options(refresh=refresh()))
        assert Path("run/step_0.pt").read_bytes() == before
        assert len(os.listdir("run")) == 5

    def test_has_limits_of_its_own(self, train, states):
        made = options(max_samples=80, refresh=refresh("train.py:endless", max_samples=48))
        model = train.Net()
        model.load_state_dict(states[0])
        ckptavg.refresh_norm(model, train.batches()[:3])
        expected = naive_metrics(train.Net(), model.state_dict(), train.batches()[:5])
        assert metrics("run/step_0.pt", made) == [pytest.approx(expected, rel=1e-5)]


class TestLimits:
    def test_end_an_endless_loader(self, train, states):
        found = metrics(loader="train.py:endless", max_samples=17)
        expected = naive_metrics(train.Net(), states[0], train.batches()[:2])
        assert found[0] == pytest.approx(expected, rel=1e-6)
        assert [one["right"] for one in metrics(metric="train.py:right", max_samples=17)] == [
            one["accuracy"] * 32 for one in found
        ]


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x = []", "returned no examples to evaluate"),
            ("x = batches()[0][0].split(9)", "neither \\(inputs, targets\\)"),
            ("x = [(a, b.float()) for a, b in batches()]", r"targets are \(16,\) and outputs"),
            ("x = [(a, b[:, None]) for a, b in batches()]", r"\(16, 1\) and outputs \(16, 4\)"),
            ("x = [(a, b + 1) for a, b in batches()]", "from 1 to 4, and the model has 4 classes"),
            ("x = [(a, b - 1) for a, b in batches()]", "from -1 to 2, and the model has 4"),
            ("x = [(a, b * 0 - 100) for a, b in batches()]", "returned no examples"),
            ("x = [{'images': a, 'labels': b} for a, b in batches()]", "yields a dict"),
            ("x = 3", "returns no batches"),
        ],
    )
    def test_of_a_loader_say_what_is_wrong_with_it(self, text, message):
        Path("own.py").write_text(f"from train import batches\n{text}\n")
        with pytest.raises(CkptAvgError, match=message):
            metrics(loader="own.py:x")

    def test_of_a_loader_that_is_used_up(self):
        with pytest.raises(CkptAvgError, match="can be iterated only once"):
            metrics(loader="train.py:once")

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("return None", "returned a NoneType, not a number"),
            ("return '0.5'", "returned a str, not"),
            ("return torch.zeros(3)", r"returned a Tensor of shape \(3,\), not"),
            ("return {'a': [1]}", "returned a list, not"),
            ("return {'path': 1.0}", "with the name 'path'"),
            ("return {3: 1.0}", "with the name 3"),
            (r"return {'\x1b[31m': 1.0}", r"with the name '\\x1b\[31m'"),
            (r"return {'\ud800': 1.0}", r"with the name '\\ud800'"),
            ("return {}", "returned a dict without metrics"),
        ],
    )
    def test_of_what_a_function_returns(self, body, message):
        Path("own.py").write_text(f"import torch\ndef fn(model, batches):\n    {body}\n")
        with pytest.raises(CkptAvgError, match=message):
            metrics(metric="own.py:fn")

    def test_of_a_metric_that_is_no_function(self):
        with pytest.raises(CkptAvgError, match="is a list, not a function"):
            metrics(metric="train.py:MADE")

    def test_of_another_model_list_the_differences(self):
        with pytest.raises(MismatchError, match=r"head\.weight: shape \(4, 72\) in the model"):
            metrics(model="train.py:Linear")

    def test_of_a_missing_buffer(self, states):
        del states[0]["bn.running_var"]
        torch.save(states[0], "run/step_0.pt")
        with pytest.raises(MismatchError, match=r"bn\.running_var: in the model, missing in"):
            metrics("run/step_0.pt")

    def test_of_one_that_does_not_fit_come_before_the_first_evaluation(self, states):
        del states[3]["bn.running_var"]
        torch.save(states[3], "run/step_3.pt")
        Path("own.py").write_text("def fn(model, batches):\n    raise ValueError\n")
        with pytest.raises(
            MismatchError, match=r"running_var: in the model, missing in run/step_3"
        ):
            metrics(metric="own.py:fn")

    def test_of_a_model_that_gives_no_scores(self):
        Path("own.py").write_text("def forward(model, batch):\n    return [model(batch[0])]\n")
        with pytest.raises(CkptAvgError, match="the model gave list, not one tensor"):
            metrics(forward="own.py:forward")

    def test_of_a_choice_without_any(self):
        with pytest.raises(SelectionError, match="no checkpoint is from number 99 on"):
            evaluate([Path("run")], **options(), select=Selection(start=99))

    @pytest.mark.parametrize("where", ["metric", "forward", "loader"])
    def test_of_the_users_own_are_told_from_ours(self, where):
        Path("own.py").write_text("def fails(*_):\n    raise ZeroDivisionError('mine')\n")
        with pytest.raises(UserCodeError, match="raised ZeroDivisionError: mine") as caught:
            metrics(made=options(**{where: "own.py:fails"}))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


class TestWinners:
    def test_are_by_the_metrics_name_and_never_nan(self):
        rows = [
            {"loss": 0.3, "accuracy": math.nan, "score": 1.0},
            {"loss": 0.2, "accuracy": 0.4, "score": 2.0},
            {"loss": math.nan, "accuracy": 0.5, "score": 3.0},
        ]
        found = [Evaluation(str(i), "", None, row) for i, row in enumerate(rows)]
        assert {name: one.checkpoint for name, one in winners(found).items()} == {
            "loss": "1",
            "accuracy": "2",
        }


COMMON = ("--model", "train.py:Net", "--loader", "train.py:batches", "--device", "cpu")


class TestCommand:
    def test_shows_the_steps_that_an_average_is_made_of(self):
        for epoch in range(5):
            state = torch.load(f"run/step_{epoch}.pt")
            torch.save({"model": state, "epoch": epoch}, f"run/step_{epoch}.pt")
        ckptavg.average("run", "swa.safetensors", select=Selection(last=3))
        result = run("evaluate", "swa.safetensors", "run/step_4.pt", *COMMON)
        heading, average, last, _ = result.stdout.splitlines()
        assert heading.split()[:2] == ["checkpoint", "epoch"]
        assert average.split()[:4] == ["swa.safetensors", "2", "to", "4"]
        assert last.split()[:2] == ["run/step_4.pt", "4"]

    def test_prints_an_aligned_table_that_marks_the_best(self):
        result = run("evaluate", "run", *COMMON)
        found = metrics()
        best = min(range(5), key=lambda i: found[i]["loss"])
        lines = result.stdout.splitlines()
        assert lines[0].split() == ["checkpoint", "step", "loss", "accuracy"]
        column = lines[0].index("loss")
        for i, line in enumerate(lines[1:6]):
            assert line[column:].startswith(f"{found[i]['loss']:.5g}" + " *" * (i == best))
            assert line.split()[:2] == [f"step_{i}.pt", str(i)]
        assert lines[6:] == ["* the best"]

    def test_makes_the_json_that_best_takes(self, states):
        states[2]["head.bias"][0] = torch.nan
        save_run(Path("run"), states, "pt")
        result = run("evaluate", "run", *COMMON, "--json")
        document = json.loads(result.stdout)
        found = metrics()
        assert document["evaluations"][1] == {
            "checkpoint": "step_1.pt",
            "path": "run/step_1.pt",
            "step": 1,
            **found[1],
        }
        assert document["evaluations"][2]["loss"] is None
        best = max((i for i in range(5) if i != 2), key=lambda i: (found[i]["accuracy"], i))
        assert document["best"]["accuracy"] == f"step_{best}.pt"
        Path("values.json").write_text(result.stdout)
        # By name, and by path, so that another run's file of that name is not taken for it.
        table = {str(name): v for name, v in read_metrics(Path("values.json"), "loss").items()}
        assert {Path(name).is_absolute() for name in table} == {True, False}
        assert {name: v for name, v in table.items() if not Path(name).is_absolute()} == {
            f"step_{i}.pt": found[i]["loss"] for i in (0, 1, 3, 4)
        }
        chosen = ("--best", 1, "--metric", "accuracy", "--metrics", "values.json")
        out = run("average", "run", "-o", "o.safetensors", *chosen, "--json")
        assert [one["name"] for one in json.loads(out.stdout)["sources"]] == [f"step_{best}.pt"]

    def test_shows_nan_as_nan(self, states):
        states[0]["head.bias"][0] = torch.nan
        torch.save(states[0], "run/step_0.pt")
        line = run("evaluate", "run/step_0.pt", *COMMON).stdout.splitlines()[1]
        assert line.split() == ["step_0.pt", "0", "nan", "nan"]

    def test_keeps_what_the_users_code_prints_off_its_json(self):
        Path("own.py").write_text("def fn(model, batches):\n    print('noise')\n    return 1\n")
        result = run("evaluate", "run", *COMMON, "--metric", "own.py:fn", "--json")
        assert json.loads(result.stdout)["evaluations"][0]["fn"] == 1.0

    def test_takes_the_rules_and_every_option(self, train):
        result = run(
            *("evaluate", "run", "--model", "train.py:Net", "--model-arg", "drop=0.5"),
            *("--loader", "train.py:batches", "--loader-arg", "size=20", "--max-samples", 50),
            *("--refresh-loader", "train.py:batches", "--seed", 3),
            *("--refresh-loader-arg", "seed=0", "--refresh-max-samples", 40, "--device", "cpu"),
            *("--estimator", "exact", "--train-mode", "full"),
            *("--memory-format", "contiguous", "--metric", "accuracy", "--last", 2, "--json"),
        )
        found = json.loads(result.stdout)["evaluations"]
        assert [sorted(one) for one in found] == [["accuracy", "checkpoint", "path", "step"]] * 2
        assert [model.drop.p for model in train.MADE] == [0.5]
        # 50 examples of 20 a batch are reached with the third
        assert all(float(one["accuracy"] * 60).is_integer() for one in found)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--loader", "train.py:batches"), "Missing option '--model'"),
            (("--model", "train.py:Net"), "Missing option '--loader'"),
            ((*COMMON, "--metric", "f1"), "not of the form"),
            (
                (*COMMON, "--refresh-max-samples", "3"),
                "--refresh-max-samples has no effect without --refresh-loader",
            ),
            ((*COMMON, "--last", "2,3"), "Invalid value for '--last'"),
            ((*COMMON, "--best", "2"), "No such option"),
        ],
    )
    def test_refuses_wrong_usage(self, arguments, message):
        assert message in run("evaluate", "run", *arguments, code=2).output

    def test_is_silent_when_quiet(self):
        assert run("evaluate", "run", *COMMON, "-q").output == ""


def test_training_gives_checkpoints_that_differ(train):
    """Or else these tests would show little."""
    first, *others = trained("Net", 3)
    assert all(not torch.equal(first["head.weight"], one["head.weight"]) for one in others)
