"""Options: their groups in the help, the fields that they fill, and those without effect."""

from __future__ import annotations

import dataclasses

import click
import pytest
import torch
from safetensors.torch import load_file

from ckptavg import cli
from ckptavg.cli.command import Command
from tests.helpers import process, run
from tests.oracle import random_state_dicts, save_run

GROUPS = [
    "Which checkpoints:",
    "How they are averaged:",
    "What is written:",
    "Refresh of the norm statistics:",
    "Running:",
]


def commands() -> dict[str, click.Command]:
    """The commands by name, those within a group among them."""
    found = dict(cli.cli.commands)
    group = found.pop("landscape")
    assert isinstance(group, click.Group)
    return {**found, **group.commands}


@pytest.fixture
def ckpts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "ckpts", random_state_dicts(3))
    return tmp_path / "ckpts"


def test_help_shows_options_in_groups():
    lines = run("average", "--help").stdout.splitlines()
    assert [line for line in lines if line in GROUPS] == GROUPS
    assert lines.index("  -h, --help       Show this message and exit.") > lines.index("Running:")


@pytest.mark.parametrize("name", commands())
def test_every_option_is_in_one_group_of_its_command(name):
    command = commands()[name]
    assert isinstance(command, Command)
    with click.Context(command, help_option_names=["-h", "--help"]) as context:
        formatter = context.make_formatter()
        command.format_options(context, formatter)
    lines = formatter.getvalue().splitlines()
    shown = [line.split()[0].removesuffix(",") for line in lines if line.startswith("  -")]
    options = [param for param in command.params if isinstance(param, click.Option)]
    assert sorted(shown) == sorted(["-h", *(option.opts[0] for option in options)])


def test_options_are_named_after_the_fields_that_they_fill():
    from ckptavg.batchnorm.options import RefreshOptions
    from ckptavg.merge.recipe import AverageOptions
    from ckptavg.select.rules import Selection

    fields = {
        field.name
        for kind in (AverageOptions, Selection, RefreshOptions)
        for field in dataclasses.fields(kind)
    }
    names = {str(param.name) for param in cli.cli.commands["average"].params}
    assert names - fields == {"inputs", "output", "config", "json", "quiet"}


WITHOUT_EFFECT = [
    (["--metric", "loss"], "--metric has no effect without --best"),
    (["--mode", "min"], "--mode has no effect without --best"),
    (["--metrics", "m.json"], "--metrics has no effect without --best"),
    (["--lr-recorded", "next"], "--lr-recorded has no effect without --lr-minima"),
    (["--unit", "epoch"], "--unit has no effect without --start, --steps, --cycle or --weights"),
    (["--no-normalize", "--weights", "ema:0.9"], "--no-normalize has no effect with --weights"),
    (["--max-shard-size", "5GB"], "--max-shard-size has no effect with an --output that is one"),
    (["-o", "o.pt", "--drop-aliases"], "--drop-aliases has no effect with an --output that is a"),
    (["-o", "o.pt", "--container", "last", "--dtype", "float16"], "effect with --container last"),
    (["-o", "o.pt", "--container", "last", "--max-shard-size", "1GB"], "with --container last"),
    (["-o", "o.pt", "--container", "last", "--drop-aliases"], "effect with --container last"),
    (["--model", "m:M"], "--model has no effect without --loader"),
    (["--loader", "m:L"], "--loader has no effect without --model"),
    (["--train-mode", "norm"], "--train-mode has no effect without --model"),
    (["--model-arg", "a=1"], "--model-arg has no effect without --model"),
    (["--max-samples", "3"], "--max-samples has no effect without --model"),
]


