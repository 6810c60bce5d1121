"""Checkpoints that change under a run: it names them, or uses them as they were."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults import Fault, Outcome, why_not
from tests.faults_scenes import EVERY_OR_SOME, Stage, folder_in_memory, state

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

VICTIMS = {
    "a new file": "run/step_1.safetensors",
    "a new directory": "run/checkpoint-1/model.safetensors",
    "a training checkpoint": "run/step_1.ckpt",
}


class Watched(Stage):
    """A stage with a file that changes."""

    def __init__(self, name: str, folder: Path, victim: str) -> None:
        super().__init__(name, folder)
        self.victim = victim


@pytest.fixture(params=VICTIMS, scope="module")
def stage(request):
    with folder_in_memory() as folder:
        yield Watched(request.param, folder, VICTIMS[request.param])


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path: Path) -> None:
    """The same bytes at the same place, as by a second save of the same weights."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data)


def replace(path: Path) -> None:
    """Another file of the same size under the same name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    other.rename(path)


def replace_by_a_copy(path: Path) -> None:
    """The same size and time; only the inode is another."""
    status = path.stat()
    other = path.with_name("other")
    shutil.copyfile(path, other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def remove(path: Path) -> None:
    path.unlink()


def become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_unreadable(path: Path) -> None:
    """As root may read anything: a link that leads nowhere."""
    path.unlink()
    path.symlink_to("nowhere")


CHANGES_OF_A_FILE = [
    append, truncate, rewrite, replace, replace_by_a_copy, remove, become_a_directory,
    become_unreadable,
]  # fmt: skip


def change_when_held(
    stage: Watched, fault: Fault, change: Callable[[Path], None]
) -> tuple[Path, Outcome]:
    root = stage.set()
    run = stage.begin(fault, root)
    assert run.go_on() is None, "it ended, and was to be held"
    change(root / stage.victim)
    return root, run.to_end()


def refused(stage: Watched, root: Path, done: Outcome) -> None:
    """It failed with one line that names the file, and left no output."""
    assert done.code == 1, done
    assert done.err.startswith(f"ckptavg: error: {stage.victim}: "), done
    assert done.err.count("\n") == 1, done
    assert stage.left_in(root) == []
    assert stage.output(root) is None


@pytest.mark.parametrize("change", CHANGES_OF_A_FILE)
def test_changed_between_planning_and_reading_is_named(stage, change):
    fault = Fault(kinds=("allocate",), number=1, act="before", value=signal.SIGSTOP)
    root, done = change_when_held(stage, fault, change)
    refused(stage, root, done)
    stage.clear(root)


@pytest.mark.parametrize("change", CHANGES_OF_A_FILE)
def test_changed_after_the_last_byte_was_read_is_named(stage, change):
    """The bytes may be those of neither state: a training may have been writing meanwhile."""
    opened = [call.path for call in stage.calls if call.kind == "open"]
    again = len(opened) - opened[::-1].index(stage.victim)
    fault = Fault(kinds=("open",), number=again, act="before", value=signal.SIGSTOP)
    root, done = change_when_held(stage, fault, change)
    refused(stage, root, done)
    stage.clear(root)


@pytest.mark.parametrize("change", [append, rewrite, replace, remove])
def test_what_is_copied_along_is_watched_as_well(tmp_path, change):
    stage = Watched("a new directory", tmp_path, "run/checkpoint-2/config.json")
    fault = Fault(kinds=("write",), number=1, act="before", value=signal.SIGSTOP)
    refused(stage, *change_when_held(stage, fault, change))


def saved_anew(path: Path) -> None:
    """Other weights, saved as trainers save: under another name first."""
    other = path.with_name("other.tmp")
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state(7), "optimizer": {"lr": 0.5}, "global_step": 1}, other)
    else:
        save_file(state(7), other, {"format": "pt"})
    other.rename(path)


def saved_in_place(path: Path) -> None:
    """Other weights, written over the old ones."""
    saved = path.with_name("saved.tmp")
    shutil.copyfile(path, saved)
    saved_anew(saved.rename(path.with_name(f"saved{path.suffix}")))
    path.write_bytes(path.with_name(f"saved{path.suffix}").read_bytes())
    path.with_name(f"saved{path.suffix}").unlink()


@EVERY_OR_SOME
@pytest.mark.parametrize("change", [saved_anew, saved_in_place])
def test_saved_anew_at_any_instant_it_counts_as_it_was_or_as_it_is(stage, every, change):
    """Never a mixture of both."""
    root = stage.set()
    change(root / stage.victim)
    stage.play(Fault(), root)
    other = stage.output(root)
    assert other not in (None, stage.new)
    kinds = ("read", "open", "create", "allocate", "write", "sync", "link", "rename")
    outcomes = []
    for number in stage.instants(every, kinds):
        fault = Fault(kinds=kinds, number=number, act="before", value=signal.SIGSTOP)
        root, done = change_when_held(stage, fault, change)
        if done.code:
            refused(stage, root, done)
        else:
            assert stage.output(root) in (stage.new, other), f"at call {number}"
        outcomes.append(done.code)
        stage.clear(root)
    assert 0 in outcomes
    assert 1 in outcomes


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_still_being_written_is_named(stage, left):
    root = stage.set()
    path = root / stage.victim
    os.truncate(path, left if left >= 0 else path.stat().st_size - 1)
    _, done = stage.play(Fault(), root)
    refused(stage, root, done)


def test_a_checkpoint_that_is_replaced_during_its_refresh_is_not_lost(tmp_path):
    stage = Stage("a file refreshed in place", tmp_path)
    for kinds, number in ((("create",), 1), (("write",), 1), (("sync",), 1)):
        root = stage.set()
        fault = Fault(kinds=kinds, number=number, act="before", value=signal.SIGSTOP)
        run = stage.begin(fault, root)
        assert run.go_on() is None
        save_file(state(9), root / "other")
        (root / "other").rename(root / "out.safetensors")
        theirs = (root / "out.safetensors").read_bytes()
        done = run.to_end()
        assert done.code == 1
        assert done.err.startswith("ckptavg: error: out.safetensors: ")
        assert done.err.count("\n") == 1
        assert (root / "out.safetensors").read_bytes() == theirs
        assert stage.left_in(root) == []
