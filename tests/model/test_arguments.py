"""The hyper-parameters that Lightning's checkpoints record, and its data modules."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptavg
from ckptavg.errors import RefreshError
from tests.helpers import run

pytestmark = pytest.mark.usefixtures("no_fsync", "user_folder")

CODE = """
import copy
import torch
from torch import nn
from torch.utils.data import DataLoader

class Net(nn.Sequential):
    def __init__(self, width, depth=1, lr=None):
        layers = [nn.Linear(5, width), nn.BatchNorm1d(width)]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.BatchNorm1d(width)]
        super().__init__(*layers, nn.Linear(width, 4))

class Keywords(Net):
    def __init__(self, **keywords):
        assert keywords.pop("momentum") == 0.9
        super().__init__(**keywords)

class OfNamespace(Net):
    def __init__(self, args):
        assert args["lr"] == vars(args)["lr"] == 0.1
        assert copy.deepcopy(args).items == 5
        super().__init__(args.width, args.depth)

class OfObject(Net):
    def __init__(self, width, act, depth=1):
        super().__init__(width, depth)

def make_model(width=3, depth=1, **others):
    assert not others
    return Net(width, depth)

class Data:
    '''What Lightning's data modules have.'''
    def __init__(self, seed=0):
        self.seed = seed
    def prepare_data(self):
        self.stage = None
    def setup(self, stage):
        assert self.stage is None
        self.stage = stage
    def loader(self, stage):
        assert self.stage == stage
        generator = torch.Generator().manual_seed(self.seed + (stage == "fit"))
        inputs = torch.randn(64, 5, generator=generator)
        return DataLoader(list(zip(inputs, torch.arange(64) % 4)), batch_size=16)
    def train_dataloader(self):
        return self.loader("fit")
    def val_dataloader(self):
        return self.loader("validate")

class Several(Data):
    def train_dataloader(self):
        return {"a": self.loader("fit"), "b": self.loader("fit")}
    def val_dataloader(self):
        return [self.loader("validate")]
