"""The role of each tensor in an average, and what cannot be averaged."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Literal

from ckptavg.errors import FormatError, MismatchError, printable
from ckptavg.formats.checkpoint import differing_tensors
from ckptavg.formats.lora_names import lora_modules
from ckptavg.formats.tensors import (
    is_extra_state,
    is_norm_state,
    is_norm_statistic,
    norm_layers,
    power_iteration_vectors,
)
from ckptavg.merge.patterns import matching

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import Tensor
    from ckptavg.merge.recipe import AverageOptions

log = logging.getLogger("ckptavg")

Role = Literal["averaged", "last", "kept", "joined"]
"""What an output has for a tensor: the `averaged` one, the `last` checkpoint's, the one that all
checkpoints have (`kept`), or the factors of all LoRA adapters side by side (`joined`)."""

_WIDEST_CODE = 8  # bits
# Beside a scale. `_data` is quanto's, `_blocks` that of MX, `_weight_qdata` torchao's.
_CODES = re.compile(r"(.*\.)?(w|W|q|_?weight|_data|[^.]*_blocks)[^.]*")
_CODES_OF_ANY_WIDTH = re.compile(r"(.*\.)?(q_weight|codes)")  # EXL2 and AQLM
_QUANTISED = re.compile(
    r"(.*\.)?(qweight|qzeros|weight_packed|W_q|SCB|absmax|nested_absmax|quant_map|quant_state\..*"
    r"|scaled_fp8|trellis|Qidxs)"  # the last two are those of EXL3 and QuIP#
)


def decide_roles(
    members: Sequence[Checkpoint], options: AverageOptions, *, is_mean: bool
) -> dict[str, Role]:
    """The role of each tensor, by name.

    Integers and norm statistics that are equal in all members are kept. Other integers, and the
    vectors of spectral norm's power iteration, which would shrink in a mean, are the last member's,
    and so is what `take_last` names.

    Args:
        members: checkpoints of one model, in order.
        options: how integers, norm statistics and LoRA factors are treated.
        is_mean: whether the weights sum to 1 in all outputs.

    Raises:
        MismatchError: an integer tensor of several elements differs between checkpoints.
    """
    first, *others = members
    vectors = power_iteration_vectors(first.tensors)
    if vectors and others:
        log.info("%d vectors of spectral norm are the last checkpoint's", len(vectors))
    names = members[-1].tensors.keys()
    opaque = matching("take_last", options.take_last, names) | vectors
    opaque |= {name for name in names if is_extra_state(name)}
    modules = lora_modules(names) if options.lora == "exact" else {}
    joined = {tensor.name for tensors in modules.values() for tensor in tensors}
    comparable = {
        name
        for name, tensor in first.tensors.items()
        if name not in opaque | joined
        and (not tensor.dtype.averaged or (is_norm_statistic(name) and others and is_mean))
    }
    differing = _differing(comparable, first, others)
    comparable -= _initial_statistics(first, comparable - differing.keys())
    if options.ints != "last":
        _refuse_differing_integers(first, differing)
    roles: dict[str, Role] = {}
    for name, tensor in members[-1].tensors.items():
        if name in opaque:
            roles[name] = "last"
        elif name in joined:
            roles[name] = "joined"
        elif name in comparable and name not in differing:
            roles[name] = "kept"
        elif options.norm_stats == "last" and is_norm_statistic(name):
            roles[name] = "last"
        else:
            roles[name] = "averaged" if tensor.dtype.averaged else "last"
    return roles


def _differing(
    names: AbstractSet[str], first: Checkpoint, others: Sequence[Checkpoint]
) -> dict[str, Checkpoint]:
    """Names of tensors that differ, with the first of the checkpoints that has another value."""
    differing: dict[str, Checkpoint] = {}
    for other in others:
        same = [name for name in first.tensors if name in names and name not in differing]
        differing |= dict.fromkeys(differing_tensors(same, first, other), other)
    return differing


def _initial_statistics(checkpoint: Checkpoint, names: AbstractSet[str]) -> set[str]:
    """The norm statistics of layers that no data have passed through: means of 0, variances of 1.

    They are not frozen, but were reset, or never computed.
    """
    initial: set[str] = set()
    for layer in norm_layers(names):
        prefix = f"{layer}." if layer else ""
        pair = {f"{prefix}running_mean", f"{prefix}running_var"}
        if pair <= names and not checkpoint.read(f"{prefix}running_mean").any():
            variance = checkpoint.read(f"{prefix}running_var")
            initial |= pair if (variance == 1).all() else set()
    return initial


def _refuse_differing_integers(first: Checkpoint, differing: Mapping[str, Checkpoint]) -> None:
    """Refuse integer tensors that differ from the first checkpoint's, save for counters.

    Raises:
        MismatchError: there are such tensors.
    """
    problems = [
        f"{printable(name)}: {tensor.dtype.name} {tensor.shape} differs between "
        f"{printable(first.path)} and {printable(other.path)}"
        for name, other in differing.items()
        if not (tensor := first.tensors[name]).dtype.averaged and tensor.count > 1
    ]
    if problems:
        raise MismatchError(
            "integer tensors differ, and integers are not averaged "
            "(`ints=last` copies them from the last checkpoint):",
            problems,
        )


def frozen_layers(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The norm layers that have the same statistics and counters in all checkpoints, sorted.

    Of a single checkpoint that is unknown: there are none.
    """
    first, *others = checkpoints
    names = {
        name
        for name in first.tensors
        if is_norm_state(name) and all(name in other.tensors for other in others)
    }
    if not others or not names:
        return []
    differing = _differing(names, first, others)
    moving = differing.keys() | _initial_statistics(first, names - differing.keys())
    return layers_but_moving(names, moving)


def layers_but_moving(names: Iterable[str], moving: Iterable[str]) -> list[str]:
    """The norm layers that have neither a statistic nor a counter among those that move, sorted.

    Args:
        names: of tensors.
        moving: names of those that are not the same in all checkpoints.
    """
    in_motion = {name.rpartition(".")[0] for name in moving if is_norm_state(name)}
    return sorted(norm_layers(names) - in_motion)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse quantised weights: a mean of codes means nothing if their scales differ.

    Raises:
        FormatError: a tensor is quantised.
    """
    scaled = set()  # layers (or tensors) with a scale or a zero point: `fc`, `fc.weight`
    for name in checkpoint.tensors:
        layer, _, last = name.rpartition(".")
        if "scale" in last or "zero" in last:
            scaled.add(layer)
    for name, tensor in checkpoint.tensors.items():
        is_scaled = name in scaled or name.rpartition(".")[0] in scaled
        if _QUANTISED.fullmatch(name) or (
            is_scaled and tensor.count > 1 and _may_be_codes(name, tensor)
        ):
            raise FormatError(
                "is quantised: codes and scales cannot be averaged separately",
                path=checkpoint.path,
                tensor=name,
                remedy="average the checkpoints before they are quantised",
            )


def _may_be_codes(name: str, tensor: Tensor) -> bool:
    if tensor.dtype.averaged:
        return tensor.dtype.bits <= _WIDEST_CODE
    is_narrow = tensor.dtype.bits <= _WIDEST_CODE and _CODES.fullmatch(name)
    return bool(is_narrow or _CODES_OF_ANY_WIDTH.fullmatch(name))
