"""One contender's pass over the batches, in a process of its own; prints the seconds it took."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ckptavg import refresh_norm

if TYPE_CHECKING:
    from tests.benchmarks.models import MODELS
else:
    from models import MODELS  # a script finds what is beside it, and knows of no package

Batches = list[torch.Tensor]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def main() -> None:
    """`refresh_pass.py CONTENDER --model M --batches N --batch-size B`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=[*CONTENDERS, "differences"])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    make, shape = MODELS[options.model]
    model = make().eval()
    batches = list(torch.randn(options.batches, options.batch_size, *shape))
    if options.contender == "differences":
        print(json.dumps(differences(model, batches)))
        return
    prepare, go = CONTENDERS[options.contender]
    model, batches = prepare(model, batches)
    go(model, batches[:1])
    begin = time.perf_counter()
    go(model, batches)
    print(json.dumps(time.perf_counter() - begin))


def differences(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Largest difference of a mean from `update_bn`'s, in running standard deviations.

    And of a standard deviation, relative to it: both by how `refresh_norm` lays out its images.
    """
    expected = copy.deepcopy(model)
    update_bn(batches, expected)
    found = {}
    for memory_format in ("auto", "contiguous"):
        own = copy.deepcopy(model)
        refresh_norm(own, batches, estimator="torch", memory_format=memory_format)
        found[memory_format] = max(
            difference(one, other)
            for one, other in zip(own.modules(), expected.modules(), strict=True)
        )
    return found


def difference(one: nn.Module, other: nn.Module) -> float:
    """Of the statistics of a layer in two models; 0 for other modules."""
    if not isinstance(one, nn.BatchNorm2d | nn.BatchNorm3d):
        return 0.0
    deviation = _double(other.running_var).sqrt()
    means = (_double(one.running_mean) - _double(other.running_mean)).abs() / deviation
    deviations = (_double(one.running_var).sqrt() - deviation).abs() / deviation
    return float(torch.maximum(means, deviations).max())


def _double(values: object) -> torch.Tensor:
    assert isinstance(values, torch.Tensor)
    return values.double()


def as_it_is(model: nn.Module, batches: Batches) -> tuple[nn.Module, Batches]:
    """Contiguous weights and images."""
    return model, batches


def in_channels_last(model: nn.Module, batches: Batches) -> tuple[nn.Module, Batches]:
    """Weights and images both."""
    return weights_in_channels_last(model, [_last(batch) for batch in batches])


def weights_in_channels_last(model: nn.Module, batches: Batches) -> tuple[nn.Module, Batches]:
    """Weights alone."""
    for parameter in model.parameters():
        parameter.data = _last(parameter.data)
    return model, batches


def _last(values: torch.Tensor) -> torch.Tensor:
    if values.dim() not in _FORMATS:
        return values
    return values.to(memory_format=_FORMATS[values.dim()])


def forward(model: nn.Module, batches: Batches) -> None:
    """Nothing but the model, in eval mode."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def forward_training(model: nn.Module, batches: Batches) -> None:
    """The least that a refresh can do: norm layers in training mode."""
    for module in model.modules():
        module.training = isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)
    forward(model, batches)


def refresh(model: nn.Module, batches: Batches) -> None:
    """`refresh_norm` as it comes, with torch's estimator."""
    refresh_norm(model, batches, estimator="torch")


def refresh_exact(model: nn.Module, batches: Batches) -> None:
    """`refresh_norm` with the estimator that reads the activations once more."""
    refresh_norm(model, batches, estimator="exact")


def refresh_contiguous(model: nn.Module, batches: Batches) -> None:
    """`refresh_norm` with torch's own bits."""
    refresh_norm(model, batches, estimator="torch", memory_format="contiguous")


def update(model: nn.Module, batches: Batches) -> None:
    """torch's own."""
    update_bn(batches, model)


Prepare = Callable[[nn.Module, Batches], tuple[nn.Module, Batches]]
Go = Callable[[nn.Module, Batches], None]

CONTENDERS: dict[str, tuple[Prepare, Go]] = {
    "update_bn": (as_it_is, update),
    "refresh_norm": (as_it_is, refresh),
    "refresh_norm, weights too": (weights_in_channels_last, refresh),
    "refresh_norm, exact": (as_it_is, refresh_exact),
    "refresh_norm, contiguous": (as_it_is, refresh_contiguous),
    "eval forward": (as_it_is, forward),
    "eval forward, channels_last": (in_channels_last, forward),
    "norm training, channels_last": (in_channels_last, forward_training),
}
"""Name to how the model and the batches are laid out beforehand, untimed, and to what is timed."""


if __name__ == "__main__":
    main()
