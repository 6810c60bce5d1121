"""Capture the statistics that the norm layers of a model compute in each call.

A layer calls torch's norm kernel with its buffers and a momentum. Each of these calls is given
fresh buffers and momentum 1 instead: the kernel leaves the statistics of its input there. A layer
may call it several times, for pieces of a batch.

A layer that calls no kernel, such as one for masked sequences, computes statistics itself. It is
called with fresh buffers and momentum 1 too, and what it leaves in them counts.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from ckptavg.batchnorm.layers import NormLayer, is_aggregating
from ckptavg.batchnorm.moments import CallStatistics, instance_statistics, merged
from ckptavg.errors import RefreshError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class UnfitBatchError(RefreshError):
    """A layer cannot normalise the batch: torch would raise, or a layer that splits it."""


@contextmanager
def capture(layers: Mapping[str, NormLayer], model: torch.nn.Module) -> Iterator[Capture]:
    """Capture the statistics of layers while the block runs.

    Args:
        layers: the layers by name.
        model: the model, whose batches are refused if one of its layers cannot normalise them.
    """
    with ExitStack() as undo:
        captured = Capture(layers)
        undo.callback(captured.take)
        for module in model.modules():
            if isinstance(module, NormLayer) or is_aggregating(module):
                undo.callback(
                    module.register_forward_pre_hook(_refuse_unfit, with_kwargs=True).remove
                )
        for layer in layers.values():
            undo.callback(layer.register_forward_pre_hook(captured.before).remove)
            undo.callback(layer.register_forward_hook(captured.after, with_kwargs=True).remove)
        yield captured


@dataclass(eq=False)
class _Layer:
    """A layer under refresh.

    Attributes:
        mean, variance: its statistics, with 0 and 1 where they are not finite.
        is_instance: whether it is an `InstanceNorm`.
        held: its buffer of the running mean for the call that has begun.
        pieces: what the kernel computed since the call of the layer began.
        computes_itself: whether it leaves statistics in its buffers without a kernel.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    is_instance: bool
    held: torch.Tensor
    pieces: list[CallStatistics] = field(default_factory=list)
    computes_itself: bool = False

    def fresh_buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance for a call. A layer that works with what it holds finds its own."""
        return self.mean.clone(), self.variance.clone()


class Capture(TorchFunctionMode):
    """Hears the calls of layers, and those of torch's norm kernels with their buffers.

    It is entered as a mode while a layer is called: it would slow down all else.

    Args:
        layers: the layers by name.
    """

    def __init__(self, layers: Mapping[str, NormLayer]) -> None:
        super().__init__()
        self._layers: dict[torch.nn.Module, _Layer] = {}
        self._calls: dict[torch.nn.Module, list[CallStatistics]] = {}
        for layer in layers.values():
            mean, variance = layer.running_mean, layer.running_var
            assert mean is not None and variance is not None  # noqa: S101, PT018 - see `tracks`
            self._layers[layer] = _Layer(
                mean.nan_to_num(0, 0, 0),
                torch.where(variance.isfinite() & (variance >= 0), variance, 1),
                isinstance(layer, _InstanceNorm),
                mean,
            )
            self._calls[layer] = []
        # The layers whose call has begun, by the buffers that they have for it.
        self._by_buffer: dict[int, _Layer] = {}
        self._depth = 0

    def take(self) -> list[list[CallStatistics]]:
        """What each layer saw in each of its calls since the last time."""
        if self._depth:  # a layer has raised
            self._depth = 1
            self._leave()
        taken = list(self._calls.values())
        self._calls = {layer: [] for layer in self._calls}
        self._by_buffer.clear()
        return taken

    def before(self, layer: NormLayer, _: tuple[Any, ...]) -> None:
        """Prepare a layer for a call. The user's own hooks have run."""
        layer.training = layer.track_running_stats = True
        with suppress(AttributeError):
            layer.momentum = 1.0
        known = self._layers[layer]
        known.held, variance = known.fresh_buffers()
        known.pieces = []
        layer._buffers.update(running_mean=known.held, running_var=variance)  # noqa: SLF001
        self._by_buffer[id(known.held)] = known
        if not self._depth:
            self.__enter__()  # type: ignore[no-untyped-call]
        self._depth += 1

    def _leave(self) -> None:
        self._depth -= 1
        if not self._depth:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def after(
        self, layer: NormLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: object
    ) -> None:
        """Keep the statistics of a call."""
        self._leave()
        known, mean, variance = self._layers[layer], layer.running_mean, layer.running_var
        assert mean is not None and variance is not None  # noqa: S101, PT018 - see `tracks`
        self._by_buffer.pop(id(known.held), None)
        if known.pieces:
            self._calls[layer].append(merged(known.pieces, is_instance=known.is_instance))
            return
        if not known.computes_itself:  # reading values waits for the device: until it has, once
            known.computes_itself = not (
                torch.equal(mean, known.mean) and torch.equal(variance, known.variance)
            )
        values = _input(args, kwargs)
        if known.computes_itself and values is not None:
            count = values.numel() // max(1, mean.numel())
            self._calls[layer].append(CallStatistics(mean, variance, count, len(values)))

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        names = _KERNELS.get(func)
        if names is None:
            return func(*args, **(kwargs or {}))
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        known = self._by_buffer.get(id(given.get("running_mean")))
        if known is None or not (given.get("training") or given.get("use_input_stats")):
            return func(*args, **(kwargs or {}))
        if known.pieces:  # the layer's buffers hold the statistics of the first piece
            given["running_mean"], given["running_var"] = known.fresh_buffers()
        mean, variance = given["running_mean"], given["running_var"]
        given["momentum"] = 1.0
        rest = args[len(names) :]  # what a native kernel takes besides
        positional = [given.pop(name) for name in names[: len(args)]]
        result = func(*positional, *rest, **given)
        known.pieces.append(_piece(given.get("input", positional[0]), mean, variance, known))
        return result


