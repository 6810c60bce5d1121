"""Train a small Conv-BN network on MNIST-1D, and leave checkpoints that are worth averaging.

`ckptavg demo` puts a copy of this file beside what came of it. It needs torch and mnist1d only,
so read it, change it, and train again: `python train.py NEW_DIRECTORY`.

The task is hard on purpose: 2,000 training examples, every fifth of them with a wrong label, and
a network that can learn all of them by heart. For 75 % of the budget the rate follows a
conventional schedule; from there on there are two ends. One goes on with the schedule
(`decayed.pt`). The other has the cyclical rate of Izmailov et al. 2018 (arXiv 1803.05407, section
3.1). It saves every epoch (`checkpoints/`), as trainers do; those at the minima of the rate are to
be picked from them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

# mnist1d imports matplotlib, which warns of what it cannot cache; nothing is drawn here.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

from mnist1d.data import get_dataset_args, make_dataset  # noqa: E402 - after the line above

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TRAIN_EXAMPLES, TEST_EXAMPLES, CLASSES = 2_000, 10_000, 10
LABEL_NOISE = 0.2
WIDTH = 32
BATCH = 50
STEPS_PER_EPOCH = TRAIN_EXAMPLES // BATCH

# As good for the run with the decayed rate as any of some twenty pairs that were tried. The cycles
# were given no tuning of their own: they swing between the first rate and a tenth of it.
FIRST_RATE = 0.2
WEIGHT_DECAY = 5e-3
MOMENTUM = 0.9
HIGH_RATE, LOW_RATE = FIRST_RATE, FIRST_RATE / 10


@dataclass(frozen=True)
class Budget:
    """How long to train.

    Attributes:
        epochs: of either run, all in all.
        common: of them, those that both runs share.
        cycle: length of a cycle, in steps.
    """

    epochs: int = 64
    common: int = 48
    cycle: int = 2 * STEPS_PER_EPOCH


class Data(NamedTuple):
    """Signals `[examples, 1, 40]`, float32, and labels `[examples]`, int64."""

    train_signals: torch.Tensor
    train_labels: torch.Tensor
    test_signals: torch.Tensor
    test_labels: torch.Tensor


@functools.cache
def load_data() -> Data:
    """Make the data set, the same one each time; the test labels are clean."""
    options = get_dataset_args()
    options.num_samples = TRAIN_EXAMPLES + TEST_EXAMPLES
    options.train_split = TRAIN_EXAMPLES / options.num_samples
    made = make_dataset(options)
    return Data(
        torch.from_numpy(made["x"]).float().unsqueeze(1),
        torch.from_numpy(with_noise(made["y"])),
        torch.from_numpy(made["x_test"]).float().unsqueeze(1),
        torch.from_numpy(made["y_test"]),
    )


def with_noise(labels: np.ndarray) -> np.ndarray:
    """Labels of which a fifth, chosen at random, was moved to another class."""
    draw = np.random.default_rng(seed=0)
    wrong = draw.permutation(len(labels))[: round(LABEL_NOISE * len(labels))]
    noisy = labels.copy()
    noisy[wrong] = (noisy[wrong] + draw.integers(1, CLASSES, len(wrong))) % CLASSES
    return noisy


def train_loader(seed: int = 0) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Batches of training data, shuffled: in the same way for the same seed."""
    data = load_data()
    return DataLoader(
        TensorDataset(data.train_signals, data.train_labels),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )


def test_loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    """Batches of the clean test data."""
    data = load_data()
    return DataLoader(TensorDataset(data.test_signals, data.test_labels), batch_size=1_000)


def make_model() -> nn.Sequential:
    """The network: signals `[batch, 1, 40]` to logits `[batch, 10]`."""
    return nn.Sequential(
        block(1, WIDTH, stride=1),
        block(WIDTH, WIDTH, stride=2),
        block(WIDTH, 2 * WIDTH, stride=2),
        block(2 * WIDTH, 2 * WIDTH, stride=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(2 * WIDTH, CLASSES),
    )


def block(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel_size=5, stride=stride, padding=2, bias=False),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
    )


def decayed_rate(step: int, steps: int) -> float:
    """The conventional rate at a step, counted from 1, of a run of so many.

    The first rate for half of the run, then linearly down to a hundredth of it at 90 % (the
    schedule that the paper holds its own against).
    """
    after_half = max(0.0, step / steps - 0.5)
    return FIRST_RATE * max(0.01, 1 - 0.99 * after_half / 0.4)


def cyclical_rate(i: int, c: int) -> float:
    """The rate at step `i` of the cycles, counted from 1, each `c` steps long.

    `alpha(i) = (1 - t) a1 + t a2, t = (mod(i - 1, c) + 1) / c`: it falls from `a1` to `a2`, and
    is lowest where `c` divides `i`.
    """
    t = ((i - 1) % c + 1) / c
    return (1 - t) * HIGH_RATE + t * LOW_RATE


class Run:
    """A training run: a model, its optimizer, and how far they are.

    Attributes:
        model: in training.
        optimizer: its optimizer.
        seed: of the first weights, and of each epoch's shuffle.
        step: optimizer steps that are done.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = make_model()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=FIRST_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.seed, self.step = seed, 0

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.step // STEPS_PER_EPOCH

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        content = io.BytesIO()  # on a full disk torch's own error would not say so
        torch.save(
            {
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": self.epoch,
                "global_step": self.step,
            },
            content,
        )
        path.write_bytes(content.getvalue())

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["state_dict"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["global_step"]

    def train_epoch(self, rate: Callable[[int], float]) -> None:
        """Train for one epoch.

        Args:
            rate: of each step, counted from 1 over the whole run.
        """
        self.model.train()
        for signals, labels in train_loader(1_000 * self.seed + self.epoch):
            self.step += 1
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.step)
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(signals), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread.

    Two are no faster with so little work in each step, and several times slower where one of them
    has to wait for a core. It also makes the figures the same whatever the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(
    directory: Path,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train up to where the runs part, and from there to both ends.

    Args:
        directory: gets the checkpoints.
        seed: of the first weights and of the shuffles.
        budget: how long; None for the demo's own.
        after_epoch: called after each epoch.
    """
    budget = budget or Budget()
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(parents=True)
    steps, start = budget.epochs * STEPS_PER_EPOCH, budget.common * STEPS_PER_EPOCH
    run = Run(seed)

    while run.epoch < budget.epochs:
        run.train_epoch(lambda step: decayed_rate(step, steps))
        after_epoch()
        if run.epoch <= budget.common:
            run.save(checkpoints / f"epoch_{run.epoch}.pt")
    run.save(directory / "decayed.pt")

    run.resume(checkpoints / f"epoch_{budget.common}.pt")
    while run.epoch < budget.epochs:
        run.train_epoch(lambda step: cyclical_rate(step - start, budget.cycle))
        after_epoch()
        run.save(checkpoints / f"epoch_{run.epoch}.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
