"""Directories as outputs: what they may replace, and what is left when something fails."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.errors import OutputError, ValueRangeError
from ckptavg.write import replacement
from tests.helpers import run

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    """Two checkpoints of 0 and 1 with a configuration and a chat template."""
    return save_run(tmp_path / "run")


def save_run(folder: Path, values: tuple[float, ...] = (0.0, 1.0)) -> Path:
    for step, value in enumerate(values):
        inner = folder / f"checkpoint-{step}"
        (inner / "additional_chat_templates").mkdir(parents=True)
        state = {name: torch.full((4,), value) for name in ("v", "w")}
        save_file(state, inner / "model.safetensors", {"format": "pt"})
        (inner / "config.json").write_text(f'{{"step": {step}}}')
        (inner / "additional_chat_templates" / "tools.jinja").write_text("x")
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is below a directory, with the files' content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


WHOLE = {
    "additional_chat_templates", "additional_chat_templates/tools.jinja", "config.json",
    "model.safetensors",
}  # fmt: skip


def is_the_average(out: Path) -> bool:
    return (
        set(tree(out)) == WHOLE and load_file(out / "model.safetensors")["w"].tolist() == [0.5] * 4
    )


def refusal(inputs: object, out: object, **options: Any) -> str:
    """What the error says, when even with --force nothing may be written."""
    with pytest.raises(OutputError) as caught:
        ckptavg.average(inputs, out, force=True, **options)  # type: ignore[arg-type]
    return str(caught.value)


class TestDestination:
    def test_that_is_not_there_is_made(self, ckpts, tmp_path):
        ckptavg.average(ckpts, tmp_path / "out")
        assert is_the_average(tmp_path / "out")
        assert {entry.name for entry in tmp_path.iterdir()} == {"run", "out"}

    def test_that_is_empty_is_used_without_force(self, ckpts, tmp_path):
        (tmp_path / "out").mkdir()
        ckptavg.average(ckpts, tmp_path / "out")
        assert is_the_average(tmp_path / "out")

    @pytest.mark.parametrize("content", ["mine.txt", ".hidden", "config.json"])
    def test_that_is_not_empty_needs_force(self, ckpts, tmp_path, content):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / content).write_text("precious")
        with pytest.raises(OutputError, match="out: exists already; `force` replaces it"):
            ckptavg.average(ckpts, tmp_path / "out")
        assert tree(tmp_path / "out") == {content: b"precious"}

    def test_that_is_a_file_is_refused(self, ckpts, tmp_path):
        (tmp_path / "out").write_text("precious")
        assert "is no directory" in refusal(ckpts, f"{tmp_path}/out/")

    def test_may_be_the_working_directory(self, ckpts, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        run("average", ckpts, "-o", ".")
        assert is_the_average(tmp_path / "here")

    def test_may_be_spelled_in_a_roundabout_way(self, ckpts, tmp_path, monkeypatch):
        (tmp_path / "x").mkdir()
        monkeypatch.chdir(tmp_path)
        run("average", ckpts, "-o", "x/../y/")
        assert is_the_average(tmp_path / "y")
        assert tree(tmp_path / "x") == {}

    def test_that_is_a_mount_point_is_refused(self, ckpts, tmp_path, monkeypatch):
        (tmp_path / "out").mkdir()
        monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "out")
        assert "is a mount point" in refusal(ckpts, tmp_path / "out")


class TestForce:
    def test_replaces_an_earlier_output(self, ckpts, tmp_path):
        out = tmp_path / "out"
        ckptavg.average(save_run(tmp_path / "old", (8.0, 9.0)), out)
        ckptavg.average(ckpts, out, force=True)
        assert is_the_average(out)
        assert {entry.name for entry in tmp_path.iterdir()} == {"run", "old", "out"}

    def test_replaces_shards_by_one_file_and_one_file_by_shards(self, ckpts, tmp_path):
        out = tmp_path / "out"
        ckptavg.average(ckpts, out, max_shard_size=16)
        shards = set(tree(out))
        assert {"model.safetensors.index.json", "model-00002-of-00002.safetensors"} <= shards
        ckptavg.average(ckpts, out, force=True)
        assert is_the_average(out)
        ckptavg.average(ckpts, out, force=True, max_shard_size=16)
        assert set(tree(out)) == shards

    def test_replaces_a_torch_file_that_was_all_its_weights(self, ckpts, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        torch.save({"w": torch.ones(4)}, out / "pytorch_model.bin")
        ckptavg.average(ckpts, out, force=True)
        assert is_the_average(out)

    @pytest.mark.parametrize(
        "name",
        [
            "optimizer.pt", "global_step10/mp_rank_00_model_states.pt", "pytorch_model.bin",
            "model_1.safetensors", "adapter_model.safetensors", "config.json/mine",
            "additional_chat_templates/mine.jinja", ".git/config", "2_Dense/model.safetensors",
        ],
    )  # fmt: skip
    def test_does_not_take_what_the_output_would_not_bring(self, ckpts, tmp_path, name):
        out = tmp_path / "out"
        out.mkdir()
        save_file({"w": torch.ones(4)}, out / "model.safetensors")
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
        before = tree(tmp_path)
        message = refusal(ckpts, out)
        assert "has files that the output does not have (" in message
        assert name in message
        assert tree(tmp_path) == before

    def test_names_some_of_many_and_counts_the_rest(self, ckpts, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        for number in range(8):
            (out / f"mine_{number}\n").touch()
        assert "(mine_0\\n, mine_1\\n, mine_2\\n, mine_3\\n, mine_4\\n and 3 more)" in refusal(
            ckpts, out
        )

    def test_keeps_the_modes(self, ckpts, tmp_path):
        out = tmp_path / "out"
        ckptavg.average(ckpts, out)
        out.chmod(0o711)
        for name, mode in (("config.json", 0o600), ("model.safetensors", 0o640)):
            (out / name).chmod(mode)
        ckptavg.average(ckpts, out, force=True)
        modes = [stat.S_IMODE((out / name).stat().st_mode) for name in ("", *sorted(WHOLE)[2:])]
        assert modes == [0o711, 0o600, 0o640]

    def test_nothing_is_put_back_for_the_top_of_the_file_system(self):
        """Which a link may lead to: it has no name to move it aside by."""
        replacement.put_back(Path("/"))

    def test_replaces_what_a_link_leads_to(self, ckpts, tmp_path):
        real = tmp_path / "elsewhere" / "real"
        real.parent.mkdir()
        ckptavg.average(save_run(tmp_path / "old", (8.0, 9.0)), real)
        (tmp_path / "out").symlink_to(real)
        ckptavg.average(ckpts, tmp_path / "out", force=True)
        assert (tmp_path / "out").readlink() == real
        assert is_the_average(real)
        assert [entry.name for entry in real.parent.iterdir()] == ["real"]


class TestFailure:
    def test_leaves_the_old_directory_and_no_litter(self, ckpts, tmp_path):
        out = tmp_path / "out"
        ckptavg.average(ckpts, out)
        bad = {"v": torch.ones(4), "w": torch.tensor([1.0, torch.nan, 0, 0])}
        save_file(bad, ckpts / "checkpoint-1" / "model.safetensors")
        before = tree(tmp_path)
        with pytest.raises(ValueRangeError, match="checkpoint-1"):
            ckptavg.average(ckpts, out, force=True)
        with pytest.raises(ValueRangeError, match="checkpoint-1"):
            ckptavg.average(ckpts, tmp_path / "new")
        assert tree(tmp_path) == before


def refuse_exchange(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def exchange(one: Path, other: Path) -> None:
        raise OSError(number, os.strerror(number), str(one))

    monkeypatch.setattr(replacement, "exchange", exchange)


def fail_to_publish(monkeypatch: pytest.MonkeyPatch, out: Path, error: BaseException) -> None:
    """Let the rename fail that gives the new directory its name, and no other."""
    rename: Callable[[Path, Any], Path] = Path.rename

    def failing(path: Path, target: Any) -> Path:
        if target == out and path.suffix == ".tmp":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)


class TestExchange:
    def test_swaps_two_names(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "was").write_text(name)
        replacement.exchange(tmp_path / "a", tmp_path / "b")
        assert [(tmp_path / name / "was").read_text() for name in ("a", "b")] == ["b", "a"]

    def test_of_what_is_not_there_is_the_system_s_error(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(FileNotFoundError):
            replacement.exchange(tmp_path / "a", tmp_path / "absent")

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_takes_two_steps_where_the_system_cannot(self, ckpts, tmp_path, monkeypatch, number):
        out = tmp_path / "out"
        ckptavg.average(save_run(tmp_path / "old", (8.0, 9.0)), out)
        refuse_exchange(monkeypatch, number)
        ckptavg.average(ckpts, out, force=True)
        assert is_the_average(out)
        assert {entry.name for entry in tmp_path.iterdir()} == {"run", "old", "out"}

    @pytest.mark.parametrize(
        ("error", "raised"),
        [
            (OSError(errno.EIO, "Input/output error"), OutputError),
            (KeyboardInterrupt(), KeyboardInterrupt),
        ],
        ids=["the disk", "a signal"],
    )
    def test_takes_the_first_step_back_if_the_second_fails(
        self, ckpts, tmp_path, monkeypatch, error, raised
    ):
        out = tmp_path / "out"
        ckptavg.average(save_run(tmp_path / "old", (8.0, 9.0)), out)
        before = tree(tmp_path)
        refuse_exchange(monkeypatch, errno.EINVAL)
        fail_to_publish(monkeypatch, out, error)
        with pytest.raises(raised):
            ckptavg.average(ckpts, out, force=True)
        assert tree(tmp_path) == before

    def test_that_fails_otherwise_leaves_the_old_one(self, ckpts, tmp_path, monkeypatch):
        out = tmp_path / "out"
        ckptavg.average(ckpts, out)
        before = tree(tmp_path)
        refuse_exchange(monkeypatch, errno.EACCES)
        assert "out: cannot write it: Permission denied" in refusal(ckpts, out)
        assert tree(tmp_path) == before


def average(inputs: Path, out: Path) -> None:
    ckptavg.average(inputs, out, force=True)


def average_with_model(inputs: Path, out: Path) -> None:
    from ckptavg.batchnorm.options import RefreshOptions
    from ckptavg.batchnorm.together import average_and_refresh

    options = RefreshOptions(model="math:sqrt", loader="math:sqrt")
    average_and_refresh([inputs], out, options, force=True)


def refresh(inputs: Path, out: Path) -> None:
    """Of the last of the checkpoints."""
    from ckptavg.batchnorm.files import refresh_checkpoint

    last = max(inputs.iterdir()) if inputs.name == "run" else inputs
    refresh_checkpoint(last, out, model="math:sqrt", loader="math:sqrt", force=True)


# None of them may get as far as making the model: its factory raises.
@pytest.mark.parametrize("act", [average, average_with_model, refresh])
class TestInputs:
    def refused(self, act: Callable[[Path, Path], None], inputs: Path, out: Path, top: Path) -> str:
        before = tree(top)
        with pytest.raises(OutputError) as caught:
            act(inputs, out)
        assert tree(top) == before
        return str(caught.value)

    def test_around_which_the_output_would_be(self, ckpts, tmp_path, act):
        assert "the directory of the checkpoints" in self.refused(act, ckpts, ckpts, tmp_path)

    def test_reached_by_a_link_to_their_directory(self, ckpts, tmp_path, act):
        (tmp_path / "alias").symlink_to(ckpts)
        message = self.refused(act, ckpts, tmp_path / "alias", tmp_path)
        assert "the directory of the checkpoints" in message

    def test_whose_files_are_links_into_the_output(self, tmp_path, act):
        out = tmp_path / "out"
        (tmp_path / "run").mkdir()
        out.mkdir()
        for step in range(2):
            save_file({"w": torch.full((2,), 1.0 * step)}, out / f"step_{step}.safetensors")
            link = tmp_path / "run" / f"step_{step}.safetensors"
            link.symlink_to(out / link.name)
        message = self.refused(act, tmp_path / "run", out, tmp_path)
        assert "the directory of the checkpoints" in message

    def test_that_are_links_in_the_output_to_files_elsewhere(self, tmp_path, act):
        (tmp_path / "real").mkdir()
        (tmp_path / "run").mkdir()
        for step in range(2):
            path = tmp_path / "real" / f"step_{step}.safetensors"
            save_file({"w": torch.full((2,), 1.0 * step)}, path)
            (tmp_path / "run" / path.name).symlink_to(path)
        message = self.refused(act, tmp_path / "run", tmp_path / "run", tmp_path)
        assert "the directory of the checkpoints" in message


@pytest.mark.parametrize("act", [average, average_with_model])
def test_one_of_the_inputs_is_no_output(ckpts, tmp_path, act):
    folder = ckpts / "checkpoint-1"
    before = tree(tmp_path)
    with pytest.raises(
        OutputError, match="is the directory of the checkpoints, and a directory is"
    ):
        act(ckpts, folder)
    with pytest.raises(OutputError, match="is itself one of the checkpoints"):
        act(ckpts, folder / "model.safetensors")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("size", ["0", "0.5B", "9" * 400, "-1", "5 apples", ""])
def test_an_impossible_size_of_shards_is_wrong_usage(ckpts, tmp_path, size):
    result = run("average", ckpts, "-o", f"{tmp_path}/out/", "--max-shard-size", size, code=2)
    assert "--max-shard-size" in result.output
    assert not (tmp_path / "out").exists()
