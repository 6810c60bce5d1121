"""A model during the pass: its norm layers tell what they see, and all is put back at the end."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ckptavg.errors import RefreshError, printable
from ckptavg.factories import user_code
from ckptavg.norm.estimators import CallStatistics
from ckptavg.norm.statistics import input_statistics, native_statistics

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

log = logging.getLogger("ckptavg")

TrainMode = Literal["norm", "full"]
Staged = list[tuple[str, CallStatistics]]
"""Name of a layer and what it saw, for each call in one forward pass."""

_AGREEMENT = 1e-3  # of the standard deviation, and of the variance


class OneValueError(RefreshError):
    """A layer was given one value per channel, which has no variance; torch would raise."""


@contextmanager
def observed(
    model: torch.nn.Module,
    layers: Mapping[str, _BatchNorm],
    *,
    from_input: bool,
    train_mode: TrainMode,
    formats: Mapping[int, torch.memory_format],
) -> Iterator[Staged]:
    """Set the model up for the pass, and put everything back at the end.

    Args:
        model: the model.
        layers: those of its norm layers that are under refresh, by name.
        from_input: compute statistics from the layers' inputs, not with torch's own kernel.
        train_mode: what is in training mode beside the norm layers: nothing, or all.
        formats: memory format of images, and so of the filters, by their number of dimensions.

    Yields:
        The list to which each call of a layer adds its name and statistics.
    """
    staged: Staged = []
    with ExitStack() as undo:
        _keep_other_buffers(model, layers, undo)
        _set_mode(model, train_mode, undo)
        _lay_out_weights(model, formats, undo)
        for name, layer in layers.items():
            _observe(name, layer, staged, undo, from_input=from_input)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and _takes_batch_statistics(module):
                hook = module.register_forward_pre_hook(_refuse_one_value, with_kwargs=True)
                undo.callback(hook.remove)
        yield staged


def _keep_other_buffers(
    model: torch.nn.Module, layers: Mapping[str, _BatchNorm], undo: ExitStack
) -> None:
    """Have the rest of the state dict put back: counters, the statistics of other layers."""
    observed_ones = {id(layer) for layer in layers.values()}
    for module in model.modules():
        if id(module) in observed_ones:
            continue
        for name, buffer in module._buffers.items():  # noqa: SLF001
            passing = name in module._non_persistent_buffers_set  # noqa: SLF001
            if buffer is None or passing or is_lazy(buffer):
                continue
            undo.callback(_put_back, module, name, buffer, buffer.clone(), buffer._version)  # noqa: SLF001


def _put_back(
    module: torch.nn.Module, name: str, buffer: torch.Tensor, values: torch.Tensor, version: int
) -> None:
    module._buffers[name] = buffer  # noqa: SLF001
    if buffer._version != version:  # noqa: SLF001 - somebody wrote into it
        buffer.copy_(values)


def _lay_out_weights(
    model: torch.nn.Module, formats: Mapping[int, torch.memory_format], undo: ExitStack
) -> None:
    """Have filters in the images' memory format, or each call would convert them anew."""
    for module in model.modules():
        weight = module._parameters.get("weight")  # noqa: SLF001 - computed ones are left alone
        if (
            isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d)
            and type(weight) is torch.nn.Parameter
            and weight.dim() in formats
        ):
            undo.callback(setattr, weight, "data", weight.data)
            weight.data = weight.data.contiguous(memory_format=formats[weight.dim()])


def _set_mode(model: torch.nn.Module, train_mode: TrainMode, undo: ExitStack) -> None:
    """Set the flags of all modules.

    `full` asks the model itself, whose `train` may know better, as `update_bn` does. To rest, only
    the flags are needed: an `eval` of the user's may do more, such as to merge weights.
    """
    for module in model.modules():
        undo.callback(setattr, module, "training", module.training)
    if train_mode == "full":
        with user_code("the model's train()"):
            model.train()
    else:
        for module in model.modules():
            module.training = False


def _observe(
    name: str, layer: _BatchNorm, staged: Staged, undo: ExitStack, *, from_input: bool
) -> None:
    """Put a layer in training mode, with buffers to throw away, and hook it."""
    buffers = dict(layer._buffers)  # noqa: SLF001
    undo.callback(_restore, layer, buffers, layer.momentum, layer.track_running_stats)
    layer.training, layer.momentum = True, 1.0
    observer = _Observer(name, layer, staged, from_input=from_input)
    _give_fresh_buffers(layer)
    undo.callback(layer.register_forward_pre_hook(observer.before, with_kwargs=True).remove)
    undo.callback(layer.register_forward_hook(observer.after, with_kwargs=True).remove)
    if type(layer).forward is torch.nn.SyncBatchNorm.forward and "forward" not in vars(layer):
        # With a process group it would sum over ranks, and refuse tensors on the CPU.
        vars(layer)["forward"] = MethodType(_BatchNorm.forward, layer)
        undo.callback(vars(layer).pop, "forward", None)


