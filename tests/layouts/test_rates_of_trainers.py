"""Learning rates and metrics as Hugging Face's Trainer and Lightning record them."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint

from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.select.learning_rates import rates_and_minima
from tests.layouts.libraries import Sentences, llama
from tests.layouts.lightning_runs import Net, batches

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The 'train_dataloader' does not have many workers",
        "The 'val_dataloader' does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "`isinstance.treespec, LeafSpec.` is deprecated",
    )
]


def minima_of(checkpoints: Sequence[Checkpoint]) -> tuple[list[float], list[bool]]:
    return rates_and_minima(checkpoints)


def rates_of(checkpoints: Sequence[Checkpoint]) -> list[float]:
    return minima_of(checkpoints)[0]


def taken(checkpoints: Sequence[Checkpoint]) -> list[int]:
    _, minima = minima_of(checkpoints)
    return [index for index, low in enumerate(minima) if low]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this tool said, and not the trainers."""
    return [record.getMessage() for record in caplog.records if record.name == "ckptavg"]


class Used(transformers.TrainerCallback):
    """Writes down the rate that each update is made with."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def on_pre_optimizer_step(self, _: Any, state: Any, __: Any, **known: Any) -> None:
        self.rates[state.global_step + 1] = known["optimizer"].param_groups[0]["lr"]


class Hugging:
    """A run of the Trainer with three cycles of 8 steps, saved every 4 steps or every step."""

    def __init__(self, folder: Path, **options: Any) -> None:
        used = Used()
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            learning_rate=0.02,
            lr_scheduler_type="cosine_with_restarts",
            lr_scheduler_kwargs={"num_cycles": 3},
            max_steps=24,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **{"save_steps": 4, "logging_steps": 4} | options,
        )
        made = transformers.Trainer(
            model=llama(),
            args=arguments,
            train_dataset=Sentences(),
            eval_dataset=Sentences(),
            callbacks=[used],
        )
        made.train()
        paths = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        self.checkpoints = [open_checkpoint(path) for path in paths]
        self.used = [used.rates[int(path.name[11:])] for path in paths]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Hugging:
    folder: Path = tmp_path_factory.mktemp("logged")
    return Hugging(folder, eval_strategy="steps", eval_steps=8)


class TestHuggingFace:
    def test_the_logged_rate_is_the_one_used_and_the_recorded_one_the_next(self, logged, caplog):
        caplog.set_level(logging.INFO)
        assert rates_of(logged.checkpoints) == pytest.approx(logged.used)
        assert taken(logged.checkpoints) == [1, 3, 5]
        assert [message for message in said(caplog) if "falling" not in message] == []
        recorded = [checkpoint.training.learning_rate for checkpoint in logged.checkpoints]
        assert recorded[1] == pytest.approx(0.02)
        assert logged.used[1] < 0.002

    def test_metrics_are_those_of_the_checkpoint_s_own_step(self, logged):
        for checkpoint in logged.checkpoints:
            state = json.loads((checkpoint.path / "trainer_state.json").read_text())
            step = state["global_step"]
            own = [entry for entry in state["log_history"] if entry["step"] == step]
            metrics = checkpoint.training.metrics
            assert metrics["loss"] == next(e["loss"] for e in own if "loss" in e)
            assert ("eval_loss" in metrics) == (step % 8 == 0)
            if step % 8 == 0:
                assert metrics["eval_loss"] == next(e["eval_loss"] for e in own if "eval_loss" in e)
            assert not {"step", "epoch", "learning_rate"} & metrics.keys()

    def test_saved_every_step_the_checkpoint_before_has_the_rate(self, tmp_path, caplog):
        run = Hugging(tmp_path, save_steps=1, logging_steps=1000)
        caplog.set_level(logging.INFO)
        assert rates_of(run.checkpoints)[1:] == pytest.approx(run.used[1:])
        assert taken(run.checkpoints) == [7, 15, 23]
        assert any("is the next one" in message for message in said(caplog))

    @pytest.mark.parametrize("logging_steps", [1, 4])
    def test_what_older_trainers_logged_is_known_to_be_the_next_rate(
        self, logged, caplog, logging_steps
    ):
        """As transformers wrote it until 2025: the rate after the scheduler's step."""
        records = []
        rates = dict(enumerate(cosine_with_restarts(24)))
        for checkpoint in logged.checkpoints:
            path = checkpoint.path / "trainer_state.json"
            text = path.read_text()
            state = json.loads(text)
            state["log_history"] = [
                {"step": step, "learning_rate": rates[step], "loss": 1.0}
                for step in range(logging_steps, state["global_step"] + 1, logging_steps)
            ]
            path.write_text(json.dumps(state))
            records.append(open_checkpoint(checkpoint.path))
            path.write_text(text)
        caplog.set_level(logging.INFO)
        found = rates_of(records)
        if logging_steps == 1:
            assert found == pytest.approx(logged.used)
            assert not said(caplog)
        else:
            assert found == [checkpoint.training.learning_rate for checkpoint in records]
            assert "is the next one" in said(caplog)[0]

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100])
    def test_a_damaged_scheduler_file_costs_but_the_rate(self, logged, caplog, content):
        path = logged.checkpoints[0].path / "scheduler.pt"
        whole = path.read_bytes()
        path.write_bytes(content)
        caplog.set_level(logging.INFO)
        opened = open_checkpoint(path.parent)
        path.write_bytes(whole)
        assert opened.training.scheduler is None
        assert opened.training.learning_rate == pytest.approx(logged.used[0])  # from the log
        [message] = said(caplog)
        assert "scheduler.pt" in message