def _piece(
    values: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, known: _Layer
) -> CallStatistics:
    """What a kernel has normalised. Buffers of 16 bits would round it: it is computed anew."""
    if mean.dtype not in (torch.float32, torch.float64):
        return (instance_statistics if known.is_instance else CallStatistics.of)(values)
    count = len(values) if known.is_instance else values.numel() // max(1, values.shape[1])
    return CallStatistics(mean, variance, count, len(values))


def _names(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


_NATIVE = ("input", "weight", "bias", "running_mean", "running_var")
_KERNELS: dict[object, tuple[str, ...]] = {
    functional.batch_norm: _names(functional.batch_norm),
    functional.instance_norm: _names(functional.instance_norm),
    torch.batch_norm: (*_NATIVE, "training", "momentum"),
    torch.instance_norm: (*_NATIVE, "use_input_stats", "momentum"),
}


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first tensor that a layer is called with, by position or by keyword."""
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return next(given, None)


def _refuse_unfit(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Refuse a batch that a module cannot normalise, before it raises an error of its own.

    Raises:
        UnfitBatchError: it cannot.
    """
    values, splits = _input(args, kwargs), getattr(module, "num_splits", 1)
    splits = splits if isinstance(splits, int) and module.training else 1
    if values is None or not values.dim():
        return
    if len(values) % splits:
        raise UnfitBatchError("a size that does not divide into a norm layer's splits")
    if isinstance(module, NormLayer) and (module.training or module.running_mean is None):
        needed = module.num_features if module.running_mean is None else module.running_mean.numel()
        if isinstance(module, _InstanceNorm) and values.dim() != module._get_no_batch_dim():  # type: ignore[no-untyped-call]  # noqa: SLF001
            needed *= len(values)
        if values.numel() // splits <= needed:
            raise UnfitBatchError("less than two values per channel in a norm layer")
