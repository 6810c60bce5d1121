"""Convolutions whose filters are laid out once for the pass, against torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ckptavg.batchnorm.packing import can_pack
from ckptavg.batchnorm.refresh import refresh_norm
from tests.helpers_norm import STATISTICS, Snapshot, assert_same_statistics

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="oneDNN is not there")


def network(*convolutions: nn.Module, norm: type[nn.Module] = nn.BatchNorm2d) -> Any:
    layers: list[nn.Module] = []
    for convolution in convolutions:
        layers += [convolution, norm(convolution.out_channels)]
    return nn.Sequential(*layers)


def assert_as_contiguous(model: nn.Module, batches: list[torch.Tensor], **options: Any) -> None:
    """The statistics are those of torch's own convolutions, and all else stays as it was."""
    other, before = copy.deepcopy(model), Snapshot(model)
    refresh_norm(model, batches, **options)
    refresh_norm(other, batches, memory_format="contiguous", **options)
    assert_same_statistics(model, other, 1e-4)
    before.check(but=STATISTICS)
    assert not any("_conv_forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1)},
        {"kernel_size": 3, "groups": 4},
        {"kernel_size": 3, "groups": 8},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_every_kind_of_convolution(options, bias):
    torch.manual_seed(0)
    model = network(nn.Conv2d(8, 16, **options, bias=bias), nn.Conv2d(16, 8, 1))
    assert_as_contiguous(model, [torch.randn(size, 8, 9, 7) for size in (6, 6, 3)])


def test_three_dimensions_and_images_of_several_sizes():
    torch.manual_seed(0)
    model = network(nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 8, 1), norm=nn.BatchNorm3d)
    assert_as_contiguous(model, [torch.randn(4, 3, 5, side, side) for side in (6, 9, 1)])


def test_double_precision_and_gradients_are_left_to_torch():
    def forward(model, images):
        with torch.enable_grad():
            score = model(images.requires_grad_()).square().mean()
            model(images - torch.autograd.grad(score, images)[0])

    torch.manual_seed(0)
    model = network(nn.Conv2d(3, 8, 3))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    assert_as_contiguous(model, batches, forward=forward)
    assert_as_contiguous(model.double(), [batch.double() for batch in batches])


@pytest.mark.parametrize("by_data", [True, False])
def test_weights_that_change_meanwhile_are_noticed(by_data):
    class Wandering(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(nn.Conv2d(3, 8, 3))
            self.calls: Any = nn.Buffer(torch.zeros(()))

        def forward(self, images):
            self.calls.add_(1)
            weight = self.body[0].weight
            (weight.data if by_data else weight.detach()).add_(self.calls)
            return self.body(images)

    torch.manual_seed(0)
    model = Wandering()
    other = copy.deepcopy(model)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    refresh_norm(model, batches)
    refresh_norm(other, batches, memory_format="contiguous")
    assert_same_statistics(model, other, 1e-4)


def test_a_copy_with_other_weights_has_its_own():
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = network(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)

        def forward(self, images):
            first = self.body(images)
            other = copy.deepcopy(self.body[0])
            other.weight = nn.Parameter(-2 * other.weight)
            return self.head(first + other(images))

    torch.manual_seed(0)
    assert_as_contiguous(Copying(), [torch.randn(4, 3, 8, 8) for _ in range(2)])


def test_bfloat16_is_left_to_autocast():
    torch.manual_seed(0)
    model, other = (network(nn.Conv2d(3, 8, 3)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]

    def forward(model, images):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images).dtype == torch.bfloat16

    refresh_norm(model, batches, forward=forward)
    refresh_norm(other, batches, amp="bf16")
    assert_same_statistics(model, other, 1e-6)
