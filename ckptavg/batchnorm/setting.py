"""The model's modes and buffers for a pass, and how they are put back."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
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
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

log = logging.getLogger("ckptavg")

TrainMode = Literal["norm", "full"]
_SCALARS = {bool, int, float, str, type(None)}


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
        keep_buffers(model.modules(), undo)
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
        keep_buffers(model.modules(), undo)
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
            undo.callback(_set_training, module, module.training)


def _set_training(module: torch.nn.Module, mode: bool) -> None:  # noqa: FBT001
    """Set a module's flag: torch takes 10 us to set one, and less than 1 to read it."""
    if module.training != mode:
        module.training = mode


def _keep_weights(model: torch.nn.Module, undo: ExitStack) -> None:
    """Have the parameters put back, and whether they require gradients."""
    for parameter in model.parameters():
        if not is_lazy(parameter):
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            undo.callback(_write_back, parameter.data, parameter.data, parameter.detach().clone())


def keep_buffers(modules: Iterable[torch.nn.Module], undo: ExitStack) -> None:
    """Have all buffers put back, and the numbers that models keep beside them.

    Counters, caches, statistics; a number may say how long a cache is.
    """
    for module in modules:
        undo.callback(_Held.by(module).put_back)


@dataclass(frozen=True)
class _Held:
    """What a module holds beside its parameters.

    Attributes:
        module: the module.
        numbers: its plain attributes.
        values: each of its buffers, with the memory that it had and a copy of the values.
        buffers: its buffers by name; None in TorchScript, which gives none away.
        passing: the names of those that are not saved.
    """

    module: torch.nn.Module
    numbers: dict[str, object]
    values: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    buffers: dict[str, torch.Tensor | None] | None
    passing: set[str]

    @classmethod
    def by(cls, module: torch.nn.Module) -> _Held:
        """What it holds now."""
        values = [
            (buffer, buffer.data, buffer.clone())
            for buffer in module.buffers(recurse=False)
            if not is_lazy(buffer) and buffer.layout == torch.strided
        ]
        numbers = {key: value for key, value in vars(module).items() if type(value) in _SCALARS}
        if isinstance(module, torch.jit.ScriptModule):
            return cls(module, numbers, values, None, set())
        passing = set(module._non_persistent_buffers_set)  # noqa: SLF001
        return cls(module, numbers, values, dict(module._buffers), passing)  # noqa: SLF001

    def put_back(self) -> None:
        """Have the module hold this, and no other buffers."""
        if self.buffers is not None:
            for held, before in (
                (self.module._buffers, self.buffers),  # noqa: SLF001
                (self.module._non_persistent_buffers_set, self.passing),  # noqa: SLF001
            ):
                held.clear()
                held.update(before)  # type: ignore[arg-type]
        for buffer, data, values in self.values:
            _write_back(buffer, data, values)
        vars(self.module).update(self.numbers)


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
            if hasattr(module, "training"):  # frozen TorchScript has no mode
                _set_training(module, is_aggregating(module))
    for name, layer in norm_layers(model).items():
        _set_training(layer, name in layers)
    for each in kept:
        with suppress(AttributeError, RuntimeError):  # frozen TorchScript has no mode
            model.get_submodule(each.name).training = False
