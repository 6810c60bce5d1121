"""Directories of DeepSpeed's ZeRO: real ones, and others made like them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptavg
from ckptavg.errors import FormatError
from ckptavg.formats import open_checkpoint
from tests.helpers import assert_same, outcome, refusal, save_torch
from tests.oracle import assert_mean

REAL = Path(__file__).parent / "zero3"
STEPS = [REAL / "global_step2", REAL / "global_step3"]
STAGES_1_2 = REAL.with_name("zero12")


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """What DeepSpeed's `zero_to_fp32.py` makes of a directory."""
    return load_file(folder.with_suffix(".safetensors"))


class TestRealDirectories:
    @pytest.mark.parametrize("folder", STEPS, ids=["2 ranks", "3 ranks"])
    def test_have_what_zero_to_fp32_makes_of_them(self, folder):
        opened = open_checkpoint(folder)
        assert_same(opened, expected(folder))
        assert opened.tensors["tie.weight"] == opened.tensors["tied.weight"]
        assert opened.step == ("global_step", int(folder.name[-1]))
        assert (opened.key, opened.container) == ("module", "shards")

    def test_of_unlike_numbers_of_ranks_are_averaged(self, tmp_path):
        run = tmp_path / "run"
        for folder in STEPS:
            shutil.copytree(folder, run / folder.name)
        (run / "latest").write_text("global_step3")
        summary = ckptavg.average(run, tmp_path / "out.safetensors")
        assert [source.name for source in summary.sources] == [each.name for each in STEPS]
        assert_mean(load_file(tmp_path / "out.safetensors"), [*map(expected, STEPS)])

    @pytest.mark.parametrize("kind", ["model", "optim"])
    def test_need_all_files_whole(self, tmp_path, kind):
        folder = Path(shutil.copytree(STEPS[1], tmp_path / "x"))
        [path] = folder.glob(f"*rank_1*{kind}_states.pt")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert refusal(folder).startswith(f"/{path.name}: ")
        path.unlink()
        name = f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt"
        assert refusal(folder) == f"/{name}: is missing; it has a part of the weights"
        with pytest.raises(FormatError, match=name):
            ckptavg.average([folder, STEPS[0]], tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    @pytest.mark.parametrize(
        "folder", [STEPS[1], STAGES_1_2 / "stage2"], ids=lambda each: each.name
    )
    def test_with_one_rank_s_file_for_another_are_refused(self, tmp_path, folder):
        folder = Path(shutil.copytree(folder, tmp_path / "x"))
        first, second, _ = sorted(folder.glob("*optim_states.pt"))
        shutil.copy(first, second)
        message = f"/{second.name}: has the same contents as {first.name}: is it a copy?"
        assert refusal(folder) == message

    def test_of_a_rank_more_or_of_two_saves_are_refused(self, tmp_path):
        folder = Path(shutil.copytree(STEPS[0], tmp_path / "x"))
        shutil.copytree(STEPS[1], folder, dirs_exist_ok=True)
        (folder / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
        (folder / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
        assert "is of another number of ranks than 2" in refusal(folder)
        optimizer = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        shutil.copy(folder / f"bf16_{optimizer}", folder / optimizer)
        assert f"/{optimizer}: is from another save than bf16_{optimizer}" in refusal(folder)
        model = "zero_pp_rank_1_mp_rank_01_model_states.pt"
        shutil.copy(folder / "zero_pp_rank_1_mp_rank_00_model_states.pt", folder / model)
        assert "zero_to_fp32.py" in refusal(folder)


class TestRealDirectoriesOfStages1And2:
    @pytest.mark.parametrize("stage", ["stage1", "stage2", "stage2-fp32"])
    def test_have_what_zero_to_fp32_makes_of_them(self, stage):
        folder = STAGES_1_2 / stage
        opened = open_checkpoint(folder)
        wanted = expected(folder)
        if stage == "stage1":  # whose frozen parameters DeepSpeed's script does not find
            module = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
            wanted |= {name: value for name, value in module.items() if "frozen" in name}
        assert_same(opened, wanted)
        assert opened.tensors["tie.weight"] == opened.tensors["tied.weight"]
        assert opened.step == ("global_step", 3 if stage == "stage2" else 2)
        assert (opened.key, opened.container) == ("module", "shards")

    def test_are_averaged_in_float32(self, tmp_path):
        run = tmp_path / "run"
        for step, stage in ((2, "stage1"), (3, "stage2")):
            shutil.copytree(STAGES_1_2 / stage, run / f"global_step{step}")
        ckptavg.average(run, tmp_path / "out.safetensors", skip="^frozen")
        states = [expected(STAGES_1_2 / stage) for stage in ("stage1", "stage2")]
        trained = [{n: v for n, v in each.items() if "frozen" not in n} for each in states]
        assert_mean(load_file(tmp_path / "out.safetensors"), trained)

    def test_need_the_optimizer_s_files_of_all_ranks_whole(self, tmp_path):
        folder = Path(shutil.copytree(STAGES_1_2 / "stage2", tmp_path / "x"))
        [path] = folder.glob("*rank_1*")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert refusal(folder).startswith(f"/{path.name}: ")
        path.unlink()
        name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        assert refusal(folder) == f"/{name}: is missing; it has a part of the weights"
        path.write_bytes(content)
        shutil.copy(path, path.with_name(name))
        assert refusal(folder) == f"/{name}: is from another save than {path.name}"
        path.with_name(name).unlink()
        [last] = folder.glob("*rank_2*")
        last.unlink()
        assert "is of another number of ranks than 2" in refusal(folder)

    def test_need_the_model_s_file(self, tmp_path):
        folder = Path(shutil.copytree(STAGES_1_2 / "stage2", tmp_path / "x"))
        (folder / "mp_rank_00_model_states.pt").unlink()
        message = "/*_model_states.pt: is missing, which says where the weights are"
        assert refusal(folder) == message
        code, _, said = outcome("convert", folder, "-o", tmp_path / "out.safetensors")
        assert code == 1
        assert f"{folder}{message}" in said
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_have_weights_of_16_bits_where_no_optimizer_is_left(self, tmp_path):
        folder = Path(shutil.copytree(STAGES_1_2 / "stage2", tmp_path / "x"))
        for path in folder.glob("*optim_states.pt"):
            path.unlink()
        assert open_checkpoint(folder).tensors["last.weight"].dtype.name == "bfloat16"


Change = Callable[[dict[str, Any], dict[str, Any]], object]


def save(folder: Path, change: Change | None = None) -> Path:
    """Two ranks' files as DeepSpeed has them, each after a change."""
    folder.mkdir()
    for rank in range(2):
        flat = torch.arange(4.0) + 4 * rank
        model = {
            "module": {"w": torch.empty(0), "v": torch.empty(0), "b": torch.ones(2), "extra": 3},
            "buffer_names": ["b"],
            "param_shapes": [{"w": torch.Size([5])}],
            "frozen_param_shapes": {"v": torch.Size([1])},
            "frozen_param_fragments": {"v": torch.full((1,), 7.0)},
            "shared_params": {},
            "ds_version": "0.19.8",
        }
        optimizer = {"fp32_flat_groups": [flat[:1], flat[1:3]], "partition_count": 2}
        if change is not None:
            change(model, optimizer)
        name = f"zero_pp_rank_{rank}_mp_rank_00_"
        save_torch(model, folder / f"{name}model_states.pt")
        save_torch({"optimizer_state_dict": optimizer}, folder / f"{name}optim_states.pt")
    return folder


def test_pieces_that_span_groups_and_padding(tmp_path):
    opened = open_checkpoint(save(tmp_path / "x"))
    wanted = {"w": torch.tensor([0.0, 1, 2, 4, 5]), "v": torch.full((1,), 7.0), "b": torch.ones(2)}
    assert_same(opened, wanted)
    assert opened.other_entries == {"extra": 3}


def test_a_rank_may_have_nothing_but_padding(tmp_path):
    for rank in range(6):
        # Two elements of `w`, which has seven, and one of `v`, which has one; the rest is padding.
        flat = torch.tensor([2.0 * rank, 2.0 * rank + 1, 9]) if rank < 4 else torch.zeros(3)
        model = {
            "module": {"w": torch.empty(0), "v": torch.empty(0)},
            "buffer_names": [],
            "param_shapes": [{"w": torch.Size([7]), "v": torch.Size([1])}],
        }
        optimizer = {"fp32_flat_groups": [flat], "partition_count": 6}
        name = f"zero_pp_rank_{rank}_mp_rank_00_"
        save_torch(model, tmp_path / f"{name}model_states.pt")
        save_torch({"optimizer_state_dict": optimizer}, tmp_path / f"{name}optim_states.pt")
    wanted = {"w": torch.arange(7.0), "v": torch.full((1,), 9.0)}
    assert_same(open_checkpoint(tmp_path), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, o: o.pop("fp32_flat_groups"), "has no fp32_flat_groups"),
        (lambda _, o: o.update(partition_count=[3]), "another number of ranks"),
        (lambda _, o: o["fp32_flat_groups"].append(torch.ones(1)),
         "has 4 elements of weights, and the shapes say 3"),
        (lambda _, o: o.update(fp32_flat_groups=[torch.ones(1, 3)]), "is not flat"),
        (lambda _, o: o.update(fp32_flat_groups=[torch.ones(6)[::2]]), "is not flat"),
        (lambda _, o: o.update(fp32_flat_groups=[torch.ones(1), torch.ones(2).half()]),
         "w: has pieces of float32 and float16"),
        (lambda _, o: o.update(fp32_flat_groups=[3]), "no whole tensor"),
        (lambda m, _: m["param_shapes"].append({"w": (5,)}), "w: is in param_shapes twice"),
        (lambda m, _: m.update(param_shapes=[{"w": (-5,)}]), "w: has no valid shape"),
        (lambda m, _: m.update(param_shapes=[{"w": (1 << 40, 1 << 40)}]), "w: has no valid shape"),
        (lambda m, _: m.update(param_shapes=[{"w": (True,)}]), "w: has no valid shape"),
        (lambda m, _: m.update(param_shapes=[{"w": 5}]), "has no valid param_shapes"),
        (lambda m, _: m.update(param_shapes=[{5: (5,)}]), "has no valid param_shapes"),
        (lambda m, _: m.update(param_shapes=None), "the shapes say 0"),
        (lambda m, _: m["module"].update(u=torch.empty(0)), "u: has no shape in param_shapes"),
        (lambda m, _: m["frozen_param_fragments"].clear(), "v: is not among frozen_param"),
        (lambda m, _: m.update(frozen_param_fragments={"v": torch.ones(2)}), "the shapes say 1"),
    ],
)  # fmt: skip
def test_what_deepspeed_does_not_write_is_refused(tmp_path, change, message):
    text = refusal(save(tmp_path / "x", change))
    assert message in text
    assert "_states.pt: " in text


def test_shapes_without_end_take_no_time(tmp_path):
    shapes = {f"w{number}": torch.Size([1 << 40]) for number in range(1_000)}
    folder = save(tmp_path / "x", lambda model, _: model.update(param_shapes=[shapes] * 1_000))
    assert "twice" in refusal(folder)


def save_groups(folder: Path, change: Change | None = None) -> Path:
    """Two ranks' files of stage 2: two groups, with elements that are nobody's."""
    folder.mkdir()
    groups = [torch.arange(8.0), torch.arange(4.0) + 10]
    model = {
        "module": {"w": torch.empty(2, 3).half(), "v": torch.empty(1).half(), "b": torch.ones(2)},
        "param_shapes": [{"w": torch.Size([2, 3])}, {"v": torch.Size([1]), "u": torch.Size([])}],
        "shared_params": {"tied": "v"},
        "ds_version": "0.19.8",
    }
    for rank in range(2):
        optimizer = {
            "single_partition_of_fp32_groups": [group.chunk(2)[rank].clone() for group in groups],
            "partition_count": [2, 2],
            "param_alignment_paddings": [[0], [2, 0]],
        }
        if change is not None:
            change(model, optimizer)
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        save_torch({"optimizer_state_dict": optimizer}, folder / name)
    save_torch(model, folder / "mp_rank_00_model_states.pt")
    return folder


def test_groups_have_padding_between_and_behind_parameters(tmp_path):
    opened = open_checkpoint(save_groups(tmp_path / "x"))
    v = torch.tensor([10.0])
    wanted = {"w": torch.arange(6.0).reshape(2, 3), "v": v, "tied": v, "u": torch.tensor(13.0)}
    assert_same(opened, {**wanted, "b": torch.ones(2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, o: o["single_partition_of_fp32_groups"].pop(), "param_shapes of 2 groups"),
        (lambda _, o: o.update(single_partition_of_fp32_groups=3), "has no single_partition"),
        (lambda _, o: o.update(partition_count=[2, 1]), "another number of ranks"),
        (lambda _, o: o.update(param_alignment_paddings=[[0]]), "param_alignment_paddings"),
        (lambda _, o: o.update(param_alignment_paddings=[[0], [2]]), "param_alignment_paddings"),
        (lambda _, o: o.update(param_alignment_paddings=[[0], [2, -1]]), "alignment_paddings"),
        (lambda _, o: o.update(param_alignment_paddings=[[0], [9, 0]]), "the shapes say 11"),
        (lambda _, o: o["single_partition_of_fp32_groups"].__setitem__(0, torch.ones(5)), "say 6"),
        (lambda m, _: m.update(param_shapes=[{"w": (1,)}, {"v": (1,), "u": ()}]), "shapes say 1"),
        (lambda m, _: m.update(param_shapes=[{"w": (2, 3)}, {"w": (1,)}]), "twice"),
    ],
)  # fmt: skip
def test_what_deepspeed_does_not_write_in_stage_2_is_refused(tmp_path, change, message):
    text = refusal(save_groups(tmp_path / "x", change))
    assert message in text
    assert "_states.pt: " in text
