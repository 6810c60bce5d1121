"""Advice: each sentence follows from what is recorded, and is absent where nothing is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptavg.select.advice import advice
from ckptavg.select.run import find_run
from tests.helpers import run


def saved(folder: Path, rates, weights) -> None:
    folder.mkdir()
    for step, (rate, value) in enumerate(zip(rates, weights, strict=True), 1):
        state = {"state_dict": {"w": torch.as_tensor(value, dtype=torch.float32)}, "epoch": step}
        if rate is not None:
            state["optimizer"] = {"state": {}, "param_groups": [{"lr": rate, "params": [0]}]}
        torch.save(state, folder / f"epoch_{step}.pt")


def advised(folder: Path, last: int) -> list[str]:
    checkpoints = find_run([folder]).checkpoints
    return advice(checkpoints, checkpoints[-last:])


CENTRE = np.random.default_rng(0).standard_normal(500)
SWING = [CENTRE + 0.1 * np.random.default_rng(n).standard_normal(500) for n in range(1, 9)]


class TestLearningRates:
    @pytest.mark.parametrize(
        ("rates", "last", "expected"),
        [
            ([0.1] * 8, 3, "is constant: 0.1 in all 8 checkpoints. There averages stand in for"),
            (
                [0.4, 0.4, 0.4, 0.4, 0.2, 0.1, 0.01, 0.01],
                3,
                (
                    "had decayed before the window: from 0.4 (epoch_1.pt) to 0.1 (epoch_6.pt). "
                    "There averages gain little"
                ),
            ),
            (
                [0.4, 0.4, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1],
                4,
                "decays within the window: from 0.4 (epoch_5.pt) to 0.1 (epoch_8.pt)",
            ),
            ([0.01, 0.1, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4], 8, "had not decayed: 0.01 at the beginn"),
            (
                [0.4, 0.1] * 4,
                6,
                (
                    "cyclical: between 0.1 and 0.4 within the window. 3 of 6 members are at its "
                    "minima; `lr_minima` takes these alone, as in SWA (arXiv 1803.05407). The "
                    "recorded learning rates count as those that were used before saving. If your "
                    "training loop calls scheduler.step() once an epoch and then saves, add "
                    "`lr_recorded` next: the minima are then epoch_3.pt, epoch_5.pt, epoch_7.pt."
                ),
            ),
        ],
    )
    def test_say_how_the_window_lies_in_the_schedule(self, tmp_path, rates, last, expected):
        saved(tmp_path / "run", rates, SWING)
        assert expected in advised(tmp_path / "run", last)[0]

    def test_at_minima_alone_there_is_nothing_to_change(self, tmp_path):
        saved(tmp_path / "run", [0.4, 0.1] * 4, SWING)
        checkpoints = find_run([tmp_path / "run"]).checkpoints
        text = advice(checkpoints, checkpoints[1::2])[0]
        assert "4 of 4 members are at its minima, as in SWA" in text
        assert text.endswith("SWA also leaves out the first part of the training: add `start` 50%.")
        assert advice(checkpoints, checkpoints[3::2])[0].endswith("as in SWA (arXiv 1803.05407).")

    def test_count_as_the_ones_that_the_user_says_are_recorded(self, tmp_path):
        saved(tmp_path / "run", [0.4, 0.1] * 4, SWING)
        checkpoints = find_run([tmp_path / "run"]).checkpoints
        assert (
            "3 of 3 members are at its minima" in advice(checkpoints, checkpoints[2::2], "next")[0]
        )

    def test_say_the_same_of_a_shorter_window_in_a_decay(self, tmp_path):
        saved(tmp_path / "run", [0.4, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1, 0.05], SWING)
        ends = {
            advised(tmp_path / "run", last)[0].partition("There averages")[2] for last in (5, 2)
        }
        [end] = ends
        assert "compare windows, and the last checkpoint" in end

    @pytest.mark.parametrize("rates", [[None] * 8, [0.1] * 7 + [None]])
    def test_that_are_not_recorded_say_nothing(self, tmp_path, rates):
        saved(tmp_path / "run", rates, SWING)
        [only] = advised(tmp_path / "run", 8)
        assert "Neighbouring members" in only


class TestDistances:
    def test_of_members_around_a_centre(self, tmp_path):
        saved(tmp_path / "run", [None] * 8, SWING)
        [text] = advised(tmp_path / "run", 8)
        mean = np.mean(SWING, axis=0)
        norm = np.linalg.norm(mean)
        apart = np.mean([np.linalg.norm(each - mean) for each in SWING]) / norm
        steps = np.median(np.linalg.norm(np.diff(SWING, axis=0), axis=1)) / norm
        assert f"are {100 * steps:.2g} % of their norm apart" in text
        assert f"members {100 * apart:.2g} % from their mean (by 500 of 500 weights)" in text
        assert text.startswith("The members move about a centre")

    def test_of_members_on_the_way(self, tmp_path):
        way = [CENTRE + 0.1 * n for n in range(8)]
        saved(tmp_path / "run", [None] * 8, way)
        [text] = advised(tmp_path / "run", 8)
        # Mean distance 2 steps; around a centre it would be sqrt(7 / 16).
        assert f"{2 / np.sqrt(7 / 16):.1f} times as far as if they swung" in text
        assert text.startswith("The weights still move in one direction")

    def test_of_members_that_hardly_differ(self, tmp_path):
        saved(tmp_path / "run", [None] * 3, [CENTRE, CENTRE + 1e-6, CENTRE - 1e-6])
        [text] = advised(tmp_path / "run", 3)
        assert text.startswith("The average hardly differs from each member.")

    def test_are_of_several_members(self, tmp_path):
        saved(tmp_path / "run", [0.1] * 8, SWING)
        assert advised(tmp_path / "run", 1) == []

    @pytest.mark.parametrize("value", [np.zeros(5), np.full(5, np.nan)])
    def test_that_mean_nothing_are_left_out(self, tmp_path, value):
        saved(tmp_path / "run", [None] * 2, [value, value + 0.0])
        checkpoints = find_run([tmp_path / "run" / "epoch_1.pt"]).checkpoints
        assert advice(checkpoints * 2, checkpoints * 2) == []

    def test_come_from_one_read_of_a_sample(self, tmp_path, monkeypatch):
        saved(tmp_path / "run", [0.1] * 3, [np.ones(200_000) + n for n in range(3)])
        checkpoints = find_run([tmp_path / "run"]).checkpoints
        sizes, pread = [], os.pread

        def counted(*arguments: int) -> bytes:
            sizes.append(arguments[1])
            return pread(*arguments)

        monkeypatch.setattr(os, "pread", counted)
        [_, text] = advice(checkpoints, checkpoints)
        assert "(by 1,024 of 200,000 weights)" in text
        assert sizes == [1024 * 4] * 3


class TestCommands:
    @pytest.fixture(autouse=True)
    def _run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        saved(Path("run"), [0.4, 0.1] * 4, SWING)

    def test_inspect_and_a_dry_run_end_with_it(self):
        sentence = "are at its minima; --lr-minima --start 50% takes those of the second half alone"
        inspected = run("inspect", "run").stdout.splitlines()
        assert sentence in inspected[-2]
        dry = run("average", "run", "-o", "x.safetensors", "--dry-run").stdout.splitlines()
        assert inspected[-2:] == dry[-2:]
        assert sentence not in run("average", "run", "-o", "x.safetensors").stdout

    def test_inspect_draws_the_schedule(self):
        result = run("inspect", "run", "--lr-minima", "--plot", "schedule.png")
        assert result.stdout.splitlines()[-1] == "  wrote schedule.png"
        assert Path("schedule.png").read_bytes().startswith(b"\x89PNG")

    def test_without_rates_there_is_nothing_to_draw(self):
        saved(Path("other"), [None] * 8, SWING)
        result = run("inspect", "other", "--plot", "schedule.png", code=1)
        assert "nothing to plot" in str(result.exception)
        assert not Path("schedule.png").exists()
