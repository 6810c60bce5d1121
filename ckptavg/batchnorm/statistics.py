"""What a norm layer sees in one call."""

from __future__ import annotations

import torch

from ckptavg.batchnorm.estimators import CallStatistics

_SLICE = 1 << 22  # elements that are held as float64 at a time


def input_statistics(*inputs: torch.Tensor, correction: int = 0) -> CallStatistics:
    """Statistics of what a layer normalises, computed in float64 from the values themselves.

    Args:
        inputs: `[batch, channels, ...]`, any floating dtype; several are parts of one call.
        correction: 1 for the unbiased variance.
    """
    moments = None
    for values in inputs:
        channels = values.shape[1]
        axes = [axis for axis in range(values.dim()) if axis != 1]
        rows = max(1, _SLICE // max(1, values[0].numel()))
        for piece in torch.split(values.detach(), rows):
            variance, mean = torch.var_mean(in_float64(piece), axes, correction=0)
            size = piece.numel() // max(1, channels)
            found = (size, mean, variance * size)
            moments = found if moments is None else _merged(moments, found)
    if moments is None:
        raise ValueError("an empty batch")
    batch = sum(len(values) for values in inputs)
    return CallStatistics(moments[1], moments[2] / (moments[0] - correction), moments[0], batch)


def instance_statistics(*inputs: torch.Tensor) -> CallStatistics:
    """The means over a batch of each image's own mean and unbiased variance, in float64.

    That is what `InstanceNorm` tracks.

    Args:
        inputs: `[batch, channels, ...]`, any floating dtype; several are parts of one call.
    """
    rows = [
        input_statistics(image[None], correction=1)
        for values in inputs
        for image in values.detach()
    ]
    mean = torch.stack([row.mean for row in rows]).mean(0)
    variance = torch.stack([row.variance for row in rows]).mean(0)
    return CallStatistics(mean, variance, len(rows), len(rows))


_Moments = tuple[int, torch.Tensor, torch.Tensor]


def _merged(one: _Moments, other: _Moments) -> _Moments:
    """Count, mean and M2 of two sets together (Chan, Golub & LeVeque 1979, equation 2.1)."""
    count = one[0] + other[0]
    delta = other[1] - one[1]
    mean = one[1] + delta * (other[0] / count)
    return count, mean, one[2] + other[2] + delta.square() * (one[0] * other[0] / count)


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The values as float64, on the CPU where their device has no such type."""
    if values.device.type == "mps":
        values = values.cpu()
    return values.double()
