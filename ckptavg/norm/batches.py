"""What a loader yields: nested dicts, lists and tuples of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckptavg.errors import RefreshError


def moved(
    batch: Any,  # noqa: ANN401 - whatever the user's loader yields
    device: torch.device,
    formats: Mapping[int, torch.memory_format],
) -> Any:  # noqa: ANN401
    """The batch with all its tensors on a device, images in the memory format of their rank."""
    if isinstance(batch, torch.Tensor):
        if batch.dim() in formats and batch.is_floating_point():
            return batch.to(device, non_blocking=True, memory_format=formats[batch.dim()])
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device, formats) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device, formats) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device, formats) for value in batch)
    return batch


def default_forward(model: torch.nn.Module, batch: Any) -> object:  # noqa: ANN401
    """Call the model with a tensor, or with the first element of a list or tuple.

    Raises:
        RefreshError: the batch is something else.
    """
    given = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(given, torch.Tensor):
        what = "a dict" if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise RefreshError(
            f"the loader yields {what}, and it is unclear how the model is called with it",
            remedy="say so with --forward FILE.py:FUNCTION, called with the model and the batch",
        )
    return model(given)


def leading_size(batch: Any) -> int:  # noqa: ANN401
    """Examples in a batch: the leading dimension of the first tensor found in it."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 1
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        return 0
    return next((size for size in map(leading_size, values) if size), 0)
