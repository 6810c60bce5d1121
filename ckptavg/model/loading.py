"""Load a checkpoint into a model, and follow which tensor of it goes to which of the model."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ckptavg.errors import FormatError, MismatchError, RefreshError, listed, printable
from ckptavg.formats.lora_names import has_lora, lora_modules
from ckptavg.formats.tensors import is_norm_statistic
from ckptavg.merge.patterns import any_matches, matching, pattern_of
from ckptavg.model.factories import user_code
from ckptavg.model.names import match_names

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import AnyArray

log = logging.getLogger("ckptavg")

_MOST_LINES = 16  # of tensors that differ from the model's; more are grouped


@dataclass(frozen=True)
class Loaded:
    """Which tensors of a model come from which tensors of a checkpoint.

    Attributes:
        names: for each parameter and buffer, by its name in `named_parameters` and `named_buffers`,
            the names of its tensor in the checkpoint. Tied tensors have several.
        lost: names of norm statistics in the checkpoint that the model changed as it loaded them.
    """

    names: Mapping[str, tuple[str, ...]]
    lost: tuple[str, ...]

    def of(self, layer: str, buffer: str) -> tuple[str, ...]:
        """The checkpoint's names of a layer's buffer; empty if the checkpoint does not have it."""
        return self.names.get(f"{layer}.{buffer}" if layer else buffer, ())


def load_weights(
    model: torch.nn.Module, checkpoint: Checkpoint, ignore: Sequence[str] = ()
) -> Loaded:
    """Load a checkpoint into a model.

    A class with its own `load_state_dict` decides which tensors fit, and so do modules that change
    names or shapes as they load.

    Args:
        model: the model.
        checkpoint: its names may differ from the model's by a prefix on all of them, and by the
            parts that wrappers add.
        ignore: regular expressions; tensors whose names match one of them are not loaded.

    Raises:
        MismatchError: names or shapes differ.
        RefreshError: nothing is loaded.
    """
    before = _state_dict(model, ignore)
    loadable = {name: None for name in checkpoint.tensors if not any_matches(ignore, name)}
    if not loadable:
        raise RefreshError("`ignore` leaves no tensor to load", path=checkpoint.path)
    names = match_names(before.keys(), loadable.keys())
    unlike = {} if _may_adapt(model) else _unlike_shapes(before, names, checkpoint)
    state = {
        inner: as_torch(checkpoint, name) for inner, name in names.items() if inner not in unlike
    }
    copies = _Copies({names[inner]: value for inner, value in state.items()})
    with copies, user_code("load_state_dict"):
        answer = _called(model.load_state_dict, dict(state), strict=False)
    arrived = copies.arrived(unwrapped(model))
    known = {name for each in arrived.values() for name in each}
    # A load_state_dict that returns nothing is judged by the tensors that it copied.
    not_copied = [inner for inner in state if names[inner] not in known]
    unexpected = getattr(answer, "unexpected_keys", not_copied)
    after = _state_dict(model, ignore)
    absent = getattr(answer, "missing_keys", after)
    missing = [name for name in absent if name in after and name not in names]
    missing = _needed(missing, after, copies, names.values())
    if missing or unexpected or unlike:
        if not _accepts(model, state):
            raise _mismatch(checkpoint, names, missing, unexpected, unlike)
        differing = listed([*missing, *unexpected])
        log.info("the model's load_state_dict() accepts a checkpoint that differs in %s", differing)
    if state and not arrived:
        raise RefreshError("the model's load_state_dict() copied none of the weights")
    lost = (name for name in names.values() if is_norm_statistic(name) and name not in known)
    return Loaded(arrived, tuple(lost))


def _mismatch(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    missing: Sequence[str],
    unexpected: Sequence[str],
    unlike: Mapping[str, str],
) -> MismatchError:
    """The error about a checkpoint that does not fit the model.

    Args:
        checkpoint: the checkpoint.
        names: the checkpoint's names by the model's, as `match_names` returns them.
        missing: the model's names of tensors that the checkpoint does not have.
        unexpected: names by which the model was given tensors that it does not have.
        unlike: how tensors of another shape differ, by their names in the model.
    """
    where = printable(checkpoint.path)
    unused = [names.get(inner, inner) for inner in unexpected]
    alike = {f"in the model, missing in {where}": missing}
    alike[f"in {where}, missing in the model"] = unused
    for difference in dict.fromkeys(unlike.values()):
        alike[difference] = [name for name, other in unlike.items() if other == difference]
    lines = [f"{printable(name)}: {how}" for how, those in alike.items() for name in those]
    count = len(lines)
    if count > _MOST_LINES:
        lines = [f"{listed(those, 3)}: {how}" for how, those in alike.items() if those]
    fitting = {inner: name for inner, name in names.items() if inner not in unexpected}
    is_bare = not checkpoint.training.hyper_parameters and checkpoint.path.suffix == ".ckpt"
    more = ""
    if is_bare and checkpoint.is_average:
        more = "; `container` last keeps the hyper-parameters of what is averaged"
    hint = f" (`model_arg` can give it other sizes{more})" if unlike else ""
    if fitting and not unlike:
        others = [*fitting, *fitting.values()]
        pattern = pattern_of([*missing, *unused], others) or "REGEX"
        hint = f" (`ignore` {pattern} leaves these tensors alone)"
    return MismatchError(f"{where} does not fit the model: {count} differences{hint}:", lines)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model without `DataParallel` and `DistributedDataParallel`.

    These wrappers copy modules to other devices, or send buffers to other processes.
    """
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def check_ignore(
    ignore: Iterable[str], model: torch.nn.Module, checkpoints: Iterable[Checkpoint]
) -> None:
    """Refuse expressions of `ignore` that match no name in the model or in the checkpoints.

    Raises:
        SelectionError: there is one, or it is no regular expression.
    """
    if ignore:
        names = [name for checkpoint in checkpoints for name in checkpoint.tensors]
        matching("ignore", ignore, {*names, *_state_dict(model, ())})


