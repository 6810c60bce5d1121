"""Put a checkpoint's weights into a model, and find out which tensor came from which."""

from __future__ import annotations

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
from ckptavg.merge.patterns import is_found, matching, pattern_of
from ckptavg.model.factories import user_code
from ckptavg.model.names import match_names

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import AnyArray

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Loaded:
    """Which tensors of a model came from which of a checkpoint.

    Attributes:
        names: the checkpoint's names of the model's parameters and buffers, by the names that
            `named_parameters` and `named_buffers` give them. Tied tensors have several.
        lost: norm statistics of the checkpoint that the model has taken, and that are nowhere in
            it as they were.
    """

    names: Mapping[str, tuple[str, ...]]
    lost: tuple[str, ...]

    def of(self, layer: str, buffer: str) -> tuple[str, ...]:
        """The checkpoint's names of a layer's buffer; empty if it is not from there."""
        return self.names.get(f"{layer}.{buffer}" if layer else buffer, ())


def load_weights(
    model: torch.nn.Module, checkpoint: Checkpoint, ignore: Sequence[str] = ()
) -> Loaded:
    """Load every tensor that the model wants.

    A model with a `load_state_dict` of its own decides itself what fits, and so do modules that
    change names or shapes as they load. What is copied to where is followed.

    Args:
        model: gets the weights.
        checkpoint: has them, perhaps with a prefix on all names that the model lacks, or without
            one that it has. Parts of names that wrappers add may differ, too.
        ignore: regular expressions; tensors with one of them in their names are left alone, in the
            checkpoint and in the model.

    Raises:
        MismatchError: names or shapes differ.
    """
    wanted = _state_dict(model, ignore)
    given = {name: None for name in checkpoint.tensors if not is_found(ignore, name)}
    names = match_names(wanted.keys(), given.keys())
    unlike = {} if _may_adapt(model) else _unlike_shapes(wanted, names, checkpoint)
    state = {own: as_torch(checkpoint, name) for own, name in names.items() if own not in unlike}
    copies = _Copies({names[own]: value for own, value in state.items()})
    with copies, user_code("load_state_dict"):
        answer = model.load_state_dict(dict(state), strict=False)
    arrived = copies.arrived(unwrapped(model))
    known = {name for each in arrived.values() for name in each}
    # A model that does not answer is judged by what has arrived.
    lacking = getattr(answer, "unexpected_keys", [own for own in state if names[own] not in known])
    held = _state_dict(model, ignore)
    absent = getattr(answer, "missing_keys", held)
    missing = [name for name in absent if name in held and name not in names]
    missing = _needed(missing, held, copies, names.values())
    if missing or lacking or unlike:
        if not _accepts(model, state):
            raise _mismatch(checkpoint, names, missing, lacking, unlike)
        differing = listed([*missing, *lacking])
        log.info("the model's load_state_dict takes a checkpoint that differs in %s", differing)
    if state and not arrived:
        raise RefreshError("the model's load_state_dict has loaded none of the weights")
    lost = (name for name in names.values() if is_norm_statistic(name) and name not in known)
    return Loaded(arrived, tuple(lost))


def _mismatch(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    missing: Sequence[str],
    lacking: Sequence[str],
    unlike: Mapping[str, str],
) -> MismatchError:
    """The error for a checkpoint that does not fit.

    Args:
        checkpoint: the checkpoint.
        names: the names under which the model was given its tensors, and their own.
        missing: names of what the model has not got.
        lacking: names of what it was given and has no place for.
        unlike: a line for each tensor of another shape, by its name in the model.
    """
    where = printable(checkpoint.path)
    lines = [f"{printable(name)}: in the model, missing in {where}" for name in missing]
    unexpected = [names.get(own, own) for own in lacking]
    lines += [f"{printable(name)}: in {where}, missing in the model" for name in unexpected]
    lines += unlike.values()
    fitting = {own: name for own, name in names.items() if own not in lacking}
    hint = ""
    if fitting and not unlike:
        others = [*fitting, *fitting.values()]
        pattern = pattern_of([*missing, *unexpected], others) or "REGEX"
        hint = f" (`ignore` {pattern} leaves these tensors alone)"
    return MismatchError(f"{where} does not fit the model, {len(lines)} differences{hint}:", lines)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model without `DataParallel` and `DistributedDataParallel`.

    Those copy modules to other devices, and send buffers to other processes in each forward pass.
    """
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def check_ignore(
    ignore: Iterable[str], model: torch.nn.Module, checkpoints: Iterable[Checkpoint]
) -> None:
    """Refuse expressions of `ignore` that are found in no name of the model and the checkpoints.

    Raises:
        SelectionError: there is one, or it is no regular expression.
    """
    if ignore:
        names = [name for checkpoint in checkpoints for name in checkpoint.tensors]
        matching("ignore", ignore, {*names, *_state_dict(model, ())})


def _state_dict(model: torch.nn.Module, ignore: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of the model's state dict, the very ones that it has."""
    with user_code("the model's state_dict"):
        state = model.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not is_found(ignore, name)
    }


