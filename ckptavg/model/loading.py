"""Put a checkpoint's weights into a model whose names may differ by a prefix."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from ckptavg.errors import FormatError, MismatchError, RefreshError, printable
from ckptavg.model.factories import user_code

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import AnyArray

log = logging.getLogger("ckptavg")


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Load every tensor that the model wants.

    Args:
        model: gets the weights.
        checkpoint: has them, perhaps with a prefix on all names that the model lacks, or without
            one that it has.

    Returns:
        The model's names to the checkpoint's.

    Raises:
        MismatchError: names or shapes differ.
    """
    with user_code("the model's state_dict"):
        own = model.state_dict(keep_vars=True)
    wanted = {name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
    names, prefix = match_names(wanted.keys(), checkpoint.tensors.keys())
    problems = [*_missing(wanted, names, checkpoint), *_unexpected(names, prefix, checkpoint)]
    unlike = _shapes(wanted, names, checkpoint)
    if problems or (unlike and not _may_adapt(model)):
        problems += unlike
        raise MismatchError(
            f"{printable(checkpoint.path)} does not fit the model, {len(problems)} differences:",
            problems,
        )
    state = {name: as_torch(checkpoint, own) for name, own in names.items()}
    with user_code("load_state_dict"):
        model.load_state_dict(state, strict=False)
    _check_arrival(model, state)
    return names


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


def _check_arrival(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Check that at least one tensor was loaded.

    Raises:
        RefreshError: not one of the tensors is in the model.
    """
    held = model.state_dict()
    arrived = (
        torch.equal(held[name].cpu(), value.to(held[name].dtype))
        for name, value in state.items()
        if name in held and value.numel()
    )
    if state and not any(arrived):
        raise RefreshError("the model's load_state_dict has loaded none of the weights")


def match_names(wanted: AbstractSet[str], given: AbstractSet[str]) -> tuple[dict[str, str], str]:
    """The model's names to the checkpoint's, which may differ by the prefix on all of them.

    Args:
        wanted: names in the model.
        given: names in the checkpoint.

    Returns:
        The names, and the prefix that the matched ones have in the checkpoint alone.

    Raises:
        MismatchError: the checkpoint holds the model several times, under unlike prefixes.
    """
    best: dict[str, str] = {}
    chosen = "", ""
    for own in _own_prefixes(wanted, given):
        short = {name.removeprefix(own): name for name in wanted if name.startswith(own)}
        prefixes = ["", *_fullest_prefixes(short.keys(), given)]
        for prefix in prefixes:
            found = {name: prefix + end for end, name in short.items() if prefix + end in given}
            if len(found) > len(best):
                best, chosen = found, (own, prefix)
                rivals = prefixes[1:] if prefix and len(found) == len(short) else []
    if best and len(rivals) > 1:
        raise MismatchError(
            "the checkpoint holds the model more than once, and which is meant is unclear; "
            "let --model be what holds them all. It is there under the prefixes:",
            [printable(prefix) for prefix in rivals],
        )
    own, prefix = chosen
    if own or prefix:
        log.info(
            "matched the model's names, %s, to the checkpoint's, %s",
            f"with the prefix {printable(own)!r}" if own else "without a prefix",
            f"with the prefix {printable(prefix)!r}" if prefix else "without a prefix",
        )
    return best, prefix


def _own_prefixes(wanted: AbstractSet[str], given: AbstractSet[str]) -> list[str]:
    """Prefixes of the model's names that the checkpoint may lack, the shortest first."""
    first, last = min(wanted, default=""), max(wanted, default="")
    ends = (position + 1 for position, character in enumerate(first) if character == ".")
    shared = [first[:end] for end in ends if last.startswith(first[:end])]
    return ["", *shared, *_fullest_prefixes(given, wanted)[:1]]


def _fullest_prefixes(short: AbstractSet[str], long: Iterable[str]) -> list[str]:
    """The prefixes that, put before the short names, give the most of the long ones."""
    found: Counter[str] = Counter()
    for name in long:
        for position, character in enumerate(name):
            if character == "." and name[position + 1 :] in short:
                found[name[: position + 1]] += 1
    most = max(found.values(), default=0)
    return sorted((prefix for prefix in found if found[prefix] == most), key=len)


def _missing(
    wanted: Mapping[str, torch.Tensor], names: Mapping[str, str], checkpoint: Checkpoint
) -> list[str]:
    """What the model wants and the checkpoint lacks, but for what load_state_dict can do without.

    A tied tensor comes under its other name; counters of batches are younger than BatchNorm.
    """
    loaded = {_place(value) for name, value in wanted.items() if name in names}
    where = printable(checkpoint.path)
    return [
        f"{printable(name)}: in the model, missing in {where}"
        for name, value in wanted.items()
        if name not in names
        and not name.endswith("num_batches_tracked")
        and _place(value) not in loaded
    ]


def _place(value: torch.Tensor) -> object:
    """What tied tensors have in common; unlike for each that has no elements."""
    if is_lazy(value) or not value.numel():
        return id(value)
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _unexpected(names: Mapping[str, str], prefix: str, checkpoint: Checkpoint) -> list[str]:
    """What the checkpoint has and the model lacks.

    Behind a prefix only what bears it is the model's; a Lightning module may hold more beside it.
    """
    used = set(names.values())
    beside = sum(not name.startswith(prefix) for name in checkpoint.tensors)
    if beside:
        log.info("left alone %d tensors without the prefix %r", beside, printable(prefix))
    where = printable(checkpoint.path)
    return [
        f"{printable(name)}: in {where}, missing in the model"
        for name in checkpoint.tensors
        if name not in used and name.startswith(prefix)
    ]


def _shapes(
    wanted: Mapping[str, torch.Tensor], names: Mapping[str, str], checkpoint: Checkpoint
) -> list[str]:
    return [
        f"{printable(name)}: shape {tuple(wanted[name].shape)} in the model, "
        f"{checkpoint.tensors[own].shape} in {printable(checkpoint.path)}"
        for name, own in names.items()
        if not is_lazy(wanted[name]) and tuple(wanted[name].shape) != checkpoint.tensors[own].shape
    ]


def as_torch(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the checkpoint as torch has it.

    Raises:
        FormatError: its dtype is not one that torch computes with.
    """
    tensor = checkpoint.tensors[name]
    dtype = getattr(torch, tensor.dtype.name, None)
    if dtype is None or tensor.dtype.kind == "packed":
        raise FormatError(f"torch has no {tensor.dtype.name}", path=checkpoint.path, tensor=name)
    if not tensor.count:
        return torch.empty(tensor.shape, dtype=dtype)
    flat: AnyArray = checkpoint.read(name).reshape(-1).view(np.uint8)
    return torch.from_numpy(np.require(flat, requirements="W")).view(dtype).reshape(tensor.shape)
