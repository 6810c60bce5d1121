"""Checkpoints of a training with torchcontrib's SWA, whose averages are in its own state dict."""

from __future__ import annotations

import pytest
import torch

import ckptavg
from ckptavg.formats import open_checkpoint
from tests.oracle import naive_mean, same_bits

contrib = pytest.importorskip("torchcontrib.optim")


def train(folder, key, *, legacy=False):
    """Train with the real optimizer, and save it beside the model; returns the state dicts."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = contrib.SWA(base, swa_start=1, swa_freq=1, swa_lr=0.05)
    states = []
    for epoch in range(4):
        base.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        states.append(state)
        root = {"epoch": epoch, "state_dict": state, key: optimizer.state_dict()}
        path = folder / f"epoch_{epoch}.pt"
        torch.save(root, path, _use_new_zipfile_serialization=not legacy)
    return states


@pytest.mark.parametrize("key", ["optimizer", "swa", "swa_optimizer", "state", "weights"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_model_is_taken_and_nothing_of_the_optimizer(tmp_path, key, legacy):
    states = train(tmp_path, key, legacy=legacy)
    for epoch, state in enumerate(states):
        opened = open_checkpoint(tmp_path / f"epoch_{epoch}.pt")
        assert opened.key == "state_dict"
        assert opened.other_keys == ()
        assert set(opened.tensors) == set(state)
        assert opened.training.steps["epoch"] == epoch
    ckptavg.average(tmp_path, tmp_path / "out.pt")
    result = torch.load(tmp_path / "out.pt")
    for name in ("0.weight", "1.bias", "1.running_var"):
        assert same_bits(result[name], naive_mean([state[name] for state in states]))


def test_the_learning_rate_is_that_of_the_optimizer(tmp_path):
    train(tmp_path, "optimizer")
    assert open_checkpoint(tmp_path / "epoch_0.pt").training.learning_rate == pytest.approx(0.1)
    assert open_checkpoint(tmp_path / "epoch_3.pt").training.learning_rate == pytest.approx(0.05)


def test_the_optimizer_s_state_alone_is_no_state_dict(tmp_path):
    train(tmp_path, "optimizer")
    root = torch.load(tmp_path / "epoch_3.pt", weights_only=False)
    assert root["optimizer"].keys() == {"opt_state", "swa_state", "param_groups"}
    torch.save(root["optimizer"], tmp_path / "optimizer.pt")
    with pytest.raises(ckptavg.CkptAvgError, match="no state dict"):
        open_checkpoint(tmp_path / "optimizer.pt")
