"""Convolutional networks of about the real width and depth, in plain torch.

`resnet18` after He et al. 2015 (1512.03385), `mobilenet` after Sandler et al. 2018 (1801.04381,
MobileNetV2), `resnet3d` a ResNet-10 of 3-D convolutions, as for video.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Expansion, channels, blocks, stride of the first: table 2 of the paper.
_INVERTED = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_CLASSES = 1000


class Residual(nn.Module):
    """`x + body(x)`, or what a projection makes of `x` where the shapes differ."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, images: Tensor) -> Tensor:
        """Images of the same or half the size."""
        result: Tensor = self.after(self.body(images) + self.shortcut(images))
        return result


def resnet18() -> nn.Module:
    """11.7 million parameters, 20 norm layers."""
    return nn.Sequential(*_stem(2), *_basic_blocks((2, 2, 2, 2), 2), *_head(2, 512))


def resnet3d() -> nn.Module:
    """14.9 million parameters, 12 norm layers."""
    return nn.Sequential(*_stem(3), *_basic_blocks((1, 1, 1, 1), 3), *_head(3, 512))


def mobilenet() -> nn.Module:
    """3.5 million parameters, 52 norm layers."""
    layers, width = [_unit(2, 3, 32, 3, 2, activation=nn.ReLU6())], 32
    for expansion, channels, blocks, stride in _INVERTED:
        for block in range(blocks):
            layers.append(_inverted(width, channels, expansion, stride if block == 0 else 1))
            width = channels
    return nn.Sequential(
        *layers, _unit(2, width, 1280, 1, 1, activation=nn.ReLU6()), *_head(2, 1280)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (resnet18, (3, 112, 112)),
    "resnet18_small": (resnet18, (3, 64, 64)),
    "mobilenet": (mobilenet, (3, 112, 112)),
    "resnet3d": (resnet3d, (3, 8, 64, 64)),
}
"""Name to constructor and shape of an input, without the batch."""


def _stem(dims: int) -> list[nn.Module]:
    pool = nn.MaxPool2d if dims == 2 else nn.MaxPool3d
    return [_unit(dims, 3, 64, 7, 2, activation=nn.ReLU()), pool(3, 2, 1)]


def _basic_blocks(blocks: tuple[int, ...], dims: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    width = 64
    for stage, count in enumerate(blocks):
        channels = 64 << stage
        for block in range(count):
            stride = 2 if stage and block == 0 else 1
            body = nn.Sequential(
                _unit(dims, width, channels, 3, stride, activation=nn.ReLU()),
                _unit(dims, channels, channels, 3, 1),
            )
            same = width == channels and stride == 1
            shortcut = nn.Identity() if same else _unit(dims, width, channels, 1, stride)
            layers.append(Residual(body, shortcut, nn.ReLU()))
            width = channels
    return layers


def _inverted(width: int, channels: int, expansion: int, stride: int) -> nn.Module:
    inner = width * expansion
    expand = [_unit(2, width, inner, 1, 1, activation=nn.ReLU6())] if expansion > 1 else []
    body = nn.Sequential(
        *expand,
        _unit(2, inner, inner, 3, stride, activation=nn.ReLU6(), groups=inner),
        _unit(2, inner, channels, 1, 1),
    )
    if width == channels and stride == 1:
        return Residual(body, nn.Identity(), nn.Identity())
    return body


def _unit(
    dims: int,
    width: int,
    channels: int,
    kernel: int,
    stride: int,
    *,
    activation: nn.Module | None = None,
    groups: int = 1,
) -> nn.Module:
    """Convolution, norm, activation."""
    padding = kernel // 2
    if dims == 2:
        return nn.Sequential(
            nn.Conv2d(width, channels, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
            activation or nn.Identity(),
        )
    return nn.Sequential(
        nn.Conv3d(width, channels, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm3d(channels),
        activation or nn.Identity(),
    )


def _head(dims: int, width: int) -> list[nn.Module]:
    pool = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.AdaptiveAvgPool3d(1)
    return [pool, nn.Flatten(), nn.Dropout(0.2), nn.Linear(width, _CLASSES)]
