"""One contender's pass over the batches, in a process of its own; prints the seconds it took.

And `tolerances`: how near a pass comes that ends early.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from ckptavg import refresh_norm
from ckptavg.distributed import launched_ranks

if TYPE_CHECKING:
    from ckptavg.batchnorm.moments import EstimatorName
    from ckptavg.batchnorm.report import RefreshReport

Batches = list[torch.Tensor]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_ESTIMATORS: tuple[EstimatorName, ...] = ("paper", "exact")
_TOLERANCES = (0.05, 0.02, 0.01)
_EXAMPLES, _FEATURES, _BATCH_SIZE = 100_000, 256, 128
_FACTORS = (256, 8)  # how many independent ones the inputs are mixed out of
_WIDTHS = (64, 128, 256, 128)


def main() -> None:
    """`refresh_pass.py CONTENDER --model M --batches N --shape B C H W`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=[*CONTENDERS, "shared"])
    parser.add_argument("--model", required=True, help="its name in torchvision")
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--shape", type=int, nargs="+", required=True, help="of a batch")
    parser.add_argument("--difference", action="store_true", help="print that from update_bn")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = network(options.model)
    images = torch.randn(options.batches, *options.shape)
    if options.contender == "shared":
        print(json.dumps(shared(model, images)))
        return
    prepare, go = CONTENDERS[options.contender]
    if options.difference:
        print(json.dumps(from_torch(model, list(images), go)))
        return
    model, batches = prepare(model, list(images))
    go(model, batches[:1])
    print(json.dumps(seconds(partial(go, model, batches))))


def seconds(go: Callable[[], object], ready: Callable[[], object] | None = None) -> float:
    """What a pass takes, once this process is ready for it.

    The imports leave much that Python's collector goes through once, in about 0.15 s: in whichever
    pass makes objects enough. So it does that beforehand.
    """
    gc.collect()
    if ready is not None:
        ready()
    begin = time.perf_counter()
    go()
    return time.perf_counter() - begin


def network(name: str) -> nn.Module:
    """As torchvision has it, with random weights."""
    from torchvision.models import get_model  # what needs no model runs without it

    model: nn.Module = get_model(name, weights=None).eval()
    return model


def shared(model: nn.Module, images: torch.Tensor) -> float:
    """Seconds of a pass on one thread, with the processes that the environment speaks of."""
    torch.set_num_threads(1)
    with launched_ranks() as ranks:
        refresh_norm(model, _loader(images[: ranks.size]), ranks=ranks)
        go = partial(refresh_norm, model, _loader(images), ranks=ranks)
        return seconds(go, ready=partial(ranks.gather, None))  # all begin at once


