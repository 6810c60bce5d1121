"""A model during the pass: its norm layers tell what they see, and all is put back at the end."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ckptavg.errors import RefreshError, printable
from ckptavg.factories import user_code
from ckptavg.norm.estimators import CallStatistics, EstimatorName
from ckptavg.norm.layers import NormLayer, is_aggregating, norm_layers
from ckptavg.norm.statistics import in_float64, input_statistics, instance_statistics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

log = logging.getLogger("ckptavg")

TrainMode = Literal["norm", "full"]
Formats = Mapping[int, torch.memory_format]
"""Memory format of images, and so of the filters, by their number of dimensions."""

_AGREEMENT = 1e-3  # of the standard deviation, and of the variance
_SCALARS = (bool, int, float, str, type(None))


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
        layout = _set_up(model, layers, train_mode, formats, undo)
        kernels = _KernelCalls()
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
) -> Iterator[dict[str, list[CallStatistics]]]:
    """The model in eval mode, while the layers' inputs are listened to.

    Yields:
        What each layer was given, by name: biased variances, but for `InstanceNorm`.
    """
    heard: dict[str, list[CallStatistics]] = {name: [] for name in layers}
    with ExitStack() as undo:
        _set_up(model, {}, "norm", formats, undo)
        for name, layer in layers.items():

            def hear(
                layer: NormLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = name
            ) -> None:
                assert layer.running_mean is not None  # noqa: S101 - only such layers are heard
                values = _channels_second(_input(args, kwargs), layer.running_mean.numel(), name)
                of = instance_statistics if isinstance(layer, _InstanceNorm) else input_statistics
                heard[name].append(of(values))

            undo.callback(layer.register_forward_pre_hook(hear, with_kwargs=True).remove)
        for module in model.modules():
            module.training = False
        yield heard


def _set_up(
    model: torch.nn.Module,
    layers: Mapping[str, NormLayer],
    train_mode: TrainMode,
    formats: Formats,
    undo: ExitStack,
) -> ExitStack:
    """Modes, memory formats and the rest of the model; returns what undoes the memory formats."""
    _keep_the_rest(model, layers, undo)
    _set_mode(model, layers, train_mode, undo)
    undo.enter_context(_not_compiled())
    layout = undo.enter_context(ExitStack())
    _lay_out_weights(model, formats, layout)
    return layout


class Observation:
    """What the norm layers have seen of the batch at hand.

    Attributes:
        home: the device where that is put together.
        dtype: in which it has to be finite.
    """

    def __init__(
        self,
        observers: list[_Observer],
        kernels: _KernelCalls,
        layout: ExitStack,
        estimator: EstimatorName,
    ) -> None:
        self._observers, self._kernels, self._layout = observers, kernels, layout
        self._estimator = estimator
        device = observers[0].device
        self._home = device
        few_bits = all(observer.dtype != torch.float64 for observer in observers)
        self.dtype = torch.float32 if few_bits else torch.float64
        self.home = torch.device("cpu") if device.type == "mps" else device

    def watching(self) -> AbstractContextManager[object]:
        """To be entered for each batch: forgets the last one."""
        self._kernels.seen.clear()
        for observer in self._observers:
            observer.turn()
        plain = all(observer.is_plain for observer in self._observers)
        return nullcontext() if plain else self._kernels

    def keep_contiguous(self) -> None:
        """Give the filters back the memory format that they had."""
        self._layout.close()

    def seen(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Weights, means and variances of first calls, of second calls, and so on.

        Each as `WeightedMoments` takes them, and copies of what the layers hold.
        """
        most = max(len(observer.calls) for observer in self._observers)
        return [self._round(number) for number in range(most)]

    def _round(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def _keep_the_rest(
    model: torch.nn.Module, layers: Mapping[str, NormLayer], undo: ExitStack
) -> None:
    """Have all other buffers put back, and the numbers that models keep beside them.

    Counters, caches, the statistics of other layers; a number may say how long a cache is.
    """
    observed_ones = {id(layer) for layer in layers.values()}
    for module in model.modules():
        numbers = {key: value for key, value in vars(module).items() if type(value) in _SCALARS}
        undo.callback(vars(module).update, numbers)
        if id(module) in observed_ones:
            continue
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None and not is_lazy(buffer):
                undo.callback(_put_back, module, name, buffer, buffer.clone())


def _put_back(
    module: torch.nn.Module, name: str, buffer: torch.Tensor, values: torch.Tensor
) -> None:
    module._buffers[name] = buffer  # noqa: SLF001
    # Its version does not tell: torch's kernels write into running statistics without a word.
    if not torch.equal(buffer, values):
        buffer.copy_(values)


def _not_compiled() -> AbstractContextManager[object]:
    """Have models of `torch.compile` run as they are: compiled code may know nothing of hooks."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _lay_out_weights(model: torch.nn.Module, formats: Formats, undo: ExitStack) -> None:
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


def _set_mode(
    model: torch.nn.Module,
    layers: Mapping[str, NormLayer],
    train_mode: TrainMode,
    undo: ExitStack,
) -> None:
    """Set the flags of all modules. Norm layers that keep their statistics are to work with them.

    `full` asks the model itself, whose `train` may know better, as `update_bn` does. To rest, only
    the flags are needed: an `eval` of the user's may do more, such as to merge weights.
    """
    for module in model.modules():
        undo.callback(setattr, module, "training", module.training)
    if train_mode == "full":
        with user_code("the model's train()"):
            model.train()
        for name, layer in norm_layers(model).items():
            layer.training = name in layers
    else:
        for module in model.modules():
            module.training = is_aggregating(module)


def _observe(
    name: str, layer: NormLayer, kernels: _KernelCalls, undo: ExitStack, *, exact: bool
) -> _Observer:
    """Put a layer in training mode, with buffers to throw away, and hook it."""
    buffers = dict(layer._buffers)  # noqa: SLF001
    undo.callback(_restore, layer, buffers, layer.momentum, layer.track_running_stats)
    layer.training, layer.momentum = True, 1.0
    observer = _Observer(name, layer, kernels, exact=exact)
    undo.callback(layer.register_forward_pre_hook(observer.before, with_kwargs=True).remove)
    undo.callback(layer.register_forward_hook(observer.after, with_kwargs=True).remove)
    if type(layer).forward is torch.nn.SyncBatchNorm.forward and "forward" not in vars(layer):
        # With a process group it would sum over ranks, and refuse tensors on the CPU.
        vars(layer)["forward"] = MethodType(_BatchNorm.forward, layer)
        undo.callback(vars(layer).pop, "forward", None)
    return observer


def _restore(
    layer: NormLayer,
    buffers: dict[str, torch.Tensor | None],
    momentum: float | None,
    tracks: bool,  # noqa: FBT001 - a value to be put back
) -> None:
    layer._buffers.update(buffers)  # noqa: SLF001
    layer.momentum, layer.track_running_stats = momentum, tracks


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
    needed = layer.num_features
    if isinstance(layer, _InstanceNorm) and values.dim() != _dims_of_one(layer):
        needed *= len(values)
    if values.numel() <= needed:
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


class _KernelCalls(TorchFunctionMode):
    """Hears of torch's norm kernels what they normalise, and into which buffers they write.

    Attributes:
        seen: the buffer of the mean, and the input, of each call that takes in its input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[object, torch.Tensor]] = []

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        names = _KERNELS.get(func)
        if names is not None:
            given = dict(zip(names, args, strict=False)) | kwargs
            if (given.get("training") or given.get("use_input_stats")) and given["momentum"] == 1:
                self.seen.append((given["running_mean"], given["input"]))
        return func(*args, **kwargs)


