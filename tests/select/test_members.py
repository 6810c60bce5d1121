"""Directories as trainers leave them: which of their files are averaged, and what else is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg import Selection
from ckptavg.errors import FormatError, SelectionError
from ckptavg.select.run import find_run
from tests.helpers import run
from tests.oracle import naive_mean, same_bits

OPTIMIZER = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
STEPPED = OPTIMIZER | {"state": {0: {"momentum_buffer": torch.ones(2)}}}


def w(value: float, count: int = 2) -> torch.Tensor:
    return torch.full((count,), float(value))


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def weights(folder: Path, names: str, first: float = 1) -> None:
    """Files of bare weights, whose values count from `first`."""
    for value, name in enumerate(names.split(), int(first)):
        put(folder / name, {"w": w(value)})


def hf(folder: Path, value: float, step: int | None = None, name: str = "model") -> None:
    put(folder / f"{name}.safetensors", {"w": w(value)})
    (folder / "config.json").write_text("{}")
    if step is not None:
        state = {"global_step": step, "log_history": []}
        (folder / "trainer_state.json").write_text(json.dumps(state))


def members(folder: Path, **options: Any) -> list[str]:
    """The names of the members, and the average is the mean of them."""
    found = find_run([folder], **options)
    out = folder.parent / "out.safetensors"
    key = options.get("key")
    summary = ckptavg.average(folder, out, key=key, force=True)
    paths = [checkpoint.path for checkpoint in found.checkpoints]
    assert [Path(source.path) for source in summary.sources] == paths
    values = [checkpoint.read("w") for checkpoint in found.checkpoints]
    assert same_bits(load_file(out)["w"], naive_mean([torch.tensor(value) for value in values]))
    return [checkpoint.name for checkpoint in found.checkpoints]


def what(folder: Path) -> dict[str, str]:
    """What each series is, by its name."""
    return {
        series.name: "member" if series.is_of_members else series.kind
        for series in find_run([folder]).series
    }


def refusal(folder: Path) -> str:
    """The error of `average`, which `inspect` reports as well, in at most 20 lines."""
    out = folder.parent / "out.safetensors"
    run("average", folder, "-o", out, code=1)
    assert not out.exists()
    with pytest.raises(ckptavg.CkptAvgError) as caught:
        _ = find_run([folder]).checkpoints
    text = str(caught.value)
    assert len(text.splitlines()) <= 20
    inspected = json.loads(run("inspect", "--json", folder).stdout)
    assert not any(row["selected"] for row in inspected["series"] + inspected["checkpoints"])
    assert inspected["error"] == text.replace("`include`", "--include").replace(
        "`exclude`", "--exclude"
    )
    return text


class TestCopies:
    def test_of_the_last_step_without_a_step(self, tmp_path):
        for step in (4, 8, 12):
            hf(tmp_path / "run" / f"checkpoint-{step}", step, step)
        hf(tmp_path / "run" / "final", 12)
        assert members(tmp_path / "run") == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
        assert what(tmp_path / "run") == {"checkpoint-#": "member", "final": "copy"}

    def test_under_another_key_and_with_epoch_minus_1(self, tmp_path):
        """As ultralytics leaves them: the weights are `ema`, in best.pt and last.pt `model`."""
        for epoch in range(4):
            content = {"epoch": epoch, "model": None, "ema": {"w": w(epoch)}}
            put(tmp_path / "run" / f"epoch{epoch}.pt", content)
        for name in ("best", "last"):
            put(tmp_path / "run" / f"{name}.pt", {"epoch": -1, "model": {"w": w(3)}, "ema": None})
        assert members(tmp_path / "run") == [f"epoch{epoch}.pt" for epoch in range(4)]

    def test_the_one_that_records_more_stays(self, tmp_path):
        for epoch in (1, 2):
            content = {"state_dict": {"w": w(epoch)}, "epoch": epoch, "optimizer": STEPPED}
            put(tmp_path / "run" / f"epoch_{epoch}.pth", content)
        put(tmp_path / "run" / "best_acc_epoch_2.pth", {"state_dict": {"w": w(2)}})
        assert members(tmp_path / "run") == ["epoch_1.pth", "epoch_2.pth"]
        out = tmp_path / "out.pth"
        ckptavg.average(tmp_path / "run", out, container="last")
        assert torch.load(out)["optimizer"]["state"]

    def test_among_plain_names_too(self, tmp_path):
        put(tmp_path / "run" / "a1.pt", {"model": {"w": w(1)}})
        put(tmp_path / "run" / "b1.pt", {"model": {"w": w(1)}, "epoch": 1, "optimizer": STEPPED})
        assert members(tmp_path / "run") == ["b1.pt"]

    def test_a_link_to_a_folder(self, tmp_path):
        for step in (1000, 2000):
            put(tmp_path / "run" / f"step{step}" / "model.pt", {"w": w(step)})
        (tmp_path / "run" / "latest").symlink_to("step2000")
        assert members(tmp_path / "run") == ["step1000/model.pt", "step2000/model.pt"]

    def test_only_samples_of_distinct_checkpoints_are_read(self, tmp_path, monkeypatch):
        from ckptavg.formats.parts import File

        for step in range(3):
            put(tmp_path / f"{step}.safetensors", {"w": torch.rand(1_000_000)})
        count, read_into = 0, File.read_into

        def counting(self: File, offset: int, out: memoryview) -> None:
            nonlocal count
            count += len(out)
            read_into(self, offset, out)

        monkeypatch.setattr(File, "read_into", counting)
        assert len(find_run([tmp_path]).checkpoints) == 3
        assert count < 10_000


class TestAverages:
    @pytest.mark.parametrize(
        ("names", "series"),
        [
            ("epoch_1.pth epoch_2.pth epoch_1_ema.pth epoch_2_ema.pth", "epoch_#_ema.pth"),
            ("model1.pt model2.pt ema_0.9999_1.pt ema_0.9999_2.pt", "ema_0.9999_#.pt"),
            ("epoch-1/unet.pt epoch-2/unet.pt epoch-1/unet_ema.pt epoch-2/unet_ema.pt",
             "epoch-#/unet_ema.pt"),
            ("student_1.pt student_2.pt teacher_1.pt teacher_2.pt", "teacher_#.pt"),
        ],
    )  # fmt: skip
    def test_a_series_of_them_beside_the_weights_is_for_the_user_to_choose(
        self, tmp_path, names, series
    ):
        weights(tmp_path / "run", names)
        text = refusal(tmp_path / "run")
        assert f"\n  {series}: 2 averages, steps 1 to 2: `include`" in text
        for wanted in re.findall(r": (`include`.*)", text):
            arguments = re.findall(r"`(\w+)` '([^']*)'", wanted)
            include, exclude = (
                [glob for name, glob in arguments if name == each]
                for each in ("include", "exclude")
            )
            rules = Selection(include=include, exclude=exclude)
            found = find_run([tmp_path / "run"], exclusion_reason=rules.exclusion_reason)
            assert len(found.checkpoints) == 2

    @pytest.mark.parametrize(
        "name", ["valid.acc.ave_2best.pth", "avg_2.pt", "swa.pt", "modelEMA.pt", "greedy_soup.pt"]
    )
    def test_a_single_one_is_left_out(self, tmp_path, name, caplog):
        weights(tmp_path / "run", f"1epoch.pth 2epoch.pth 3epoch.pth {name}")
        with caplog.at_level("INFO", "ckptavg"):
            assert members(tmp_path / "run") == ["1epoch.pth", "2epoch.pth", "3epoch.pth"]
        assert f"left out as averages: {name}" in caplog.text

    def test_by_what_they_record(self, tmp_path):
        weights(tmp_path / "run", "epoch_1.pt epoch_2.pt")
        averaged = {"n_averaged": torch.tensor(2), "module.w": w(9)}
        put(tmp_path / "run" / "model.pt", averaged)
        assert members(tmp_path / "run") == ["epoch_1.pt", "epoch_2.pt"]

    def test_of_averages_are_said(self, tmp_path, caplog):
        for epoch in (1, 2):
            averaged = {"n_averaged": torch.tensor(epoch), "module.w": w(epoch)}
            put(tmp_path / "bare" / f"epoch_{epoch}.pt", averaged)
            root = {"state_dict": {"w": w(0)}, "swa_state_dict": averaged}
            put(tmp_path / "within" / f"epoch_{epoch}.pt", root)
        for folder, key in (("bare", None), ("within", "swa_state_dict")):
            caplog.clear()
            with caplog.at_level("INFO", "ckptavg"):
                assert members(tmp_path / folder, key=key) == ["epoch_1.pt", "epoch_2.pt"]
            assert "these are averages already: epoch_1.pt, epoch_2.pt" in caplog.text

    def test_lightning_s_callback_writes_one_ahead_of_its_epoch(self, tmp_path):
        for epoch in range(5):
            count = min(max(0, epoch - 1), 2)
            content = {
                "epoch": epoch,
                "global_step": 4 * min(epoch + 1, 4),
                "state_dict": {"w": w(epoch)},
                "callbacks": {"StochasticWeightAveraging": {"n_averaged": torch.tensor(count)}},
            }
            put(tmp_path / "run" / f"epoch={epoch}.ckpt", content)
        assert members(tmp_path / "run") == [f"epoch={epoch}.ckpt" for epoch in range(4)]


class TestPointersAndStarts:
    @pytest.mark.parametrize(
        "name",
        ["last.pt", "model_best.pth.tar", "latest.pth", "final.pt", "init.pt", "pretrained.pt",
         "best_epoch_7.pt", "epoch_latest.pt", "epoch.pt"],
    )  # fmt: skip
    def test_beside_a_numbered_series_are_left_out(self, tmp_path, name):
        weights(tmp_path / "run", f"{name} epoch_1.pt epoch_2.pt")
        assert members(tmp_path / "run") == ["epoch_1.pt", "epoch_2.pt"]

    def test_a_last_save_without_a_number_is_one(self, tmp_path):
        """As kohya's scripts leave it."""
        weights(
            tmp_path / "run", "lora-000001.safetensors lora-000002.safetensors lora.safetensors"
        )
        assert len(members(tmp_path / "run")) == 2

    def test_words_that_all_names_have_tell_nothing(self, tmp_path):
        weights(tmp_path / "run", "best_vit_1.pt best_vit_2.pt best_vit_last.pt")
        assert members(tmp_path / "run") == ["best_vit_1.pt", "best_vit_2.pt"]

    def test_alone_are_a_soup(self, tmp_path):
        weights(tmp_path / "run", "best.pt last.pt")
        assert members(tmp_path / "run") == ["best.pt", "last.pt"]

    def test_beside_others_without_numbers_are_for_the_user_to_choose(self, tmp_path):
        weights(tmp_path / "run", "checkpoint.pt model_best.pt")
        assert "model_best.pt: 1 pointer: `include` 'model_best.pt'" in refusal(tmp_path / "run")

    def test_what_was_saved_before_the_training_is_none(self, tmp_path):
        for epoch in range(4):
            optimizer = STEPPED if epoch else OPTIMIZER
            content = {"epoch": epoch, "state_dict": {"w": w(epoch)}, "optimizer": optimizer}
            put(tmp_path / "run" / f"checkpoint-{epoch}.pt", content)
        names = [f"checkpoint-{epoch}.pt" for epoch in (1, 2, 3)]
        assert members(tmp_path / "run") == names

    def test_a_downloaded_model_of_step_0_is_none(self, tmp_path):
        """As so-vits-svc, RVC and Bert-VITS2 begin with one, which has no optimizer."""
        for step in (0, 800, 1600):
            content = {"model": {"w": w(step)}, "optimizer": STEPPED if step else None}
            put(tmp_path / "run" / f"G_{step}.pth", content)
        assert members(tmp_path / "run") == ["G_800.pth", "G_1600.pth"]

    def test_an_epoch_0_without_an_optimizer_is_one_as_another_is(self, tmp_path):
        for epoch in range(3):
            content = {"model": {"w": w(epoch)}, "optimizer": STEPPED if epoch == 2 else None}
            put(tmp_path / "run" / f"epoch_{epoch}.pth", content)
        assert len(members(tmp_path / "run")) == 3

    @pytest.mark.parametrize(
        ("names", "start"),
        [
            ("step0-unsharded/model.pt step500-unsharded/model.pt step900-unsharded/model.pt",
             "step0-unsharded/model.pt"),  # OLMo
            ("step0.pt step1.pt step2.pt step512.pt", "step0.pt"),  # Pythia
            ("step_0.pt step_2.pt step_3.pt", ""),
            ("epoch_0.pt epoch_10.pt epoch_20.pt", ""),
            ("model_0.pt model_50.pt model_100.pt", ""),  # after the first of rsl_rl's iterations
            ("ep0-step0.pt ep0-step50.pt ep1-step0.pt ep1-step50.pt", ""),
        ],
    )  # fmt: skip
    def test_step_0_of_many_updates_is_none(self, tmp_path, names, start):
        weights(tmp_path / "run", names)
        assert members(tmp_path / "run") == [name for name in names.split() if name != start]


