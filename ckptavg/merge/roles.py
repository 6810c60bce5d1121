"""What becomes of each tensor: floats are averaged, integers must agree, codes are refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from ckptavg.errors import FormatError, MismatchError, printable
from ckptavg.select.compare import differing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.formats.tensors import Tensor
    from ckptavg.select.sources import Collection, Source

Role = Literal["averaged", "last", "kept", "joined"]
"""What becomes of a tensor: its mean, the last checkpoint's, what all of them have, or (factors of
LoRA adapters) all of them side by side."""

_NORM_STATISTICS = ("running_mean", "running_var")
_WIDEST_CODE = 8  # bits
_QUANTISED = re.compile(
    r"(.*\.)?(qweight|qzeros|weight_packed|W_q|SCB|absmax|nested_absmax|quant_map|quant_state\..*"
    r"|scaled_fp8)"
)


def is_norm_statistic(name: str) -> bool:
    """Whether a tensor is a norm layer's running statistic, by its name."""
    return name.rpartition(".")[2] in _NORM_STATISTICS


def is_extra_state(name: str) -> bool:
    """Whether a tensor is a module's own state, whose bytes mean nothing here (fp8 recipes)."""
    return name.rpartition(".")[2] == "_extra_state"


def refuse_quantised(collection: Collection) -> None:
    """Refuse codes with scales beside them: a mean of codes under unlike scales means nothing.

    Raises:
        FormatError: the first such tensor.
    """
    by_last = _by_last_part(collection.names)
    scaled = {
        name.rpartition(".")[0]
        for last, names in by_last.items()
        if re.search("scale|zero", last)
        for name in names
    }
    # Few of the names are looked at one by one: of a hundred thousand that would take a while.
    packed = any(tensor.dtype.kind == "packed" for tensor in collection.described)
    every = packed or bool(scaled) or any("quant_state." in name for name in collection.names)
    named = [
        name for last, names in by_last.items() if _QUANTISED.fullmatch(last) for name in names
    ]
    for name in collection.names if every else named:
        tensor = collection.tensors[name]
        beside_scales = name in scaled or name.rpartition(".")[0] in scaled
        if (
            tensor.dtype.kind == "packed"
            or _QUANTISED.fullmatch(name)
            or (beside_scales and tensor.count > 1 and _may_be_codes(name, tensor))
        ):
            raise FormatError(
                "is quantised: codes and scales do not average apart",
                path=collection.sources[0].path,
                tensor=name,
                remedy="average the checkpoints before they are quantised",
            )


def _by_last_part(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by what follows their last dot."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name[name.rfind(".") + 1 :], []).append(name)
    return found


def _may_be_codes(name: str, tensor: Tensor) -> bool:
    if tensor.dtype.bits > _WIDEST_CODE:
        return False
    return tensor.dtype.averaged or name.rpartition(".")[2].startswith(("weight", "w", "W", "q"))


def decide_roles(
    collection: Collection, used: Sequence[Source], *, ints: str, norm_stats: str
) -> list[Role]:
    """What becomes of each tensor: floats are averaged, integers must agree.

    Raises:
        MismatchError: an integer tensor (of more than one element) differs between checkpoints.
    """
    tensors = collection.described
    roles: list[Role] = [
        "last"
        if (norm_stats == "last" and is_norm_statistic(name)) or is_extra_state(name)
        else "averaged"
        if tensor.dtype.averaged
        else "kept"
        for name, tensor in collection.tensors.items()
    ]
    whole = [
        index
        for index, (tensor, role) in enumerate(zip(tensors, roles, strict=True))
        if not tensor.dtype.averaged and role != "last"
    ]
    problems: dict[int, str] = {}
    for source in used[1:]:
        for index in differing(tensors, whole, used[0], source):
            roles[index] = "last"
            if tensors[index].count > 1 and ints != "last":
                problems.setdefault(
                    index,
                    f"{printable(collection.names[index])}: {tensors[index].dtype.name} "
                    f"{tensors[index].shape} differs between {printable(used[0].path)} and "
                    f"{printable(source.path)}",
                )
    if problems:
        raise MismatchError(
            "integer tensors differ, and integers are not averaged "
            "(--ints last takes them from the last checkpoint):",
            list(problems.values()),
        )
    return roles
