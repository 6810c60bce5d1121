"""What becomes of tensors that a mean would destroy, and of those that are the same everywhere."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import ckptavg
from ckptavg.evaluation.evaluate import EvaluationOptions
from ckptavg.formats import open_checkpoint
from ckptavg.landscape.explore import ExploreOptions
from ckptavg.landscape.segment import segment

pytestmark = pytest.mark.usefixtures("no_fsync")


def saved(states: list[dict[str, torch.Tensor]], folder: Path) -> Path:
    folder.mkdir()
    for step, state in enumerate(states):
        torch.save(state, folder / f"epoch_{step}.pt")
    return folder


def averaged(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    output = folder.parent / "average.pt"
    ckptavg.average(folder, output, force=True, **options)
    state: dict[str, torch.Tensor] = torch.load(output)
    return state


def provenance(path: Path) -> dict[str, Any]:
    entry = open_checkpoint(path).provenance
    assert entry is not None
    return dict(entry)


def mean(states: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return torch.stack([state[name].double() for state in states]).mean(0).float()


def trained(norm, steps: int = 60) -> list[dict[str, torch.Tensor]]:
    """States of a network at the end of each 20 steps, in training mode: vectors are iterated."""
    model = nn.Sequential(norm(nn.Linear(6, 16)), nn.Tanh(), norm(nn.Linear(16, 3)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    states = []
    for step in range(steps):
        values = torch.randn(32, 6)
        loss = nn.functional.cross_entropy(model(values), values[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


class TestSpectralNorm:
    @pytest.mark.parametrize(
        ("norm", "ends"),
        [
            (spectral_norm, ("weight_u", "weight_v")),
            (parametrizations.spectral_norm, ("_u", "_v")),
        ],
        ids=["hook", "parametrization"],
    )
    def test_vectors_are_the_last_members(self, norm, ends, tmp_path, notices):
        states = trained(norm)
        average = averaged(saved(states, tmp_path / "run"))
        vectors = [name for name in average if name.rpartition(".")[2] in ends]
        assert len(vectors) == 4
        assert all(torch.equal(average[name], states[-1][name]) for name in vectors)
        assert "4 vectors of spectral norm are the last checkpoint's" in notices.text
        for name in average.keys() - set(vectors):
            torch.testing.assert_close(average[name], mean(states, name))
        # The network is nearly that whose vectors have converged for the averaged weights.
        model = nn.Sequential(norm(nn.Linear(6, 16)), nn.Tanh(), norm(nn.Linear(16, 3)))
        model.load_state_dict(average)
        values = torch.randn(200, 6)
        outputs = model.eval()(values)
        model.train()
        for _ in range(100):
            model(values)
        difference = (model.eval()(values) - outputs).abs().max()
        assert difference < 0.2 * outputs.abs().max()

    def test_vectors_of_biggan_and_of_weight_bar_are_the_last_members(self, tmp_path):
        names = ("linear.u0", "linear.sv0", "block.weight_u", "block.weight_v")
        states = [
            {name: torch.randn(1, 4) for name in (*names, "linear.weight", "block.weight_bar")}
            for _ in range(3)
        ]
        average = averaged(saved(states, tmp_path / "run"))
        assert all(torch.equal(average[name], states[-1][name]) for name in names)
        torch.testing.assert_close(average["block.weight_bar"], mean(states, "block.weight_bar"))

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_names_like_theirs_are_averaged(self, tmp_path, notices):
        """Weight norm's `weight_v` is the weight; a Conformer has a `pos_bias_u`."""
        states = [
            {
                **weight_norm(nn.Linear(4, 3)).state_dict(),
                "attention.pos_bias_u": torch.randn(2, 4),
                "attention.pos_bias_v": torch.randn(2, 4),
                "u0": torch.randn(3),
            }
            for _ in range(3)
        ]
        average = averaged(saved(states, tmp_path / "run"))
        for name in average:
            torch.testing.assert_close(average[name], mean(states, name))
        assert "spectral" not in notices.text

    def test_a_point_between_two_checkpoints_has_the_vectors_of_the_nearer(self, tmp_path):
        states = trained(spectral_norm)
        saved(states, tmp_path / "run")
        seen: list[dict[str, torch.Tensor]] = []

        def look(model, batches):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
            return 0.0

        model = nn.Sequential(
            spectral_norm(nn.Linear(6, 16)), nn.Tanh(), spectral_norm(nn.Linear(16, 3))
        )
        options = ExploreOptions(
            evaluation=EvaluationOptions(model=model, loader=[0], metric=look, device="cpu")
        )
        ends = [tmp_path / "run" / f"epoch_{step}.pt" for step in (0, 2)]
        segment(ends, tmp_path / "out", options, positions=(-0.5, 0.0, 0.4, 0.8, 1.0))
        assert len(seen) == 5
        for state in seen:
            vectors = [state["0.weight_u"], state["2.weight_v"]]
            assert any(
                all(
                    torch.equal(vector, end[name])
                    for vector, name in zip(vectors, ("0.weight_u", "2.weight_v"), strict=True)
                )
                for end in (states[0], states[2])
            )