class TestNoCheckpoints:
    def test_unfinished_saves(self, tmp_path):
        for name, value in (("checkpoint-4", 4), ("checkpoint-8", 8), ("tmp-checkpoint-12", 99)):
            hf(tmp_path / "run" / name, value)
        hf(tmp_path / "run" / "checkpoint-16-tmp", 98)
        assert members(tmp_path / "run") == ["checkpoint-4", "checkpoint-8"]

    def test_files_without_a_state_dict(self, tmp_path, caplog):
        weights(tmp_path / "run", "params_1.pt params_2.pt")
        for name in ("train_end_optimizer.pt", "trunk_optimizer_1.pth", "opt000002.pt"):
            put(tmp_path / "run" / name, OPTIMIZER)
        named = {"state": {"l.weight": {"exp_avg": w(1), "step": w(1)}}, "param_groups": []}
        put(tmp_path / "run" / "fsdp.pt", named)
        put(tmp_path / "run" / "criterion.pt", {})
        with caplog.at_level("INFO", "ckptavg"):
            assert members(tmp_path / "run") == ["params_1.pt", "params_2.pt"]
        assert "left out, since they hold no weights: criterion.pt, fsdp.pt, opt" in caplog.text

    def test_text_in_files_of_a_checkpoint_s_ending(self, tmp_path):
        """As SpeechBrain leaves them."""
        for place, clock in enumerate(("10-30-00", "11-30-00")):
            folder = tmp_path / "run" / f"CKPT+2024-05-17+{clock}+00"
            put(folder / "model.ckpt", {"w": w(place)})
            put(folder / "optimizer.ckpt", OPTIMIZER)
            (folder / "counter.ckpt").write_text("5")
            (folder / "brain.ckpt").write_text("avg_train_loss: 0.5\noptimizer_step: 100\n")
        assert members(tmp_path / "run") == [
            "CKPT+2024-05-17+10-30-00+00/model.ckpt",
            "CKPT+2024-05-17+11-30-00+00/model.ckpt",
        ]
        (folder / "model.ckpt").write_text("<html>")
        (tmp_path / "out.safetensors").unlink()
        assert "model.ckpt: holds no state dict, " in refusal(tmp_path / "run")
        with pytest.raises(SelectionError, match=r"counter\.ckpt: is a text file"):
            ckptavg.average(folder / "counter.ckpt", tmp_path / "out.pt")

    def test_one_that_is_named_like_the_members_is_an_error(self, tmp_path):
        weights(tmp_path / "run", "epoch_1.pt epoch_2.pt")
        put(tmp_path / "run" / "epoch_3.pt", {"args": 1})
        assert "epoch_3.pt: holds no state dict" in refusal(tmp_path / "run")

    def test_a_truncated_member_is_an_error_of_both(self, tmp_path):
        weights(tmp_path / "run", "epoch_1.pt epoch_2.pt")
        with (tmp_path / "run" / "epoch_2.pt").open("r+b") as file:
            file.truncate(700)
        run("average", tmp_path / "run", "-o", tmp_path / "out.pt", code=1)
        result = run("inspect", tmp_path / "run", code=1)
        assert "epoch_2.pt: " in str(result.exception)
        assert "truncated" in str(result.exception)