"""


@pytest.fixture
def lit(user_folder: Path, monkeypatch) -> Any:
    """The user's file as a module."""
    (user_folder / "lit.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(user_folder))
    yield importlib.import_module("lit")
    del sys.modules["lit"]


@pytest.fixture
def checkpoints(lit) -> Path:
    """A run of a net that is 7 wide and has two layers."""
    hyper_parameters = {"width": 7, "depth": 2, "lr": 0.1}
    return save_run(lit, hyper_parameters=hyper_parameters, hparams_name="kwargs")


def save_run(lit: Any, **recorded: Any) -> Path:
    Path("run").mkdir(exist_ok=True)
    for step in range(2):
        torch.manual_seed(step)
        state = lit.Net(7, 2).state_dict()
        whole = {"state_dict": state, "global_step": step + 1, "epoch": step}
        torch.save(whole | {"pytorch-lightning_version": "2.6"} | recorded, f"run/e{step}.ckpt")
    return Path("run")


SPECS = ("--loader", "lit.py:Data", "-o", "new.ckpt")


class TestHyperParameters:
    @pytest.mark.parametrize("model", ["Net", "make_model"])
    def test_are_the_models_arguments(self, model, checkpoints):
        said = run(
            "bn-refresh", checkpoints / "e1.ckpt", "--model", f"lit.py:{model}", *SPECS
        ).stderr
        assert f"{model} is given what e1.ckpt records: width=7, depth=2" in said

    def test_give_the_same_as_arguments_by_hand(self, checkpoints):
        evaluate = functools.partial(ckptavg.evaluate, checkpoints, model="lit.py:Net")
        recorded = evaluate(loader="lit.py:Data")
        assert recorded == evaluate(loader="lit.py:Data", model_args={"width": 7, "depth": 2})

    def test_count_less_than_the_users(self, checkpoints):
        result = run(
            "evaluate", checkpoints, "--model", "lit.py:Net", *SPECS[:2],
            "--model-arg", "depth=1", code=1,
        )  # fmt: skip
        assert "differences (`model_arg` can give it other sizes)" in str(result.exception)
        assert "Net is given what e0.ckpt records: width=7, lr=0.1\n" in result.stderr

    def test_are_all_given_to_a_class_that_takes_any(self, lit):
        values = {"width": 7, "depth": 2, "momentum": 0.9, "self": 1}
        folder = save_run(lit, hyper_parameters=values, hparams_name="kwargs")
        run("bn-refresh", folder / "e1.ckpt", "--model", "lit.py:Keywords", *SPECS)

    @pytest.mark.parametrize("name", ["args", "kwargs"])
    def test_may_be_a_namespace(self, name, lit):
        """Saved by itself, or as one of the constructor's arguments."""
        values: Any = {"width": 7, "depth": 2, "lr": 0.1, "items": 5}
        if name == "kwargs":
            values = {"args": argparse.Namespace(**values)}
        folder = save_run(lit, hyper_parameters=values, hparams_name=name)
        run("bn-refresh", folder / "e1.ckpt", "--model", "lit.py:OfNamespace", *SPECS)

    def test_that_are_objects_are_named_and_their_classes_not_imported(self, lit):
        values = {"width": 7, "depth": 2, "act": torch.nn.ReLU(), "lr": Path("x")}
        folder = save_run(lit, hyper_parameters=values, hparams_name="kwargs")
        model = ("--model", "lit.py:OfObject")
        error = run("bn-refresh", folder / "e1.ckpt", *model, *SPECS, code=1).exception
        assert isinstance(error, RefreshError)
        assert (
            "OfObject needs act, and e1.ckpt records act (a torch.nn.modules.activation.ReLU)"
            in (str(error))
        )
        assert "`model_arg` act=VALUE" in str(error)
        run("bn-refresh", folder / "e1.ckpt", *model, *SPECS, "--model-arg", "act=relu")

    def test_that_are_not_needed_are_left_out_with_a_notice(self, lit):
        values = {"width": 7, "depth": 2, "lr": Path("x")}
        folder = save_run(lit, hyper_parameters=values, hparams_name="kwargs")
        said = run("bn-refresh", folder / "e1.ckpt", "--model", "lit.py:Net", *SPECS).stderr
        assert "objects, which are not read: lr (pathlib.PosixPath)" in said

    @pytest.mark.usefixtures("checkpoints")
    def test_are_not_in_an_average_and_the_error_says_so(self):
        run("average", "run", "-o", "swa.safetensors")
        arguments = ("swa.safetensors", "--model", "lit.py:Net", "--loader", "lit.py:Data")
        error = str(run("bn-refresh", *arguments, code=1).exception)
        assert "Net needs width, and the checkpoint records no hyper-parameters" in error
        assert "`model_arg` width=VALUE" in error
        misspelt = str(run("bn-refresh", *arguments, "--model-arg", "widht=7", code=1).exception)
        assert "Net does not take widht (`model_arg`); it takes width" in misspelt
        run("bn-refresh", *arguments, "--model-arg", "width=7", "--model-arg", "depth=2")

    @pytest.mark.usefixtures("checkpoints")
    def test_are_those_of_the_members_where_an_average_is_refreshed(self):
        specs = ("--model", "lit.py:Net", "--loader", "lit.py:Data")
        run("average", "run", "-o", "both.safetensors", *specs)
        run("average", "run", "-o", "swa.safetensors")
        run(
            "bn-refresh", "swa.safetensors", *specs,
            "--model-arg", "width=7", "--model-arg", "depth=2",
        )  # fmt: skip
        assert Path("both.safetensors").read_bytes() == Path("swa.safetensors").read_bytes()

    @pytest.mark.usefixtures("checkpoints")
    def test_of_one_checkpoint_are_those_of_all(self):
        run("average", "run", "-o", "swa.safetensors")
        specs = ("--model", "lit.py:Net", "--loader", "lit.py:Data")
        result = run("evaluate", "swa.safetensors", "run/e1.ckpt", *specs, "--json")
        assert len(json.loads(result.stdout)["evaluations"]) == 2
        run(
            "soup",
            "run",
            *specs,
            "--metric",
            "loss",
            "-o",
            "soup.pt",
            "--refresh-loader",
            "lit.py:Data",
        )

    @pytest.mark.usefixtures("checkpoints")
    def test_make_the_model_of_the_evaluation_around_a_refresh(self):
        run(
            "bn-refresh", "run/e1.ckpt", "--model", "lit.py:Net", *SPECS,
            "--eval-loader", "lit.py:Data",
        )  # fmt: skip


class TestDataModules:
    @pytest.mark.parametrize("as_instance", [False, True])
    def test_are_evaluated_on_their_held_out_batches(self, as_instance, lit, checkpoints):
        held_out = list(batches(lit))
        data = lit.Data() if as_instance else lit.Data
        found = ckptavg.evaluate(checkpoints, model=lit.Net, loader=data)
        assert found == ckptavg.evaluate(checkpoints, model=lit.Net, loader=held_out)

    def test_of_several_loaders_are_an_error(self, lit, checkpoints):
        with pytest.raises(RefreshError, match=r"Several\.train_dataloader\(\) returns 2 loaders"):
            ckptavg.refresh_checkpoint(
                checkpoints / "e1.ckpt", "new.ckpt", model=lit.Net, loader=lit.Several
            )

    def test_of_one_in_a_list_give_that(self, lit, checkpoints):
        found = ckptavg.evaluate(checkpoints, model=lit.Net, loader=lit.Several)
        assert found == ckptavg.evaluate(checkpoints, model=lit.Net, loader=lit.Data)


def batches(lit: Any) -> Any:
    data = lit.Data()
    data.stage = "validate"
    return data.val_dataloader()
