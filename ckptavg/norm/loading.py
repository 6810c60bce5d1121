"""Put a checkpoint's weights into a model whose names may differ by a prefix."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Set

import numpy as np
import torch

from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import FormatError, MismatchError, printable
from ckptavg.factories import user_code
from ckptavg.tensors import AnyArray

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
    wanted = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    names = match_names(wanted.keys(), checkpoint.tensors.keys())
    problems = [*_missing(wanted, names, checkpoint), *_unexpected(names, checkpoint)]
    problems += _shapes(wanted, names, checkpoint)
    if problems:
        raise MismatchError(
            f"{printable(checkpoint.path)} does not fit the model, {len(problems)} differences:",
            problems,
        )
    state = {name: as_torch(checkpoint, own) for name, own in names.items()}
    with user_code("load_state_dict"):
        model.load_state_dict(state, strict=False)
    return names


def match_names(wanted: Set[str], given: Set[str]) -> dict[str, str]:
    """The model's names to the checkpoint's, which may differ by one prefix on all of them.

    Args:
        wanted: names in the model.
        given: names in the checkpoint.
    """
    matches = {name: name for name in wanted & given}
    longer = _common_prefix(wanted, given)
    with_prefix = {name: longer + name for name in wanted if longer + name in given}
    if len(with_prefix) > len(matches):
        log.info("the checkpoint's names have the prefix %r, the model's do not: matched", longer)
        return with_prefix
    shorter = _common_prefix(given, wanted)
    without_prefix = {shorter + name: name for name in given if shorter + name in wanted}
    if len(without_prefix) > len(matches):
        log.info("the model's names have the prefix %r, the checkpoint's do not: matched", shorter)
        return without_prefix
    return matches


def _common_prefix(short: Iterable[str], long: Iterable[str]) -> str:
    """The prefix that, put before the short names, gives the most of the long ones."""
    ends = set(short)
    found: Counter[str] = Counter()
    for name in long:
        for position, character in enumerate(name):
            if character == "." and name[position + 1 :] in ends:
                found[name[: position + 1]] += 1
    return max(found, key=lambda prefix: (found[prefix], -len(prefix))) if found else ""


def _missing(
    wanted: Mapping[str, torch.Tensor], names: Mapping[str, str], checkpoint: Checkpoint
) -> list[str]:
    """What the model wants and the checkpoint lacks, but for what load_state_dict can do without.

    A tied tensor comes under its other name; counters of batches are younger than BatchNorm.
    """
    loaded = {
        value.data_ptr() for name, value in wanted.items() if name in names and _has_data(value)
    }
    where = printable(checkpoint.path)
    return [
        f"{printable(name)}: in the model, missing in {where}"
        for name, value in wanted.items()
        if name not in names
        and not name.endswith("num_batches_tracked")
        and not (_has_data(value) and value.data_ptr() in loaded)
    ]


def _has_data(value: torch.Tensor) -> bool:
    return not torch.nn.parameter.is_lazy(value) and value.numel() > 0  # type: ignore[no-untyped-call]


def _unexpected(names: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    """What the checkpoint has and the model lacks.

    Behind a prefix only what bears it is the model's; a Lightning module may hold more beside it.
    """
    used = set(names.values())
    prefix = next((own.removesuffix(name) for name, own in names.items() if own != name), "")
    beside = [name for name in checkpoint.tensors if not name.startswith(prefix)]
    if beside:
        log.info("%d tensors stand outside of the model's prefix %r", len(beside), prefix)
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
        if not torch.nn.parameter.is_lazy(wanted[name])  # type: ignore[no-untyped-call]
        and tuple(wanted[name].shape) != checkpoint.tensors[own].shape
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
