"""Which checkpoints the rules take, of files as trainers write them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg import Selection
from ckptavg.errors import CkptAvgError, SelectionError
from ckptavg.select.names import steps_in_names
from ckptavg.select.rules import chosen, select
from ckptavg.select.run import find_run
from tests import helpers
from tests.oracle import naive_mean, same_bits


def save(path, number, **facts):
    """A checkpoint whose only weight is its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {"w": torch.full((3,), float(number))}, **facts}, path)
    return path


@pytest.fixture
def run(tmp_path):
    """Ten checkpoints of 100 steps each, with epochs counted from 1."""
    for number in range(1, 11):
        facts = {"global_step": 100 * number, "epoch": number, "val_loss": abs(number - 7) / 10}
        save(tmp_path / "run" / f"step_{100 * number}.pt", number, **facts)
    return tmp_path / "run"


def taken(folder, **rules):
    """The numbers of the checkpoints that the rules take."""
    selection = Selection(**rules)
    found = find_run([folder], exclusion_reason=selection.exclusion_reason)
    names = [verdict.checkpoint.path.name for verdict in chosen(select(found, selection))]
    return [int(torch.load(folder / name, weights_only=False)["model"]["w"][0]) for name in names]


def reasons(folder, **rules):
    verdicts = select(find_run([folder]), Selection(**rules))
    return {verdict.checkpoint.name: verdict.reason for verdict in verdicts}


ALL = list(range(1, 11))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, ALL),
        ({"last": 3}, [8, 9, 10]),
        ({"last": 99}, ALL),
        ({"every": 3}, [1, 4, 7, 10]),
        ({"every": 4}, [2, 6, 10]),
        ({"start": "700"}, [7, 8, 9, 10]),
        ({"start": 701}, [8, 9, 10]),
        ({"start": "75%"}, [8, 9, 10]),
        ({"start": "0%"}, ALL),
        ({"start": "100 %"}, [10]),
        ({"steps": "100,300, 1000"}, [1, 3, 10]),
        ({"steps": "200:800:300"}, [2, 5, 8]),
        ({"steps": "200:400"}, [2, 3, 4]),
        ({"cycle": 300, "unit": "global_step"}, [3, 6, 9]),
        ({"cycle": 300, "start": 400, "unit": "global_step"}, [4, 7, 10]),
        ({"cycle": 300, "start": "40%", "unit": "global_step"}, [4, 7, 10]),
        ({"cycle": 3, "unit": "epoch"}, [3, 6, 9]),
        ({"include": ["step_1*"]}, [1, 10]),
        ({"include": ["step_1*", "step_5*"], "exclude": ["*_1000.pt"]}, [1, 5]),
        ({"best": 3, "metric": "val_loss"}, [6, 7, 8]),
        ({"best": 2, "metric": "val_loss", "mode": "max"}, [1, 2]),
        ({"start": "50%", "cycle": 1, "unit": "epoch", "last": 4, "every": 2}, [8, 10]),
        ({"best": 5, "metric": "val_loss", "last": 3}, [7, 8, 9]),
        ({"best": 5, "metric": "val_loss", "last": 3, "every": 2}, [7, 9]),
    ],
    ids=str,
)
def test_the_rules(run, rules, expected):
    assert taken(run, **rules) == expected


def test_the_best_are_named_with_their_values(run, caplog):
    caplog.set_level("INFO", "ckptavg")
    taken(run, best=2, metric="val_loss")
    assert caplog.messages == ["the best by val_loss: step_700.pt (0), step_800.pt (0.1)"]


def test_each_that_is_left_out_says_why(run):
    rules = {"start": "50%", "cycle": 200, "unit": "global_step"}
    said = reasons(run, **rules, best=2, metric="val_loss", last=1)
    assert said["step_400.pt"] == "before 50%"
    assert said["step_600.pt"] == "not at the end of a cycle"
    assert said["step_500.pt"] == "not among the best 2 (val_loss 0.2)"
    assert said["step_700.pt"] == "not among the last 1"
    assert said["step_900.pt"] == ""


def test_cycles_of_what_is_said_where_steps_and_epochs_are_recorded(run):
    with pytest.raises(SelectionError, match="set `unit` to global_step or to epoch"):
        taken(run, cycle=300)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"start": "5"}, "`start` counts in global_step; for epochs add `unit` epoch"),
        ({"steps": "2:9"}, "`steps` counts in global_step; for epochs add `unit` epoch"),
        ({"start": "0"}, None),
        ({"start": "500"}, None),
        ({"start": "50%"}, None),
        ({"start": "5", "unit": "epoch"}, None),
        ({"start": "5", "unit": "global_step"}, None),
        ({"steps": "200:900:100"}, None),
        ({"steps": "100,300"}, None),
    ],
)
def test_the_unit_is_said_where_a_number_may_be_one_of_epochs(run, caplog, rules, message):
    caplog.set_level(logging.INFO)
    select(find_run([run]), Selection(**rules))
    assert caplog.messages == ([message] if message else [])


