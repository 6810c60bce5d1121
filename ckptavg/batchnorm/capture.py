"""Capture the statistics that the norm layers of a model compute in each call.

A layer calls torch's norm kernel with its buffers and a momentum. Each of these calls is given
copies of the old buffers and momentum 1: the kernel leaves the statistics of its input in the
copies. A layer may call it several times, for pieces of a batch.

A layer that calls no kernel, such as one for masked sequences, computes statistics itself. It too
is called with copies and momentum 1, and what it leaves in them counts.
"""

from __future__ import annotations

import inspect
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ckptavg.batchnorm.layers import (
    MIXING,
    NOT_CALLED,
    UNCHANGED,
    KeptLayer,
    NormLayer,
    is_aggregating,
)
from ckptavg.batchnorm.moments import CallStatistics, instance_statistics, merged
from ckptavg.errors import RefreshError
from ckptavg.model.batches import cloned, leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Set as AbstractSet


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
        undo.callback(captured.leave)
        for module in model.modules():
            if isinstance(module, NormLayer) or is_aggregating(module):
                undo.callback(
                    module.register_forward_pre_hook(_refuse_unfit, with_kwargs=True).remove
                )
        for layer in layers.values():
            undo.callback(_restore_momentum, layer, layer.momentum)
            undo.callback(layer.register_forward_pre_hook(captured.before).remove)
            # It is called after an `Exception` too, so that each call leaves the mode.
            after = layer.register_forward_hook(captured.after, with_kwargs=True, always_call=True)
            undo.callback(after.remove)
        yield captured


def _restore_momentum(layer: NormLayer, momentum: float | None) -> None:
    with suppress(AttributeError):  # a property without a setter
        layer.momentum = momentum


