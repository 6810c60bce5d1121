"""The recipes that need torch alone."""

from __future__ import annotations

import functools
import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import cdist

from tests.held_out import naive_metrics
from tests.oracle import StateDict, naive_mean
from tests.recipes import (
    FOLDER,
    Metrics,
    assert_metrics,
    assert_statistics,
    run_recipe_here,
)

AVERAGES = ("swa.safetensors", "refreshed.safetensors")


@pytest.fixture
def recipe_here(user_folder, no_fsync, monkeypatch) -> Any:
    """Runs a recipe and its commands in this process; returns its module and what it printed."""

    def play(name: str) -> tuple[Any, Metrics]:
        printed = run_recipe_here(name, user_folder, monkeypatch)
        return importlib.import_module(name), printed

    return play


def states_of(last: str, key: str = "model") -> dict[str, StateDict]:
    """The last checkpoint and the two averages, from the working directory."""
    states = {last: torch.load(f"ckpts/{last}")[key]}
    return states | {name: load_file(name) for name in AVERAGES}


def assert_average(average: StateDict, paths: list[str], key: str = "model") -> None:
    states = [torch.load(f"ckpts/{path}")[key] for path in paths]
    for name, value in average.items():
        is_last = not value.is_floating_point() or re.search(r"\._[uv]$", name)
        wanted = states[-1][name] if is_last else naive_mean([state[name] for state in states])
        assert torch.equal(value, wanted), name


def test_segmentation(recipe_here):
    module, printed = recipe_here("segmentation")
    states = states_of("epoch_7.pt")
    model, batches = module.make_model(), list(module.held_out())
    before, after = (states[name] for name in AVERAGES)
    assert_average(before, [f"epoch_{epoch}.pt" for epoch in range(3, 8)])
    names = {"1", "4", "7", "11"}
    passes = [lambda model, x=images: model(x) for images, _ in module.train_loader()]
    assert_statistics(after, before, model, names, passes)

    def measure(state: StateDict) -> dict[str, float]:
        """From the table of predicted and true classes."""
        model.load_state_dict(state)
        model.eval()
        table = np.zeros((3, 3))
        for images, masks in batches:
            with torch.no_grad():
                predicted = model(images).argmax(1)
            np.add.at(table, (predicted.numpy(), masks.numpy()), 1)
        both = np.diag(table)
        return {"mean_iou": float((both / (table.sum(0) + table.sum(1) - both)).mean())}

    assert_metrics(printed, states, measure)


def test_frozen_backbone(recipe_here):
    module, printed = recipe_here("frozen_backbone")
    states = states_of("epoch_7.pt")
    before, after = (states[name] for name in AVERAGES)
    assert_average(before, [f"epoch_{epoch}.pt" for epoch in range(3, 8)])
    passes = [lambda model, x=images: model(x) for images, _ in module.train_loader()]
    assert_statistics(after, before, module.Net(), {"head.3"}, passes)
    batches = list(module.held_out())
    measure = functools.partial(naive_metrics, module.Net(), batches=batches)
    assert_metrics(printed, states, measure)
    assert printed["refreshed.safetensors"]["loss"] < printed["epoch_7.pt"]["loss"]


def test_spectral_gan(recipe_here):
    module, printed = recipe_here("spectral_gan")
    states = states_of("step_800.pt", "generator")
    before, after = (states[name] for name in AVERAGES)
    steps = [f"step_{step}.pt" for step in range(450, 801, 50)]
    assert_average(before, steps, "generator")
    both = torch.load("gan.pt")
    for key in ("generator", "discriminator"):
        assert_average(both[key], steps, key)
    module.make_discriminator().load_state_dict(both["discriminator"], strict=True)
    model = module.make_generator()
    passes = [lambda model, x=noise: model(x) for noise in module.noise_loader()]
    assert_statistics(after, before, model, {"1", "4"}, passes)
    [(noise, points)] = module.held_out()

    def measure(state: StateDict) -> dict[str, float]:
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            generated = model(noise).numpy()
        real = points.numpy()
        between, *within = (
            cdist(*pair).mean()
            for pair in ((generated, real), (generated, generated), (real, real))
        )
        return {"energy_distance": float(2 * between - sum(within))}

    assert_metrics(printed, states, measure)


def test_vocabulary(recipe_here):
    module, printed = recipe_here("vocabulary")
    epochs = [torch.load(f"ckpts/epoch_{epoch}.pt")["model"] for epoch in range(2, 8)]
    assert ["inv_freq" in epoch for epoch in epochs] == [True] + [False] * 5
    assert [len(epoch["embed.weight"]) for epoch in epochs] == [10] + [12] * 5
    states = {"epoch_7.pt": epochs[-1], "swa.safetensors": load_file("swa.safetensors")}
    average = states["swa.safetensors"]
    assert average.keys() == epochs[-1].keys()
    for name, value in average.items():
        wanted = [epoch[name] for epoch in (epochs[-1:] if "embed" in name else epochs)]
        assert torch.equal(value, naive_mean(wanted)), name
    model, batches = module.Net(), list(module.held_out())

    def measure(state: StateDict) -> dict[str, float]:
        return {"accuracy": naive_metrics(model, state, batches)["accuracy"]}

    assert_metrics(printed, states, measure)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmentation", "frozen_backbone", "spectral_gan", "vocabulary"])
def test_in_processes_of_their_own(name, recipe, recipe_here):
    _, printed = recipe(name)
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, here = recipe_here(name)
    assert printed == here


def test_every_recipe_is_in_the_table():
    page = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\)", page, re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in FOLDER.glob("*.py"))