def test_a_list_of_epochs_where_steps_are_meant_is_an_error_that_says_so(run):
    with pytest.raises(SelectionError, match=r"global_step 100, .*; for epochs add `unit` epoch$"):
        taken(run, steps="2,5")
    with pytest.raises(SelectionError, match=r"1000$"):
        taken(run, steps="150")


def test_shares_are_exact(tmp_path):
    for epoch in range(5, 101, 5):
        save(tmp_path / "run" / f"epoch_{epoch}.pt", epoch, epoch=epoch)
    for share in range(5, 101, 5):
        assert taken(tmp_path / "run", start=f"{share}%")[0] == share


def test_the_order_is_that_of_the_steps_in_the_names(tmp_path):
    names = ["loss0.50_step100", "loss0.40_step200", "loss0.30_step300"]
    for number, name in enumerate(names, 1):
        save(tmp_path / "run" / f"{name}.pt", number)
    assert taken(tmp_path / "run") == [1, 2, 3]
    assert taken(tmp_path / "run", last=1) == [3]
    epochs = [f"val_loss=0.{60 - epoch}-epoch={epoch:02}.ckpt" for epoch in range(8, 12)]
    for epoch, name in enumerate(epochs, 8):
        save(tmp_path / "other" / name, epoch)
    assert taken(tmp_path / "other", last=2) == [10, 11]
    assert taken(tmp_path / "other", unit="epoch", steps="9,10") == [9, 10]


def test_steps_that_begin_anew_in_each_epoch(tmp_path):
    for number, (epoch, step) in enumerate([(e, s) for e in range(3) for s in (500, 1000)]):
        save(tmp_path / "run" / f"epoch{epoch}_step{step}.pt", number, epoch=epoch, step=step)
    assert taken(tmp_path / "run") == [0, 1, 2, 3, 4, 5]
    assert taken(tmp_path / "run", last=2) == [4, 5]
    with pytest.raises(SelectionError, match="begins anew in each epoch"):
        taken(tmp_path / "run", unit="step", start=500)


def test_numpy_s_numbers_are_steps(tmp_path):
    for epoch, rate in ((3, 100), (2, 200), (1, 300)):
        save(tmp_path / "run" / f"lr0.{rate}_x{epoch}.pt", epoch, epoch=np.int64(epoch))
    assert taken(tmp_path / "run") == [1, 2, 3]


def test_loops_that_begin_with_epoch_0_count_from_it(tmp_path):
    for epoch in range(20):
        save(tmp_path / "run" / f"epoch_{epoch}.pt", epoch, epoch=epoch)
    assert taken(tmp_path / "run", cycle=5) == [4, 9, 14, 19]


def test_numbers_that_are_no_steps(tmp_path):
    for number, name in enumerate(("a_100", "a_200", "a_300", "best_model_0.9")):
        save(tmp_path / "run" / f"{name}.pt", number)
    # best_model_0.9 is left out beside the series a_#, whose numbers are steps.
    assert taken(tmp_path / "run", steps="100,300") == [0, 2]
    named = find_run(sorted((tmp_path / "run").iterdir()))
    with pytest.raises(SelectionError, match=r"a_100\.pt does not"):
        select(named, Selection(unit="epoch"))
    for rule in ({"cycle": 100}, {"start": 100}, {"steps": "100"}):
        with pytest.raises(
            SelectionError, match=r"not of one series, such as a_100\.pt, a_200\.pt"
        ):
            select(named, Selection(**rule))


