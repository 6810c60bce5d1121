"""What in a directory is a checkpoint, and what only stands beside some."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.errors import FormatError, SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.words import is_no_checkpoint
from ckptavg.select.candidates import find_candidates
from tests.helpers import run, save_dcp, save_engine


def save(path: Path, value: float = 1.0) -> Path:
    """A file of weights, in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"w": torch.full((2,), value)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def found(folder: Path) -> list[str]:
    """What a directory stands for: paths below it, `.` for itself, apart from optimizers."""
    paths = [path for path in find_candidates([folder]) if not is_no_checkpoint(path.name)]
    return [path.relative_to(folder).as_posix() for path in paths]


class TestDirectory:
    def test_of_a_trainer_stands_for_its_numbered_checkpoints(self, tmp_path):
        save(tmp_path / "model.safetensors")
        for step in (500, 1000):
            save(tmp_path / f"checkpoint-{step}" / "model.safetensors", float(step))
        assert found(tmp_path) == ["checkpoint-500", "checkpoint-1000"]
        result = run("average", tmp_path, "-o", tmp_path / "out.safetensors")
        assert "left out: model.safetensors\n" in result.stderr

    def test_of_a_finished_pipeline_stands_for_the_checkpoints_in_it(self, tmp_path):
        (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
        save(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
        assert find_candidates([tmp_path]) == {tmp_path: None}
        for step in (5, 10):
            save(tmp_path / f"checkpoint-{step}" / "unet" / "diffusion_pytorch_model.safetensors")
        assert found(tmp_path) == ["checkpoint-5/unet", "checkpoint-10/unet"]

    def test_with_other_weights_beside_its_own_stays_itself(self, tmp_path):
        folder = save(tmp_path / "x" / "model.safetensors").parent
        for name in (
            "ref/adapter_model.safetensors",
            "2_Dense/model.safetensors",
            "ema_0.999.pt",
            "model.fp16.safetensors",
        ):
            save(folder / name)
        assert find_candidates([folder]) == {folder: None}

    def test_with_shards_does_not_leave_them_out(self, tmp_path):
        folder = tmp_path / "x"
        torch.save({"w": torch.ones(2), "v": torch.ones(2)}, tmp_path / "one.pt")
        ckptavg.average(tmp_path / "one.pt", f"{folder}/", max_shard_size=8)
        assert len(list(folder.glob("model-*.safetensors"))) == 2
        result = run("average", folder, "-o", tmp_path / "out.safetensors")
        assert "left out" not in result.stderr

    def test_without_checkpoints_is_an_error_that_says_where_some_are(self, tmp_path):
        save(tmp_path / "a" / "b" / "c" / "step_1.safetensors")
        with pytest.raises(SelectionError, match="no checkpoint found") as caught:
            find_candidates([tmp_path])
        assert str(caught.value).endswith(f"; name a directory that has some: {tmp_path}/a/b/c")

    def test_without_any_names_several_folders_that_have_some(self, tmp_path):
        """As Lightning leaves them: a run has begun twice."""
        for version in range(2):
            folder = tmp_path / f"version_{version}" / "checkpoints"
            folder.mkdir(parents=True)
            for epoch in range(2):
                (folder / f"epoch={epoch}.ckpt").touch()
        with pytest.raises(SelectionError) as caught:
            find_candidates([tmp_path])
        folders = [f"{tmp_path}/version_{version}/checkpoints" for version in range(2)]
        assert str(caught.value).endswith(f"name a directory that has some: {', '.join(folders)}")

    def test_with_links_to_each_other_are_looked_through_once(self, tmp_path):
        for name, other in (("a", "b"), ("b", "a")):
            (tmp_path / name).mkdir()
            (tmp_path / name / f"epoch_{name}1.pt").write_bytes(b"")
            for number in range(9):
                (tmp_path / name / f"step_{number}").symlink_to(tmp_path / other)
        assert len(find_candidates([tmp_path / "a"])) <= 3

    def test_with_links_to_itself_is_looked_through_once(self, tmp_path):
        for number in range(40):
            (tmp_path / f"link_{number}").symlink_to(tmp_path)
            (tmp_path / f"again_{number}").symlink_to(tmp_path / f"link_{number}")
        with pytest.raises(SelectionError, match="no checkpoint found"):
            find_candidates([tmp_path])
        save(tmp_path / "a" / "b" / "step_1.safetensors")
        with pytest.raises(
            SelectionError, match=f"name a directory that has some: {tmp_path}/a/b$"
        ):
            find_candidates([tmp_path])

    def test_whose_folders_all_link_to_each_other_is_searched_once(self, tmp_path, monkeypatch):
        """For the error about it, too, which names folders that have checkpoints."""
        for number in range(12):
            (tmp_path / f"a{number}").mkdir()
            for other in range(12):
                (tmp_path / f"a{number}" / f"b{other}").symlink_to(f"../a{other}")
        listed = []
        iterdir = Path.iterdir

        def noting(path: Path) -> object:
            listed.append(path)
            return iterdir(path)

        monkeypatch.setattr(Path, "iterdir", noting)
        with pytest.raises(SelectionError, match="no checkpoint found"):
            find_candidates([tmp_path])
        assert len(listed) < 5_000  # of 144 links, at three levels

    def test_with_one_file_in_each_of_its_folders_is_an_error_that_names_them(self, tmp_path):
        for value, name in enumerate("ab"):
            save(tmp_path / "run" / name / "model.pt", float(value))
        with pytest.raises(SelectionError, match=r"; name them: (.*)") as caught:
            find_candidates([tmp_path / "run"])
        pattern = str(caught.value).partition("name them: ")[2]
        assert pattern == f"{tmp_path}/run/*/model.pt"
        paths = sorted((tmp_path / "run").glob("*/model.pt"))
        assert len(ckptavg.average(paths, tmp_path / "out.pt").sources) == 2

    def test_with_files_deep_in_numbered_folders_is_an_error_that_names_them(self, tmp_path):
        """As fairseq2 leaves them."""
        for step in (1000, 2000):
            folder = tmp_path / "run" / f"step_{step}"
            save(folder / "model" / "pp_00" / "tp_00" / "sdp_00.pt", float(step))
            save(folder / "optimizer" / "pp_00" / "tp_00" / "sdp_00.pt")
        with pytest.raises(SelectionError, match=r"; name them: (.*)") as caught:
            find_candidates([tmp_path / "run"])
        pattern = str(caught.value).partition(f"name them: {tmp_path}/")[2]
        assert pattern == "run/*/model/pp_00/tp_00/sdp_00.pt"
        out = tmp_path / "out.safetensors"
        ckptavg.average(sorted(tmp_path.glob(pattern)), out)
        assert load_file(out)["w"].tolist() == [1500, 1500]

    def test_with_checkpoints_further_down_is_told_what_is_looked_for(self, tmp_path):
        save(tmp_path / "a" / "b" / "c" / "d" / "step_1.safetensors")
        with pytest.raises(
            SelectionError, match=r"; checkpoints are files ending with .*\.safetensors"
        ):
            find_candidates([tmp_path])

    def test_that_is_not_there_is_an_error(self, tmp_path):
        with pytest.raises(SelectionError, match="absent: does not exist"):
            find_candidates([tmp_path / "absent"])


class TestEntries:
    def test_are_in_natural_order(self, tmp_path):
        for step in (10, 9, 100, 2):
            save(tmp_path / f"step_{step}.safetensors")
        assert found(tmp_path) == [f"step_{step}.safetensors" for step in (2, 9, 10, 100)]

    def test_that_are_hidden_are_none(self, tmp_path):
        save(tmp_path / "step_1.safetensors")
        save(tmp_path / ".step_2.safetensors")
        save(tmp_path / ".cache" / "model.safetensors")
        assert found(tmp_path) == ["step_1.safetensors"]

    def test_named_twice_count_once_as_named(self, tmp_path):
        path = save(tmp_path / "step_1.safetensors")
        assert find_candidates([tmp_path, path]) == {path: None}

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may look into everything")
    def test_that_cannot_be_looked_into_are_left_out(self, tmp_path):
        save(tmp_path / "step_1.safetensors")
        locked = save(tmp_path / "step_2" / "model.safetensors").parent
        locked.chmod(0)
        try:
            assert found(tmp_path) == ["step_1.safetensors"]
        finally:
            locked.chmod(0o700)

    def test_that_cannot_be_looked_into_are_named(self, tmp_path, monkeypatch):
        save(tmp_path / "run" / "step_1.safetensors")
        save(tmp_path / "run" / "step_2" / "model.safetensors")
        iterdir = Path.iterdir

        def refusing(path: Path) -> object:
            if path.name == "step_2":
                raise PermissionError(13, "Permission denied", str(path))
            return iterdir(path)

        monkeypatch.setattr(Path, "iterdir", refusing)
        result = run("average", tmp_path / "run", "-o", tmp_path / "out.safetensors")
        assert "left out step_2: no permission to read it" in result.stderr
        for number in range(20):
            save(tmp_path / "run" / f"step_{3 + number}" / "step_2" / "model.safetensors")
        result = run("average", tmp_path / "run", "-o", tmp_path / "again.safetensors")
        assert result.stderr.count("step_2") <= 5
        with pytest.raises(SelectionError, match="no checkpoint found"):
            find_candidates(
                [save(tmp_path / "deep" / "step_2" / "model.safetensors").parent.parent]
            )

    @pytest.mark.parametrize(
        "name",
        [
            "optimizer.pt", "optimizer.bin", "optimizer_1.bin", "optim.pt", "optimizer_0",
            "scheduler.pt", "lr_scheduler.pt", "scaler.pt", "grad_scaler.pt", "sampler_1.bin",
            "rng_state.pth", "rng_state_7.pth", "training_args.bin",
            "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ],
    )  # fmt: skip
    def test_that_trainers_leave_beside_checkpoints_are_none(self, name):
        assert is_no_checkpoint(name)

    @pytest.mark.parametrize(
        "name", ["optimus.pt", "optimized_model.pt", "scaler_model.pt", "sampler.safetensors", "x"]
    )
    def test_with_names_like_theirs_are(self, name):
        assert not is_no_checkpoint(name)


class TestFolders:
    def test_of_deepspeed_in_a_trainer_s_checkpoint_are_no_further_one(self, tmp_path):
        folder = save(tmp_path / "checkpoint-5" / "model.safetensors").parent
        save_engine(folder / "global_step5", {"w": torch.ones(2)})
        (folder / "trainer_state.json").write_text("{}")
        assert find_candidates([folder]) == {folder: None}

    def test_of_deepspeed_beside_a_configuration_are_the_checkpoints(self, tmp_path):
        for step in (10, 5):
            save_engine(tmp_path / f"global_step{step}", {"w": torch.ones(2)}, step=step)
        (tmp_path / "config.json").write_text("{}")
        assert found(tmp_path) == ["global_step5", "global_step10"]

    def test_of_a_sharded_optimizer_are_none(self, tmp_path):
        save_dcp({"state": {"w": torch.ones(2)}}, tmp_path / "optimizer_0")
        save(tmp_path / "step_1.safetensors")
        assert found(tmp_path) == ["step_1.safetensors"]

    @pytest.mark.parametrize("beside", ["trainer_state.json", "random_states_0.pkl"])
    def test_of_a_sharded_model_are_read_in_its_checkpoint(self, tmp_path, beside):
        folder = tmp_path / "checkpoint-7"
        save_dcp({"model": {"w": torch.full((2,), 7.0)}}, folder / "pytorch_model_fsdp_0")
        save_dcp({"optimizer": {"w": torch.zeros(2)}}, folder / "optimizer_0")
        (folder / beside).write_text('{"global_step": 7}')
        assert find_candidates([folder]) == {folder: None}
        opened = open_checkpoint(folder)
        assert opened.read("w").tolist() == [7, 7]
        assert opened.path == folder


class TestInterruptedSaving:
    def test_of_shards_is_an_error(self, tmp_path):
        for step in (1, 2):
            save(tmp_path / f"checkpoint-{step}" / "model-00001-of-00002.safetensors")
        with pytest.raises(FormatError, match=r"no index of them, as if the saving was"):
            ckptavg.average(tmp_path, tmp_path / "out.safetensors")

    def test_of_a_distributed_checkpoint_is_an_error(self, tmp_path):
        for step in (1, 2):
            folder = save_dcp({"model": {"w": torch.ones(2)}}, tmp_path / f"step_{step}")
        (folder / ".metadata").unlink()
        with pytest.raises(FormatError, match=r"step_2: .*no \.metadata: was the saving inter"):
            ckptavg.average(tmp_path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["step_1.safetensors", "step_1.pt"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 123\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(FormatError, match=f"{name}: is a pointer of Git LFS.*`git lfs pull`"):
        ckptavg.average(tmp_path, tmp_path / "out.pt")


def test_what_a_file_without_weights_holds_is_said_with_the_way_out(tmp_path):
    torch.save({"w": np.ones(3)}, tmp_path / "step_1.pt")
    with pytest.raises(SelectionError, match=r"w is a numpy array, .* \(save .*from_numpy\)"):
        ckptavg.average(tmp_path, tmp_path / "out.pt")


def test_files_of_other_endings_are_averaged_if_they_are_named(tmp_path):
    paths = [tmp_path / name for name in ("a.pkl", "b.model", "c")]
    for number, path in enumerate(paths):
        torch.save({"w": torch.full((2,), float(number))}, path)
    with pytest.raises(SelectionError, match="other endings can be named one by one"):
        ckptavg.average(tmp_path, tmp_path / "out.pt")
    ckptavg.average(paths, tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt")["w"], torch.ones(2))
