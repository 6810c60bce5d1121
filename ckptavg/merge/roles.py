"""What becomes of each tensor: floats are averaged, integers must agree, codes are refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from ckptavg.errors import FormatError, MismatchError, printable
from ckptavg.formats.names import is_extra_state, is_lora_factor, is_norm_statistic
from ckptavg.select.copies import differing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import Tensor
    from ckptavg.merge.options import MergeOptions

Role = Literal["averaged", "last", "kept", "joined"]
"""What becomes of a tensor: its mean; the last checkpoint's; what all checkpoints have; or, for the
factors of LoRA adapters, those of all checkpoints side by side."""

_WIDEST_CODE = 8  # bits
_QUANTISED = re.compile(
    r"(.*\.)?(qweight|qzeros|weight_packed|W_q|SCB|absmax|nested_absmax|quant_map|quant_state\..*"
    r"|scaled_fp8)"
)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse codes with scales beside them: a mean of codes under unlike scales means nothing.

    Raises:
        FormatError: a tensor is quantised.
    """
    # The layers that have a scale or a zero point: its name begins with theirs.
    scaled = {
        layer
        for layer, _, last in (name.rpartition(".") for name in checkpoint.tensors)
        if "scale" in last or "zero" in last
    }
    for name, tensor in checkpoint.tensors.items():
        is_scaled = name in scaled or name.rpartition(".")[0] in scaled
        if (
            tensor.dtype.kind == "packed"
            or _QUANTISED.fullmatch(name)
            or (is_scaled and tensor.count > 1 and _may_be_codes(name, tensor))
        ):
            raise FormatError(
                "is quantised: codes and scales do not average apart",
                path=checkpoint.path,
                tensor=name,
                remedy="average the checkpoints before they are quantised",
            )


def _may_be_codes(name: str, tensor: Tensor) -> bool:
    if tensor.dtype.bits > _WIDEST_CODE:
        return False
    return tensor.dtype.averaged or name.rpartition(".")[2].startswith(("weight", "w", "W", "q"))


def decide_roles(members: Sequence[Checkpoint], options: MergeOptions) -> dict[str, Role]:
    """The role of each tensor, by name.

    Args:
        members: checkpoints of one model, in order.
        options: what becomes of integers, norm statistics and LoRA factors.

    Raises:
        MismatchError: an integer tensor of several elements differs between checkpoints.
    """
    first, *others = members
    roles: dict[str, Role] = {}
    for name, tensor in first.tensors.items():
        if is_extra_state(name) or (options.norm_stats == "last" and is_norm_statistic(name)):
            roles[name] = "last"
        elif options.lora == "exact" and is_lora_factor(name):
            roles[name] = "joined"
        else:
            roles[name] = "averaged" if tensor.dtype.averaged else "kept"
    integers = [name for name, role in roles.items() if role == "kept"]
    problems: dict[str, str] = {}
    for other in others:
        for name in differing(integers, first, other):
            roles[name] = "last"
            tensor = first.tensors[name]
            if tensor.count > 1 and options.ints != "last":
                problems.setdefault(
                    name,
                    f"{printable(name)}: {tensor.dtype.name} {tensor.shape} differs between "
                    f"{printable(first.path)} and {printable(other.path)}",
                )
    if problems:
        raise MismatchError(
            "integer tensors differ, and integers are not averaged "
            "(--ints last takes them from the last checkpoint):",
            list(problems.values()),
        )
    return roles
