"""A user's module, a run of his, and what is expected of its evaluation: plain loops in torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.oracle import StateDict, naive_mean, save_run

TRAIN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MADE, CALLS = [], []


class Net(nn.Module):
    def __init__(self, width=6, drop=0.3):
        super().__init__()
        MADE.append(self)
        self.conv = nn.Conv2d(2, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(width, 4)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, images):
        if not self.training:
            self.seen += 1
        found = self.drop(self.bn(self.conv(images)).relu()).amax((2, 3))
        return self.head(found)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        MADE.append(self)
        self.head = nn.Linear(72, 4)

    def forward(self, images):
        return self.head(images.flatten(1))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)

    def forward(self, images):
        return self.conv(images)


def data(seed, count):
    made = torch.Generator().manual_seed(seed)
    classes = torch.randint(4, (count,), generator=made)
    images = torch.randn(count, 2, 6, 6, generator=made)
    images[torch.arange(count), classes % 2, classes, classes] += 2.5
    return images * 1.5 + 0.5, classes


def batches(seed=1, count=83, size=16):
    images, classes = data(seed, count)
    return list(zip(images.split(size), classes.split(size)))


def training(size=16):
    return batches(0, 75, size)


def shuffled(size=7):
    return DataLoader(TensorDataset(*data(0, 75)), batch_size=size, shuffle=True)


def endless():
    while True:
        yield from batches()


def dense():
    images, _ = data(1, 13)
    classes = torch.randint(4, (13, 6, 6), generator=torch.Generator().manual_seed(2))
    classes[:, :2] = -100
    return list(zip(images.split(5), classes.split(5)))


def right(model, batches):
    assert not model.training and not torch.is_grad_enabled()
    return sum((model(x).argmax(1) == y).sum() for x, y in batches)


def constant_score(model, batches):
    return 1.0


once = iter(batches())
"""


def trained(kind: str, count: int) -> list[StateDict]:
    """The state dicts of a short run at a rate that is too high: some are better than others."""
    return copy.deepcopy(_trained(kind, count))


@functools.cache
@torch.random.fork_rng(devices=[])  # nobody sees which test was the first
def _trained(kind: str, count: int) -> list[StateDict]:
    train: dict[str, Any] = {}
    exec(TRAIN, train)  # noqa: S102
    torch.manual_seed(0)
    model = train[kind]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    states = []
    for _ in range(count):
        for images, classes in train["training"]():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def save_trained(folder: Path, kind: str = "Net", count: int = 5) -> list[StateDict]:
    """The same, saved."""
    states = trained(kind, count)
    save_run(folder, states, "pt")
    return states


def naive_metrics(model: nn.Module, state: StateDict, batches: Any) -> dict[str, float]:
    """Loss and accuracy of a state dict, an example at a time."""
    model.load_state_dict(state)
    model.eval()
    losses, hits = [], []
    with torch.no_grad():
        for images, classes in batches:
            for image, label in zip(images, classes, strict=True):
                scores = model(image[None])[0].double()
                losses.append(float(scores.logsumexp(0) - scores[label]))
                hits.append(int(scores.argmax() == label))
    return {"loss": sum(losses) / len(losses), "accuracy": sum(hits) / len(hits)}


def naive_average(states: Sequence[StateDict]) -> StateDict:
    """Of floats the mean, of counters the last."""
    return {
        name: naive_mean([state[name] for state in states])
        if value.is_floating_point()
        else value.clone()
        for name, value in states[-1].items()
    }


def naive_greedy(
    states: Sequence[StateDict], value_of: Callable[[StateDict], float], *, high: bool
) -> list[int]:
    """The members of a greedy soup, by their places in the training (Wortsman et al. 2022)."""
    alone = [value_of(state) for state in states]
    ranked = sorted(range(len(states)), key=lambda place: (alone[place], place), reverse=True)
    if not high:
        ranked = sorted(range(len(states)), key=lambda place: (alone[place], -place))
    members, best = [ranked[0]], alone[ranked[0]]
    for place in ranked[1:]:
        value = value_of(naive_average([states[one] for one in sorted([*members, place])]))
        if value >= best if high else value <= best:
            members, best = [*members, place], value
    return sorted(members)
