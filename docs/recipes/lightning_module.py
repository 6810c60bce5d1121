"""A LightningModule and a LightningDataModule, named as they are; the average is a `.ckpt` too.

The file is not called `lightning.py`: that would hide the library.
"""

import subprocess

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

COMMANDS = """
ckptavg bn-refresh swa.ckpt -o refreshed.ckpt --container last \
    --model lightning_module.py:LitModel --model-arg width=24 --loader lightning_module.py:Data
ckptavg evaluate ckpts/last.ckpt swa.ckpt refreshed.ckpt by_hand.ckpt \
    --model lightning_module.py:LitModel --model-arg width=24 --loader lightning_module.py:held_out
"""


class LitModel(lightning.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        first = nn.Linear(10, width), nn.BatchNorm1d(width), nn.ReLU()
        second = nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()
        self.layers = nn.Sequential(*first, *second, nn.Linear(width, 4))

    def forward(self, inputs):
        return self.layers(inputs)

    def training_step(self, batch, _):
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Data(lightning.LightningDataModule):
    def setup(self, stage):  # noqa: ARG002 - Lightning passes it
        self.train_data, self.test_data = data(1, 600), data(2, 1000)

    def train_dataloader(self):
        shuffle = torch.Generator().manual_seed(0)
        return DataLoader(self.train_data, batch_size=30, shuffle=True, generator=shuffle)

    def test_dataloader(self):
        return DataLoader(self.test_data, batch_size=100)


def data(seed, count):
    """Points `[count, 10]`, of which the signs of two products are the four classes."""
    torch.manual_seed(seed)
    inputs = torch.randn(count, 10)
    labels = 2 * (inputs[:, 0] * inputs[:, 1] > 0) + (inputs[:, 2] * inputs[:, 3] > 0)
    return TensorDataset(inputs, labels)


def held_out():
    module = Data()
    module.setup("test")
    return module.test_dataloader()


def main():
    lightning.seed_everything(0)
    keep = ModelCheckpoint("ckpts", save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=12, callbacks=[keep], accelerator="cpu", logger=False, enable_progress_bar=False
    )
    trainer.fit(LitModel(width=24), Data())

    average = "ckptavg average ckpts -o swa.ckpt --container last --start 50%"
    subprocess.run(["sh", "-exc", average], check=True)
    model, module = LitModel.load_from_checkpoint("swa.ckpt"), Data()
    module.setup("fit")
    update_bn(module.train_dataloader(), model)  # the refresh by hand
    torch.save({"state_dict": model.state_dict()}, "by_hand.ckpt")
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
