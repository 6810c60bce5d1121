"""Checkpoints of Lightning's Trainer: hyper-parameters, weight averaging, sharded directories."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckptavg
from ckptavg.errors import OutputError
from ckptavg.formats import open_checkpoint
from tests.helpers import run
from tests.layouts.libraries import differ
from tests.layouts.lightning_runs import (
    HasView,
    Net,
    SavesArguments,
    SavesNamespace,
    Schedule,
    batches,
    trainer,
)
from tests.oracle import assert_mean

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The 'train_dataloader' does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "`isinstance.treespec, LeafSpec.` is deprecated",
        "The dirpath has changed from",
    )
]


ALONE = "has the weights alone, which Lightning's load_from_checkpoint does not take"


def forward(model: Net, batch: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model.layers(batch)
    return result


def size(model: Net, _batches: object) -> float:
    return float(sum(value.square().sum() for value in model.parameters()))


def width_of(model: Net) -> int:
    return len(model.state_dict()["layers.0.weight"])


def load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=False))


def epochs(folder: Path) -> list[Path]:
    """The checkpoints in order, without `last.ckpt`."""
    paths = [path for path in folder.glob("epoch=*.ckpt") if "swa" not in path.name]
    return sorted(paths, key=lambda path: int(path.stem.partition("step=")[2]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    trainer(folder).fit(Net(8, Schedule([0.1, 0.2])), batches())
    return folder


@pytest.fixture(scope="module")
def averaging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which Lightning keeps an average of its own."""
    folder: Path = tmp_path_factory.mktemp("averaging")
    torch.manual_seed(0)
    trainer(folder, WeightAveraging()).fit(Net(8, Schedule([0.1])), batches())
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model spread over two processes."""
    folder: Path = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, "-m", "tests.layouts.lightning_runs", folder],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Its state dicts as torch joins them."""
    folder: Path = tmp_path_factory.mktemp("whole")
    states = []
    for path in epochs(sharded):
        dcp_to_torch_save(path, folder / "whole.pt")
        states.append(load(folder / "whole.pt")["state_dict"])
    return states


class TestTrainer:
    def test_the_average_of_a_run_is_loaded(self, trained, tmp_path):
        states = [load(path)["state_dict"] for path in epochs(trained)]
        assert len(states) == 3
        assert differ(states)
        summary = ckptavg.average(trained, tmp_path / "out.safetensors")
        assert [source.name for source in summary.sources] == [p.name for p in epochs(trained)]
        result = load_file(tmp_path / "out.safetensors")
        assert_mean(result, states)
        Net(8).load_state_dict(result, strict=True)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("--dtype", "float16"), "--dtype is given"),
            (("--skip", "num_batches_tracked"), "--skip is given"),
            (("--container", "weights"), None),
        ],
    )
    def test_weights_alone_are_said_to_be_no_lightning_checkpoint(
        self, arguments, reason, trained, tmp_path
    ):
        result = run("average", trained, "-o", tmp_path / "out.ckpt", *arguments)
        if reason is None:
            assert "has the weights alone" not in result.stderr
        else:
            assert f"out.ckpt {ALONE}: {reason}\n" in result.stderr
        with pytest.raises(KeyError, match="pytorch-lightning_version"):
            Net.load_from_checkpoint(tmp_path / "out.ckpt")

    def test_so_is_a_conversion(self, trained, tmp_path):
        result = run("convert", epochs(trained)[0], "-o", tmp_path / "out.ckpt")
        assert f"out.ckpt {ALONE}: a conversion has the state dict only\n" in result.stderr
        assert load(tmp_path / "out.ckpt").keys() == Net(8).state_dict().keys()

    def test_a_file_that_is_none_of_lightning_s_leaves_the_weights_alone(self, trained, tmp_path):
        plain = {"state_dict": Net(8).state_dict(), "epoch": 99, "global_step": 99}
        torch.save(plain, tmp_path / "plain.ckpt")
        ckptavg.average([*epochs(trained), tmp_path / "plain.ckpt"], tmp_path / "out.ckpt")
        assert load(tmp_path / "out.ckpt").keys() == Net(8).state_dict().keys()
        ckptavg.average(trained, f"{tmp_path}/folder.ckpt/")
        assert (tmp_path / "folder.ckpt" / "model.safetensors").is_file()

    def test_the_last_one_s_copy_counts_once(self, trained, tmp_path):
        assert (trained / "last.ckpt").is_file()
        result = run("average", trained, "-o", tmp_path / "out.pt", "--expect", 3)
        assert "last.ckpt is the same checkpoint as epoch=2-step=9.ckpt" in result.stderr

    def test_a_hyper_parameter_s_class_is_not_needed(self, trained, tmp_path, monkeypatch):
        monkeypatch.delattr(sys.modules[Schedule.__module__], "Schedule")
        with pytest.raises(AttributeError):
            load(trained / "last.ckpt")
        ckptavg.average(trained, tmp_path / "out.ckpt", container="last")