class TestPieces:
    @pytest.mark.parametrize(
        ("names", "tool"),
        [
            ("consolidated.00.pth consolidated.01.pth", "convert_llama_weights_to_hf.py"),
            ("model-rank-0-part-0.safetensors model-rank-1-part-0.safetensors", "vLLM"),
            ("iter_1/mp_rank_00/model_optim_rng.pt iter_1/mp_rank_01/model_optim_rng.pt",
             "Megatron-LM's"),
            ("epoch_1_tp0_pp0.pt epoch_1_tp1_pp0.pt epoch_2_tp0_pp0.pt", "tool of the trainer"),
            ("weights-1-of-2.pt weights-2-of-2.pt", "index"),
            ("model.shard_0.pt model.shard_1.pt", "tool of the trainer"),
            ("tp0/epoch_1.pt tp1/epoch_1.pt", "tool of the trainer"),
            ("pp_00/tp_00/sdp_00.pt pp_00/tp_00/sdp_01.pt", "tool of the trainer"),  # fairseq2
        ],
    )  # fmt: skip
    def test_of_one_model_are_refused_with_the_tool_that_joins_them(self, tmp_path, names, tool):
        weights(tmp_path / "run", names)
        text = refusal(tmp_path / "run")
        assert "pieces of one model" in text
        assert tool in text
        paths = [tmp_path / "run" / name for name in names.split()]
        with pytest.raises(FormatError, match="pieces of one model"):
            ckptavg.average(paths, tmp_path / "out.safetensors")

    def test_flat_parameters(self, tmp_path):
        for number in range(2):
            put(tmp_path / "flat" / f"x{number}.pt", {"_flat_param": torch.rand(10)})
        assert "FULL_STATE_DICT" in refusal(tmp_path / "flat")

    def test_files_of_rank_0_alone_are_checkpoints(self, tmp_path):
        weights(tmp_path / "run", "ep0-ba100-rank0.pt ep0-ba200-rank0.pt ep1-ba300-rank0.pt")
        assert len(members(tmp_path / "run")) == 3
        verdicts = ckptavg.Selection(start=200)
        summary = ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors", select=verdicts)
        assert len(summary.sources) == 2


