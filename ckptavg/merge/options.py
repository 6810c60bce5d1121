"""How checkpoints are weighted, and what becomes of their tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.errors import SelectionError
from ckptavg.formats.tensors import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.merge.schemes import Scheme


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How checkpoints are weighted, and what becomes of their tensors.

    Attributes:
        weights: a scheme such as `ema:0.9`, one number for each checkpoint, in order, or what
            `schemes.parse` returns.
        normalize: divide by the sum of the weights.
        update: fold the other checkpoints into the earlier uniform average among the inputs.
        expect: the number of checkpoints that there must be.
        key: the state dict to average, where a file holds several.
        keep_prefix: leave the prefix of a wrapper (`module.`, `_orig_mod.`) on the names.
        dtype: of the floating tensors in the output, by torch's name; None for the inputs' own.
        ints: `last` takes differing integer tensors from the last checkpoint.
        norm_stats: `last` takes running statistics from the last checkpoint.
        lora: of LoRA adapters, `separate` averages the factors A and B apart, and `exact` their
            products: the ranks then add up, and the output must be a directory.
        allow_nonfinite: let NaN and Inf pass.
    """

    weights: str | Sequence[float] | Sequence[Scheme] = "uniform"
    normalize: bool = True
    update: bool = False
    expect: int | None = None
    key: str | None = None
    keep_prefix: bool = False
    dtype: str | None = None
    ints: Literal["equal", "last"] = "equal"
    norm_stats: Literal["average", "last"] = "average"
    lora: Literal["separate", "exact"] = "separate"
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no option has.

        Raises:
            SelectionError: a value is unknown, or two values contradict each other.
        """
        if self.dtype is not None and (
            self.dtype not in BY_NAME or BY_NAME[self.dtype].kind != "float"
        ):
            raise SelectionError(f"unknown floating dtype {self.dtype!r}")
        check_choice("ints", self.ints, ("equal", "last"))
        check_choice("norm_stats", self.norm_stats, ("average", "last"))
        check_choice("lora", self.lora, ("separate", "exact"))
        if self.update and (self.lora == "exact" or not self.normalize):
            raise SelectionError("only a mean of the weights themselves can be updated")

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that the values of the output depend on, where they are not the defaults."""
        names = ("dtype", "ints", "norm_stats", "lora", "keep_prefix", "update")
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name in names and getattr(self, each.name) != each.default
        }


def check_choice(name: str, value: object, choices: tuple[str, str]) -> None:
    """Refuse a value that is not one of two choices.

    Raises:
        SelectionError: it is another.
    """
    if value not in choices:
        raise SelectionError(f"{name} is {choices[0]!r} or {choices[1]!r}, not {value!r}")