def _restore(
    layer: _BatchNorm,
    buffers: dict[str, torch.Tensor | None],
    momentum: float | None,
    tracks: bool,  # noqa: FBT001 - a value to be put back
) -> None:
    layer._buffers.update(buffers)  # noqa: SLF001
    layer.momentum, layer.track_running_stats = momentum, tracks


def _give_fresh_buffers(layer: _BatchNorm) -> None:
    """Buffers for one call: with momentum 1 the layer leaves that call's statistics in them.

    The layer's own may hold NaN, which no momentum forgets.
    """
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    layer._buffers["running_mean"] = torch.zeros_like(layer.running_mean)  # noqa: SLF001
    layer._buffers["running_var"] = torch.ones_like(layer.running_var)  # noqa: SLF001
    if layer.num_batches_tracked is not None:
        layer._buffers["num_batches_tracked"] = torch.zeros_like(layer.num_batches_tracked)  # noqa: SLF001


def _takes_batch_statistics(layer: _BatchNorm) -> bool:
    return layer.training or layer.running_mean is None


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a layer is called with, by position or by keyword."""
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return next(given, None)


def _refuse_one_value(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    assert isinstance(layer, _BatchNorm)  # noqa: S101 - it was registered with one
    values = _input(args, kwargs)
    if values is not None and values.numel() <= layer.num_features:
        raise OneValueError("one value per channel")


class _Observer:
    """The hooks of a layer: they hand over what each call saw.

    torch's kernel has computed the statistics anyway, and left them in the buffers. They are
    computed here from the input where that is not good enough (`exact`, buffers of 16 bits), or
    did not happen (checkpoint wrappers that stop the layer from tracking while gradients are off;
    subclasses that normalise piece by piece). Whether it did is found out in a layer's first call:
    later ones must not wait for the device.
    """

    def __init__(self, name: str, layer: _BatchNorm, staged: Staged, *, from_input: bool) -> None:
        assert layer.running_mean is not None  # noqa: S101 - only such layers are observed
        self._name, self._staged = name, staged
        self._channels = layer.running_mean.numel()
        few_bits = layer.running_mean.dtype not in (torch.float32, torch.float64)
        self._from_input = from_input or few_bits
        self._proven = False

    def before(self, layer: _BatchNorm, _: tuple[Any, ...], __: Mapping[str, Any]) -> None:
        """Note whether the layer is going to track, as far as the hooks before this one let it."""
        # A model may put parts of itself in eval mode: it would normalise with our buffers.
        layer.training = True
        self._tracks = layer.track_running_stats

    def after(
        self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: object
    ) -> None:
        """Stage the statistics of this call."""
        values = self._channels_second(_input(args, kwargs))
        if self._from_input or not self._tracks:
            seen = input_statistics(values)
        else:
            seen = self._native(layer, values)
        self._staged.append((self._name, seen))
        _give_fresh_buffers(layer)

    def _native(self, layer: _BatchNorm, values: torch.Tensor) -> CallStatistics:
        assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
        seen = native_statistics(layer.running_mean, layer.running_var, values)
        if self._proven:
            return seen
        found = _kernel_statistics(values)
        self._proven = _agree(seen, found, layer.eps) or self._saw_something_else(layer)
        self._from_input = not self._proven
        return seen if self._proven else input_statistics(values)

    def _saw_something_else(self, layer: _BatchNorm) -> bool:
        """Whether the layer tracked once, but not its input: a subclass that scales or masks it."""
        assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
        tracked = layer.num_batches_tracked
        once = tracked is not None and int(tracked) == 1
        touched = bool(layer.running_mean.any()) or bool((layer.running_var != 1).any())
        if once and touched:
            log.warning(
                "layer %s normalises something else than its input: its own statistics are taken",
                printable(self._name),
            )
        return once and touched

    def _channels_second(self, values: torch.Tensor | None) -> torch.Tensor:
        """The input as `[batch, channels, ...]`: a subclass may take `[batch, ..., channels]`."""
        if values is not None and values.dim() > 1:
            for axis in (1, -1):
                if values.shape[axis] == self._channels:
                    return values.movedim(axis, 1)
        raise RefreshError(
            f"layer {printable(self._name)!r} was called without an input of "
            f"{self._channels} channels"
        )


def _kernel_statistics(values: torch.Tensor) -> CallStatistics:
    """What torch's kernel says of a layer's input: not exact, and ten times as fast as that."""
    mean = torch.zeros(values.shape[1], dtype=torch.float32, device=values.device)
    variance = torch.ones_like(mean)
    torch.nn.functional.batch_norm(values.float(), mean, variance, training=True, momentum=1.0)
    return native_statistics(mean, variance, values)


def _agree(one: CallStatistics, other: CallStatistics, eps: float) -> bool:
    variance, expected = one.m2 / one.count, other.m2 / other.count
    scale = expected + eps
    means = (one.mean - other.mean).abs() <= _AGREEMENT * scale.sqrt()
    variances = (variance - expected).abs() <= _AGREEMENT * scale
    return bool((means & variances).all())
