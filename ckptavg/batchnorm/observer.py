"""A model during the pass: its norm layers tell what they see, and all is put back at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptavg.batchnorm.estimators import CallStatistics, EstimatorName, Round
from ckptavg.batchnorm.kernels import KernelCall, KernelCalls
from ckptavg.batchnorm.layers import NormLayer, is_aggregating
from ckptavg.batchnorm.setting import Formats, TrainMode, set_up
from ckptavg.batchnorm.statistics import in_float64, input_statistics, instance_statistics
from ckptavg.errors import RefreshError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager


class UnfitBatchError(RefreshError):
    """A layer cannot normalise the batch: torch would raise, or a layer that splits it."""


@contextmanager
def observed(
    model: torch.nn.Module,
    layers: Mapping[str, NormLayer],
    *,
    estimator: EstimatorName,
    train_mode: TrainMode,
    formats: Formats,
) -> Iterator[Observation]:
    """Set the model up for the pass, and put everything back at the end.

    Args:
        model: the model.
        layers: those of its norm layers that are under refresh, by name.
        estimator: `exact` computes statistics from the layers' inputs, not with torch's own kernel.
        train_mode: what is in training mode beside the norm layers: nothing, or all.
        formats: memory format of images.
    """
    with ExitStack() as undo:
        layout = set_up(model, layers, train_mode, formats, undo)
        kernels = KernelCalls()
        observers = [
            _observe(name, layer, kernels, undo, exact=estimator == "exact")
            for name, layer in layers.items()
        ]
        for module in model.modules():
            for hook in _fitness_hooks(module):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield Observation(observers, kernels, layout, estimator)


@contextmanager
def heard_in_eval(
    model: torch.nn.Module, layers: Mapping[str, NormLayer], formats: Formats
) -> Iterator[list[tuple[str, CallStatistics]]]:
    """The model in eval mode, while what the layers normalise is listened to.

    Yields:
        Each call's layer by name, and what it was given: biased variances, but for `InstanceNorm`.
    """
    found: list[tuple[str, CallStatistics]] = []
    with ExitStack() as undo:
        set_up(model, {}, "norm", formats, undo)
        for module in model.modules():
            if is_aggregating(module):
                module.training = False
        kernels = undo.enter_context(KernelCalls())

        def hear(name: str, layer: NormLayer, given: torch.Tensor | None) -> None:
            own = layer.running_mean
            assert own is not None  # noqa: S101 - only such layers are listened to
            heard = [one.input for one in kernels.take(own)]
            inputs = heard or [_channels_second(given, own.numel(), name)]
            of = instance_statistics if isinstance(layer, _InstanceNorm) else input_statistics
            if inputs[0].numel():
                found.append((name, of(*inputs)))

        for name, layer in layers.items():
            assert layer.running_mean is not None  # noqa: S101 - only such layers are listened to
            kernels.listen_to(layer.running_mean, (layer.running_mean, layer.running_var))

            def hook(
                layer: NormLayer,
                args: tuple[Any, ...],
                kwargs: Mapping[str, Any],
                _: object,
                name: str = name,
            ) -> None:
                hear(name, layer, _input(args, kwargs))

            undo.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield found


class Observation:
    """What the norm layers have seen of the batch at hand.

    Attributes:
        home: the device where that is put together.
        dtype: in which it has to be finite.
    """

    def __init__(
        self,
        observers: list[_Observer],
        kernels: KernelCalls,
        layout: ExitStack,
        estimator: EstimatorName,
    ) -> None:
        self._observers, self._kernels, self._layout = observers, kernels, layout
        self._estimator, self._is_first = estimator, True
        device = observers[0].device
        self._home = device
        few_bits = all(observer.dtype != torch.float64 for observer in observers)
        self.dtype = torch.float32 if few_bits else torch.float64
        self.home = torch.device("cpu") if device.type == "mps" else device

    def watching(self) -> AbstractContextManager[object]:
        """To be entered for each batch: forgets the last one."""
        kernels = self._kernels
        kernels.forget()
        # What was never called is no reason to listen; if it is called after all, see `overheard`.
        listen = self._is_first or self.overheard
        listen = listen or any(
            observer.was_called and not observer.is_plain for observer in self._observers
        )
        for observer in self._observers:
            observer.turn()
        self._is_first = False
        return kernels if listen else nullcontext()

    @property
    def overheard(self) -> bool:
        """Whether a layer was called for the first time while nobody listened to the kernels.

        The batch has to go through the model once more.
        """
        return any(observer.overheard for observer in self._observers)

    def keep_contiguous(self) -> None:
        """Give the filters back the memory format that they had."""
        self._layout.close()

    def seen(self) -> list[Round]:
        """Weights, means and variances of first calls, of second calls, and so on.

        Each as `WeightedMoments` takes them, and copies of what the layers hold.
        """
        most = max(len(observer.calls) for observer in self._observers)
        return [self._round(number) for number in range(most)]

    def _round(self, number: int) -> Round:
        weights, means, variances = [], [], []
        for observer in self._observers:
            if number < len(observer.calls):
                call = observer.calls[number]
                weights.append(call.weight(self._estimator))
                means.append(call.mean.to(self._home))
                variances.append(call.variance.to(self._home))
            else:
                weights.append(0)
                nothing = torch.zeros(observer.channels, device=self._home)
                means.append(nothing)
                variances.append(nothing)
        return (
            torch.tensor(weights, dtype=torch.float64),
            in_float64(torch.cat(means)),
            in_float64(torch.cat(variances)),
        )

    def reset(self) -> None:
        """Forget NaN and Inf: the layers' buffers would not."""
        for observer in self._observers:
            observer.reset()


