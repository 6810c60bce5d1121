"""Errors say what to type instead: each hint is the command that works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import outcome
from tests.oracle import save_run

pytestmark = pytest.mark.usefixtures("no_fsync", "user_folder")

CODE = """
import functools
from collections import OrderedDict
from math import sqrt

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SIZE = 3


class Net(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(5, width), nn.BatchNorm1d(width))


class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.randn(8, 5))

    def __len__(self):
        return 8


def make_model():
    return Net(4)


def make_loader(split, *, batch=8):
    if split == "none":
        raise TypeError("make_loader() missing split")
    return DataLoader(dataset, batch_size=batch, shuffle=True)


def count(model, batches):
    return sum(model(batch).sum() for batch in batches)


def with_split(function):
    @functools.wraps(function)
    def wrapper():
        return function("train")

    return wrapper


decorated = with_split(make_loader)
dataset = TensorDataset(torch.randn(16, 5), torch.arange(16) % 4)


def make_dataset():
    return dataset
"""


@pytest.fixture
def swa(user_folder: Path) -> str:
    """The user's code, `mine.py`, and an average of a model of it."""
    (user_folder / "mine.py").write_text(CODE)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    states = [{name: value + step for name, value in model.state_dict().items()} for step in (0, 1)]
    save_run(user_folder / "ckpts", states)
    assert outcome("average", "ckpts", "-o", "swa.safetensors")[0] == 0
    return "swa.safetensors"


def refresh(swa: str, *options: str, model: str = "make_model", loader: str = "decorated") -> str:
    """What is said on stderr of a refresh that fails, without "ckptavg: error: "."""
    specs = ("--model", f"mine.py:{model}", "--loader", f"mine.py:{loader}")
    code, _, said = outcome("bn-refresh", swa, *specs, *options)
    assert code == 1
    return said


def line(said: str) -> str:
    """The error, which is all that was said."""
    assert said.count("\n") == 1
    return said.removeprefix("ckptavg: error: ").rstrip()


class TestArguments:
    def test_that_a_loader_needs_are_named_with_the_option(self, swa):
        assert line(refresh(swa, loader="make_loader")) == (
            "mine.py:make_loader needs split; give --loader-arg split=VALUE, or name a function "
            "that needs no arguments"
        )

    @pytest.mark.parametrize(
        ("command", "options", "option"),
        [
            ("bn-refresh", ("--eval-loader", "mine.py:make_loader"), "--eval-loader-arg"),
            ("evaluate", ("--refresh-loader", "mine.py:make_loader"), "--refresh-loader-arg"),
            (
                "sweep",
                (
                    *("--refresh-loader", "mine.py:decorated", "--last", "1"),
                    *("--test-loader", "mine.py:make_loader"),
                ),
                "--test-loader-arg",
            ),
        ],
    )
    def test_are_those_of_the_loader_at_fault(self, command, options, option, swa):
        inputs = swa if command == "bn-refresh" else "ckpts"
        specs = ("--model", "mine.py:make_model", "--loader", "mine.py:decorated")
        code, _, said = outcome(command, inputs, *specs, *options)
        assert code == 1
        assert f"mine.py:make_loader needs split; give {option} split=VALUE" in said
        assert "Traceback" not in said

    @pytest.mark.parametrize(
        ("loader", "argument", "message"),
        [
            (
                "make_loader",
                ("--loader-arg", "splt=1", "--loader-arg", "split=a"),
                "mine.py:make_loader does not take splt (--loader-arg); it takes split, batch",
            ),
            (
                "make_loader",
                ("--loader-arg", "splt=a"),
                "mine.py:make_loader does not take splt (--loader-arg); it takes split, batch",
            ),
            (
                "make_dataset",
                ("--loader-arg", "split=a"),
                "mine.py:make_dataset does not take split (--loader-arg); it takes no arguments",
            ),
            (
                "decorated",
                ("--model-arg", "width=3"),
                "mine.py:make_model does not take width (--model-arg); it takes no arguments",
            ),
        ],
    )
    def test_that_are_not_taken_are_named(self, loader, argument, message, swa):
        assert line(refresh(swa, *argument, loader=loader)) == message

    def test_that_a_decorator_gives_are_not_asked_for(self, swa):
        specs = ("--model", "mine.py:make_model", "--loader", "mine.py:decorated")
        assert outcome("bn-refresh", swa, *specs)[0] == 0

    def test_are_not_blamed_for_an_error_within_the_function(self, swa):
        said = refresh(swa, "--loader-arg", "split=none", loader="make_loader")
        assert said.startswith("Traceback")
        assert "mine.py:make_loader raised TypeError: make_loader() missing split" in said