def test_metrics_of_another_run_are_not_taken(tmp_path):
    for run, losses in (("A", (0.1, 0.2)), ("B", (0.3, 0.4))):
        for number, loss in enumerate(losses):
            weight = 10 * number + ord(run)
            save(tmp_path / run / f"step_{number}.pt", weight, global_step=number, val_loss=loss)
    table = tmp_path / "a.json"
    entries = [
        {"checkpoint": f"step_{n}.pt", "path": str(tmp_path / "A" / f"step_{n}.pt"), "loss": loss}
        for n, loss in enumerate((0.1, 0.05))
    ]
    table.write_text(json.dumps({"evaluations": entries}))
    found = find_run([tmp_path / "A", tmp_path / "B"])
    verdicts = select(found, Selection(best=1, metric="loss", metrics=table))
    assert [verdict.checkpoint.name for verdict in chosen(verdicts)] == ["A/step_1.pt"]
    assert {verdict.checkpoint.name: verdict.metric for verdict in verdicts} == {
        "A/step_0.pt": 0.1,
        "A/step_1.pt": 0.05,
        "B/step_0.pt": None,
        "B/step_1.pt": None,
    }


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 5000 + "%", "\u0663"])
def test_endless_and_odd_numbers_are_one_line(run, text):
    for rules in ({"start": text}, {"steps": text}):
        with pytest.raises(SelectionError):
            taken(run, **rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"steps": "100,250"}, "no checkpoint of global_step 250"),
        ({"steps": "1-5"}, "100,200 or a range such as 100:1000:100"),
        ({"steps": "1:5:0"}, "stride"),
        ({"start": "soon"}, "a share such as 75%"),
        ({"start": "110%"}, "must be at most 100%, not 110%"),
        ({"start": "5000"}, "no checkpoint is from global_step 5000 on: the last is 1000$"),
        (
            {"start": "50", "unit": "epoch"},
            "from epoch 50 on: the last is 10; for 50 % of the training write `start` 50%",
        ),
        ({"steps": "1:5"}, "the selection leaves out all 10 checkpoints"),
        ({"best": 1, "metric": "speed"}, "none of the checkpoints has the metric speed"),
        ({"best": 1, "metric": "speed"}, "recorded are: val_loss"),
        (
            {"best": 1},
            "`best` needs a metric, and the checkpoints record val_loss; add `metric` val_",
        ),
        ({"lr_minima": True}, "none of the checkpoints records a learning rate"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen_is_said(run, rules, message):
    if "speed" in str(rules):
        rules = {**rules, "mode": "max"}
    with pytest.raises(SelectionError, match=message):
        taken(run, **rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"steps": "1", "cycle": 3}, "`steps` and `cycle`"),
        ({"cycle": 3, "lr_minima": True}, "`cycle` and `lr_minima`"),
        ({"mode": "max"}, "need a metric"),
        ({"last": 0}, "`last` must be at least 1"),
        ({"every": -1}, "`every` must be at least 1"),
    ],
    ids=str,
)
def test_rules_that_make_no_sense_are_refused(rules, message):
    with pytest.raises(SelectionError, match=message):
        Selection(**rules)


def test_a_metric_whose_sense_is_not_certain_needs_a_mode(tmp_path):
    for number in range(3):
        save(tmp_path / "run" / f"{number}.pt", number, epoch=number, metric=float(number))
    with pytest.raises(SelectionError, match="set `mode` to min or to max"):
        taken(tmp_path / "run", best=1, metric="metric")
    assert taken(tmp_path / "run", best=1, metric="metric", mode="max") == [2]


def test_nan_never_wins(tmp_path):
    for number, loss in enumerate([0.5, float("nan"), 0.4, float("nan")]):
        save(tmp_path / "run" / f"{number}.pt", number, epoch=number, val_loss=loss)
    assert taken(tmp_path / "run", best=1, metric="val_loss") == [2]
    assert taken(tmp_path / "run", best=3, metric="val_loss") == [0, 2]


def test_metrics_in_names_and_in_files(tmp_path):
    folder = tmp_path / "run"
    for number, loss in enumerate([0.3, 0.1, 0.2]):
        save(folder / f"epoch={number}-val_loss={loss}.ckpt", number, epoch=number)
    assert taken(folder, best=2, metric="val_loss") == [1, 2]
    table = tmp_path / "metrics.csv"
    rows = [
        f"epoch={n}-val_loss={loss}.ckpt,{acc}"
        for n, loss, acc in [(0, 0.3, 0.9), (1, 0.1, 0.5), (2, 0.2, 0.6)]
    ]
    table.write_text("checkpoint,accuracy\n" + "\n".join(rows))
    assert taken(folder, best=1, metric="accuracy", metrics=table) == [0]