def cosine_with_restarts(steps: int) -> list[float]:
    """The rate for each update, counted from 0, and the one after the last."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.02)
    scheduler = transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, 0, steps, 3
    )
    rates = []
    for _ in range(steps + 1):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


class Cycles(Net):
    """Warm restarts every three epochs of three updates, and a metric."""

    def __init__(self, interval: str) -> None:
        super().__init__()
        self.interval = interval
        self.used: dict[int, float] = {}
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        length = 3 if self.interval == "epoch" else 9
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, length)
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        self.used[self.trainer.global_step + 1] = self.optimizers().param_groups[0]["lr"]
        super().optimizer_step(*arguments, **options)

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("val/loss", self.layers(batch).square().mean())

    def on_validation_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["val/loss"]))


def fit(folder: Path, interval: str, *savers: ModelCheckpoint) -> Cycles:
    torch.manual_seed(0)
    model = Cycles(interval)
    lightning.Trainer(
        accelerator="cpu",
        callbacks=list(savers),
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=9,
        num_sanity_val_steps=0,
    ).fit(model, batches(), batches())
    return model


def opened(folder: Path) -> list[Checkpoint]:
    found = [open_checkpoint(path) for path in folder.glob("*.ckpt")]
    return sorted(found, key=lambda checkpoint: checkpoint.training.steps["global_step"])


class TestLightning:
    @pytest.mark.parametrize("steps", [1, 3, None])
    @pytest.mark.parametrize("interval", ["epoch", "step"])
    def test_the_used_rate_is_found_whenever_it_saves(self, tmp_path, caplog, interval, steps):
        every = {"every_n_epochs": 1} if steps is None else {"every_n_train_steps": steps}
        saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, **every)
        model = fit(tmp_path, interval, saver)
        checkpoints = opened(tmp_path)
        steps_saved = [checkpoint.training.steps["global_step"] for checkpoint in checkpoints]
        assert len(steps_saved) == (27 if steps == 1 else 9)
        caplog.set_level(logging.INFO)
        assert rates_of(checkpoints) == pytest.approx([model.used[step] for step in steps_saved])
        assert not said(caplog)
        wanted = {9, 18, 27}
        if interval == "epoch":  # all updates of an epoch have one rate
            wanted = {7, 8, 9, 16, 17, 18, 25, 26, 27}
        assert {steps_saved[index] for index in taken(checkpoints)} == wanted & set(steps_saved)

    def test_each_checkpoint_has_its_own_score(self, tmp_path):
        saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, monitor="val/loss", save_last=True)
        model = fit(tmp_path, "epoch", saver)
        for checkpoint in opened(tmp_path):
            metrics = checkpoint.training.metrics
            if checkpoint.path.name == "last.ckpt":
                assert metrics == {}
            else:
                epoch = checkpoint.training.steps["epoch"]
                assert metrics == {"val/loss": pytest.approx(model.losses[epoch])}
        assert len({*model.losses}) == 9

    def test_another_saver_s_checkpoints_do_not_take_the_score_of_the_best(self, tmp_path):
        best = ModelCheckpoint(dirpath=tmp_path / "best", save_top_k=1, monitor="val/loss")
        every = ModelCheckpoint(dirpath=tmp_path / "all", save_top_k=-1, every_n_epochs=1)
        model = fit(tmp_path, "epoch", best, every)
        for checkpoint in opened(tmp_path / "all"):
            epoch = checkpoint.training.steps["epoch"]
            found = checkpoint.training.metrics.get("val/loss")
            assert found is None or found == pytest.approx(model.losses[epoch])
        assert any(later > sooner for sooner, later in itertools.pairwise(model.losses))