def _loader(images: torch.Tensor) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Of the batches in `images`, which are collated anew."""
    return DataLoader(TensorDataset(images.flatten(0, 1)), batch_size=images.shape[1])


def from_torch(model: nn.Module, batches: Batches, go: Go) -> float:
    """Largest difference of a mean from `update_bn`'s, in running standard deviations.

    And of a standard deviation, relative to it.
    """
    expected = copy.deepcopy(model)
    update_bn(batches, expected)
    go(model, batches)
    return max(
        difference(one, other)
        for one, other in zip(model.modules(), expected.modules(), strict=True)
    )


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


def with_statistics(model: nn.Module, batches: Batches) -> tuple[nn.Module, Batches]:
    """With those of the first batch: without any, activations vanish or explode in eval mode."""
    update_bn(batches[:1], model)
    return model, batches


def in_channels_last(model: nn.Module, batches: Batches) -> tuple[nn.Module, Batches]:
    """Weights and images both, with statistics."""
    return with_statistics(*weights_in_channels_last(model, [_last(batch) for batch in batches]))


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


def refresh_bf16(model: nn.Module, batches: Batches) -> None:
    """`refresh_norm` with the model in bfloat16."""
    refresh_norm(model, batches, estimator="torch", amp="bf16")


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
    "refresh_norm, bf16": (as_it_is, refresh_bf16),
    "eval forward": (with_statistics, forward),
    "eval forward, channels_last": (in_channels_last, forward),
    "norm training, channels_last": (in_channels_last, forward_training),
}
"""Name to how the model and the batches are laid out beforehand, untimed, and to what is timed."""


def tolerances(runs: int) -> str:
    """How many examples a pass takes by tolerance, and how far from all of them it ends.

    In so many shuffled passes; errors and distances are the largest of any pass and layer. The
    first line of each estimator is that of a pass over all examples.
    """
    return "\n\n".join(_tolerances(runs, factors) for factors in _FACTORS)


def _tolerances(runs: int, factors: int) -> str:
    torch.manual_seed(0)
    data, model = TensorDataset(correlated(factors)), perceptron()
    lines = [
        (
            f"{_EXAMPLES:,} examples mixed out of {factors} factors, in batches of {_BATCH_SIZE}; "
            f"{runs} runs; largest of all"
        ),
        f"{'':20}{'':>10}{'stated error of':>20}{'real distance of':>20}",
        f"{'estimator, tol':20}{'examples':>10}" + f"{'mean':>10}{'log std':>10}" * 2,
    ]
    for estimator in _ESTIMATORS:
        expected, report = ended_by(None, model, data, estimator, 0)
        lines.append(_row(f"{estimator}, none", report.samples, [(*_stated(report), 0.0, 0.0)]))
        for tol in _TOLERANCES:
            found = [ended_by(tol, model, data, estimator, number) for number in range(1, runs + 1)]
            samples = statistics.median(one.samples for _, one in found)
            errors = [(*_stated(one), *distances(own, expected)) for own, one in found]
            lines.append(_row(f"{estimator}, {tol}", samples, errors))
    return "\n".join(lines)


def ended_by(
    tol: float | None, model: nn.Module, data: TensorDataset, estimator: EstimatorName, seed: int
) -> tuple[nn.Module, RefreshReport]:
    """A copy of the model after a shuffled pass, and what that says of itself."""
    own, order = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch_size=_BATCH_SIZE, shuffle=True, generator=order)
    return own, refresh_norm(own, loader, estimator=estimator, tol=tol)


def correlated(factors: int) -> torch.Tensor:
    """Inputs that are mixed out of so many factors, with a little noise."""
    mixed = torch.randn(_EXAMPLES, factors) @ torch.randn(factors, _FEATURES)
    return mixed + 0.1 * torch.randn(_EXAMPLES, _FEATURES)


def perceptron() -> nn.Module:
    """Linear layers, each with its norm layer."""
    layers: list[nn.Module] = []
    before = _FEATURES
    for width in _WIDTHS:
        layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers)


def distances(found: nn.Module, expected: nn.Module) -> tuple[float, float]:
    """Of the means, in standard deviations, and of the logarithms of the standard deviations.

    Root mean squares over the channels, as the report has its errors, of the layer with most.
    """
    means, log_stds = [0.0], [0.0]
    for one, other in zip(found.modules(), expected.modules(), strict=True):
        if isinstance(one, nn.BatchNorm1d) and isinstance(other, nn.BatchNorm1d):
            variance = _double(other.running_var) + other.eps
            mean = _double(one.running_mean) - _double(other.running_mean)
            log_std = ((_double(one.running_var) + one.eps) / variance).log() / 2
            means.append(float((mean.square() / variance).mean().sqrt()))
            log_stds.append(float(log_std.square().mean().sqrt()))
    return max(means), max(log_stds)


def _stated(report: RefreshReport) -> tuple[float, float]:
    return (
        report.largest(lambda layer: layer.mean_error).mean_error,
        report.largest(lambda layer: layer.log_std_error).log_std_error,
    )


def _row(name: str, samples: float, errors: list[tuple[float, float, float, float]]) -> str:
    largest = "".join(f"{max(column):>10.4f}" for column in zip(*errors, strict=True))
    return f"{name:20}{samples:>10,.0f}{largest}"


if __name__ == "__main__":
    main()
