"""Lightning's data modules: batches, hooks and arguments are what its own Trainer takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import ckptavg
from ckptavg import Selection
from ckptavg.batchnorm.options import RefreshOptions
from ckptavg.errors import CkptAvgError, RefreshError, UserCodeError
from tests.helpers import run

pytestmark = [
    pytest.mark.usefixtures("no_fsync", "user_folder"),
    *(
        pytest.mark.filterwarnings(f"ignore:{message}")
        for message in (
            "The '.*_dataloader' does not have many workers",
            "`isinstance.treespec, LeafSpec.` is deprecated",
            "You have overridden `on_.*_batch_transfer`",
        )
    ),
]


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layers(inputs)
        return outputs

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        outputs = self(batch[0])
        self.log("loss", nn.functional.cross_entropy(outputs, batch[1]))
        self.log("accuracy", (outputs.argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Doubling(Net):
    """Two hooks of a model."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0] - dataloader_idx, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].exp().clamp(max=9) + dataloader_idx, batch[1]


class Data(lightning.LightningDataModule):
    def __init__(self, size: int = 40, shift: float = 0.0, *, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.size, self.shift, self.seed = size, shift, seed

    def loader(self, number: int, *, shuffle: bool = False) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.seed + number)
        inputs = torch.randn(120, 4, generator=generator)
        labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
        inputs = 5 + 10 * (inputs + self.shift)
        return DataLoader(TensorDataset(inputs, labels), self.size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(2)


class Normalising(Data):
    """A hook of a data module."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ARG002
        return (batch[0] - 5) / 10, batch[1]


class Moving(Data):
    """The hook in the middle, which is given the device."""

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:  # fmt: skip
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        assert moved[0].device == device
        return moved[0].neg(), moved[1]


class NeedsTrainer(Data):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ARG002
        return batch if self.trainer.training else None


class WithoutTest(lightning.LightningDataModule):
    def val_dataloader(self) -> DataLoader[Any]:
        return Data().val_dataloader()


def trainer(**options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def trained(model: lightning.LightningModule, data: lightning.LightningDataModule) -> list[Path]:
    """A run of three epochs; its checkpoints in order."""
    keep = ModelCheckpoint("run", filename="{epoch}", save_top_k=-1)
    trainer(max_epochs=3, limit_val_batches=0, callbacks=[keep]).fit(model, data)
    return sorted(Path("run").glob("*.ckpt"))


def metrics_of_lightning(kind: type[Net], path: Path, data: Any, what: str) -> dict[str, float]:
    model = kind()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    [metrics] = getattr(trainer(), what)(model, data, verbose=False)
    return dict(metrics)


def test_a_loader_without_a_data_module_goes_through_the_model_s_hooks():
    paths = trained(Doubling(), Data())
    loader = Data().loader(1)
    [*_, found] = ckptavg.evaluate(paths, model=Doubling, loader=loader, device="cpu")
    expected = metrics_of_lightning(Doubling, paths[-1], loader, "validate")
    assert found.metrics == pytest.approx(expected, rel=1e-5)
    with pytest.raises(CkptAvgError, match="can be iterated only once"):
        ckptavg.evaluate(paths, model=Doubling, loader=iter(loader), device="cpu")


MODELS = [(Net, Data), (Net, Normalising), (Net, Moving), (Doubling, Data), (Doubling, Normalising)]


@pytest.mark.parametrize(("model", "data"), MODELS[1:])
def test_metrics_are_those_of_lightning_s_trainer(model, data):
    path = trained(model(), data())[-1]
    [plain] = ckptavg.evaluate(path, model=Net, loader=Data, device="cpu")
    for method, what in (("val_dataloader", "validate"), ("test_dataloader", "test")):
        for loader in (data, getattr(data(), method)):
            if loader is data and what == "test":
                continue
            [found] = ckptavg.evaluate(path, model=model, loader=loader, device="cpu")
            assert found.metrics == pytest.approx(
                metrics_of_lightning(model, path, data(), what), rel=1e-5
            )
            assert found.metrics["loss"] != pytest.approx(plain.metrics["loss"], rel=1e-2)


@pytest.mark.parametrize(("model", "data"), MODELS)
def test_the_refresh_sees_the_batches_that_the_training_saw(model, data):
    """The statistics are those of torch's `update_bn`, from what Lightning's step is given."""
    path = trained(model(), data())[-1]
    seen: list[Any] = []

    class Recording(model):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            seen.append(batch)
            loss: torch.Tensor = super().training_step(batch, number)
            return loss

    trainer(max_epochs=1, limit_val_batches=0, enable_checkpointing=False).fit(Recording(), data())
    assert len(seen) == 3
    expected = Net()
    expected.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    # One batch of all: the order in which they were drawn does not matter then.
    whole = data(120)
    seen = [(torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen]))]
    update_bn(seen, expected)
    ckptavg.refresh_checkpoint(path, "new.ckpt", model=model, loader=whole, device="cpu")
    state = torch.load("new.ckpt", weights_only=True)["state_dict"]
    for name in ("layers.1.running_mean", "layers.1.running_var"):
        assert torch.allclose(state[name], expected.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_checkpoints_give_the_arguments_unless_the_user_does(caplog):
    path = trained(Net(), Normalising(30, shift=2.0, seed=7))[-1]
    caplog.set_level("INFO", "ckptavg")
    [found] = ckptavg.evaluate(path, model=Net, loader=Normalising, device="cpu")
    assert "Normalising is given what epoch=2.ckpt records: size=30, shift=2.0" in caplog.text
    data = Normalising(30, shift=2.0, seed=7)
    expected = metrics_of_lightning(Net, path, data, "validate")
    assert found.metrics == pytest.approx(expected, rel=1e-5)
    arguments = {"shift": 0.0, "seed": 1}
    [found] = ckptavg.evaluate(
        path, model=Net, loader=Normalising, loader_args=arguments, device="cpu"
    )
    expected = metrics_of_lightning(Net, path, Normalising(30, shift=0.0, seed=1), "validate")
    assert found.metrics == pytest.approx(expected, rel=1e-5)


def swept(loader: Any, test_loader: Any) -> Any:
    return ckptavg.sweep(
        "run", model=Net, loader=loader, test_loader=test_loader, metric="loss", device="cpu",
        select=Selection(last=(2, None)), refresh=RefreshOptions(model=Net, loader=Normalising),
    )  # fmt: skip


def test_a_sweep_is_tested_on_the_test_batches():
    last = trained(Net(), Normalising())[-1]
    found = swept(Normalising, Normalising)
    of_last = next(each for each in found.test if each.against == "last checkpoint")
    expected = metrics_of_lightning(Net, last, Normalising(), "test")
    assert of_last.other == pytest.approx(expected["loss"], rel=1e-5)
    assert found.last_checkpoint.metrics["loss"] != pytest.approx(expected["loss"], rel=1e-3)


def test_a_test_loader_without_test_batches_is_refused():
    trained(Net(), Normalising())
    with pytest.raises(RefreshError, match=r"WithoutTest has no test_dataloader\(\)"):
        swept(Normalising, WithoutTest)
    data = Normalising()
    with pytest.raises(RefreshError, match="are the same batches"):
        swept(data.val_dataloader, data.val_dataloader)


def test_a_hook_that_needs_a_trainer_is_an_error_that_says_so():
    path = trained(Net(), Data())[-1]
    with pytest.raises(UserCodeError, match=r"on_after_batch_transfer\(\) raised .*there is no Tr"):
        ckptavg.evaluate(path, model=Net, loader=NeedsTrainer, device="cpu")


def test_methods_of_a_data_module_are_named_on_the_command_line():
    path = trained(Net(), Normalising(30))[-1]
    for method, what in (("val_dataloader", "validate"), ("test_dataloader", "test")):
        words = ("--loader", f"{__name__}:Normalising.{method}", "--device", "cpu", "--json")
        result = run("evaluate", path, "--model", f"{__name__}:Net", *words)
        expected = metrics_of_lightning(Net, path, Normalising(30), what)
        assert f'"loss": {expected["loss"]:.4f}'[:-1] in result.stdout