class TestNamespaces:
    @pytest.mark.parametrize("kind", [SavesNamespace, SavesArguments])
    def test_are_given_to_the_model_without_the_objects_in_them(self, kind, tmp_path, caplog):
        args = argparse.Namespace(width=5, data=Path("x"), device=torch.device("cpu"))
        trainer(tmp_path, epochs=1).fit(kind(args), batches())
        name = load(tmp_path / "last.ckpt")["hparams_name"]
        assert name == {SavesNamespace: "args", SavesArguments: "kwargs"}[kind]
        options: dict[str, Any] = {"loader": batches, "metric": lambda model, _: width_of(model)}
        caplog.set_level("INFO", "ckptavg")
        caplog.clear()
        for model in (kind, Net):
            [result] = ckptavg.evaluate(tmp_path / "last.ckpt", model=model, **options)
            assert [*result.metrics.values()] == [5]
        left_out = "args.data (pathlib.PosixPath), args.device (torch.device)"
        notice = f"{kind.__name__} is given what last.ckpt records: args={{'width': 5}}"
        assert [record.getMessage() for record in caplog.records] == [
            f"{notice}; it is not given objects, which are not read: {left_out}",
            "Net is given what last.ckpt records: width=5",
        ]


class TestContainer:
    @pytest.fixture
    def out(self, trained, tmp_path):
        out = tmp_path / "swa.ckpt"
        result = run("average", trained, "-o", out)
        rest = "everything else (optimizer, epoch, hyper-parameters)"
        notice = f"swa.ckpt has {rest} from epoch=2-step=9.ckpt; --container weights writes the"
        assert notice in result.stderr
        return out

    def test_is_what_container_last_writes(self, trained, out, tmp_path):
        ckptavg.average(trained, tmp_path / "last.ckpt", container="last")
        assert out.read_bytes() == (tmp_path / "last.ckpt").read_bytes()
        assert ckptavg.verify(out, [trained]).sources == 3

    def test_is_written_where_the_key_is_that_of_the_weights(self, trained, out, tmp_path):
        ckptavg.average(trained, tmp_path / "key.ckpt", key="state_dict")
        assert load(tmp_path / "key.ckpt").keys() == load(out).keys()
        options: dict[str, Any] = {"model": Net, "loader": batches, "forward": forward}
        ckptavg.refresh_checkpoint(out, tmp_path / "new.ckpt", key="state_dict", **options)
        Net.load_from_checkpoint(tmp_path / "new.ckpt", weights_only=False)

    def test_is_refreshed_to_another_and_has_the_mean_of_a_soup(self, trained, out, tmp_path):
        options: dict[str, Any] = {"model": Net, "loader": batches, "forward": forward}
        ckptavg.refresh_checkpoint(out, tmp_path / "new.ckpt", **options)
        model = Net.load_from_checkpoint(tmp_path / "new.ckpt", weights_only=False)
        before = Net.load_from_checkpoint(out, weights_only=False).state_dict()
        assert differ([before, model.state_dict()])
        ckptavg.soup(trained, tmp_path / "soup.ckpt", metric=size, mode="min", **options)
        Net.load_from_checkpoint(tmp_path / "soup.ckpt", weights_only=False)

    def test_is_loaded_with_the_mean_and_the_hyper_parameters(self, trained, out):
        model = Net.load_from_checkpoint(out, weights_only=False)
        assert_mean(model.state_dict(), [load(path)["state_dict"] for path in epochs(trained)])
        assert model.hparams.width == 8
        assert model.hparams.schedule.rates == [0.1, 0.2]

    def test_keeps_all_else_of_the_last_one(self, trained, out):
        last, result = load(epochs(trained)[-1]), load(out)
        assert result.keys() == last.keys()
        for name in ("epoch", "global_step", "pytorch-lightning_version", "callbacks", "loops"):
            assert result[name] == last[name]
        [before], [after] = last["optimizer_states"], result["optimizer_states"]
        assert after["param_groups"] == before["param_groups"]
        for number, moments in before["state"].items():
            for name, value in moments.items():
                assert torch.equal(after["state"][number][name], value)

    def test_the_training_goes_on_from_it(self, out, tmp_path):
        made = trainer(tmp_path / "more", epochs=5)
        made.fit(Net(8), batches(), ckpt_path=out, weights_only=False)
        assert made.current_epoch == 5
        assert made.global_step == 15
        more = epochs(tmp_path / "more")
        assert [path.name for path in more] == ["epoch=3-step=12.ckpt", "epoch=4-step=15.ckpt"]

    def test_the_training_begins_with_the_mean(self, trained, out, tmp_path):
        """No epoch is left to train: what is saved is what was loaded."""
        made = trainer(tmp_path / "more", epochs=3)
        model = Net(8)
        made.fit(model, batches(), ckpt_path=out, weights_only=False)
        assert_mean(model.state_dict(), [load(path)["state_dict"] for path in epochs(trained)])


