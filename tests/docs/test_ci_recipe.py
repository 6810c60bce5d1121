"""The page on the last step of a training job: its files parse, and its Makefile runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ckptavg.cli import cli

PAGE = (Path(__file__).parents[2] / "docs" / "recipes" / "ci.md").read_text()
TRAIN = """
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def make_model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

def train_loader():
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(40, 4, generator=draw)
    return DataLoader(TensorDataset(points), batch_size=10, shuffle=True)

if __name__ == "__main__":
    Path("ckpts").mkdir()
    for epoch in range(4):
        torch.manual_seed(epoch)
        torch.save({"model": make_model().state_dict(), "epoch": epoch}, f"ckpts/epoch_{epoch}.pt")
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    """The calls of `ckptavg average` in all of the files, each in one line."""
    [make] = blocks("make")
    [actions, gitlab] = map(yaml.safe_load, blocks("yaml"))
    steps = actions["jobs"]["train"]["steps"]
    scripts = [
        *blocks("sh"),
        make.replace("$@", "swa.safetensors"),
        *(step["run"] for step in steps if "run" in step),
        *gitlab["train"]["script"],
    ]
    text = "\n".join(scripts).replace("\\\n", " ")
    return [each.strip() for each in re.findall(r"ckptavg (?:average|verify) [^>\n]*", text)]


def test_every_command_line_is_one_that_the_command_takes():
    lines = command_lines()
    assert len(lines) >= 6
    for line in lines:
        _, name, *arguments = shlex.split(line)
        parent = click.Context(cli, **cli.context_settings)  # a command keeps its first help option
        context = click.Context(cli.commands[name], parent=parent, info_name=name)
        cli.commands[name].parse_args(context, arguments)


def test_the_yaml_is_as_the_services_read_it():
    actions, gitlab = map(yaml.safe_load, blocks("yaml"))
    assert {"name", "jobs"} < set(actions)
    assert all({"run", "uses"} & set(step) for step in actions["jobs"]["train"]["steps"])
    assert set(gitlab["train"]) == {"image", "script", "artifacts", "retry"}
    assert all(isinstance(line, str) for line in gitlab["train"]["script"])


def test_the_scripts_are_bash():
    for script in blocks("sh"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_table_of_options_is_that_of_the_command():
    [text] = blocks("toml")
    options = tomllib.loads(text)["tool"]["ckptavg"]["average"]
    known: set[Any] = {parameter.name for parameter in cli.commands["average"].params}
    assert set(options) <= known


@pytest.mark.slow
def test_the_makefile_runs(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    [make] = blocks("make")
    (tmp_path / "Makefile").write_text(make)
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for _ in range(2):  # the second time nothing is to be done
        done = subprocess.run(
            ["make", "swa.safetensors"],
            cwd=tmp_path,
            env=os.environ | {"PATH": scripts},
            capture_output=True,
            text=True,
            check=True,
        )
    assert "up to date" in done.stdout
    summary = json.loads((tmp_path / "swa.json").read_text())
    assert len(summary["sources"]) == 3
    assert (tmp_path / "swa.safetensors").is_file()
