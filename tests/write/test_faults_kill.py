"""A run that is killed or interrupted at any instant leaves the old output or the new one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults import Fault, environment, tree, why_not
from tests.faults_scenes import (
    EVERY_OR_SOME,
    LITTER,
    REFRESH,
    TRAIN,
    Stage,
    every_or_one_of,
    library,
    stages,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
stage = stages()


@every_or_one_of(8)
def test_killed_before_any_change_it_leaves_the_old_or_the_new_output(stage, every):
    for index, number in enumerate(stage.instants(every)):
        root, done = stage.play(Fault(number=number, act="before", value=signal.SIGKILL))
        where = f"killed before change {number}"
        assert done.code == -signal.SIGKILL, where
        stage.check_inputs(root)
        left, moved_aside = stage.left_in(root), False
        if "exchange" in stage.scene.refused and not (root / stage.scene.output).exists():
            # There is no single step on such a file system: the next run puts it back.
            [aside] = [root / name for name in left if name.endswith(".old")]
            assert tree(aside) == stage.old, where
            moved_aside = True
        else:
            assert stage.is_whole(stage.output(root)), where
        assert all(LITTER.fullmatch(name) for name in left), where
        if index % 4 == 1 or moved_aside:
            again(stage, root)
        stage.clear(root)


def again(stage: Stage, root: Path) -> None:
    """The next run cleans up, and makes the output."""
    output, written = root / stage.scene.output, stage.output(root)
    if stage.old is None and (written == stage.new or (stage.scene.several and written)):
        # It was finished, or one of several outputs was: that would be refused.
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    _, done = stage.play(Fault(), root)
    assert done.code == 0, done.err
    stage.check_inputs(root)
    assert stage.left_in(root) == []
    assert stage.output(root) == stage.new


@EVERY_OR_SOME
@pytest.mark.parametrize(
    ("number", "act"),
    [
        (signal.SIGINT, "before"),
        (signal.SIGTERM, "after"),
        pytest.param(signal.SIGINT, "after", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "before", marks=pytest.mark.slow),
    ],
)
def test_interrupted_at_any_change_it_says_so_and_leaves_no_temporary_file(
    stage, every, number, act
):
    word = "interrupted" if number == signal.SIGINT else "terminated"
    for position in stage.instants(every):
        root, done = stage.play(Fault(number=position, act=act, value=number))
        where = f"at change {position}"
        assert (done.code, done.err.strip()) == (128 + number, f"ckptavg: {word}"), where
        stage.check_inputs(root)
        assert stage.left_in(root) == [], where
        assert stage.is_whole(stage.output(root)), where
        stage.clear(root)


def test_interrupted_while_it_reads_it_leaves_what_was_there(stage):
    reads = stage.count(("read",))
    for position, number in ((1, signal.SIGINT), (reads // 2, signal.SIGTERM)):
        fault = Fault(kinds=("read",), number=position, act="before", value=number)
        root, done = stage.play(fault)
        assert done.code == 128 + number
        stage.check_inputs(root)
        assert stage.left_in(root) == []
        assert stage.output(root) == stage.old
        stage.clear(root)


def command(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ckptavg", *arguments],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["a new file"], indirect=True)
def test_a_process_that_is_started_anew_dies_and_is_cleaned_up_after_just_so(stage):
    """What the warm process's children do is what the command does."""
    root = stage.set()
    last = stage.count()
    fault = Fault(number=last - 1, act="before", value=signal.SIGKILL)
    arguments = [sys.executable, "-m", "ckptavg", *stage.scene.arguments]
    killed = subprocess.run(
        arguments, cwd=root, env=environment(library(), root, fault), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert stage.output(root) == stage.new  # it had got its name
    assert len(stage.left_in(root)) == 1
    (root / stage.scene.output).unlink()
    subprocess.run(arguments, cwd=root, check=True)
    assert stage.left_in(root) == []
    assert stage.output(root) == stage.new


def test_the_next_run_says_what_it_took_away_and_spares_what_is_not_its_own(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    for name in (".ckptavg-0123abcd.tmp", ".ckptavg-mine.tmp", ".ckptavg-0123abcd.tmp.bak"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".ckptavg-01234567.tmp").symlink_to(tmp_path / "a.safetensors")
    done = command(tmp_path, "average", "a.safetensors", "-o", "o.safetensors")
    _, errors = done.communicate()
    assert done.returncode == 0
    assert "removed what a killed run left: .ckptavg-0123abcd.tmp" in errors
    assert sorted(os.listdir(tmp_path)) == [
        ".ckptavg-01234567.tmp", ".ckptavg-0123abcd.tmp.bak", ".ckptavg-mine.tmp",
        "a.safetensors", "o.safetensors",
    ]  # fmt: skip


RUNS = {
    "a new file": ("average", "run", "-o", "out.safetensors"),
    "a file over an old one": ("average", "run", "-o", "out.safetensors", "--force"),
    "a new directory": ("average", "folders", "-o", "out/", "--max-shard-size", "4MB"),
    "a directory over an old one": (
        "average", "folders", "-o", "out/", "--max-shard-size", "4MB", "--force",
    ),
    "a file refreshed in place": ("bn-refresh", "out.safetensors", *REFRESH),
    "a directory refreshed in place": ("bn-refresh", "out", *REFRESH),
    "an average with a refresh": (
        "average", "run", "-o", "out.safetensors", "--force", *REFRESH,
    ),
}  # fmt: skip
INSTANTS = 20


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_instants_spread_over_a_run(tmp_path, name):
    """140 instants in all, of processes that write 16 MB with several threads."""
    template = tmp_path / "template"
    arguments = RUNS[name]
    output = "out.safetensors" if "out.safetensors" in arguments else "out"
    save_large(template)
    if "new" not in name:
        made = ("average", "run" if output != "out" else "folders", "-o", output, "--last", "2")
        more = ("--max-shard-size", "4MB") if output == "out" else ()
        made_by = command(template, *made, *more)
        made_by.communicate()
        assert made_by.returncode == 0
    old, inputs = tree(template / output), all_but(template, output)
    good = shutil.copytree(template, tmp_path / "good")
    begun = time.monotonic()
    process = command(good, *arguments)
    process.communicate()
    took = time.monotonic() - begun
    assert process.returncode == 0
    new = tree(good / output)
    assert new not in (None, old)
    root, codes = tmp_path / "root", []
    for instant in range(INSTANTS):
        shutil.copytree(template, root)
        process = command(root, *arguments)
        try:
            process.communicate(timeout=took * (instant + 0.5) / INSTANTS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        codes.append(process.returncode)
        assert tree(root / output) in (old, new)
        assert all_but(root, output) == inputs
        if instant % 4 == 0 and codes[-1]:
            process = command(root, *arguments)
            _, errors = process.communicate()
            assert process.returncode == 0 or (old is None and "exists already" in errors)
            assert tree(root / output) == new
            assert not [name for name in os.listdir(root) if LITTER.match(name)]
        shutil.rmtree(root)
    assert codes.count(-signal.SIGKILL) > INSTANTS // 2
    assert set(codes) <= {0, -signal.SIGKILL}


def save_large(root: Path) -> None:
    """Three models of 16 MB, as files and as directories, and the user's code for them."""
    wide = TRAIN.replace(
        "nn.Linear(3, 4), nn.BatchNorm1d(4)", "nn.Linear(1000, 4000), nn.BatchNorm1d(4000)"
    )
    root.mkdir()
    (root / "run").mkdir()
    (root / "train.py").write_text(wide.replace("8, 3,", "8, 1000,"))
    for step in range(3):
        torch.manual_seed(step)
        model = torch.nn.Sequential(torch.nn.Linear(1000, 4000), torch.nn.BatchNorm1d(4000))
        folder = root / "folders" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(model.state_dict(), root / "run" / f"step_{step}.safetensors", {"format": "pt"})
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")


def all_but(root: Path, output: str) -> dict[str, bytes | None]:
    return {
        name: data
        for name, data in (tree(root) or {}).items()
        if not LITTER.match(name) and name.split("/")[0] not in (output, "__pycache__")
    }