def _state_dict(model: torch.nn.Module, ignore: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of the model's state dict, in the same memory as its parameters and buffers."""
    with user_code("the model's state_dict"):
        state = _called(model.state_dict, keep_vars=True)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not any_matches(ignore, name)
    }


def _called(method: Callable[..., Any], *args: object, **keywords: object) -> Any:  # noqa: ANN401
    """What a method returns, called with those of the keywords that it accepts.

    A class may define `state_dict(self)` or `load_state_dict(self, state_dict)` without torch's
    other arguments.
    """
    parameters = inspect.signature(method).parameters
    accepts_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    accepted = {
        name: value for name, value in keywords.items() if accepts_any or name in parameters
    }
    return method(*args, **accepted)


class _Copies(TorchFunctionMode):
    """Follows the tensors of a state dict to where a `load_state_dict` puts them.

    Args:
        tensors: the tensors by their names in the checkpoint.

    Attributes:
        names: for each place in memory, the names of the tensors that were copied to it.
    """

    # These functions change values by rounding alone.
    _KEEPING = frozenset(
        getattr(torch.Tensor, name)
        for name in ("clone", "contiguous", "cpu", "double", "float", "to", "type")
    )

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {place_of(value): [name] for name, value in tensors.items()}
        self._alive: list[object] = [tensors]  # so that no other tensor gets the same place

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call the function, and record if it copies one of the tensors."""
        result = func(*args, **(kwargs or {}))
        source = (
            args[1] if func is torch.Tensor.copy_ else args[0] if func in self._KEEPING else None
        )
        if isinstance(source, torch.Tensor) and place_of(source) in self.names:
            known = self.names.setdefault(place_of(result), [])
            known += [name for name in self.names[place_of(source)] if name not in known]
            self._alive.append(result)
        return result

    def arrived(self, model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
        """The checkpoint's names by the model's, for all parameters and buffers that have some."""
        tensors = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        return {
            inner: tuple(self.names[place_of(tensor)])
            for inner, tensor in tensors
            if place_of(tensor) in self.names
        }


def place_of(value: torch.Tensor) -> object:
    """A key that tied tensors share. Each tensor without data has another one."""
    if is_lazy(value) or value.is_meta or not value.numel():
        return id(value)
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _needed(
    missing: Sequence[str],
    tensors: Mapping[str, torch.Tensor],
    copies: _Copies,
    checkpoint_names: Collection[str],
) -> list[str]:
    """The missing names without which the model is not complete.

    A tied tensor may be in the checkpoint under its other name. Old checkpoints lack
    `num_batches_tracked`. The checkpoint of an adapter may lack all of the base model.
    """
    missing = [
        name
        for name in missing
        if not name.endswith("num_batches_tracked") and place_of(tensors[name]) not in copies.names
    ]
    if missing and _are_of_adapter_alone(checkpoint_names) and not has_lora(missing):
        log.info(
            "the checkpoint holds only an adapter: %d other tensors of the model stay as they are",
            len(missing),
        )
        return []
    return missing


def _are_of_adapter_alone(names: Collection[str]) -> bool:
    """Whether there are LoRA factors, and none of the weights that they are added to."""
    modules = lora_modules(names)
    weights = {f"{module}{end}" for module in modules for end in (".weight", ".base_layer.weight")}
    return bool(modules) and not weights.intersection(names)


def _accepts(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model's own `load_state_dict` accepts the tensors, strict by default."""
    if "load_state_dict" not in vars(model) and (
        type(model).load_state_dict is torch.nn.Module.load_state_dict
    ):
        return False
    try:
        model.load_state_dict(dict(state))
    except Exception:  # noqa: BLE001 - the user's own
        return False
    return True


def _may_adapt(model: torch.nn.Module) -> bool:
    """Whether a module of the model overrides how it loads tensors, and so may change shapes.

    Observers of quantisation-aware training resize their buffers. If a module does not resize them,
    `load_state_dict` raises.
    """
    plain = torch.nn.Module
    kinds = {type(module) for module in model.modules()}
    return any(
        kind._load_from_state_dict is not plain._load_from_state_dict  # noqa: SLF001
        or kind.load_state_dict is not plain.load_state_dict
        for kind in kinds
        if not kind.__module__.startswith("torch.nn.modules.")
    )


def _unlike_shapes(
    tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, str]:
    """How tensors of another shape differ, by their names in the model."""
    unlike = {}
    for inner, value in tensors.items():
        if inner not in names or is_lazy(value):
            continue
        shape = checkpoint.tensors[names[inner]].shape
        if tuple(value.shape) != shape:
            unlike[inner] = (
                f"shape {tuple(value.shape)} in the model, {shape} in {printable(checkpoint.path)}"
            )
    return unlike


def as_torch(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the checkpoint as a `torch.Tensor`.

    Raises:
        FormatError: torch does not have its dtype.
    """
    tensor = checkpoint.tensors[name]
    dtype = getattr(torch, tensor.dtype.name, None)
    if dtype is None:
        raise FormatError(f"torch has no {tensor.dtype.name}", path=checkpoint.path, tensor=name)
    if not tensor.count:
        return torch.empty(tensor.shape, dtype=dtype)
    flat: AnyArray = checkpoint.read(name).reshape(-1).view(np.uint8)
    return torch.from_numpy(np.require(flat, requirements="W")).view(dtype).reshape(tensor.shape)
