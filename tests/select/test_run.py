"""Which checkpoints are taken, in which order, and which are not."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.errors import CkptAvgError, FormatError, SelectionError
from ckptavg.select.members import log_left_out
from ckptavg.select.names import natural_key
from ckptavg.select.run import find_run, log_other_state_dicts
from tests.oracle import save_run


def collect(inputs, **options):
    """All checkpoints among the inputs."""
    found = find_run(inputs, **options)
    log_left_out(found.candidates)
    log_other_state_dicts(found.checkpoints)
    return found


def names(*inputs: Path, **options) -> list[str]:
    return [checkpoint.path.name for checkpoint in collect(inputs, **options).checkpoints]


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), float(value)), "n": torch.tensor(int(value))}


def save_named(folder: Path, *file_names: str) -> None:
    folder.mkdir(exist_ok=True)
    for value, name in enumerate(file_names):
        torch.save(state(value), folder / name)


class TestOrder:
    def test_numbers_in_names_count_as_numbers(self, tmp_path):
        save_named(tmp_path, "step_1000.pt", "step_100.pt", "step_20.pt")
        assert names(tmp_path) == ["step_20.pt", "step_100.pt", "step_1000.pt"]

    def test_a_recorded_step_goes_before_the_name(self, tmp_path):
        for name, step in (("b1.pt", 30), ("a2.pt", 100), ("c3.pt", 20)):
            torch.save(
                {"state_dict": state(step), "global_step": step, "epoch": 200 - step},
                tmp_path / name,
            )
        assert names(tmp_path) == ["c3.pt", "b1.pt", "a2.pt"]

    def test_epochs_order_where_there_are_no_steps(self, tmp_path):
        for name, epoch in (("x.pt", 2), ("y.pt", 1)):
            torch.save({"state_dict": state(epoch), "epoch": epoch}, tmp_path / name)
        assert names(tmp_path) == ["y.pt", "x.pt"]

    def test_the_last_in_order_gives_the_counters(self, tmp_path):
        for name, step in (("z.pt", 1), ("a.pt", 9)):
            torch.save({"state_dict": state(step), "step": step}, tmp_path / name)
        ckptavg.average(tmp_path, tmp_path / "out.safetensors")
        assert load_file(tmp_path / "out.safetensors")["n"] == 9

    def test_an_unsure_order_is_an_error_only_where_it_matters(self, tmp_path):
        counted, plain = tmp_path / "counted", tmp_path / "plain"
        for folder, extra in ((counted, {"n": 1}), (plain, {})):
            folder.mkdir()
            for name, step in (("first.pt", None), ("other.pt", 7)):
                tensors = {"w": torch.randn(2)} | {
                    k: torch.tensor(step or v) for k, v in extra.items()
                }
                torch.save(
                    {"state_dict": tensors} | ({"step": step} if step else {}), folder / name
                )
        ckptavg.average(plain, tmp_path / "a.safetensors")
        for options in ({"norm_stats": "average"}, {"weights": [1, 2]}):
            folder = counted if "norm_stats" in options else plain
            with pytest.raises(
                SelectionError, match=r"first\.pt, other\.pt; leave out first\.pt: no step"
            ):
                ckptavg.average(folder, tmp_path / "b.safetensors", **options)

    def test_numbers_in_folders_order_files_of_one_name(self, tmp_path):
        paths = []
        for epoch in (10, 9, 11):
            folder = tmp_path / f"epoch_{epoch}"
            save_named(folder, "model.pt")
            torch.save(state(epoch), folder / "model.pt")
            paths.append(folder / "model.pt")
        found = collect(paths)
        assert [each.name for each in found.checkpoints] == [
            "epoch_9/model.pt",
            "epoch_10/model.pt",
            "epoch_11/model.pt",
        ]
        assert found.order_is_known

    def test_names_are_ordered_wherever_they_are(self, tmp_path, monkeypatch):
        save_named(tmp_path, "step_1.pt", "step_2.pt")
        monkeypatch.chdir(tmp_path)
        assert names(Path("step_1.pt"), tmp_path / "step_2.pt") == ["step_1.pt", "step_2.pt"]

    @pytest.mark.parametrize(
        ("files", "known"),
        [
            (["a.pt", "b.pt"], True),
            (["resnet50_best.pt", "resnet50_final.pt"], True),
            (["resnet50_001.pt", "resnet50_002.pt"], True),
            (["e1-loss0.5.pt", "e2-loss0.4.ckpt"], True),
            (["resnet50_001.pt", "resnet50_best.pt"], False),
            (["runA/100.pt", "runA/300.pt", "runB/200.pt"], False),
        ],
    )
    def test_only_numbers_that_tell_files_apart_are_steps(self, tmp_path, files, known):
        for value, name in enumerate(files):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            torch.save(state(value), tmp_path / name)
        assert collect([tmp_path / name for name in files]).order_is_known is known

    def test_equal_recorded_steps_leave_it_to_the_names(self, tmp_path):
        for name in ("a.pt", "b.pt", "c1.pt", "c2.pt"):
            torch.save({"model": {"w": torch.randn(2)}, "epoch": 5}, tmp_path / name)
        assert not collect([tmp_path / "a.pt", tmp_path / "b.pt"]).order_is_known
        assert collect([tmp_path / "c1.pt", tmp_path / "c2.pt"]).order_is_known

    def test_a_step_that_only_some_record_does_not_order_those_of_one_epoch(self, tmp_path):
        facts = {"x.pt": {"epoch": 3}, "y.pt": {"epoch": 3, "step": 50}, "z.pt": {"epoch": 2}}
        for name, recorded in facts.items():
            torch.save({"model": {"w": torch.randn(2)}, **recorded}, tmp_path / name)
        assert not collect([tmp_path]).order_is_known

    @given(st.lists(st.text(alphabet="ab01-_ .²", max_size=6), max_size=6))
    def test_natural_keys_can_always_be_compared(self, texts):
        keys = sorted(map(natural_key, texts))
        assert all(one <= other for one, other in pairwise(keys))


class TestDuplicates:
    @pytest.fixture
    def run(self, tmp_path):
        save_named(tmp_path / "run", "checkpoint-1.pt", "checkpoint-2.pt")
        return tmp_path / "run"

    def test_hard_links_count_once(self, run, caplog):
        """timm's `last` and `model_best` are hard links to a numbered checkpoint."""
        os.link(run / "checkpoint-2.pt", run / "last.pt")
        os.link(run / "checkpoint-1.pt", run / "model_best.pt")
        with caplog.at_level("INFO", "ckptavg"):
            assert names(run) == ["checkpoint-1.pt", "checkpoint-2.pt"]
        assert "counted once: last.pt is the same checkpoint as checkpoint-2.pt" in caplog.text

    def test_symlinks_count_once(self, run):
        (run / "best.pt").symlink_to("checkpoint-1.pt")
        assert names(run) == ["checkpoint-1.pt", "checkpoint-2.pt"]

    def test_copies_count_once(self, run):
        """Lightning's `last.ckpt` is a copy."""
        shutil.copy(run / "checkpoint-2.pt", run / "last.ckpt")
        assert names(run) == ["checkpoint-1.pt", "checkpoint-2.pt"]

    def test_a_copy_saved_anew_counts_once(self, tmp_path):
        for name, epoch in (("epoch=1.ckpt", 1), ("epoch=2.ckpt", 2), ("last.ckpt", 2)):
            content = {"state_dict": state(epoch), "epoch": epoch, "callbacks": {"last": name}}
            torch.save(content, tmp_path / name)
        assert names(tmp_path) == ["epoch=1.ckpt", "epoch=2.ckpt"]

    def test_one_file_named_twice_counts_once(self, run):
        path = run / "checkpoint-1.pt"
        assert names(path, path, run) == ["checkpoint-1.pt", "checkpoint-2.pt"]

    def test_files_that_differ_in_one_bit_are_two(self, tmp_path):
        big = torch.randn(300_000)
        save_file({"w": big}, tmp_path / "1.safetensors")
        big[-7] += 1e-3
        save_file({"w": big}, tmp_path / "2.safetensors")
        assert len(names(tmp_path)) == 2

    @pytest.mark.parametrize("places", [[0], [-1], [0, -1]])
    def test_copies_of_several_contents_each_count_once(self, tmp_path, places):
        values = torch.randn(300_000)
        for number in range(6):
            other = values.clone()
            other[places] += number % 2
            save_file({"a": other, "b": values}, tmp_path / f"{number}.safetensors")
        assert names(tmp_path) == ["0.safetensors", "1.safetensors"]

    def test_copies_are_found_by_comparison_without_hashes(self, tmp_path, monkeypatch):
        """SHA-256 of gigabytes took seconds before the first copy was found."""
        for name in ("1.safetensors", "2.safetensors"):
            save_file({"w": torch.ones(300_000)}, tmp_path / name)
        hashed = 0
        sha256 = hashlib.sha256

        class Counting:
            def __init__(self, data=b""):
                self._hash = sha256()
                self.update(data)

            def update(self, data):
                nonlocal hashed
                hashed += len(data)
                self._hash.update(data)

            def __getattr__(self, name):
                return getattr(self._hash, name)

        monkeypatch.setattr(hashlib, "sha256", Counting)
        assert len(find_run([tmp_path]).checkpoints) == 1
        assert hashed < 100_000

    def test_same_weights_at_another_step_count_once(self, tmp_path):
        for step in (1, 2):
            torch.save({"model": state(0), "step": step}, tmp_path / f"s{step}.pt")
        assert names(tmp_path) == ["s1.pt"]