def test_names_tell_the_step_where_the_files_do_not(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for number in (100, 900, 1000, 1100):
        save_file({"w": torch.full((3,), float(number))}, folder / f"step_{number}.safetensors")
    selection = Selection(steps="100,1000")
    verdicts = select(find_run([folder]), selection)
    names = [verdict.checkpoint.name for verdict in verdicts if verdict.is_chosen]
    assert names == ["step_100.safetensors", "step_1000.safetensors"]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["step_100.pt", "step_20.pt"], (100, 20)),
        (["epoch=3-step=400.ckpt", "epoch=4-step=500.ckpt"], (400, 500)),
        (["epoch=3-val_loss=0.12.ckpt", "epoch=4-val_loss=0.11.ckpt"], (3, 4)),
        (["val_loss=0.5-epoch=8.ckpt", "val_loss=0.4-epoch=9.ckpt"], (8, 9)),
        (["a_100.pt", "best_model_0.9.pt"], None),
        (["resnet50_7.pt", "resnet50_8.pt"], (7, 8)),
        (["checkpoint-500", "checkpoint-1000"], (500, 1000)),
        (["iter_0001000/x", "iter_0002000/x"], (1000, 2000)),
        (["best.pt", "final.pt"], None),
        (["a_1.pt", "final.pt"], None),
        (["step_5.pt"], (5,)),
    ],
)
def test_numbers_in_names(names, numbers):
    assert steps_in_names(names) == numbers


def test_lightning_and_timm_count_epochs_from_zero(tmp_path):
    for number in range(10):
        lightning = {"pytorch-lightning_version": "2.6", "epoch": number}
        torch.save(
            {"state_dict": {"w": torch.full((3,), float(number))}, **lightning},
            _made(tmp_path / "lightning") / f"epoch={number}.ckpt",
        )
        timm = {"arch": "resnet18", "version": 2, "epoch": number}
        torch.save(
            {"state_dict": {"w": torch.full((3,), float(number))}, **timm},
            _made(tmp_path / "timm") / f"checkpoint-{number}.pth.tar",
        )
    for folder in ("lightning", "timm"):
        for rules, epochs in (
            ({"cycle": 5}, [4, 9]),
            ({"start": "50%"}, [4, 5, 6, 7, 8, 9]),
            ({"start": 4, "cycle": 5}, [4, 9]),
            ({"start": 5, "cycle": 2}, [5, 7, 9]),
            ({"steps": "3,9"}, [3, 9]),
        ):
            verdicts = chosen(select(find_run([tmp_path / folder]), Selection(**rules)))
            assert [verdict.step for verdict in verdicts] == epochs, (folder, rules)


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def test_links_and_earlier_averages_do_not_count(run, tmp_path):
    os.link(run / "step_1000.pt", run / "last.pt")
    (run / "copy.pt").write_bytes((run / "step_900.pt").read_bytes())
    ckptavg.average(run, run / "swa.pt")
    assert taken(run, last=2) == [9, 10]


def test_the_choice_needs_an_order(tmp_path):
    paths = [save(tmp_path / "a.pt", 1, global_step=5), save(tmp_path / "b.pt", 2)]
    for rules in ({"last": 1}, {"every": 2}, {"lr_minima": True}):
        with pytest.raises(SelectionError, match=r"order.*; leave out b\.pt: no step is recorded"):
            select(find_run(paths), Selection(**rules))


def test_checkpoints_of_another_model_do_no_harm_unless_they_are_taken(run):
    torch.save({"model": {"v": torch.ones(2)}, "global_step": 50}, run / "step_50.pt")
    assert taken(run, start=100, last=2) == [9, 10]
    ckptavg.average(run, run.parent / "out.safetensors", select=Selection(start=100))
    with pytest.raises(CkptAvgError, match=r"step_50\.pt"):
        ckptavg.average(run, run.parent / "no.safetensors")


def test_if_none_is_left_each_reason_is_said_with_the_names(run):
    torch.save({"model": {"v": torch.ones(2)}}, run / "best.pt")
    with pytest.raises(
        SelectionError,
        match=r"in .*run; best\.pt: matched by exclude b\*; .*step_100\.pt.*: not matched by",
    ):
        taken(run, include=["best*"], exclude=["b*"])


def test_left_out_by_name_it_is_not_even_opened(run):
    (run / "step_5.pt").write_bytes(b"broken")
    assert taken(run, exclude=["step_5.pt"]) == ALL


def test_the_average_is_of_those_taken(run, tmp_path):
    out = tmp_path / "out.safetensors"
    summary = ckptavg.average(run, out, select=Selection(start="75%"))
    states = [torch.load(run / f"step_{number}00.pt")["model"]["w"] for number in (8, 9, 10)]
    assert same_bits(load_file(out)["w"], naive_mean(states))
    assert [source.name for source in summary.sources] == [
        "step_800.pt",
        "step_900.pt",
        "step_1000.pt",
    ]
    inspected = helpers.run("inspect", "--json", out)
    made = json.loads(inspected.stdout)["checkpoints"][0]["provenance"]
    assert made["selection"] == {"start": "75%", "unit": "global_step"}


