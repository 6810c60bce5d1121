"""Models with norm layers, their data, and how their statistics are compared."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.oracle import same_bits


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(
            *(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()),
            *(nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2)),
        )


def conv_net(conv, norm):
    return nn.Sequential(
        *(conv(3, 8, 3), norm(8), nn.ReLU()),
        *(conv(8, 8, 3, stride=2), norm(8, eps=1e-3), nn.ReLU()),
        *(conv(8, 4, 1), norm(4, momentum=None)),
    )


def sync_net():
    return nn.SyncBatchNorm.convert_sync_batchnorm(conv_net(nn.Conv2d, nn.BatchNorm2d))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (Mlp, (5,)),
    "conv1d": (lambda: conv_net(nn.Conv1d, nn.BatchNorm1d), (3, 17)),
    "conv2d": (lambda: conv_net(nn.Conv2d, nn.BatchNorm2d), (3, 9, 11)),
    "conv3d": (lambda: conv_net(nn.Conv3d, nn.BatchNorm3d), (3, 7, 9, 8)),
    "sync": (sync_net, (3, 9, 11)),
}


def make(name: str, seed: int = 0) -> Any:
    """A model whose every tensor differs from what a fresh one has."""
    torch.default_generator.manual_seed(seed)
    model = MODELS[name][0]()
    disturb(model)
    return model


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))


def draw(sizes, *shape, mean=0.7, std=1.5, seed=1):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=made) * std + mean for size in sizes]


def data_for(name, sizes=(16, 16, 16, 5)):
    return draw(sizes, *MODELS[name][1])


def norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def assert_same_statistics(model, other, tolerance, variance_tolerance=None):
    """Means within `tolerance` standard deviations, variances within that relatively."""
    assert norms(model)
    for one, two in zip(norms(model), norms(other), strict=True):
        scale = two.running_var.double().sqrt()
        apart = (one.running_mean.double() - two.running_mean.double()).abs() / scale
        assert apart.max() <= tolerance
        ratio = one.running_var.double() / two.running_var.double()
        assert (ratio - 1).abs().max() <= (variance_tolerance or tolerance)
        assert one.num_batches_tracked == two.num_batches_tracked


class Snapshot:
    """All of a model that could be changed by accident."""

    def __init__(self, model):
        self.model = model
        self.facts = self._facts()
        self.values = {name: value.detach().clone() for name, value in self._tensors().items()}

    def _tensors(self):
        return {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }

    def _facts(self):
        return {
            name: {
                "class": type(module),
                "attributes": set(vars(module)),
                "training": module.training,
                "momentum": getattr(module, "momentum", ()),
                "tracks": getattr(module, "track_running_stats", ()),
                "hooks": [
                    dict(hooks) for key, hooks in sorted(vars(module).items()) if "hooks" in key
                ],
                "tensors": {
                    key: (id(value), value is not None and value.requires_grad)
                    for key, value in [*module._parameters.items(), *module._buffers.items()]
                },
                "grads": [value is None or value.grad for value in module._parameters.values()],
            }
            for name, module in self.model.named_modules()
        }

    def check(self, but=()):
        """Nothing is changed but the values of tensors whose names end so."""
        assert self._facts() == self.facts
        tensors = self._tensors()
        assert list(tensors) == list(self.values)
        for name, value in self.values.items():
            assert name.endswith(tuple(but)) or same_bits(tensors[name], value), name


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Renorm(nn.Module):
    """Like batch renormalisation: running statistics by a rule of its own."""

    def __init__(self, channels):
        super().__init__()
        self.running_mean: torch.Tensor
        self.running_var: torch.Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, values):
        shape = (-1, *[1] * (values.dim() - 2))
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * values.mean([0, *range(2, values.dim())]))
        mean, variance = self.running_mean.reshape(shape), self.running_var.reshape(shape)
        return (values - mean) / (variance + 1e-5).sqrt()


def explode():
    raise ZeroDivisionError("on purpose")