def _observe(
    name: str, layer: NormLayer, kernels: KernelCalls, undo: ExitStack, *, exact: bool
) -> _Observer:
    """Put a layer in training mode, with buffers to throw away, and hook it."""
    layer.training = True
    observer = _Observer(name, layer, kernels, exact=exact)
    # For who uses them without calling the layer.
    layer._buffers.update(_fresh_buffers(layer))  # noqa: SLF001
    undo.callback(layer.register_forward_pre_hook(observer.before, with_kwargs=True).remove)
    undo.callback(layer.register_forward_hook(observer.after, with_kwargs=True).remove)
    return observer


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a layer is called with, by position or by keyword."""
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return next(given, None)


_Hook = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]


def _fitness_hooks(module: torch.nn.Module) -> list[_Hook]:
    """What refuses batches that the module cannot normalise, before it raises itself."""
    hooks: list[_Hook] = []
    if isinstance(module, NormLayer) and (module.training or module.running_mean is None):
        hooks.append(_refuse_one_value)
    splits = getattr(module, "num_splits", None)
    if isinstance(splits, int) and (isinstance(module, NormLayer) or is_aggregating(module)):
        hooks.append(_refuse_remainder)
    return hooks


def _refuse_one_value(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    assert isinstance(layer, NormLayer)  # noqa: S101 - it was registered with one
    values = _input(args, kwargs)
    if values is None:
        return
    splits = getattr(layer, "num_splits", 1)
    needed = layer.num_features if layer.running_mean is None else layer.running_mean.numel()
    if isinstance(layer, _InstanceNorm) and values.dim() != _dims_of_one(layer):
        needed *= len(values)
    if values.numel() // (splits if isinstance(splits, int) else 1) <= needed:
        raise UnfitBatchError("less than two values per channel in a norm layer")


def _dims_of_one(layer: _InstanceNorm) -> int:
    """Dimensions of an input without a batch's."""
    dims: int = layer._get_no_batch_dim()  # type: ignore[no-untyped-call]  # noqa: SLF001
    return dims


