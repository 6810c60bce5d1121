"""Models of torchvision: state dicts, and whole models in a pickle."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file

import ckptavg
from tests.oracle import assert_mean, same_bits

NORM = ("running_mean", "running_var", "num_batches_tracked")


def make(seed: int) -> Any:
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=3)
    model(torch.randn(2, 3, 32, 32))  # in training mode: statistics that differ
    return model


@pytest.mark.parametrize("whole", [False, True], ids=["state dict", "whole model"])
def test_the_mean_is_loaded_by_torchvision(tmp_path, whole, monkeypatch):
    (tmp_path / "run").mkdir()
    states = []
    for seed in range(3):
        model = make(seed)
        states.append(dict(model.state_dict()))
        torch.save(model if whole else model.state_dict(), tmp_path / "run" / f"epoch_{seed}.pth")
    with monkeypatch.context() as hidden:
        # Whatever a pickle names is not needed to read it.
        hidden.setitem(sys.modules, "torchvision", None)
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    result = load_file(tmp_path / "out.safetensors")
    assert_mean(result, states)
    torchvision.models.resnet18(num_classes=3).load_state_dict(result, strict=True)


@pytest.mark.parametrize("estimator", ["paper", "torch"])
def test_refreshed_statistics_are_those_of_update_bn(estimator):
    model = make(0)
    reference = copy.deepcopy(model)
    batches = [torch.randn(4, 3, 32, 32) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, reference)
    ckptavg.refresh_norm(model, batches, estimator=estimator, memory_format="contiguous")
    for name, wanted in reference.state_dict().items():
        found = model.state_dict()[name]
        if name.endswith(NORM):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        else:
            assert same_bits(found, wanted)
