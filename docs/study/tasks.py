"""What the study trains on: two small tasks of classification, each split in three.

Signals of MNIST-1D (generated) and images of scikit-learn's digits (shipped with it). A fifth of
the labels of the training and of the validation examples is wrong; those of the test are clean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

# mnist1d imports matplotlib, which warns of what it cannot cache.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

LABEL_NOISE = 0.2
CLASSES = 10


class Examples(NamedTuple):
    """Inputs `[examples, 1, ...]`, float32, and labels `[examples]`, int64."""

    inputs: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Task:
    """A task, and how it is trained.

    Attributes:
        name: what it is called.
        train: noisy labels.
        validation: noisy labels; the window and the best checkpoint are chosen on these.
        test: clean labels; looked at once, when all is chosen.
        make_model: a network with BatchNorm.
        batch: examples of a batch.
        epochs: of the budget.
        rate: the first learning rate of both schedules.
        weight_decay: of SGD.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    make_model: Callable[[], nn.Module]
    batch: int
    epochs: int
    rate: float
    weight_decay: float


def mnist1d() -> Task:
    """2,000 signals of 40 numbers to train on, 1,000 to validate, 10,000 to test."""
    from mnist1d.data import get_dataset_args, make_dataset  # noqa: PLC0415 - after the line above

    options = get_dataset_args()
    options.num_samples, options.train_split = 13_000, 3_000 / 13_000
    made = make_dataset(options)
    inputs = torch.from_numpy(made["x"]).float().unsqueeze(1)
    noisy = torch.from_numpy(with_noise(made["y"]))
    test = Examples(
        torch.from_numpy(made["x_test"]).float().unsqueeze(1), torch.from_numpy(made["y_test"])
    )
    return Task(
        "MNIST-1D", Examples(inputs[:2_000], noisy[:2_000]),
        Examples(inputs[2_000:], noisy[2_000:]), test, _network(nn.Conv1d, nn.BatchNorm1d),
        batch=50, epochs=64, rate=0.1, weight_decay=1e-2,
    )  # fmt: skip


def digits() -> Task:
    """800 images of 8 x 8 to train on, 297 to validate, 700 to test."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second

    made = load_digits()
    order = np.random.default_rng(seed=0).permutation(len(made.target))
    inputs = torch.from_numpy(made.images[order]).float().unsqueeze(1) / 16
    labels = made.target[order].astype(np.int64)
    noisy, clean = torch.from_numpy(with_noise(labels)), torch.from_numpy(labels)
    return Task(
        "digits",
        Examples(inputs[:800], noisy[:800]),
        Examples(inputs[800:1_097], noisy[800:1_097]),
        Examples(inputs[1_097:], clean[1_097:]),
        _network(nn.Conv2d, nn.BatchNorm2d),
        batch=40, epochs=96, rate=0.2, weight_decay=2e-2,
    )  # fmt: skip


TASKS: dict[str, Callable[[], Task]] = {"mnist1d": mnist1d, "digits": digits}


def with_noise(labels: np.ndarray) -> np.ndarray:
    """Labels of which a fifth, chosen at random, was moved to another class."""
    draw = np.random.default_rng(seed=0)
    wrong = draw.permutation(len(labels))[: round(LABEL_NOISE * len(labels))]
    noisy = labels.astype(np.int64)
    noisy[wrong] = (noisy[wrong] + draw.integers(1, CLASSES, len(wrong))) % CLASSES
    return noisy


def _network(
    convolution: type[nn.Module], norm: type[nn.Module], width: int = 32
) -> Callable[[], nn.Module]:
    """Four convolutions with BatchNorm and ReLU, mean over space, a linear layer."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            convolution(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(),
        )

    def make() -> nn.Module:
        pool = nn.AdaptiveAvgPool1d(1) if convolution is nn.Conv1d else nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(
            block(1, width, 1), block(width, width, 2), block(width, 2 * width, 2),
            block(2 * width, 2 * width, 1), pool, nn.Flatten(), nn.Linear(2 * width, CLASSES),
        )  # fmt: skip

    return make
