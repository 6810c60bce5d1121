"""Run the scripts of `docs/recipes` as users do, and check what they print and leave behind."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import run
from tests.oracle import StateDict

FOLDER = Path(__file__).parents[1] / "docs" / "recipes"
Metric = dict[str, float]
Metrics = dict[str, Metric]
"""The metrics of each checkpoint by its name."""


def run_recipe(name: str, folder: Path) -> Metrics:
    """Copy a script into an empty folder and run it there, in a process of its own."""
    shutil.copy(FOLDER / f"{name}.py", folder)
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, f"{name}.py"],
        cwd=folder,
        env=os.environ | {"PATH": scripts},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not result.returncode, result.stdout + result.stderr
    return _tables(result.stdout)


def run_recipe_here(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Metrics:
    """The same in this process, commands too: starting all of them takes longer than their work."""
    shutil.copy(FOLDER / f"{name}.py", folder)
    printed = []

    def commands(arguments: list[str], *, check: bool) -> None:
        assert check
        assert arguments[:2] == ["sh", "-exc"]
        for line in arguments[2].strip().splitlines():
            program, *rest = shlex.split(line)
            assert program == "ckptavg"
            printed.append(run(*rest).stdout)

    monkeypatch.setattr(subprocess, "run", commands)
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
    return _tables("\n".join(printed))


def _tables(printed: str) -> Metrics:
    """The rows of the tables that `ckptavg evaluate` prints."""
    metrics: Metrics = {}
    names: list[str] | None = None
    for line in printed.splitlines():
        # An average has the first and the last step of its members.
        words = re.sub(r"\d+ to (?=\d)", "", line.replace("*", "")).split()
        if words[:2] in (["checkpoint", "step"], ["checkpoint", "epoch"]):
            names = words[2:]
        elif names and len(words) == len(names) + 2:
            values = map(float, words[2:])
            metrics[Path(words[0]).name] = dict(zip(names, values, strict=True))
        else:
            names = None
    return metrics


def assert_metrics(
    printed: Metrics, states: Mapping[str, StateDict], measure: Callable[[StateDict], Metric]
) -> None:
    """What was printed of each checkpoint is what `measure` finds of its state dict.

    Two classes may be so close together that the size of the batches decides between them.
    """
    assert printed.keys() == states.keys()
    for name, state in states.items():
        wanted = measure(state)
        assert printed[name].keys() == wanted.keys()
        for metric, value in wanted.items():
            slack = 2e-3 if metric in {"accuracy", "recall"} else 1e-5
            assert printed[name][metric] == pytest.approx(value, rel=1e-3, abs=slack), name


def assert_statistics(
    refreshed: StateDict,
    before: StateDict,
    model: nn.Module,
    names: set[str],
    passes: Iterable[Callable[[nn.Module], object]],
) -> None:
    """The statistics of some layers are those of a plain pass; all else is as before.

    Args:
        refreshed: after the refresh.
        before: the average.
        model: loads them.
        names: of the layers that are refreshed.
        passes: each gives a batch to the model, of which only those layers are in training mode.
    """
    model.load_state_dict(before)
    model.eval()
    for name in names:
        norm: Any = model.get_submodule(name)
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for call in passes:
            call(model)
    wanted = model.state_dict()
    assert furthest(refreshed, wanted, names) <= 1e-4
    assert furthest(refreshed, before, names) > 1e-2
    changed = {f"{name}.{end}" for name in names for end in ENDS}
    assert all(torch.equal(refreshed[name], before[name]) for name in refreshed.keys() - changed)


ENDS = ("running_mean", "running_var", "num_batches_tracked")


def furthest(refreshed: StateDict, wanted: StateDict, names: set[str]) -> float:
    """The largest difference of means or standard deviations, in running standard deviations."""
    distances = []
    for name in names:
        deviation = wanted[f"{name}.running_var"].double().sqrt()
        means = refreshed[f"{name}.running_mean"] - wanted[f"{name}.running_mean"]
        deviations = refreshed[f"{name}.running_var"].double().sqrt() - deviation
        distances += [(each / deviation).abs().max() for each in (means, deviations)]
    return float(max(distances))