@dataclass(eq=False)
class _Layer:
    """A layer under refresh.

    Attributes:
        name: its name.
        mean, variance: its old statistics, with 0 and 1 where they are not finite.
        is_instance: whether it is an `InstanceNorm`.
        start: the buffer of the running mean that its current call began with.
        pieces: what the kernel computed in its current call.
        calls: the statistics of its calls since they were last taken.
        was_called: whether a call of it has ended well.
        obeys: whether a layer without a kernel leaves the statistics of a call in its buffers if
            its momentum is 1; None before its first such call.
    """

    name: str
    mean: torch.Tensor
    variance: torch.Tensor
    is_instance: bool
    start: torch.Tensor
    pieces: list[CallStatistics] = field(default_factory=list)
    calls: list[CallStatistics] = field(default_factory=list)
    was_called: bool = False
    obeys: bool | None = None

    def old_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of mean and variance: buffers that a layer finds its old statistics in."""
        return self.mean.clone(), self.variance.clone()


class Capture(TorchFunctionMode):
    """Hears the calls of layers, and those of torch's norm kernels with their buffers.

    It is entered as a mode while a layer is called, in the thread that calls it: it would slow down
    all else.

    Args:
        layers: the layers by name.
    """

    def __init__(self, layers: Mapping[str, NormLayer]) -> None:
        super().__init__()
        self._layers: dict[torch.nn.Module, _Layer] = {}
        for name, layer in layers.items():
            mean, variance = layer.running_mean, layer.running_var
            assert mean is not None and variance is not None  # noqa: S101, PT018 - see `tracks`
            usable = torch.where(variance.isfinite() & (variance >= 0), variance, 1)
            is_instance = isinstance(layer, _InstanceNorm)
            self._layers[layer] = _Layer(name, mean.nan_to_num(0, 0, 0), usable, is_instance, mean)
        self._by_address: dict[int, _Layer] = {}
        self._thread = threading.local()  # `active`: the layers whose calls have begun in it

    def leave(self) -> None:
        """Leave the mode, if an interruption has ended the call of a layer: no hook ran then."""
        vars(self._thread).pop("active", None)
        while self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def take(self) -> list[list[CallStatistics]]:
        """What each layer saw in each of its calls since the last time."""
        taken = [known.calls for known in self._layers.values()]
        for known in self._layers.values():
            known.calls = []
        self._by_address.clear()
        return taken

    def unheard(self, names: AbstractSet[str]) -> list[KeptLayer]:
        """The layers that have no new statistics, with the reason.

        Args:
            names: those of the layers that have some.
        """
        kept = []
        for known in self._layers.values():
            if known.name not in names:
                if known.obeys is False:
                    reason = MIXING
                else:
                    reason = UNCHANGED if known.was_called else NOT_CALLED
                kept.append(KeptLayer(known.name, reason, is_intended=reason == UNCHANGED))
        return kept

    def before(self, layer: NormLayer, _: tuple[Any, ...]) -> None:
        """Prepare a layer for a call. The user's own hooks have run."""
        known = self._layers.get(layer)
        if known is None:  # a copy of a layer
            return
        if not layer.training:  # the model itself has put it into eval mode
            known.was_called = True
            return
        if not layer.track_running_stats:
            layer.track_running_stats = True
        if layer.momentum != 1:  # torch takes ten times as long to set it as to read it
            with suppress(AttributeError):
                layer.momentum = 1.0
        known.start, variance = known.old_statistics()
        known.pieces = []
        layer._buffers.update(running_mean=known.start, running_var=variance)  # noqa: SLF001
        self._by_address[known.start.data_ptr()] = known
        active = vars(self._thread).setdefault("active", [])
        if not active:
            self.__enter__()  # type: ignore[no-untyped-call]
        active.append(known)

    def after(
        self, layer: NormLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object
    ) -> object:
        """Keep the statistics of a call; of one that raised, without a result, nothing.

        Returns:
            Another result of the call, of a layer that is found to keep its old statistics.
        """
        active, known = vars(self._thread).get("active", []), self._layers.get(layer)
        if not active or active[-1] is not known:  # a hook before ours has raised
            return None
        active.pop()
        if not active:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._by_address.pop(known.start.data_ptr(), None)
        if result is None:
            return None
        known.was_called = True
        if known.pieces:
            known.calls.append(merged(known.pieces, is_instance=known.is_instance))
            return None
        mean, variance = layer.running_mean, layer.running_var
        values = _input(args, kwargs)
        assert mean is not None and variance is not None  # noqa: S101, PT018 - see `tracks`
        if values is None or (
            torch.equal(mean, known.mean) and torch.equal(variance, known.variance)
        ):
            return None  # the layer works with what it holds
        if known.obeys is None:
            known.obeys = _obeys_momentum(layer, args, kwargs)
        if known.obeys:
            count = values.numel() // max(1, mean.numel())
            known.calls.append(CallStatistics(mean, variance, count, len(values)))
            return None
        old_mean, old_variance = known.old_statistics()
        layer._buffers.update(running_mean=old_mean, running_var=old_variance)  # noqa: SLF001
        layer.training = False  # for the rest of the pass: the layers behind it are to see this
        return layer.forward(*args, **kwargs)

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
        mean = given.get("running_mean")
        known = None if mean is None else self._by_address.get(mean.data_ptr())
        if known is None or not (given.get("training") or given.get("use_input_stats")):
            return func(*args, **(kwargs or {}))
        if known.pieces:  # the layer's buffers hold the statistics of the first piece
            given["running_mean"], given["running_var"] = known.old_statistics()
        given["momentum"] = 1.0
        values, mean, variance = given["input"], given["running_mean"], given["running_var"]
        by_position = [given.pop(name) for name in names[: len(args)]]
        result = func(*by_position, *args[len(names) :], **given)
        known.pieces.append(_piece(values, mean.flatten(), variance.flatten(), known))
        return result


def _obeys_momentum(layer: NormLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether neither output nor buffers depend on what the buffers held, if the momentum is 1.

    A layer may have a momentum that cannot be set, or normalise with its old statistics too, as
    batch renormalisation does. It is called twice more with the same input.
    """
    held = dict(layer._buffers)  # noqa: SLF001
    mean, variance = held["running_mean"], held["running_var"]
    assert mean is not None and variance is not None  # noqa: S101, PT018 - see `tracks`
    results: list[list[torch.Tensor]] = []
    for mean_start, variance_start in ((0.0, 1.0), (1.0, 2.0)):
        layer._buffers.update(  # noqa: SLF001
            running_mean=torch.full_like(mean, mean_start),
            running_var=torch.full_like(variance, variance_start),
        )
        with torch.random.fork_rng(devices=[]):
            output = layer.forward(*cloned(args), **cloned(dict(kwargs)))  # it may work in place
        buffers = (layer.running_mean, layer.running_var)
        results.append([each for each in leaves([output, *buffers]) if torch.is_tensor(each)])
    layer._buffers.update(held)  # noqa: SLF001
    return all(
        torch.allclose(first, second, rtol=1e-3, atol=1e-6, equal_nan=True)
        for first, second in zip(*results, strict=True)
    )


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
    torch.native_batch_norm: (*_NATIVE, "training", "momentum"),
    torch.batch_norm: (*_NATIVE, "training", "momentum"),
    torch.instance_norm: (*_NATIVE, "use_input_stats", "momentum"),
}


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first tensor that a layer is called with, by position or by keyword."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return None


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
            raise UnfitBatchError("fewer than two values per channel in a norm layer")
