"""The options of an average: one dataclass, whose fields are the keywords of `average`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import SelectionError
from ckptavg.formats.paths import PathLike
from ckptavg.formats.tensors import BY_NAME
from ckptavg.select.rules import Selection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.merge.schemes import Scheme

Progress = Callable[[int, int], None]
"""Called with the bytes since the last call, and with the bytes in all."""

_RECORDED = ("dtype", "ints", "norm_stats", "lora", "container", "keep_prefix", "update")


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """The options of an average.

    Attributes:
        select: the rules that choose the checkpoints.
        weights: a scheme such as `ema:0.9`, or one number for each checkpoint, in order.
        normalize: divide by the sum of the weights.
        update: fold the other checkpoints into the earlier uniform average among the inputs.
        expect: the number of checkpoints that there must be; None for any.
        key: name of the state dict to average, where a file holds several.
        keep_prefix: leave the prefix of a wrapper (`module.`, `_orig_mod.`) on the names.
        dtype: torch's name of the output's floating dtype; None to keep that of each tensor.
        ints: `equal` refuses integer tensors that differ; `last` uses the last checkpoint's.
        norm_stats: `average` averages running statistics; `last` uses the last checkpoint's.
        lora: `separate` averages the factors A and B of LoRA adapters apart. `exact` averages their
            products: the ranks add up, and the output must be a directory.
        allow_nonfinite: accept NaN and Inf.
        container: `weights` writes a state dict alone. `last` writes the last checkpoint's torch
            file, with the average in place of its weights.
        max_shard_size: bytes of tensors in a file of a directory; None for the inputs' shards.
        drop_aliases: write tied tensors once, and record the other names in the metadata.
        hash: record the SHA-256 of the checkpoints' files.
        force: replace an existing output.
        fsync: wait until the output is on the disk.
        dry_run: write nothing, and return what would be written.
        threads: the number of threads; None for the processors that this process may use, 4 at
            most, or for 16 threads if bytes come over a network.
        progress: called as bytes are written.
        hash_progress: called as bytes are hashed.
        ranks: the processes that share the work, on a file system that all of them see; each calls
            the function with the same arguments.
    """

    select: Selection = field(default_factory=Selection)
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
    container: Literal["weights", "last"] = "weights"
    max_shard_size: int | None = None
    drop_aliases: bool = False
    hash: bool = False
    force: bool = False
    fsync: bool = True
    dry_run: bool = False
    threads: int | None = None
    progress: Progress | None = None
    hash_progress: Progress | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SelectionError: a value is unknown, or two values contradict each other.
        """
        if self.dtype is not None and (
            self.dtype not in BY_NAME or BY_NAME[self.dtype].kind != "float"
        ):
            raise SelectionError(f"unknown floating dtype {self.dtype!r}")
        for name, choices in (
            ("ints", ("equal", "last")),
            ("norm_stats", ("average", "last")),
            ("lora", ("separate", "exact")),
            ("container", ("weights", "last")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise SelectionError(f"{name} is {choices[0]!r} or {choices[1]!r}, not {value!r}")
        for name in ("threads", "max_shard_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SelectionError(f"`{name}` is at least 1, not {value}")
        if self.update and (self.lora == "exact" or not self.normalize):
            raise SelectionError("only a mean of the weights themselves can be updated")
        if self.container == "last" and self.dtype is not None:
            raise SelectionError(
                "the last checkpoint's container keeps its dtypes: leave dtype out"
            )
        if self.container == "last" and self.max_shard_size is not None:
            raise SelectionError("the last checkpoint's container is one file: no shards")

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that the output's values depend on, without those at their defaults."""
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name in _RECORDED and getattr(self, each.name) != each.default
        }


_Fields = ParamSpec("_Fields")
_Result = TypeVar("_Result")
_Inputs = PathLike | Iterable[PathLike]


def _takes_fields_of(
    options: Callable[_Fields, AverageOptions],
) -> Callable[
    [Callable[[_Inputs, PathLike, AverageOptions], _Result]],
    Callable[Concatenate[_Inputs, PathLike, _Fields], _Result],
]:
    """The decorator `options_as_keywords`, with the types of the options' fields."""

    def decorate(
        function: Callable[[_Inputs, PathLike, AverageOptions], _Result],
    ) -> Callable[Concatenate[_Inputs, PathLike, _Fields], _Result]:
        @functools.wraps(function)
        def with_fields(
            inputs: _Inputs, output: PathLike, *args: _Fields.args, **fields: _Fields.kwargs
        ) -> _Result:
            return function(inputs, output, options(*args, **fields))

        first_two = list(inspect.signature(function).parameters.values())[:2]
        fields = inspect.signature(options).parameters.values()
        with_fields.__signature__ = inspect.Signature([*first_two, *fields])  # type: ignore[attr-defined]
        return with_fields  # type: ignore[return-value]

    return decorate


options_as_keywords = _takes_fields_of(AverageOptions)
"""Decorates `f(inputs, output, options)`, so that callers pass the options' fields as keywords."""
