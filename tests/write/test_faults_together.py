"""Two runs with one output: one wins, and the other says so."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults import Fault, tree, why_not
from tests.faults_scenes import EVERY_OR_SOME, Stage, folder_in_memory

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

NAMES = [
    "a new file", "a new file, no link", "a file over an old one", "a new directory",
    "a directory over an old one", "a directory over an old one, no exchange",
]  # fmt: skip
OTHER = ("--weights", "linear")
"""What makes the second run's output another one."""
LOST = ("another process wrote it meanwhile", "exists already")
HELD = signal.SIGSTOP


class Contested(Stage):
    """A stage that knows what the second run's output is."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        root, done = self.play(Fault(), more=OTHER)
        assert done.code == 0
        self.other = self.output(root)
        assert self.other != self.new


@pytest.fixture(params=NAMES, scope="module")
def stage(request):
    with folder_in_memory() as folder:
        yield Contested(request.param, folder)


def lost(err: str) -> bool:
    return err.count("\n") == 1 and any(word in err for word in LOST)


def names_in_its_place(stage: Stage, number: int) -> bool:
    """Whether the change is made with a lock on the directory, for which others wait."""
    call = [call for call in stage.calls if call.kind not in ("read", "open")][number - 1]
    locked = "--force" in stage.scene.arguments or "link" in stage.scene.refused
    return locked and call.kind == "rename" and "/" not in call.path


@EVERY_OR_SOME
def test_one_that_comes_and_goes_while_the_other_is_at_work(stage, every):
    for number in stage.instants(every):
        if names_in_its_place(stage, number):
            continue
        root = stage.set()
        first = stage.begin(Fault(number=number, act="before", value=HELD), root)
        assert first.go_on() is None
        was_there = stage.output(root) == stage.new
        second = stage.begin(Fault(), root, more=OTHER, number=1).to_end()
        done = first.to_end()
        where = f"at change {number}: {done.err}{second.err}"
        stage.check_inputs(root)
        assert stage.left_in(root) == [], where
        if second.code:
            assert done.code == 0, where
            assert lost(second.err), where
            assert stage.output(root) == stage.new, where
        else:
            assert stage.output(root) == stage.other, where
            # Replacing what was finished when it began is no quarrel.
            assert done.code == 0 if was_there else lost(done.err), where
        stage.clear(root)


def test_one_that_comes_while_the_other_gives_the_output_its_name_waits(stage):
    for number in range(1, stage.count() + 1):
        if not names_in_its_place(stage, number):
            continue
        root = stage.set()
        first = stage.begin(Fault(number=number, act="before", value=HELD), root)
        assert first.go_on() is None
        was_there = stage.output(root) == stage.new
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(stage.begin(Fault(), root, more=OTHER, number=1).to_end)
            with pytest.raises(TimeoutError):
                second.result(0.5)
            assert first.to_end().code == 0
            won = second.result().code == 0
            assert won or lost(second.result().err)
        # While a directory is moved aside there is nothing yet that would be replaced.
        assert won == was_there or (won and "exchange" in stage.scene.refused)
        assert stage.output(root) == (stage.other if won else stage.new)
        assert stage.left_in(root) == []
        stage.clear(root)


@EVERY_OR_SOME
@pytest.mark.parametrize("act", ["before", "after"])
def test_one_with_another_output_leaves_alone_what_a_live_one_has_begun(stage, every, act):
    more = ("-o", "other/" if stage.scene.output == "out" else "other.safetensors")
    for number in stage.instants(every):
        if names_in_its_place(stage, number):
            continue
        root = stage.set()
        first = stage.begin(Fault(number=number, act=act, value=HELD), root)
        if first.go_on() is not None:
            continue
        second = stage.begin(Fault(), root, more=(*OTHER, *more), number=1).to_end()
        done = first.to_end()
        assert (done.code, done.err, second.code, second.err) == (0, "", 0, ""), f"change {number}"
        assert stage.output(root) == stage.new
        assert tree(root / more[1].rstrip("/")) == stage.other
        assert len(stage.left_in(root)) == 1
        stage.clear(root)


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_at_the_same_time_one_wins_at_least(stage, times):
    with ThreadPoolExecutor(2) as pool:
        for _ in range(times):
            root = stage.set()
            runs = (
                stage.begin(Fault(), root),
                stage.begin(Fault(), root, more=OTHER, number=1),
            )
            done = list(pool.map(lambda run: run.to_end(), runs))
            won = [one.code == 0 for one in done]
            assert any(won)
            assert all(one.code == 0 or lost(one.err) for one in done)
            allowed = [
                out for out, is_won in zip((stage.new, stage.other), won, strict=True) if is_won
            ]
            assert stage.output(root) in allowed
            assert stage.left_in(root) == []
            if "--force" not in stage.scene.arguments:
                assert won.count(True) == 1
            stage.clear(root)