class TestDatasets:
    @pytest.mark.parametrize("loader", ["dataset", "make_dataset"])
    def test_are_no_loaders(self, loader, swa):
        assert line(refresh(swa, loader=loader)) == (
            f"mine.py:{loader} is a dataset (TensorDataset), which returns examples, not batches; "
            "name a function that returns torch.utils.data.DataLoader(dataset, batch_size=..., "
            "shuffle=True)"
        )

    def test_are_not_what_a_model_is(self, swa):
        assert line(refresh(swa, loader="make_model")) == (
            "mine.py:make_model is a Net, which returns no batches; "
            "let it be an iterable of batches, such as a DataLoader, or return one"
        )

    def test_for_an_evaluation_need_no_shuffle(self, swa):
        specs = ("--model", "mine.py:make_model", "--loader", "mine.py:dataset")
        assert line(outcome("evaluate", swa, *specs)[2]).endswith("(dataset, batch_size=...)")

    def test_that_give_single_examples_are_told_by_the_model(self, swa):
        specs = ("--model", "mine.py:make_model", "--loader", "mine.py:Numbers")
        said = outcome("evaluate", swa, *specs, "--metric", "mine.py:count")[2]
        assert "where the loader yields single examples, let it be a torch.utils.data.Dat" in said


class TestNames:
    @pytest.mark.parametrize(
        ("name", "others"),
        [
            ("make_modl", "make_model, make_loader, make_dataset, Net, Numbers and 3 more"),
            ("qqq", "Net, Numbers, make_model, make_loader, count and 3 more"),
            ("Net.widht", ""),
        ],
    )
    def test_that_a_file_defines_are_proposed(self, name, others, swa):
        proposed = f"; it has {others}" if others else ""
        assert line(refresh(swa, model=name)).startswith(f"mine.py has no '{name}'{proposed}")

    def test_of_a_package_are_those_that_it_collects(self, swa):
        specs = ("--model", "torch.nn:Sequentia", "--loader", "mine.py:decorated")
        assert "it has Sequential" in line(outcome("bn-refresh", swa, *specs)[2])


class TestPatterns:
    @pytest.mark.usefixtures("swa")
    @pytest.mark.parametrize("command", ["average", "inspect"])
    def test_in_quotes_are_said_to_be_such(self, command):
        output = ("-o", "out.pt") if command == "average" else ()
        said = line(outcome(command, "ckpts/*.safetensors", *output)[2])
        assert said == (
            "ckpts/*.safetensors: does not exist; as a pattern it matches 2: leave out the quotes, "
            "and the shell expands it; or name ckpts/"
        )
        assert outcome(command, "ckpts/", *output)[0] == 0

    @pytest.mark.usefixtures("swa")
    def test_of_one_checkpoint_are_said_to_be_such(self):
        specs = ("--model", "mine.py:make_model", "--loader", "mine.py:decorated")
        for command in (("bn-refresh", *specs), ("convert", "-o", "out.pt")):
            said = line(outcome(*command, "ckpts/*.safetensors")[2])
            assert said.startswith("ckpts/*.safetensors: does not exist; as a pattern it matches 2")

    def test_in_urls_are_said_not_to_be_expanded(self):
        said = line(outcome("average", "memory://ckpts/*.pt", "-o", "out.pt")[2])
        assert said == (
            "memory://ckpts/*.pt: does not exist; patterns in URLs are not expanded: name the "
            "directory, or each checkpoint"
        )

    def test_that_match_nothing_say_so(self):
        said = line(outcome("average", "ckpts/*.pt", "-o", "out.pt")[2])
        assert said == "ckpts/*.pt: does not exist; as a pattern it matches nothing"

    @pytest.mark.usefixtures("swa")
    def test_of_folders_are_not_proposed_as_names(self):
        said = line(outcome("average", "ckpt?/step_?.safetensors", "-o", "out.pt")[2])
        assert said.endswith(
            "as a pattern it matches 2: leave out the quotes, and the shell expands it"
        )


class TestBest:
    def test_without_a_metric_lists_those_recorded(self):
        Path("run").mkdir()
        for epoch in range(3):
            path = f"run/epoch={epoch}-val_loss={epoch / 10}-speed=3.0.ckpt"
            torch.save({"state_dict": {"w": torch.rand(1)}, "epoch": epoch}, path)
        arguments = ("average", "run", "-o", "out.pt", "--best", 2)
        said = line(outcome(*arguments)[2])
        assert said == (
            "--best needs a metric, and the checkpoints record speed, val_loss; "
            "add --metric val_loss"
        )
        assert outcome(*arguments, "--metric", "val_loss")[0] == 0

    @pytest.mark.usefixtures("swa")
    def test_lists_those_of_a_file(self):
        Path("m.csv").write_text("name,steps,other\nstep_0.safetensors,1,2\n")
        said = line(outcome("inspect", "ckpts", "--best", 1, "--metrics", "m.csv")[2])
        assert said == (
            "--best needs a metric, and m.csv has other, steps; "
            "add --metric other, and --mode min or --mode max"
        )

    @pytest.mark.usefixtures("swa")
    def test_says_where_none_is_recorded(self):
        said = line(outcome("inspect", "ckpts", "--best", 1)[2])
        assert said == (
            "--best needs a metric, and the checkpoints record none; "
            "name a file that has one with --metrics, such as `ckptavg evaluate --json` prints, "
            "and the metric with --metric"
        )