def _refuse_remainder(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    values = _input(args, kwargs)
    if module.training and values is not None and len(values) % int(module.num_splits):  # type: ignore[arg-type]
        raise UnfitBatchError("a size that does not divide into a norm layer's splits")


class _Observer:
    """The hooks of a layer: they keep what each call saw.

    torch's kernel has computed the statistics anyway, and with momentum 1 left them in the buffers,
    of which each call in a pass through the model has its own. They are computed here from the
    input where that is not good enough (`exact`, buffers of 16 bits), or did not happen (checkpoint
    wrappers that stop the layer from tracking while gradients are off; subclasses that normalise
    piece by piece).

    Attributes:
        calls: what was seen of the batch at hand.
        is_plain: the kernel is known to be called with the layer's own input.
        was_called: in any batch.
        overheard: called for the first time, while nobody listened to the kernels.
        channels: of the layer.
        device: of its buffers.
        dtype: of its buffers.
    """

    def __init__(self, name: str, layer: NormLayer, kernels: KernelCalls, *, exact: bool) -> None:
        assert layer.running_mean is not None  # noqa: S101 - only such layers are observed
        self.channels, self.device = layer.running_mean.numel(), layer.running_mean.device
        self.dtype = layer.running_mean.dtype
        self.calls: list[CallStatistics] = []
        self.is_plain = False
        self._name, self._kernels, self._exact = name, kernels, exact
        self._instances = isinstance(layer, _InstanceNorm)
        few_bits = layer.running_mean.dtype not in (torch.float32, torch.float64)
        self._from_input = exact or few_bits
        self.was_called = self.overheard = False
        self._own = layer.running_mean, layer.running_var
        self._buffers: list[dict[str, torch.Tensor]] = []
        self._others: list[dict[str, torch.Tensor]] = []

    def turn(self) -> None:
        """Begin with another batch, and with other buffers.

        Whether those of the last batch hold NaN is not known yet: nobody has waited for them.
        """
        self.calls.clear()
        self.overheard = False
        self._buffers, self._others = self._others, self._buffers

    def reset(self) -> None:
        """Have the buffers as they were when they were fresh."""
        for buffers in (*self._buffers, *self._others):
            buffers["running_mean"].zero_()
            buffers["running_var"].fill_(1)

    def before(self, layer: NormLayer, _: tuple[Any, ...], __: Mapping[str, Any]) -> None:
        """Give the layer the buffers of this call; the hooks before this one have run."""
        # A model may put parts of itself in eval mode: it would normalise with our buffers.
        if not layer.training:
            layer.training = True
        if layer.momentum != 1:  # some have it follow a schedule
            with suppress(AttributeError):
                layer.momentum = 1.0
        self._tracks = layer.track_running_stats
        if len(self._buffers) == len(self.calls):
            self._buffers.append(_fresh_buffers(layer))
            # A kernel that does not take in its input is to have what the layer holds.
            self._kernels.listen_to(self._buffers[-1]["running_mean"], self._own)
        layer._buffers.update(self._buffers[len(self.calls)])  # noqa: SLF001

    def after(
        self, layer: NormLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: object
    ) -> None:
        """Keep the statistics of this call."""
        given, own = _input(args, kwargs), self._buffers[len(self.calls)]["running_mean"]
        if not (self.is_plain or self.was_called or self._kernels.is_on):
            self.overheard = True
            return
        self.was_called = True
        every = [] if self.is_plain else self._kernels.take(own)
        if every and not any(one.is_training for one in every):
            return  # frozen: a layer that works with what it holds even in training mode
        taken_in = [one for one in every if one.is_training]
        if len(taken_in) == 1:
            self.is_plain = taken_in[0].input is given and taken_in[0].momentum == 1
        if self._tracks and not self._from_input and (self.is_plain or _is_one(taken_in)):
            values = given if self.is_plain else taken_in[0].input
            assert values is not None  # noqa: S101 - the kernel was given it
            self.calls.append(_from_buffers(layer, values))
            return
        inputs = [one.input for one in taken_in]
        if self.is_plain and given is not None:
            inputs = [given]
        inputs = inputs or [_channels_second(given, self.channels, self._name)]
        if self._instances:
            self.calls.append(instance_statistics(*inputs))
        else:
            self.calls.append(input_statistics(*inputs, correction=0 if self._exact else 1))


def _is_one(calls: list[KernelCall]) -> bool:
    """Whether the kernel was called once, and has left that call's statistics."""
    return len(calls) == 1 and calls[0].momentum == 1


def _channels_second(values: torch.Tensor | None, channels: int, name: str) -> torch.Tensor:
    """The input as `[batch, channels, ...]`: a subclass may take `[batch, ..., channels]`."""
    if values is not None and values.dim() > 1:
        for axis in (1, -1):
            if values.shape[axis] == channels:
                return values.movedim(axis, 1)
    raise RefreshError(
        f"layer {printable(name)!r} was called without an input of {channels} channels"
    )


def _fresh_buffers(layer: NormLayer) -> dict[str, torch.Tensor]:
    """Buffers for one call: with momentum 1 the layer leaves that call's statistics in them.

    The layer's own may hold NaN, which no momentum forgets.
    """
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    found = {
        "running_mean": torch.zeros_like(layer.running_mean),
        "running_var": torch.ones_like(layer.running_var),
    }
    if layer.num_batches_tracked is not None:
        found["num_batches_tracked"] = torch.zeros_like(layer.num_batches_tracked)
    return found


def _from_buffers(layer: NormLayer, values: torch.Tensor) -> CallStatistics:
    """What the layer has left there; the input only says how much that was of."""
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    count = values.numel() // max(1, values.shape[1])
    return CallStatistics(layer.running_mean, layer.running_var, count, len(values))