@pytest.mark.parametrize(("arguments", "message"), WITHOUT_EFFECT, ids=str)
def test_an_option_without_effect_is_wrong_usage(arguments, message, ckpts, tmp_path):
    (tmp_path / "m.json").write_text("{}")
    result = run("average", ckpts, "-o", "o.safetensors", *arguments, code=2)
    assert message in result.stderr
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--unit", "step", "--cycle", "1"],
        ["--unit", "step", "--weights", "power:0.1"],
        ["--no-normalize", "--weights", "linear"],
        ["--container", "weights", "--dtype", "float16"],
        ["--drop-aliases"],
        ["--force", "--dry-run"],
        ["--hash", "--dry-run"],
        ["-o", "o/", "--max-shard-size", "5GB", "--drop-aliases"],
    ],
    ids=str,
)
def test_an_option_with_effect_is_none(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for step, state in enumerate(random_state_dicts(2)):
        torch.save({"state_dict": state, "step": step + 1}, tmp_path / "run" / f"step_{step}.pt")
    run("average", "run", "-o", "o.safetensors", *arguments)


def test_in_inspect_a_metric_is_shown_without_a_choice(ckpts, tmp_path):
    (tmp_path / "m.json").write_text('{"step_0": 1}')
    assert "loss" in run("inspect", ckpts, "--metric", "loss").stdout
    for arguments in (["--mode", "min"], ["--metrics", "m.json"], ["--lr-recorded", "used"]):
        assert "has no effect without" in run("inspect", ckpts, *arguments, code=2).stderr


def test_defaults_from_the_configuration_need_no_effect(ckpts, tmp_path):
    """They are not what the user has asked for in this call, and are dropped."""
    (tmp_path / "pyproject.toml").write_text(
        "[tool.ckptavg.average]\n"
        "mode = 'max'\nhash = true\nunit = 'epoch'\ntrain-mode = 'full'\ndrop-aliases = true\n"
        "max-shard-size = '5GB'\nno-normalize = true\nmodel = 'm:M'\n"
    )
    run("average", ckpts, "-o", "o.safetensors", "--weights", "ema:0.5", "--dry-run")
    run("average", ckpts, "-o", "o.pt")
    run("average", ckpts, "-o", "o.pt", "-f", "--mode", "min", code=2)


def test_what_the_configuration_sets_counts_for_other_options(ckpts, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.ckptavg.average]\nweights = 'ema:0.9'\n")
    result = run("average", ckpts, "-o", "o.safetensors", "--no-normalize", code=2)
    assert "--no-normalize has no effect with --weights" in result.stderr


def test_a_flag_that_says_no_is_one_in_the_configuration_as_well(ckpts, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.ckptavg.average]\nno-normalize = true\n")
    run("average", ckpts, "-o", "sum.safetensors", "--weights", "1,1,1")
    (tmp_path / "pyproject.toml").write_text("[tool.ckptavg.average]\nno-normalize = false\n")
    run("average", ckpts, "-o", "mean.safetensors", "--weights", "1,1,1")
    total, mean = load_file("sum.safetensors")["scalar"], load_file("mean.safetensors")["scalar"]
    torch.testing.assert_close(total, 3 * mean)


def test_values_of_any_type_in_the_configuration_are_read_like_text(ckpts, tmp_path):
    config = tmp_path / "pyproject.toml"
    config.write_text("[tool.ckptavg.average]\nlast = [1, 2]\nweights = ['uniform', 'linear']\n")
    run("average", ckpts, "-o", "out")
    assert len(list((tmp_path / "out").iterdir())) == 4
    config.write_text("[tool.ckptavg.average]\nlast = 3\nweights = [0.2, 0.3, 0.5]\nexpect = 3\n")
    run("average", ckpts, "-o", "o.safetensors")
    for wrong in ("last = 0", "max-shard-size = true", "model = 3", "weights = {}", "expect = []"):
        config.write_text(f"[tool.ckptavg.average]\n{wrong}\n")
        run("average", ckpts, "-o", "out/", "-f", code=2)


def test_a_missing_option_may_stand_in_the_configuration(tmp_path):
    done = process("bn-refresh", "a.pt", cwd=tmp_path)
    assert done.returncode == 2
    assert "Missing option '--model'" in done.stderr
    assert "[tool.ckptavg] of pyproject.toml" in done.stderr


def test_unknown_weights_are_wrong_usage(ckpts):
    result = run("average", ckpts, "-o", "o.safetensors", "--weights", "best", code=2)
    assert "Invalid value for '--weights': unknown weights 'best'; they are" in result.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("false", False),
        ("False", False),
        ("true", True),
        ("None", None),
        ("1e-3", 0.001),
        ("[1, 2]", [1, 2]),
        ("(1, 2)", (1, 2)),
        ("{a = 1}", {"a": 1}),
        ("resnet50", "resnet50"),
        ("a=b", "a=b"),
        ("2020-01-01", "2020-01-01"),
        ("1\nother = 2", "1\nother = 2"),
        ("", ""),
    ],
)
def test_keyword_arguments_are_values_of_python_or_toml(text, value):
    from ckptavg.cli.declarations import _key_value

    assert _key_value(f"name={text}") == ("name", value)
