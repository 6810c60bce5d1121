"""Lightning's module and trainers for its tests; `python -m` trains in two processes."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard


class Schedule:
    """A class of the user's own that goes into the hyper-parameters."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates


class Layers(lightning.LightningModule):
    """A norm layer, and an optimizer with state."""

    def make_layers(self, width: int) -> None:
        self.layers = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 6)
        )

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.layers(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Net(Layers):
    """It has a hyper-parameter of an unknown class."""

    def __init__(
        self,
        width: int = 8,
        schedule: Schedule | None = None,  # noqa: ARG002 - a hyper-parameter
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.make_layers(width)


class HasView(Layers):
    """It has a buffer whose first half is another buffer too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.make_layers(width)
        self.register_buffer("whole", torch.arange(8.0))
        self.register_buffer("first", self.whole[:4])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The buffers differ between the epochs."""
        self.whole += 1
        super().on_save_checkpoint(checkpoint)


class SavesNamespace(Layers):
    """Its only argument is a namespace, which it saves by itself."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.save_hyperparameters(args)
        self.make_layers(args.width)


class SavesArguments(Layers):
    """It saves the namespace as one of its arguments."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.make_layers(args.width)


class ShardedNet(Net):
    """Its layers are spread over the processes."""

    def configure_model(self) -> None:
        fully_shard(self.layers[0], mesh=self.device_mesh["data_parallel"])
        fully_shard(self.layers[3], mesh=self.device_mesh["data_parallel"])


def batches() -> Any:
    made = torch.Generator().manual_seed(0)
    rows: Any = torch.randn(12, 8, generator=made)
    return torch.utils.data.DataLoader(rows, batch_size=4)


def trainer(folder: Path, *callbacks: Any, epochs: int = 3, **options: Any) -> Any:
    """A trainer that keeps every epoch's checkpoint, and the last one under another name."""
    keeping = ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_epochs=1, save_last=True)
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=[keeping, *callbacks],
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=epochs,
        **options,
    )


def main(folder: Path) -> None:
    """Train with a sharded model in two processes, whose checkpoints are directories."""
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    torch.manual_seed(0)
    trainer(folder, devices=2, strategy=strategy).fit(ShardedNet(), batches())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
