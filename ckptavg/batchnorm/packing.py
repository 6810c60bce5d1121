"""Filters of convolutions in the layout of oneDNN, made once for a pass.

torch's own convolutions make it anew in each call, which takes most of the time where images are
few and small: a ResNet-18 has 340 weights for each pixel of 32 images of 32 x 32.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Convolution = torch.nn.Conv2d | torch.nn.Conv3d

_REORDERS = torch._C._nn  # noqa: SLF001
_REORDER = {4: "mkldnn_reorder_conv2d_weight", 5: "mkldnn_reorder_conv3d_weight"}


def can_pack(device: torch.device) -> bool:
    """Whether oneDNN computes convolutions of float32 on a device, from filters that we lay out."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    mkldnn: Any = torch.backends.mkldnn
    # These are not in torch's public interface: without them its own convolutions do the work.
    has_operators = hasattr(torch.ops.mkldnn, "_convolution_pointwise") and all(
        hasattr(_REORDERS, name) for name in _REORDER.values()
    )
    is_used = bool(mkldnn.is_available() and mkldnn.enabled)
    return device.type == "cpu" and is_x86 and has_operators and is_used


def is_packable(module: Convolution) -> bool:
    """Whether a module is a convolution of torch's own, with a plain weight in float32."""
    weight = module._parameters.get("weight")  # noqa: SLF001 - computed ones are left alone
    return (
        type(module) in (torch.nn.Conv2d, torch.nn.Conv3d)
        and "_conv_forward" not in vars(module)
        and not module._forward_pre_hooks  # noqa: SLF001 - they may set another weight
        and type(weight) is torch.nn.Parameter
        and weight.dtype == torch.float32
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def packed(module: Convolution) -> Callable[..., torch.Tensor]:
    """What computes the convolution of a module, in place of its `_conv_forward`.

    Results are in channels_last, and differ from torch's own in their last bits.
    """
    own = module._conv_forward  # noqa: SLF001
    sizes = [list(map(int, each)) for each in (module.padding, module.stride, module.dilation)]
    groups, held = module.groups, dict[str, Any]()

    def convolve(
        images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if (
            type(images) is not torch.Tensor
            or (images.dim(), images.dtype) != (weight.dim(), torch.float32)
            or not images.numel()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            unpacked: torch.Tensor = own(images, weight, bias)
            return unpacked
        version = _version(weight)
        if held.get("version") != version:
            reorder = getattr(_REORDERS, _REORDER[weight.dim()])
            filters = reorder(weight.detach().to_mkldnn(), *sizes, groups, list(images.shape))
            held.update(version=version, filters=filters)
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(  # noqa: SLF001
            images, held["filters"], bias, *sizes, groups, "none", [], ""
        )
        return result

    return convolve


def _version(weight: torch.Tensor) -> tuple[object, ...]:
    """What changes with a weight: the forward pass may give a module another, or write into it.

    By way of `weight.data` nobody counts the changes, so that some of the values are compared too.
    """
    step = max(1, len(weight) // 16)
    some = weight.detach().as_strided((len(weight) // step,), (step * weight.stride(0),)).tolist()
    return weight.data_ptr(), weight._version, some  # noqa: SLF001
