"""What the name of a tensor says about the tensor."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

_FACTOR = re.compile(
    r"(?P<module>.+)\.(lora_(?P<factor>[AB])(?P<bias>\.weight|\.bias)|lora_embedding_(?P<table>[AB]))"
)
_LORA = re.compile(r"(.+\.)?lora_[A-Za-z_]+(\..+)?")
_NORM_STATISTICS = ("running_mean", "running_var")

Factor = Literal["A", "B", "bias"]
"""A LoRA module's down-projection, its up-projection, and the bias of the latter."""


def is_norm_statistic(name: str) -> bool:
    """Whether a tensor is the running mean or the running variance of a norm layer."""
    return name.rpartition(".")[2] in _NORM_STATISTICS


def is_batch_counter(name: str) -> bool:
    """Whether a tensor counts the batches that a norm layer has seen."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def is_extra_state(name: str) -> bool:
    """Whether a tensor is the opaque state of a module, such as an fp8 recipe."""
    return name.rpartition(".")[2] == "_extra_state"


def lora_factor(name: str) -> tuple[str, Factor] | None:
    """The module that a LoRA factor belongs to, and which factor it is; None for other tensors."""
    match = _FACTOR.fullmatch(name)
    if match is None:
        return None
    if match["bias"] == ".bias":
        return (match["module"], "bias") if match["factor"] == "B" else None
    return match["module"], match["factor"] or match["table"]  # type: ignore[return-value]


def is_of_lora(name: str) -> bool:
    """Whether a tensor belongs to a LoRA adapter of any kind."""
    return _LORA.fullmatch(name) is not None


def is_lora_factor(name: str) -> bool:
    """Whether a tensor is a factor of a LoRA adapter, or its bias."""
    return _FACTOR.fullmatch(name) is not None


def has_rank(name: str) -> bool:
    """Whether the shape of a tensor depends on the rank of a LoRA adapter."""
    factor = lora_factor(name)
    return factor is not None and factor[1] != "bias"


def has_lora_factors(names: Iterable[str]) -> bool:
    """Whether some of the tensors are factors of LoRA adapters."""
    return any(map(is_lora_factor, names))