class TestInspect:
    def rows(self, *arguments):
        result = helpers.run("inspect", "--json", *arguments)
        return json.loads(result.stdout)["checkpoints"]

    def test_says_which_are_taken_and_why_not_the_others(self, run):
        rows = self.rows(run, "--last", "2", "--best", "4", "--metric", "val_loss")
        by_step = {row["step"]: row for row in rows}
        assert [step for step, row in by_step.items() if row["selected"]] == [800, 900]
        assert by_step[100]["reason"] == "not among the best 4 (val_loss 0.6)"
        assert by_step[100]["metric"] == pytest.approx(0.6)
        assert by_step[600]["reason"] == "not among the last 2"

    def test_names_copies_and_averages(self, run):
        os.link(run / "step_1000.pt", run / "last.pt")
        ckptavg.average(run, run / "swa.pt")
        said = {Path(row["path"]).name: row["reason"] for row in self.rows(run, "--last", "1")}
        assert said["last.pt"] == "the same checkpoint as step_1000.pt"
        assert said["swa.pt"] == "an average made earlier"

    def test_is_a_table_on_a_terminal(self, run):
        result = helpers.run("inspect", run, "--last", "2")
        series, members = result.output.split("\n\n")[:2]
        head, row = (" ".join(line.split()) for line in series.splitlines())
        assert head == "series files steps what selected why not"
        assert row == "step_#.pt 10 100 to 1,000 members yes"
        lines = members.splitlines()
        assert lines[0].split() == [
            "path",
            "global_step",
            "rate",
            "metric",
            "bytes",
            "selected",
            "why",
            "not",
        ]
        assert "2 of 10 checkpoints selected" in lines[-1]
        assert len({line.index(" no ") for line in lines if " no " in line}) == 1


def test_minima_of_a_cyclic_rate_from_a_real_loop(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4)
    rates = []
    (tmp_path / "run").mkdir()
    for epoch in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        state = {
            "model": {"w": torch.full((3,), float(epoch))},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "epoch": epoch,
        }
        torch.save(state, tmp_path / "run" / f"epoch_{epoch}.pt")
    lows = [epoch for epoch, rate in enumerate(rates) if rate == min(rates)]
    assert taken(tmp_path / "run", lr_minima=True) == lows == [3, 7, 11]
    assert taken(tmp_path / "run", lr_minima=True, start="60%") == [7, 11]
    np.testing.assert_allclose(rates[lows[0]], min(rates))


def test_a_named_checkpoint_from_before_the_training_ends_no_cycle(tmp_path):
    paths = []
    for epoch in range(11):
        state = {0: {"momentum_buffer": torch.ones(3)}} if epoch else {}
        optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}
        path = tmp_path / f"checkpoint-{epoch}.pt"
        paths.append(save(path, epoch, epoch=epoch, optimizer=optimizer))
    verdicts = select(find_run(paths), Selection(cycle=5))
    assert [each.step for each in verdicts if each.is_chosen] == [5, 10]
    assert verdicts[0].reason == "saved before the training"


def test_where_cycles_are_counted_from_epoch_0_it_is_said(tmp_path, caplog):
    for epoch in range(4):
        save(tmp_path / "run" / f"epoch_{epoch}.pt", epoch, epoch=epoch)
    with caplog.at_level("INFO", "ckptavg"):
        assert taken(tmp_path / "run", cycle=2) == [1, 3]
    assert "epochs are counted from 0: cycles end with epoch 1, 3, ..." in caplog.text


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["tokens_1B.pt", "tokens_1.25B.pt"], (10**9, 1_250_000_000)),
        (["m-500M.pt", "m-10k.pt"], (500_000_000, 10_000)),
        (["x5e3.pt", "x1e4.pt"], (5000, 10_000)),
        (["ep0-ba2000-rank0.pt", "ep0-ba4000-rank0.pt"], (2000, 4000)),
        (["checkpoint_1_500.pt", "checkpoint_1_1000.pt"], (500, 1000)),
        (["epoch=-1.ckpt", "epoch=2.ckpt"], None),
        (["a_20240517_1.pt", "a_20240518_2.pt"], (1, 2)),
        (["2024-05-17_10-30-00.pt", "2024-05-17_11-30-00.pt"], None),
        (["step_20240517.pt", "step_20240518.pt"], (20240517, 20240518)),
        (["epoch=1-elbo=-0.5.ckpt", "epoch=2-elbo=nan.ckpt"], (1, 2)),
        (["checkpoint.3.pt", "checkpoint.10.pt"], (3, 10)),
        (["lr1e-05_step1.pt", "lr1e-05_step2.pt"], (1, 2)),
    ],
)
def test_numbers_with_units_exponents_and_dates(names, numbers):
    assert steps_in_names(names) == numbers