class TestDiscovery:
    def test_an_earlier_average_is_left_out_unless_named(self, tmp_path, caplog):
        save_named(tmp_path, "1.pt", "2.pt")
        for output in ("avg_5.safetensors", "avg_6.pt"):
            ckptavg.average(tmp_path, tmp_path / output)
        with caplog.at_level("INFO", "ckptavg"):
            assert names(tmp_path) == ["1.pt", "2.pt"]
        assert "left out as averages: avg_5.safetensors, avg_6.pt" in caplog.text
        assert "avg_6.pt" in names(tmp_path, tmp_path / "avg_6.pt")

    def test_what_trainers_leave_beside_is_no_checkpoint(self, tmp_path):
        save_named(tmp_path, "model_1.pt", "sampler.ckpt", "scaler.3d_unet.pt", "train.pt")
        for name in (
            "optimizer.pt",
            "optimizer_2.pt",
            "lr_scheduler.pt",
            "grad_scaler.pt",
            "optim.pt",
            "scheduler.pt",
            "rng_state.pth",
            "rng_state_3.pth",
            "training_args.bin",
            "scaler.pt",
            ".hidden.pt",
            "notes.txt",
        ):
            (tmp_path / name).write_bytes(b"anything")
        (tmp_path / "folder.pt").mkdir()
        assert names(tmp_path) == ["model_1.pt", "sampler.ckpt", "scaler.3d_unet.pt", "train.pt"]

    def test_a_refreshed_checkpoint_is_no_average(self, tmp_path):
        from ckptavg.write.provenance import encode_provenance

        for step in range(2):
            entry = encode_provenance({"scheme": "none", "norm_stats": {"state": "refreshed"}})
            save_file(state(step), tmp_path / f"{step}.safetensors", {"ckptavg": entry})
        assert len(names(tmp_path)) == 2

    def test_state_dicts_of_unlike_names_are_mentioned(self, tmp_path, caplog):
        torch.save({"state_dict": state(1), "state_dict_ema": state(2)}, tmp_path / "1.pt")
        torch.save({"state_dict_ema": state(3)}, tmp_path / "2.pt")
        collect([tmp_path])
        assert "have different names: state_dict, state_dict_ema" in caplog.text

    def test_a_damaged_file_is_never_passed_over(self, tmp_path):
        save_named(tmp_path, "1.pt", "2.pt", "3.pt")
        whole = (tmp_path / "2.pt").read_bytes()
        (tmp_path / "2.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FormatError, match=r"2\.pt: .*truncated"):
            collect([tmp_path])

    def test_a_checkpoint_without_tensors_is_an_error_that_names_it(self, tmp_path):
        """Averaged, two of them were a model without weights."""
        for name in ("1.safetensors", "2.safetensors"):
            save_file({}, tmp_path / name, {"step": name})
        out = tmp_path / "out" / "average.safetensors"
        with pytest.raises(FormatError, match=r"1\.safetensors: has no tensors"):
            ckptavg.average(tmp_path, out)

    def test_none_is_an_error_that_says_what_was_looked_for(self, tmp_path):
        with pytest.raises(SelectionError, match=r"no checkpoint found in .*\.safetensors"):
            collect([tmp_path])

    def test_a_missing_input_is_named(self, tmp_path):
        with pytest.raises(SelectionError, match=r"nowhere: does not exist"):
            collect([tmp_path / "nowhere"])

    def test_any_other_count_than_expected_is_an_error(self, tmp_path):
        save_named(tmp_path, "1.pt", "2.pt")
        out = tmp_path / "out.safetensors"
        with pytest.raises(SelectionError, match=r"expected 3 checkpoints, found 2: 1\.pt, 2\.pt"):
            ckptavg.average(tmp_path, out, expect=3)
        assert len(ckptavg.average(tmp_path, out, expect=2).sources) == 2

    def test_one_is_averaged_with_a_warning(self, tmp_path, caplog):
        save_named(tmp_path, "1.pt")
        ckptavg.average(tmp_path, tmp_path / "out.safetensors")
        assert "only one checkpoint" in caplog.text
        assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], state(0)["w"])

    def test_containers_may_be_mixed(self, tmp_path):
        save_run(tmp_path, [state(1)], "safetensors")
        torch.save({"model": state(2), "optimizer": {"param_groups": []}}, tmp_path / "step_2.pt")
        ckptavg.average(tmp_path, tmp_path / "out.safetensors")
        assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [1.5] * 3

    def test_other_state_dicts_are_mentioned(self, tmp_path, caplog):
        for step in range(2):
            content = {"state_dict": state(step), "state_dict_ema": state(step + 10)}
            torch.save(content, tmp_path / f"{step}.pth.tar")
        with caplog.at_level("INFO", "ckptavg"):
            ckptavg.average(tmp_path, tmp_path / "out.safetensors")
        assert "`key` can choose state_dict_ema instead" in caplog.text
        assert load_file(tmp_path / "out.safetensors")["w"][0] == 0.5
        caplog.clear()
        ckptavg.average(tmp_path, tmp_path / "ema.safetensors", key="state_dict_ema")
        assert "can choose" not in caplog.text
        assert load_file(tmp_path / "ema.safetensors")["w"][0] == 10.5

    @pytest.mark.parametrize("kind", ["safetensors", "pt"])
    def test_a_key_of_a_bare_state_dict_is_an_error_that_says_what_to_do(self, kind, tmp_path):
        save_run(tmp_path, [state(1)], kind)
        with pytest.raises(SelectionError, match=r"the whole file is one; leave `key` out"):
            ckptavg.average(tmp_path, tmp_path / "out.safetensors", key="ema")

    def test_more_files_than_may_be_open_at_once(self, tmp_path):
        for step in range(130):
            save_file({"w": torch.full((2,), float(step))}, tmp_path / f"{step}.safetensors")
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        try:
            ckptavg.average(tmp_path, tmp_path / "out.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [64.5, 64.5]


@pytest.mark.parametrize("change", ["rewritten", "replaced", "removed", "truncated"])
def test_a_checkpoint_that_changes_meanwhile_is_named(tmp_path, monkeypatch, change):
    paths = save_run(tmp_path / "run", [{"w": torch.randn(1000)} for _ in range(2)])
    from ckptavg.merge.plan import make_plan

    def change_then_plan(*arguments, **options):
        data = paths[1].read_bytes()
        if change == "removed":
            paths[1].unlink()
        elif change == "replaced":
            other = paths[1].with_suffix(".new")
            other.write_bytes(data)
            other.replace(paths[1])
        elif change == "truncated":
            os.truncate(paths[1], len(data) - 100)
        else:
            paths[1].write_bytes(data[:-4] + b"abcd")
            os.utime(paths[1], ns=(1, 1))
        return make_plan(*arguments, **options)

    monkeypatch.setattr(sys.modules["ckptavg.average"], "make_plan", change_then_plan)
    with pytest.raises(CkptAvgError, match=r"step_1\.safetensors: "):
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