def _names(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


_NATIVE = ("input", "weight", "bias", "running_mean", "running_var")
_KERNELS: dict[object, tuple[str, ...]] = {
    functional.batch_norm: _names(functional.batch_norm),
    functional.instance_norm: _names(functional.instance_norm),
    torch.batch_norm: (*_NATIVE, "training", "momentum"),
    torch.instance_norm: (*_NATIVE, "use_input_stats", "momentum"),
}


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
        channels: of the layer.
        device: of its buffers.
        dtype: of its buffers.
    """

    def __init__(self, name: str, layer: NormLayer, kernels: _KernelCalls, *, exact: bool) -> None:
        assert layer.running_mean is not None  # noqa: S101 - only such layers are observed
        self.channels, self.device = layer.running_mean.numel(), layer.running_mean.device
        self.dtype = layer.running_mean.dtype
        self.calls: list[CallStatistics] = []
        self.is_plain = False
        self._name, self._kernels, self._exact = name, kernels, exact
        self._instances = isinstance(layer, _InstanceNorm)
        few_bits = layer.running_mean.dtype not in (torch.float32, torch.float64)
        self._from_input = exact or few_bits
        self._has_own_ways: bool | None = None
        self._buffers: list[dict[str, torch.Tensor]] = []
        self._others: list[dict[str, torch.Tensor]] = []

    def turn(self) -> None:
        """Begin with another batch, and with other buffers.

        Whether those of the last batch hold NaN is not known yet: nobody has waited for them.
        """
        self.calls.clear()
        self._buffers, self._others = self._others, self._buffers

    def reset(self) -> None:
        """Have fresh buffers."""
        self._buffers.clear()
        self._others.clear()

    def before(self, layer: NormLayer, _: tuple[Any, ...], __: Mapping[str, Any]) -> None:
        """Give the layer the buffers of this call; the hooks before this one have run."""
        # A model may put parts of itself in eval mode: it would normalise with our buffers.
        if not layer.training:
            layer.training = True
        self._tracks = layer.track_running_stats
        if len(self._buffers) == len(self.calls):
            self._buffers.append(_fresh_buffers(layer))
        layer._buffers.update(self._buffers[len(self.calls)])  # noqa: SLF001

    def after(
        self, layer: NormLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: object
    ) -> None:
        """Keep the statistics of this call."""
        given, own = _input(args, kwargs), self._buffers[len(self.calls)]["running_mean"]
        heard = [] if self.is_plain else [one for mean, one in self._kernels.seen if mean is own]
        kernel = self.is_plain or len(heard) == 1
        if len(heard) == 1:
            self.is_plain, given = heard[0] is given, heard[0]
        if not self._tracks or not kernel:
            kernel = self._tracks and not heard and self._goes_its_own_way(layer, given)
        values = _channels_second(given, self.channels, self._name)
        if kernel and not self._from_input:
            self.calls.append(_from_buffers(layer, values, biased=self._exact))
        elif self._instances:
            self.calls.append(instance_statistics(values))
        else:
            self.calls.append(input_statistics(values, correction=0 if self._exact else 1))

    def _goes_its_own_way(self, layer: NormLayer, given: torch.Tensor | None) -> bool:
        """Whether a layer without a kernel tracked once, but not its input.

        A subclass that computes its statistics itself, of what it scales or masks, say. That is
        found out once: later calls must not wait for the device.
        """
        if self._has_own_ways is None:
            inputs = _channels_second(given, self.channels, self._name)
            found = _from_buffers(layer, inputs)
            tracked = layer.num_batches_tracked
            once = tracked is not None and int(tracked) == 1
            touched = bool(found.mean.any()) or bool((found.variance != 1).any())
            values = input_statistics(inputs, correction=1)
            self._has_own_ways = once and touched and not _agree(found, values, layer.eps)
            if self._has_own_ways:
                self._from_input = False
                log.warning(
                    "layer %s normalises something else than its input: "
                    "its own statistics are taken",
                    printable(self._name),
                )
        return self._has_own_ways


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


def _from_buffers(
    layer: NormLayer, values: torch.Tensor, *, biased: bool = False
) -> CallStatistics:
    """What the layer has left there; the input only says how much that was of."""
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: S101, PT018
    count = values.numel() // max(1, values.shape[1])
    variance = layer.running_var * ((count - 1) / count) if biased else layer.running_var
    return CallStatistics(layer.running_mean, variance, count, len(values))


def _agree(one: CallStatistics, other: CallStatistics, eps: float) -> bool:
    scale = other.variance + eps
    means = (one.mean - other.mean).abs() <= _AGREEMENT * scale.sqrt()
    variances = (one.variance - other.variance).abs() <= _AGREEMENT * scale
    return bool((means & variances).all())
