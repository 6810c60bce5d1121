"""What a norm layer sees in one call."""

from __future__ import annotations

import torch

from ckptavg.norm.estimators import CallStatistics, merged

_SLICE = 1 << 22  # elements that are held as float64 at a time


def input_statistics(values: torch.Tensor) -> CallStatistics:
    """Statistics of a layer's input, computed in float64 from the values themselves.

    Args:
        values: `[batch, channels, ...]`, any floating dtype.
    """
    batch, channels = values.shape[:2]
    count = values.numel() // max(1, channels)
    axes = [axis for axis in range(values.dim()) if axis != 1]
    rows = max(1, _SLICE // max(1, values[0].numel()))
    moments = None
    for piece in torch.split(values.detach(), rows):
        exact = in_float64(piece)
        variance, mean = torch.var_mean(exact, axes, correction=0)
        size = piece.numel() // max(1, channels)
        found = (size, mean, variance * size)
        moments = found if moments is None else merged(moments, found)
    if moments is None:
        raise ValueError("an empty batch")
    return CallStatistics(moments[1], moments[2], count, batch)


def native_statistics(
    mean: torch.Tensor, unbiased: torch.Tensor, values: torch.Tensor
) -> CallStatistics:
    """Statistics that torch's own kernel computed on the way, taken from the layer's buffers.

    Args:
        mean: `[channels]`.
        unbiased: variance, `[channels]`.
        values: the layer's input, for its shape.
    """
    count = values.numel() // values.shape[1]
    return CallStatistics(
        in_float64(mean), in_float64(unbiased) * (count - 1), count, values.shape[0]
    )


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The values as float64, on the CPU where their device has no such type."""
    if values.device.type == "mps":
        values = values.cpu()
    return values.double()
