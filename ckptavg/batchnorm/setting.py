"""The model's modes and buffers for a pass, and how they are put back."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ckptavg.batchnorm.layers import (
    IN_EVAL_MODE,
    KeptLayer,
    NormLayer,
    is_aggregating,
    norm_layers,
    tracks,
)
from ckptavg.model.modes import has_own_train, start_training

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

log = logging.getLogger("ckptavg")

TrainMode = Literal["norm", "full"]
_SCALARS = (bool, int, float, str, type(None))


@contextmanager
def training_mode(
    model: torch.nn.Module,
    layers: Mapping[str, NormLayer],
    kept: Sequence[KeptLayer],
    train_mode: TrainMode,
) -> Iterator[None]:
    """The model with the modes and buffers for a pass; all is put back at the end.

    Args:
        model: the model.
        layers: those of its norm layers that are under refresh, by name.
        kept: layers that keep their statistics, and are in eval mode.
        train_mode: what is in training mode beside them: nothing, or all.
    """
    with ExitStack() as undo:
        keep_buffers(model, undo)
        _set_mode(model, layers, kept, train_mode, undo)
        undo.enter_context(_not_compiled())
        undo.enter_context(_not_synchronised())
        yield


def kept_in_eval(model: torch.nn.Module) -> list[KeptLayer]:
    """The norm layers that the model's own `train` keeps in eval mode.

    The model is asked only if a class or an object above a norm layer has a `train(mode)` of its
    own. That may change more, such as weights that are merged in eval mode: all is put back.
    """
    layers = norm_layers(model)
    if not any(
        has_own_train(module) and any(tracks(part) for part in module.modules())
        for module in model.modules()
    ):
        return []
    with ExitStack() as undo:
        keep_buffers(model, undo)
        _keep_weights(model, undo)
        _keep_modes(model, undo)
        try:
            model.train()
        except Exception as error:  # noqa: BLE001 - the user's own
            log.warning(
                "which norm layers the model keeps in eval mode is unknown: its train() raised %s: "
                "%s",
                type(error).__name__,
                error,
            )
            return []
        return [
            KeptLayer(name, IN_EVAL_MODE, is_intended=True)
            for name, layer in layers.items()
            if not layer.training
        ]


def _keep_modes(model: torch.nn.Module, undo: ExitStack) -> None:
    for module in model.modules():
        if hasattr(module, "training"):  # frozen TorchScript has no mode
            undo.callback(setattr, module, "training", module.training)


def _keep_weights(model: torch.nn.Module, undo: ExitStack) -> None:
    """Have the parameters put back, and whether they require gradients."""
    for parameter in model.parameters():
        if not is_lazy(parameter):
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            undo.callback(_write_back, parameter.data, parameter.data, parameter.detach().clone())


def keep_buffers(model: torch.nn.Module, undo: ExitStack) -> None:
    """Have all buffers put back, and the numbers that models keep beside them.

    Counters, caches, statistics; a number may say how long a cache is.
    """
    for module in model.modules():
        numbers = {key: value for key, value in vars(module).items() if type(value) in _SCALARS}
        undo.callback(vars(module).update, numbers)
        for buffer in module.buffers(recurse=False):
            if not is_lazy(buffer) and buffer.layout == torch.strided:
                undo.callback(_write_back, buffer, buffer.data, buffer.clone())
        if isinstance(module, torch.jit.ScriptModule):
            continue
        passing = set(module._non_persistent_buffers_set)  # noqa: SLF001
        undo.callback(_put_back, module, dict(module._buffers), passing)  # noqa: SLF001


def _put_back(
    module: torch.nn.Module, buffers: dict[str, torch.Tensor | None], passing: set[str]
) -> None:
    """Have a module hold the buffers that it held, and no others."""
    for held, before in (
        (module._buffers, buffers),  # noqa: SLF001
        (module._non_persistent_buffers_set, passing),  # noqa: SLF001
    ):
        held.clear()
        held.update(before)  # type: ignore[arg-type]


def _write_back(buffer: torch.Tensor, data: torch.Tensor, values: torch.Tensor) -> None:
    if buffer.shape != values.shape or buffer.data_ptr() != data.data_ptr():
        buffer.data = data if data.shape == values.shape else values
    # Its version does not tell: torch's kernels write into running statistics without a word.
    if not torch.equal(buffer, values):
        buffer.copy_(values)


def _not_compiled() -> AbstractContextManager[object]:
    """Have models of `torch.compile` run as they are: compiled code may know nothing of hooks."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _not_synchronised() -> Iterator[None]:
    """Have SyncBatchNorm, and what is derived from it, work with its own process's batch.

    With a process group it would sum over the processes, and refuse tensors on the CPU.
    """
    forward = torch.nn.SyncBatchNorm.forward
    torch.nn.SyncBatchNorm.forward = _BatchNorm.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign]


def _set_mode(
    model: torch.nn.Module,
    layers: Mapping[str, NormLayer],
    kept: Sequence[KeptLayer],
    train_mode: TrainMode,
    undo: ExitStack,
) -> None:
    """Set the flags of all modules. Norm layers that keep their statistics are to work with them.

    `full` asks the model itself, whose `train` may know better, as `update_bn` does. To rest, only
    the flags are needed: an `eval` of the user's may do more, such as to merge weights.
    """
    _keep_modes(model, undo)
    if train_mode == "full":
        if any(map(has_own_train, model.modules())):
            _keep_weights(model, undo)
        start_training(model)
    else:
        for module in model.modules():
            if hasattr(module, "training"):
                module.training = is_aggregating(module)
    for name, layer in norm_layers(model).items():
        layer.training = name in layers
    for each in kept:
        with suppress(AttributeError, RuntimeError):  # frozen TorchScript has no mode
            model.get_submodule(each.name).training = False