class TestFrozenNorms:
    @pytest.fixture
    def states(self) -> list[dict[str, torch.Tensor]]:
        """Layer 1 has the same statistics and counter everywhere; layer 3 has not."""
        base = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5))
        base(torch.randn(8, 4))
        states = []
        for step in range(3):
            state = {name: value.clone() for name, value in base.state_dict().items()}
            for name in ("0.weight", "2.weight", "3.weight", "3.running_mean", "3.running_var"):
                state[name] += step
            state["3.num_batches_tracked"] += step
            states.append(state)
        return states

    def test_layers_with_the_same_statistics_everywhere_are_recorded(self, states, tmp_path):
        average = averaged(saved(states, tmp_path / "run"))
        entry = provenance(tmp_path / "average.pt")["norm_stats"]
        assert entry == {"state": "stale", "frozen": ["1"]}
        assert torch.equal(average["1.running_var"], states[0]["1.running_var"])
        torch.testing.assert_close(average["3.running_var"], mean(states, "3.running_var"))

    def test_an_average_of_frozen_layers_alone_is_not_stale(self, states, tmp_path):
        for state in states:
            state.update({name: states[0][name] for name in state if name.startswith("3.r")})
            state["3.num_batches_tracked"] = states[0]["3.num_batches_tracked"]
        summary = ckptavg.average(saved(states, tmp_path / "run"), tmp_path / "average.safetensors")
        assert summary.norm_stats == "frozen"
        assert provenance(tmp_path / "average.safetensors")["norm_stats"] == {"state": "frozen"}
        again = averaged(tmp_path / "run", dtype="float16")
        assert torch.equal(again["1.running_mean"], states[0]["1.running_mean"].half())

    def test_a_counter_that_runs_tells_of_a_layer_that_is_not_frozen(self, states, tmp_path):
        for step, state in enumerate(states):
            state["1.num_batches_tracked"] += step
        averaged(saved(states, tmp_path / "run"))
        assert provenance(tmp_path / "average.pt")["norm_stats"] == {"state": "stale"}

    def test_statistics_of_a_weighted_sum_are_summed(self, states, tmp_path):
        run = saved(states, tmp_path / "run")
        average = averaged(run, weights=[1, 1, 2], normalize=False)
        torch.testing.assert_close(average["1.running_var"], 4 * states[0]["1.running_var"])
        assert provenance(tmp_path / "average.pt")["norm_stats"] == {"state": "stale"}

    def test_nan_everywhere_passes_as_in_all_tensors(self, states, tmp_path, caplog):
        for state in states:
            state["1.running_mean"] = torch.full((5,), torch.nan)
        with caplog.at_level(logging.INFO, "ckptavg"):
            average = averaged(saved(states, tmp_path / "run"), dtype="float16")
        assert average["1.running_mean"].isnan().all()
