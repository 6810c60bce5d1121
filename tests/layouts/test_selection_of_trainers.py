"""The rules of selection on what Lightning and Hugging Face's Trainer leave."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from ckptavg import Selection
from ckptavg.errors import SelectionError
from ckptavg.select.rules import chosen, select
from ckptavg.select.run import find_run
from tests.layouts.libraries import llama
from tests.layouts.lightning_runs import Net, batches, trainer


def taken(folder: Path, **rules: Any) -> list[str]:
    selection = Selection(**rules)
    found = find_run([folder], exclusion_reason=selection.exclusion_reason)
    return [verdict.checkpoint.path.name for verdict in chosen(select(found, selection))]


class Measured(Net):
    """Logs a loss that is best after the second epoch."""

    def on_train_epoch_end(self) -> None:
        self.log("val_loss", abs(float(self.current_epoch) - 1.1))


@pytest.fixture(scope="module")
def lightning_run(tmp_path_factory):
    """Four epochs of three steps, the loss in the names, and `last.ckpt` as a copy."""
    folder = tmp_path_factory.mktemp("lightning")
    torch.manual_seed(0)
    keeping = ModelCheckpoint(
        dirpath=folder / "kept", filename="{epoch}-{val_loss:.2f}", monitor="val_loss",
        save_top_k=-1, save_last=True,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):
        trainer(folder / "every", keeping, epochs=4).fit(Measured(), batches())
    return folder / "kept"


class TestLightning:
    def epochs(self, folder, **rules):
        return [int(name.split("=")[1].split("-")[0]) for name in taken(folder, **rules)]

    def test_rules(self, lightning_run):
        assert self.epochs(lightning_run) == [0, 1, 2, 3]
        assert self.epochs(lightning_run, last=2) == [2, 3]
        assert self.epochs(lightning_run, cycle=2, unit="epoch") == [1, 3]
        assert self.epochs(lightning_run, cycle=6, unit="global_step") == [
            1,
            3,
        ]  # of steps: 3, 6, 9 and 12
        assert self.epochs(lightning_run, start="75%") == [2, 3]
        assert self.epochs(lightning_run, start="75%", unit="epoch") == [2, 3]
        assert self.epochs(lightning_run, steps="3,9") == [0, 2]
        assert self.epochs(lightning_run, include=["epoch=[13]*"]) == [1, 3]

    def test_the_best_by_what_was_monitored(self, lightning_run):
        assert self.epochs(lightning_run, best=2, metric="val_loss") == [1, 2]
        assert self.epochs(lightning_run, best=1, metric="val_loss", mode="max") == [3]


class Logged(Net):
    """Logs a loss of each step, which is the step's number, and the epoch's number after each."""

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.log("step_loss", float(self.global_step), on_step=True, on_epoch=False)
        return super().training_step(batch, index)

    def on_train_epoch_end(self) -> None:
        self.log("accuracy", float(self.current_epoch))


@pytest.mark.parametrize(("every", "kept"), [(3, [3, 6, 9, 12]), (2, [2, 4, 6, 8, 10, 12])])
def test_the_log_of_lightning_s_csv_logger_is_a_file_of_metrics(tmp_path, every, kept):
    keeping = ModelCheckpoint(
        dirpath=tmp_path / "kept", every_n_train_steps=every, save_top_k=-1, filename="{step}"
    )
    logger = CSVLogger(tmp_path, "log")
    with warnings.catch_warnings(action="ignore"):
        training = lightning.Trainer(
            max_epochs=4, accelerator="cpu", logger=logger, callbacks=[keeping],
            log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        training.fit(Logged(), batches())
    log = Path(logger.log_dir) / "metrics.csv"
    assert log.read_text().startswith("accuracy,epoch,step,step_loss\n")
    run = find_run([tmp_path / "kept"])

    def metrics(name: str) -> list[float | None]:
        rules = Selection(metric=name, mode="min", metrics=log)
        return [verdict.metric for verdict in select(run, rules)]

    assert metrics("step_loss") == [step - 1 for step in kept]
    ends = [step // 3 - 1 if step % 3 == 0 else None for step in kept]
    assert metrics("accuracy") == ends


@pytest.fixture(scope="module")
def trainer_run(tmp_path_factory):
    """Six checkpoints of two steps; the rate restarts after every fourth step."""
    folder = tmp_path_factory.mktemp("trainer")
    rows = [{"input_ids": [step % 7, 3, 4], "labels": [step % 7, 3, 4]} for step in range(48)]
    options = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=12, save_steps=2,
        logging_steps=1, eval_strategy="steps", eval_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="cosine_with_restarts",
        lr_scheduler_kwargs={"num_cycles": 3}, learning_rate=0.01,
    )  # fmt: skip
    transformers.Trainer(
        model=llama(), args=options, train_dataset=rows, eval_dataset=rows[:4]
    ).train()
    return folder


class TestTransformers:
    def steps(self, folder, **rules):
        return [int(name.removeprefix("checkpoint-")) for name in taken(folder, **rules)]

    def test_rules(self, trainer_run):
        assert self.steps(trainer_run) == [2, 4, 6, 8, 10, 12]
        assert self.steps(trainer_run, last=2) == [10, 12]
        assert self.steps(trainer_run, every=3) == [6, 12]
        assert self.steps(trainer_run, cycle=4) == [4, 8, 12]
        assert self.steps(trainer_run, start="75%") == [10, 12]
        assert self.steps(trainer_run, steps="2:12:4") == [2, 6, 10]

    def test_the_minima_of_the_rate(self, trainer_run):
        assert self.steps(trainer_run, lr_minima=True) == [4, 8, 12]
        assert self.steps(trainer_run, lr_minima=True, start="50%") == [8, 12]

    def test_the_best_by_what_was_evaluated(self, trainer_run):
        verdicts = select(find_run([trainer_run]), Selection(best=2, metric="eval_loss"))
        losses = [(verdict.metric or 0.0, verdict.step or 0) for verdict in verdicts]
        assert all(loss > 0 for loss, _ in losses)
        lowest = [step for _, step in sorted(losses)[:2]]
        assert self.steps(trainer_run, best=2, metric="eval_loss") == sorted(lowest)
        with pytest.raises(SelectionError, match="none of the checkpoints has the metric eval_f1"):
            taken(trainer_run, best=1, metric="eval_f1")