class TestNumbers:
    @pytest.mark.parametrize(
        "names",
        [
            "a_ep_50_rew_-310.2.pth a_ep_100_rew_-12.25.pth a_ep_150_rew_490.5.pth",  # rl_games
            "net_0.9123_1.pth net_0.85_2.pth net_0.8_10.pth",  # a metric, then the epoch
            "ckpt_8.pt ckpt_9.pt ckpt_010.pt",  # a training that was begun again
            "2024-05-17_10-30-00-save-9-5-0.pt 2024-05-18_09-00-00-save-10-5-1.pt",  # OneTrainer
            "model-1a2b:v8/model.ckpt model-1a2b:v9/model.ckpt model-1a2b:v10/model.ckpt",
            "checkpoint_epoch_00009.pyth checkpoint_epoch_00010.pyth",  # SlowFast
            "010000/pretrained_model.pt 020000/pretrained_model.pt",  # LeRobot
        ],
    )
    def test_order_the_members(self, tmp_path, names):
        weights(tmp_path / "run", names)
        assert members(tmp_path / "run") == names.split()

    def test_of_allennlp_s_epochs(self, tmp_path):
        weights(tmp_path / "run", "model_state_epoch_0.th model_state_epoch_1.th best.th")
        for epoch in range(2):
            content = {"epoch": epoch, "optimizer": STEPPED}
            put(tmp_path / "run" / f"training_state_epoch_{epoch}.th", content)
        names = ["model_state_epoch_0.th", "model_state_epoch_1.th"]
        assert members(tmp_path / "run") == names