class _Copies(TorchFunctionMode):
    """Follows the tensors of a state dict to where a `load_state_dict` puts them.

    Args:
        tensors: the tensors by their names in the checkpoint.

    Attributes:
        names: the names of the tensors whose values are at a place in memory.
    """

    # They change values by rounding alone.
    _KEEPING = frozenset(
        getattr(torch.Tensor, name)
        for name in ("clone", "contiguous", "cpu", "double", "float", "to", "type")
    )

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {_place(value): [name] for name, value in tensors.items()}
        self._alive: list[object] = [tensors]  # so that no other tensor gets its place

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call the function, and note a copy."""
        result = func(*args, **(kwargs or {}))
        source = (
            args[1] if func is torch.Tensor.copy_ else args[0] if func in self._KEEPING else None
        )
        if isinstance(source, torch.Tensor) and _place(source) in self.names:
            known = self.names.setdefault(_place(result), [])
            known += [name for name in self.names[_place(source)] if name not in known]
            self._alive.append(result)
        return result

    def arrived(self, model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
        """The names of what has come to a model's parameters and buffers, by their own names."""
        held = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        return {
            own: tuple(self.names[_place(tensor)])
            for own, tensor in held
            if _place(tensor) in self.names
        }


def _place(value: torch.Tensor) -> object:
    """What tied tensors have in common; unlike for each that has no elements."""
    if is_lazy(value) or not value.numel():
        return id(value)
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _needed(
    missing: Sequence[str],
    held: Mapping[str, torch.Tensor],
    copies: _Copies,
    given: Collection[str],
) -> list[str]:
    """Of the names of what a model has not got, those that it cannot do without.

    A tied tensor comes under its other name; counters of batches are younger than BatchNorm. An
    adapter may come alone: the rest is what the model was made with.
    """
    missing = [
        name
        for name in missing
        if not name.endswith("num_batches_tracked") and _place(held[name]) not in copies.names
    ]
    if missing and _are_of_adapter_alone(given) and not has_lora(missing):
        log.info(
            "the checkpoint holds an adapter: %d other tensors are what the model was made with",
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
    """Whether a `load_state_dict` of the model's own takes what it is given, however strict."""
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
    """Whether a part of the model loads tensors in a way of its own, and so may change shapes.

    Observers of quantisation-aware training resize their buffers. If a module does not,
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
    wanted: Mapping[str, torch.Tensor], names: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, str]:
    """A line for each tensor of another shape, by its name in the model."""
    unlike = {}
    for own, value in wanted.items():
        if own not in names or is_lazy(value):
            continue
        shape = checkpoint.tensors[names[own]].shape
        if tuple(value.shape) != shape:
            unlike[own] = (
                f"{printable(own)}: shape {tuple(value.shape)} in the model, "
                f"{shape} in {printable(checkpoint.path)}"
            )
    return unlike


def as_torch(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the checkpoint as torch has it.

    Raises:
        FormatError: its dtype is not one that torch computes with.
    """
    tensor = checkpoint.tensors[name]
    dtype = getattr(torch, tensor.dtype.name, None)
    if dtype is None:
        raise FormatError(f"torch has no {tensor.dtype.name}", path=checkpoint.path, tensor=name)
    if not tensor.count:
        return torch.empty(tensor.shape, dtype=dtype)
    flat: AnyArray = checkpoint.read(name).reshape(-1).view(np.uint8)
    return torch.from_numpy(np.require(flat, requirements="W")).view(dtype).reshape(tensor.shape)
