"""Directories as DeepSpeed's engine writes them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckptavg
from ckptavg.errors import FormatError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.statedict import check_kind
from ckptavg.select.candidates import find_candidates
from tests.helpers import save_engine
from tests.oracle import naive_mean, same_bits


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
    assert find_candidates([folder]) == {folder: None}
    assert open_checkpoint(folder).path == folder


def test_beside_a_model_of_the_trainers_it_is_not_a_further_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-5"
    save_engine(folder / "global_step5", {"w": torch.ones(2)})
    (folder / "trainer_state.json").write_text("{}")
    assert open_checkpoint(folder).read("w").tolist() == [1, 1]
    torch.save({"w": torch.full((2,), 2.0)}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).read("w").tolist() == [2, 2]
    assert find_candidates([folder]) == {folder: None}


def test_slices_of_a_parallel_model_are_refused(tmp_path):
    folder = save_engine(tmp_path / "x", {"w": torch.ones(2)}, ranks=2)
    with pytest.raises(FormatError, match="weights in 2 pieces"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model", "checkpoint"])
def test_the_engine_s_folder_in_another_trainer_s_checkpoint_has_the_weights(tmp_path, name):
    """As accelerate and Lightning have it write."""
    folder = save_engine(tmp_path / "step_7" / name, {"w": torch.full((2,), 7.0)}).parent
    (folder / "random_states_0.pkl").touch()
    (folder / "scheduler.bin").touch()
    assert find_candidates([folder]) == {folder: None}
    opened = open_checkpoint(folder)
    assert (opened.path, opened.read("w").tolist()) == (folder, [7, 7])


def test_two_of_the_engine_s_folders_are_two_checkpoints(tmp_path):
    for name in ("pytorch_model", "checkpoint"):
        save_engine(tmp_path / name, {"w": torch.ones(2)})
    assert [path.name for path in find_candidates([tmp_path])] == ["checkpoint", "pytorch_model"]


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_are_elsewhere_are_known_by_their_shapes(tmp_path, frozen):
    folder = save_engine(tmp_path / "x", {"w": torch.ones(2), "v": torch.ones(0)})
    path = folder / "mp_rank_00_model_states.pt"
    states = torch.load(path)
    shapes = {"v": torch.Size([3])}
    states |= {"frozen_param_shapes": shapes} if frozen else {"param_shapes": [{}, shapes]}
    torch.save(states, path)
    with pytest.raises(FormatError, match=r"stage 3.*zero_to_fp32\.py"):
        open_checkpoint(folder)


def test_parameters_without_an_element_are_weights_like_others(tmp_path):
    weights = {"w": torch.ones(2), "empty": torch.ones(0)}
    folder = save_engine(tmp_path / "x", weights)
    assert set(open_checkpoint(folder).tensors) == {"w", "empty"}


@pytest.mark.parametrize("stage", [None, "3", [3], {"stage": 3}])
def test_an_odd_configuration_is_no_trouble(tmp_path, stage):
    folder = save_engine(tmp_path / "x", {"w": torch.ones(2)})
    path = folder / "mp_rank_00_model_states.pt"
    odd = {"ds_config": {"zero_optimization": stage}, "param_shapes": stage}
    torch.save(torch.load(path) | odd, path)
    if stage == {"stage": 3}:
        with pytest.raises(FormatError, match="stage 3"):
            open_checkpoint(folder)
    else:
        assert open_checkpoint(folder).read("w").tolist() == [1, 1]


def test_one_group_of_shapes_many_times_takes_no_longer_than_once():
    shapes = dict.fromkeys(map(str, range(30_000)), (1,))
    root = {"module": {}, "ds_version": "0.16", "param_shapes": [shapes] * 30_000}
    started = time.process_time()
    check_kind(Path("x.pt"), root, {})
    assert time.process_time() - started < 30