class TestSeveralSeries:
    def test_of_the_same_steps(self, tmp_path):
        for epoch in range(3):
            for version in ("", "-v1"):
                facts = {"epoch": epoch, "global_step": 4 * epoch + 4}
                content = {"state_dict": {"w": torch.rand(2)}, **facts}
                put(tmp_path / "run" / f"epoch={epoch}{version}.ckpt", content)
        text = refusal(tmp_path / "run")
        assert "2 series of checkpoints, of the same steps:" in text
        assert "`include` 'epoch=*.ckpt' `exclude` 'epoch=*-v1.ckpt'" in text

    def test_of_two_models_take_few_lines(self, tmp_path):
        for number in range(3):
            for model, count in (("G", 60), ("D", 90)):
                state = {f"{model}.{place}": w(number + place) for place in range(count)}
                put(tmp_path / "run" / f"{number}_net_{model}.pth", state)
        text = refusal(tmp_path / "run")
        assert "#_net_G.pth: 3 checkpoints, steps 0 to 2: `include` '*_net_G.pth'" in text
        assert len(text.splitlines()) == 4
        with pytest.raises(ckptavg.CkptAvgError) as caught:
            ckptavg.average(sorted((tmp_path / "run").iterdir()), tmp_path / "out.pt")
        assert len(str(caught.value).splitlines()) <= 20

    @pytest.mark.parametrize(
        "names",
        [
            "run1_epoch_1.pt run1_epoch_2.pt run2_epoch_1.pt run2_epoch_2.pt",
            "trial_1/epoch_1.pt trial_1/epoch_2.pt trial_2/epoch_3.pt",
            "fold_0/best.pt fold_1/best.pt",
            "model_0/best.pt model_1/best.pt",  # an ensemble of Chemprop
            "experiment_0/checkpoint.pth.tar experiment_1/checkpoint.pth.tar",
            "exp1/epoch_3.pt exp2/epoch_5.pt",
            "lr=0.1/epoch_3.pt lr=0.01/epoch_5.pt",
            "2024-05-17_10-30-00/epoch_1.pt 2024-05-18_10-30-00/epoch_2.pt",
            "train_0_2024-05-17/checkpoint_09/a.pt train_1_2024-05-17/checkpoint_04/a.pt",  # Ray
            "seed_0.pt seed_1.pt",
            "a_20240517_step1.pt a_20240517_step2.pt a_20240518_step3.pt a_20240518_step4.pt",
            "checkpoint1.pt checkpoint2.pt checkpoint_1_500.pt checkpoint_1_900.pt",
            "epoch_1.pt epoch_2.pt encoder.pt",
        ],
    )
    def test_are_never_averaged_in_silence(self, tmp_path, names):
        weights(tmp_path / "run", names)
        assert " series of checkpoints" in refusal(tmp_path / "run")

    def test_that_are_for_the_user_to_choose_are_not_said_to_be_left_out(self, tmp_path, caplog):
        weights(tmp_path / "run", "epoch_1.pt epoch_2.pt epoch_1_ema.pt epoch_2_ema.pt last.pt")
        with caplog.at_level("INFO", "ckptavg"), pytest.raises(ckptavg.CkptAvgError):
            ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
        assert "left out beside the numbered checkpoints: last.pt" in caplog.text
        assert "left out as averages" not in caplog.text

    def test_files_that_are_named_are_averaged(self, tmp_path):
        weights(tmp_path, "seed_0.pt seed_1.pt best.pt")
        paths = sorted(tmp_path.iterdir())
        assert len(ckptavg.average(paths, tmp_path / "out.safetensors").sources) == 3

    @pytest.mark.parametrize(
        "names",
        [
            "epoch=3-loss=0.5.ckpt epoch=3-loss=0.6.ckpt epoch=4-loss=0.1.ckpt",
            "epoch=3-acc=71.ckpt epoch=3-acc=72.ckpt",
            "epoch_1.pt epoch_01.pt",
            "epoch_1.pt epoch_1.safetensors epoch_2.pt",
        ],
    )
    def test_the_same_step_twice_names_both(self, tmp_path, names):
        weights(tmp_path / "run", names)
        text = refusal(tmp_path / "run")
        assert "the same step twice: " in text
        assert names.split()[0] in text
        assert names.split()[1] in text

    def test_models_that_each_end_a_training_are_a_soup(self, tmp_path):
        for number in range(3):
            content = {"epoch": 10, "model": {"w": w(number)}}
            put(tmp_path / "run" / f"model_{number}.pt", content)
        assert len(members(tmp_path / "run")) == 3


