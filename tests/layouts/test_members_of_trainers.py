"""Which files of a directory are averaged, where the real library of a trainer wrote them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from safetensors.torch import load_file
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR

import ckptavg
from ckptavg import Selection
from ckptavg.errors import SelectionError
from ckptavg.select.rules import select
from ckptavg.select.run import find_run
from tests.layouts import libraries
from tests.layouts.lightning_runs import Net, batches, trainer
from tests.oracle import assert_mean

pytestmark = pytest.mark.filterwarnings("ignore")


def series(folder: Path) -> dict[str, str]:
    """What each series of a directory is, by its name."""
    return {
        each.name: "member" if each.is_of_members else each.kind
        for each in find_run([folder]).series
    }


def names(folder: Path) -> list[str]:
    return [checkpoint.name for checkpoint in find_run([folder]).checkpoints]


class TestLightning:
    def test_an_average_of_its_callback_is_left_out(self, tmp_path):
        torch.manual_seed(0)
        callback = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        trainer(tmp_path, callback, epochs=4).fit(Net(), batches())
        epochs = [int(name.partition("=")[2].partition("-")[0]) for name in names(tmp_path)]
        assert epochs == [0, 1, 2, 3]
        [average] = [path for path in tmp_path.glob("epoch=*.ckpt") if "epoch=4" in path.name]
        for epoch in (1, 3):
            next(tmp_path.glob(f"epoch={epoch}-*")).unlink()
        (tmp_path / "last.ckpt").unlink()
        assert average.name not in names(tmp_path)
        assert len(names(tmp_path)) == 2

    def test_a_metric_with_a_slash_makes_folders(self, tmp_path):
        from lightning.pytorch.callbacks import ModelCheckpoint

        class Validated(Net):
            def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
                loss = super().training_step(batch, number)
                self.log("val/loss", loss, on_epoch=True)
                return loss

        keeping = ModelCheckpoint(
            dirpath=tmp_path / "run", filename="{epoch}-{val/loss:.3f}", save_top_k=-1,
            monitor="val/loss",
        )  # fmt: skip
        trainer(tmp_path / "other", keeping, epochs=3).fit(Validated(), batches())
        assert [name.partition("-")[0] for name in names(tmp_path / "run")] == [
            "epoch=0",
            "epoch=1",
            "epoch=2",
        ]


class TestTransformers:
    def test_the_model_saved_at_the_end_is_a_copy(self, tmp_path):
        made = libraries.trainer(tmp_path / "run", libraries.llama())
        made.train()
        made.save_model(tmp_path / "run" / "final")
        shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "tmp-checkpoint-16")
        assert names(tmp_path / "run") == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
        assert series(tmp_path / "run") == {
            "checkpoint-#": "member",
            "final": "copy",
            "tmp-checkpoint-16": "unfinished",
        }


@pytest.mark.parametrize("after", [True, False])
def test_torch_s_recipe_of_swa_has_its_minima_where_the_rate_is_constant(tmp_path, after):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler = CosineAnnealingLR(optimizer, T_max=20)
    swa = SWALR(optimizer, anneal_strategy="linear", anneal_epochs=5, swa_lr=0.01)
    (tmp_path / "run").mkdir()
    for epoch in range(1, 21):
        weight.grad = torch.ones(3)
        optimizer.step()

        def save(number: int) -> None:
            state = {
                "epoch": number,
                "model": {"w": weight.detach().clone()},
                "optimizer": optimizer.state_dict(),
                "swa_scheduler": swa.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            torch.save(state, tmp_path / "run" / f"epoch_{number}.pt")

        if not after:
            save(epoch)
        (swa if epoch > 6 else scheduler).step()
        if after:
            save(epoch)
    verdicts = select(find_run([tmp_path / "run"]), Selection(lr_minima=True))
    assert [each.step for each in verdicts if each.is_chosen] == list(range(12, 21))


class TestMMEngine:
    @pytest.fixture
    def run(self, tmp_path: Path) -> tuple[Path, dict[int, Mapping[str, Any]]]:
        """A run with an EMAHook, and the weights themselves after each epoch."""
        pytest.importorskip("mmengine")
        from mmengine.hooks import Hook
        from mmengine.model import BaseModel
        from mmengine.runner import Runner

        truth: dict[int, Mapping[str, Any]] = {}

        class Model(BaseModel):
            def __init__(self) -> None:
                super().__init__()
                self.layers = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))

            def forward(self, rows: torch.Tensor, mode: str = "tensor") -> Any:
                values = self.layers(rows)
                return {"loss": values.square().mean()} if mode == "loss" else values

        class Keep(Hook):
            def after_train_epoch(self, runner: Any) -> None:
                state = runner.model.state_dict()
                truth[runner.epoch + 1] = {name: value.clone() for name, value in state.items()}

        torch.manual_seed(0)
        rows: Any = torch.randn(12, 8)
        loader: Any = torch.utils.data.DataLoader(
            rows, batch_size=4, collate_fn=lambda rows: {"rows": torch.stack(rows)}
        )
        runner = Runner(
            Model(),
            work_dir=str(tmp_path / "run"),
            train_dataloader=loader,
            train_cfg={"by_epoch": True, "max_epochs": 3},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
            custom_hooks=[{"type": "EMAHook", "momentum": 0.1}],
            experiment_name=tmp_path.name,
            log_level="ERROR",
        )
        runner.register_hook(Keep())
        try:
            runner.train()
        finally:
            for name in ("mmengine", "current"):  # it does not close its log
                for handler in logging.getLogger(name).handlers:
                    handler.close()
        return tmp_path / "run", truth

    def test_the_weights_are_averaged_and_not_what_its_hook_keeps(self, run, tmp_path):
        folder, truth = run
        ckptavg.average(folder, tmp_path / "out.safetensors")
        assert_mean(load_file(tmp_path / "out.safetensors"), [truth[n] for n in sorted(truth)])


class TestSkorch:
    def test_parameters_are_averaged_beside_optimizers_and_criteria(self, tmp_path):
        skorch = pytest.importorskip("skorch")
        from skorch.callbacks import Checkpoint, TrainEndCheckpoint

        place = str(tmp_path / "run")
        net = skorch.NeuralNetRegressor(
            torch.nn.Linear, module__in_features=4, module__out_features=1, max_epochs=3,
            optimizer=torch.optim.Adam, verbose=0,
            callbacks=[
                Checkpoint(dirname=place, monitor=None, f_params="params_{last_epoch[epoch]}.pt"),
                TrainEndCheckpoint(dirname=place),
            ],
        )  # fmt: skip
        rows = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
        net.fit(rows, rows.sum(1, keepdims=True))
        assert names(tmp_path / "run") == ["params_1.pt", "params_2.pt", "params_3.pt"]
        assert series(tmp_path / "run")["train_end_optimizer.pt"] == "no weights"
        assert series(tmp_path / "run")["train_end_params.pt"] == "copy"


class TestDiffusers:
    def test_a_model_and_its_average_in_one_checkpoint_are_two_series(self, tmp_path):
        pytest.importorskip("diffusers")
        import accelerate
        from diffusers import AutoencoderTiny
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        model = AutoencoderTiny(
            encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
            num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
        )  # fmt: skip
        average = EMAModel(model.parameters(), model_cls=AutoencoderTiny, model_config=model.config)
        accelerator = accelerate.Accelerator(cpu=True)
        states = []
        for step in (10, 20, 30):  # the first average is a copy
            for value in model.parameters():
                value.data.add_(0.01 * torch.randn_like(value))
            average.step(model.parameters())
            folder = tmp_path / "run" / f"checkpoint-{step}"
            accelerator.save_state(str(folder))
            model.save_pretrained(folder / "unet")
            average.save_pretrained(str(folder / "unet_ema"))
            states.append({name: value.clone() for name, value in model.state_dict().items()})
        with pytest.raises(SelectionError, match="2 series of checkpoints") as caught:
            ckptavg.average(tmp_path / "run", tmp_path / "out/")
        assert "`include` 'checkpoint-*/unet'\n" in str(caught.value)
        chosen = Selection(include=["checkpoint-*/unet"])
        ckptavg.average(tmp_path / "run", f"{tmp_path}/out/", select=chosen)
        found = AutoencoderTiny.from_pretrained(tmp_path / "out").state_dict()
        assert_mean(found, states)


class TestSentenceTransformers:
    def test_the_folders_of_modules_are_no_series(self, tmp_path):
        pytest.importorskip("sentence_transformers")
        from sentence_transformers import SentenceTransformer, models
        from transformers import BertConfig, BertModel

        libraries.tokenizer().save_pretrained(tmp_path / "bert")
        config = BertConfig(
            vocab_size=libraries.WORDS, hidden_size=8, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=8,
        )  # fmt: skip
        BertModel(config).save_pretrained(tmp_path / "bert")
        transformer = models.Transformer(str(tmp_path / "bert"))
        modules = [transformer, models.Pooling(8), models.Dense(8, 4)]
        model = SentenceTransformer(modules=modules, device="cpu")
        for step in (5, 10):
            for value in model.parameters():
                value.data.add_(0.01 * torch.randn_like(value))
            model.save(str(tmp_path / "run" / f"checkpoint-{step}"))
        model.save(str(tmp_path / "run" / "final"))
        assert names(tmp_path / "run") == ["checkpoint-5", "checkpoint-10"]
        assert series(tmp_path / "run")["final"] == "copy"