class TestModelsOfTransformers:
    @pytest.mark.parametrize(
        "config",
        [
            {"architectures": ["Net; rm -rf"]},
            {"architectures": ["Net"], "auto_map": {"AutoModel": "modeling.Net"}},
            {"architectures": []},
            ["Net"],
        ],
        ids=["no name", "code of its own", "none", "no object"],
    )
    def test_are_not_proposed_where_they_are_not_known(self, config, swa):
        folder = Path("run/checkpoint-1")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        Path(swa).rename(folder / "model.safetensors")
        for path in ("run", folder):
            code, _, said = outcome("bn-refresh", path)
            assert code == 2
            assert said.splitlines()[-1].startswith("It may also be set")


def test_that_an_input_is_an_average_is_said_where_it_is_averaged_again(swa):
    notice = "warning: these are averages already: swa.safetensors; if their members are"
    specs = ("--model", "mine.py:make_model", "--loader", "mine.py:decorated")
    code, _, said = outcome("evaluate", "ckpts", swa, *specs)
    assert code == 0
    assert "the BatchNorm statistics of swa.safetensors are stale" in said
    assert said.count("\n") == 1
    assert notice in outcome("average", "ckpts", swa, "-o", "again.safetensors")[2]
    assert notice in outcome("inspect", "ckpts", swa)[2]


def test_a_damaged_file_is_left_out_by_the_option_that_is_named(swa):
    damaged = max(Path("ckpts").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-200])
    code, _, said = outcome("average", "ckpts", "-o", "out.pt")
    assert code == 1
    assert f"leave it out with --exclude {damaged.name}" in said


def test_steps_are_shown_beside_an_error(swa):
    for epoch in (1, 2):
        torch.save({"epoch": epoch, "model": {"w": torch.ones(3)}}, f"mine_{epoch}.pt")
    Path("mine_2.pt").write_bytes(Path("mine_2.pt").read_bytes()[:-200])
    _, shown, _ = outcome("inspect", "--json", "mine_1.pt", "mine_2.pt")
    [good] = [row for row in json.loads(shown)["checkpoints"] if row["path"].endswith("_1.pt")]
    assert good["step"] == 1


def test_an_average_without_hyper_parameters_is_said_to_be_so(swa):
    assert outcome("average", "ckpts", "-o", "swa.ckpt")[0] == 0
    model = ("--model", "mine.py:Net", "--model-arg", "width=3")
    code, _, said = outcome("bn-refresh", "swa.ckpt", *model, "--loader", "mine.py:decorated")
    assert code == 1
    assert "--container last keeps the hyper-parameters" in said


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("evaluate", "absent.pt"),
        ("soup", "absent.pt"),
        ("sweep", "absent.pt"),
        ("bn-refresh", "absent.pt"),
        ("landscape", "absent.pt"),
        ("evaluate", "absent.py"),
        ("bn-refresh", "absent.py"),
    ],
)
def test_what_does_not_exist_is_said_before_torch_is_imported(command, missing, swa):
    model = "absent.py:make" if missing == "absent.py" else "mine.py:make_model"
    checkpoint = swa if missing == "absent.py" else missing
    arguments = [checkpoint, "--model", model, "--loader", "mine.py:decorated"]
    if command == "landscape":
        arguments = ["rays", *arguments, "-o", "out.json"]
    if command == "soup":
        arguments += ["--metric", "loss", "-o", "out.pt"]
    code = "import sys; sys.modules['torch'] = None; from ckptavg.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, command, *arguments], capture_output=True, check=False
    )
    what = "there is no such file" if missing == "absent.py" else "does not exist"
    assert done.stderr.decode() == f"ckptavg: error: {missing}: {what}\n"
    assert done.returncode == 1


def test_an_option_without_its_value_says_what_that_is(swa):
    code, _, said = outcome("inspect", swa, "--plot")
    assert code == 2
    assert "'--plot' requires an argument. PICTURE: PNG, SVG or PDF file for a plot" in said
    assert "'--json' does not take a value." in outcome("inspect", swa, "--json=1")[2]