class TestFolders:
    def test_of_one_file_each(self, tmp_path):
        for step in (4, 8, 12):
            folder = tmp_path / "run" / f"step-{step:08}"
            put(folder / "lit_model.pth", {"w": w(step)})
            (folder / "model_config.yaml").write_text("x: 1\n")
        assert members(tmp_path / "run") == [f"step-{s:08}/lit_model.pth" for s in (4, 8, 12)]

    def test_that_a_slash_in_a_metric_s_name_makes(self, tmp_path):
        for epoch, loss in ((0, 0.9), (1, 0.8), (2, 0.85)):
            content = {"epoch": epoch, "global_step": epoch, "state_dict": {"w": w(epoch)}}
            put(tmp_path / "run" / f"epoch={epoch}-val" / f"loss={loss}.ckpt", content)
        assert len(members(tmp_path / "run")) == 3
        best = Selection(best=2, metric="val/loss")
        summary = ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors", select=best)
        assert [source.name for source in summary.sources] == [
            "epoch=1-val/loss=0.8.ckpt",
            "epoch=2-val/loss=0.85.ckpt",
        ]

    def test_without_a_number_are_not_looked_into(self, tmp_path):
        weights(tmp_path / "run", "epoch_1.pt epoch_2.pt backup/epoch_1.pt", first=1)
        assert members(tmp_path / "run") == ["epoch_1.pt", "epoch_2.pt"]


