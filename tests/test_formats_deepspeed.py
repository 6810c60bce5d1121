"""Directories as DeepSpeed's engine writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckptavg
from ckptavg.discover import find
from ckptavg.errors import FormatError
from ckptavg.formats import open_checkpoint
from tests.oracle import naive_mean, same_bits


def save_engine(folder: Path, weights, *, stage: int = 2, ranks: int = 1, step: int = 1) -> Path:
    """The files of an engine: everything but the optimizer's content is as it writes it."""
    folder.mkdir(parents=True)
    states = {
        "module": weights,
        "ds_version": "0.17.0",
        "ds_config": {"zero_optimization": {"stage": stage}},
        "param_shapes": [{name: value.shape for name, value in weights.items()}],
        "global_steps": step,
        "optimizer": None,
    }
    for rank in range(ranks):
        name = f"mp_rank_{rank:02}_model_states.pt"
        torch.save(states, folder / (f"zero_pp_rank_{rank}_{name}" if stage == 3 else name))
        optimizer = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {"exp_avg": torch.ones(50)}}, optimizer)
    return folder


def test_a_run_of_the_engine(tmp_path):
    states = [{"w": torch.randn(5, 3).bfloat16()} for _ in range(3)]
    for step, state in enumerate(states):
        save_engine(tmp_path / "run" / f"global_step{10 * step}", state, step=10 * step)
    (tmp_path / "run" / "latest").write_text("global_step20")
    (tmp_path / "run" / "zero_to_fp32.py").write_text("")
    summary = ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    assert [source.step for source in summary.sources] == [("global_step", n) for n in (0, 10, 20)]
    found = load_file(tmp_path / "out.safetensors")["w"]
    assert same_bits(found, naive_mean([state["w"] for state in states]))


def test_a_directory_is_one_checkpoint(tmp_path):
    folder = save_engine(tmp_path / "global_step7", {"w": torch.ones(2)})
    assert find([folder]) == [(folder, True)]
    assert open_checkpoint(folder).path == folder


def test_beside_a_model_of_the_trainers_it_is_not_a_further_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-5"
    save_engine(folder / "global_step5", {"w": torch.ones(2)})
    (folder / "trainer_state.json").write_text("{}")
    assert open_checkpoint(folder).read("w").tolist() == [1, 1]
    torch.save({"w": torch.full((2,), 2.0)}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).read("w").tolist() == [2, 2]
    assert find([folder]) == [(folder, True)]


def test_partitioned_weights_are_refused_with_the_way_out(tmp_path):
    folder = save_engine(tmp_path / "x", {"w": torch.ones(0)}, stage=3, ranks=2)
    with pytest.raises(FormatError, match=r"stage 3.*zero_to_fp32\.py"):
        open_checkpoint(folder)


def test_slices_of_a_parallel_model_are_refused(tmp_path):
    folder = save_engine(tmp_path / "x", {"w": torch.ones(2)}, ranks=2)
    with pytest.raises(FormatError, match="weights in 2 pieces"):
        open_checkpoint(folder)