class TestFilesThatAreNoContainer:
    def test_from_before_torch_1_6_give_weights_that_are_refreshed_and_verified(
        self, trained, tmp_path
    ):
        """Such a file has no place for the provenance."""
        for path in epochs(trained):
            old = tmp_path / path.name
            torch.save(load(path), old, _use_new_zipfile_serialization=False)
        options: dict[str, Any] = {"model": Net, "loader": batches, "forward": forward}
        out = tmp_path / "out" / "swa.ckpt"
        out.parent.mkdir()
        result = run("average", tmp_path, "-o", out)
        reason = "epoch=2-step=9.ckpt is in torch's format from before 1.6"
        assert f"swa.ckpt {ALONE}: {reason}\n" in result.stderr
        assert ckptavg.verify(out, epochs(tmp_path)).sources == 3
        ckptavg.refresh_checkpoint(out, None, **options)
        assert load(out).keys() == Net(8).state_dict().keys()

    def test_with_a_view_of_another_tensor_give_the_weights(self, tmp_path):
        torch.manual_seed(0)
        trainer(tmp_path / "run").fit(HasView(8), batches())
        states = [load(path)["state_dict"] for path in epochs(tmp_path / "run")]
        result = run("average", tmp_path / "run", "-o", tmp_path / "swa.ckpt")
        assert f"swa.ckpt {ALONE}: " in result.stderr
        assert "shares bytes with" in result.stderr
        assert differ(states)
        assert_mean(load(tmp_path / "swa.ckpt"), states)
        assert ckptavg.verify(tmp_path / "swa.ckpt", [tmp_path / "run"]).sources == 3
        options: dict[str, Any] = {"model": HasView, "loader": batches, "forward": forward}
        for source in (epochs(tmp_path / "run")[-1], tmp_path / "swa.ckpt"):
            ckptavg.refresh_checkpoint(source, tmp_path / "new.ckpt", force=True, **options)
            assert load(tmp_path / "new.ckpt").keys() == states[0].keys()
        with pytest.raises(OutputError, match="shares bytes with"):
            ckptavg.average(tmp_path / "run", tmp_path / "last.ckpt", container="last")