class TestStateDicts:
    def test_that_some_lack_do_no_harm_unless_these_are_chosen(self, tmp_path):
        for epoch in (1, 2, 3):
            content = {"epoch": epoch, "model": {"w": w(epoch)}}
            if epoch > 1:
                content["model_ema"] = {"w": w(10 * epoch)}
            put(tmp_path / "run" / f"epoch_{epoch}.pt", content)
        out = tmp_path / "out.safetensors"
        ckptavg.average(tmp_path / "run", out, key="model_ema", select=Selection(last=2))
        assert load_file(out)["w"].tolist() == [25, 25]
        with pytest.raises(SelectionError, match=r"epoch_1\.pt: no state dict 'model_ema' in it"):
            ckptavg.average(tmp_path / "run", out, key="model_ema", force=True)

    @pytest.mark.parametrize("counter", ["n_averaged", "steps"])
    def test_under_a_key_lose_a_wrapper_s_prefix_and_counter(self, tmp_path, counter):
        for epoch in (1, 2):
            inner = {counter: torch.tensor(epoch), "module.w": w(epoch)}
            content = {"epoch": epoch, "model": {"w": w(9)}, "averaged": inner}
            put(tmp_path / "run" / f"epoch_{epoch}.pt", content)
        assert len(members(tmp_path / "run", key="averaged")) == 2

    def test_of_mmengine_s_ema_hook_hold_the_weights(self, tmp_path, caplog):
        """The hook exchanges the weights and their average when it saves."""
        for epoch in (1, 2):
            hook = {"steps": torch.tensor(epoch), "module.w": w(epoch)}
            content = {"state_dict": {"w": w(50)}, "ema_state_dict": hook}
            put(tmp_path / "run" / f"epoch_{epoch}.pth", content)
        with caplog.at_level("INFO", "ckptavg"):
            assert len(members(tmp_path / "run")) == 2
        assert "averages already" not in caplog.text
        out = tmp_path / "out.pth"
        ckptavg.average(tmp_path / "run", out, container="last")
        root = torch.load(out)
        assert root["state_dict"]["w"].tolist() == root["ema_state_dict"]["module.w"].tolist()
        assert root["state_dict"]["w"].tolist() == [1.5, 1.5]


class TestInspect:
    def test_shows_each_series_and_what_it_is(self, tmp_path):
        weights(tmp_path / "run", "tokens_1B.pt tokens_1.25B.pt tokens_1.5B.pt avg_2.pt best.pt")
        rows = json.loads(run("inspect", "--json", tmp_path / "run").stdout)
        series = {row["name"]: row for row in rows["series"]}
        assert series["tokens_#B.pt" if "tokens_#B.pt" in series else "tokens_#.pt"]["steps"] == [
            1_000_000_000,
            1_500_000_000,
        ]
        assert series["avg_2.pt"]["what"] == "average"
        assert series["best.pt"]["what"] == "pointer"
        assert [row["step"] for row in rows["checkpoints"] if row["selected"]] == [
            1_000_000_000,
            1_250_000_000,
            1_500_000_000,
        ]

    def test_says_how_many_of_the_best_there_are(self, tmp_path):
        for epoch in range(4):
            put(tmp_path / "run" / f"{epoch}.pt", {"w": w(epoch)})
            content = {"epoch": epoch, "model": {"w": w(epoch)}, "loss": 1.0 - epoch / 10}
            put(tmp_path / "run" / f"{epoch}.pt", content)
        result = run("inspect", tmp_path / "run", "--best", "5", "--metric", "loss")
        assert "there are only 4 of the best 5 by loss" in result.stderr
