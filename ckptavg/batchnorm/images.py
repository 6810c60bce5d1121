"""The memory format in which a model is given its images, and holds its filters, during a pass."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch.nn.parameter import is_lazy

from ckptavg.batchnorm.packing import can_pack, is_packable, packed
from ckptavg.errors import UserCodeError
from ckptavg.model.batches import Formats, cloned, in_formats, leaves

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("ckptavg")

MemoryFormat = Literal["auto", "channels_last", "contiguous"]

_CHANNELS_LAST: Formats = {4: torch.channels_last, 5: torch.channels_last_3d}
_CONVOLUTIONS = (torch.nn.Conv2d, torch.nn.Conv3d)
# Where they are not packed, each convolution rearranges its filters, which takes longer in
# channels_last. With fewer pixels in a batch, more is lost by that than is gained elsewhere.
_WEIGHTS_PER_PIXEL = 300


class ImageFormat:
    """The memory format of images, and of the filters as long as this context is entered.

    `auto` chooses at the first batch: the choice depends on the model, the device and the size of
    the batch, and on nothing that is timed.

    Args:
        model: the model.
        wanted: `auto`, `channels_last` or `contiguous`, which leaves images and filters alone.
        device: where the model is.
        is_amp: whether the model runs in bfloat16.
    """

    def __init__(
        self, model: torch.nn.Module, wanted: MemoryFormat, device: torch.device, *, is_amp: bool
    ) -> None:
        self._model, self._device, self._is_amp = model, device, is_amp
        self._formats: Formats = _CHANNELS_LAST if wanted == "channels_last" else {}
        self._is_chosen = wanted != "auto"
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self._set(self._formats)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def call(self, forward: Callable[[Any], object], batch: Any) -> None:  # noqa: ANN401
        """Call `forward` with the batch, its images in the memory format.

        `view` and custom kernels do not take all memory formats: if `auto` chose one and the first
        batch fails, `forward` is called again with the batch as it was.
        """
        if self._is_chosen:
            forward(in_formats(batch, self._formats))
            return
        self._set(_fitting_formats(self._model, batch, self._device, is_amp=self._is_amp))
        try:
            forward(in_formats(cloned(batch), self._formats) if self._formats else batch)
        except UserCodeError as error:
            if not self._formats or not isinstance(error.__cause__, RuntimeError):
                raise
            log.info("trying contiguous images: %s", str(error.__cause__).splitlines()[0])
            self._set({})
            forward(batch)
        self._is_chosen = True

    def _set(self, formats: Formats) -> None:
        """Take the formats, and have filters in them, or each call would convert them anew."""
        self._undo.close()
        self._formats = formats
        packs = bool(formats) and not self._is_amp and can_pack(self._device)
        for module in self._model.modules():
            if not isinstance(module, _CONVOLUTIONS):
                continue
            if packs and is_packable(module):
                module._conv_forward = packed(module)  # type: ignore[method-assign]  # noqa: SLF001
                self._undo.callback(delattr, module, "_conv_forward")
                continue
            weight = module._parameters.get("weight")  # noqa: SLF001 - computed ones are left alone
            if type(weight) is torch.nn.Parameter and weight.dim() in formats:
                self._undo.callback(setattr, weight, "data", weight.data)
                weight.data = weight.data.contiguous(memory_format=formats[weight.dim()])


def _fitting_formats(
    model: torch.nn.Module,
    batch: Any,  # noqa: ANN401
    device: torch.device,
    *,
    is_amp: bool,
) -> Formats:
    """The formats with which the model is faster: channels_last for convolutions, or none.

    In float32, GPUs gain little by channels_last, and lose where channels come in groups. CPUs gain
    by it where filters are packed; else unless the model is large and the batch small. Depthwise
    convolutions gain always.
    """
    if device.type != "cpu" and not is_amp:
        return {}
    convolutions = [module for module in model.modules() if isinstance(module, _CONVOLUTIONS)]
    formats = {
        dims: _CHANNELS_LAST[dims]
        for dims in {len(module.kernel_size) + 2 for module in convolutions}
    }
    packs = not is_amp and can_pack(device) and all(map(is_packable, convolutions))
    if packs or device.type != "cpu" or any(_is_depthwise(module) for module in convolutions):
        return formats
    images = [leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
    pixels = [image[:, :1].numel() for image in images if image.dim() in formats]
    filters = [module._parameters.get("weight") for module in convolutions]  # noqa: SLF001
    weights = sum(each.numel() for each in filters if each is not None and not is_lazy(each))
    is_small = pixels and max(pixels) * _WEIGHTS_PER_PIXEL < weights
    return {} if is_small else formats


def _is_depthwise(module: torch.nn.Conv2d | torch.nn.Conv3d) -> bool:
    return module.groups == module.in_channels > 1
