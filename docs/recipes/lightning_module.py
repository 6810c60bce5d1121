"""A LightningModule and a LightningDataModule, named as they are; the average is a `.ckpt` too.

The file is not called `lightning.py`: that would hide the library.
"""

import subprocess

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

COMMANDS = """
ckptavg average ckpts -o swa.ckpt --start 50%
ckptavg bn-refresh swa.ckpt -o refreshed.ckpt \
    --model lightning_module.py:LitModel --loader lightning_module.py:Data
ckptavg evaluate ckpts/last.ckpt swa.ckpt refreshed.ckpt \
    --model lightning_module.py:LitModel --loader lightning_module.py:Data
"""


class LitModel(lightning.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        first = nn.Linear(10, width), nn.BatchNorm1d(width), nn.ReLU()
        second = nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()
        self.layers = nn.Sequential(*first, *second, nn.Linear(width, 4))

    def forward(self, inputs):
        return self.layers(inputs)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        shuffle = torch.Generator().manual_seed(0)
        return DataLoader(data(1, 600), batch_size=30, shuffle=True, generator=shuffle)

    def val_dataloader(self):
        return DataLoader(data(2, 1000), batch_size=100)


def data(seed, count):
    """Points `[count, 10]`, of which the signs of two products are the four classes."""
    inputs = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    labels = 2 * (inputs[:, 0] * inputs[:, 1] > 0) + (inputs[:, 2] * inputs[:, 3] > 0)
    return TensorDataset(inputs, labels)


def main():
    lightning.seed_everything(0)
    keep = ModelCheckpoint("ckpts", save_top_k=-1, save_last=True)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=12, callbacks=[keep], limit_val_batches=0, **options)
    trainer.fit(LitModel(width=24), Data())
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