class TestWeightAveraging:
    def test_its_files_give_the_weights_and_not_its_average(self, averaging, tmp_path):
        saved = [load(path) for path in epochs(averaging)]
        states = [root["current_model_state"] for root in saved]
        assert differ(states)
        assert differ([saved[-1]["state_dict"], states[-1]])
        ckptavg.average(averaging, tmp_path / "out.safetensors")
        assert_mean(load_file(tmp_path / "out.safetensors"), states)

    def test_its_average_is_taken_by_its_key(self, averaging, tmp_path):
        result = run("average", averaging, "-o", tmp_path / "out.ckpt", "--key", "state_dict")
        assert f"{ALONE}: --key takes another state dict than Lightning's\n" in result.stderr
        states = [load(path)["state_dict"] for path in epochs(averaging)]
        assert_mean(torch.load(tmp_path / "out.ckpt"), states)

    def test_one_file_alone_is_no_container_in_which_its_average_would_stay(
        self, averaging, tmp_path
    ):
        *_, last = epochs(averaging)
        result = run("average", last, "-o", tmp_path / "out.ckpt")
        assert f"{ALONE}: its state_dict would still be the average" in result.stderr
        weights = load(last)["current_model_state"]
        assert_mean(torch.load(tmp_path / "out.ckpt"), [weights])

    def test_the_container_has_the_mean_in_both_so_that_it_is_loaded(self, averaging, tmp_path):
        out = tmp_path / "swa.ckpt"
        result = run("average", averaging, "-o", out, "--container", "last")
        assert "warning" not in result.stderr
        saved = [load(path) for path in epochs(averaging)]
        states = [root["current_model_state"] for root in saved]
        found = load(out)
        assert_mean(found["current_model_state"], states)
        assert_mean(found["state_dict"], states)
        assert_mean(Net.load_from_checkpoint(out, weights_only=False).state_dict(), states)
        assert found["averaging_state"].keys() == saved[-1]["averaging_state"].keys()

    def test_the_training_goes_on_from_it_with_the_callback(self, averaging, tmp_path):
        out = tmp_path / "swa.ckpt"
        ckptavg.average(averaging, out, container="last")
        made = trainer(tmp_path / "more", WeightAveraging(), epochs=4)
        made.fit(Net(8), batches(), ckpt_path=out, weights_only=False)
        assert made.global_step == 12


class TestShardedDirectories:
    """`ModelParallelStrategy`, which like FSDP saves with torch.distributed.checkpoint."""

    def test_are_averaged(self, sharded, whole, tmp_path):
        assert (epochs(sharded)[0] / "meta.pt").is_file()
        assert len(list(epochs(sharded)[0].glob("*.distcp"))) == 2
        assert differ(whole)
        ckptavg.average(epochs(sharded), tmp_path / "out.safetensors")
        result = load_file(tmp_path / "out.safetensors")
        assert_mean(result, whole)
        Net().load_state_dict(result, strict=True)

    def test_are_written_for_lightning_s_own_tool(self, sharded, whole, tmp_path, monkeypatch):
        ckptavg.average(epochs(sharded), f"{tmp_path}/out.ckpt/", format="dcp")
        tool = "lightning.fabric.utilities.consolidate_checkpoint"
        monkeypatch.setattr("sys.argv", [tool, str(tmp_path / "out.ckpt")])
        runpy.run_module(tool, run_name="__main__")
        consolidated = load(tmp_path / "out.ckpt.consolidated")
        assert_mean(consolidated["state_dict"], whole)
        assert consolidated["global_step"] == 6

    def test_of_a_run_are_found_in_order(self, sharded, tmp_path):
        summary = ckptavg.average(sharded, tmp_path / "out.safetensors", dry_run=True)
        names = [source.name for source in summary.sources]
        assert names == [path.name for path in epochs(sharded)]

    def test_tell_their_step(self, sharded):
        found = [open_checkpoint(path).step for path in epochs(sharded)]
        assert found == [("global_step", step) for step in (2, 4, 6)]
