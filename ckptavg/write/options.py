"""The options of an average: how it is made, and how it is written."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import SelectionError
from ckptavg.formats.paths import PathLike
from ckptavg.merge.options import MergeOptions, check_choice
from ckptavg.select.rules import Selection

Progress = Callable[[int, int], None]
"""Called with the bytes since the last call, and with the bytes in all."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How an output is written.

    Attributes:
        container: `last` writes the last checkpoint's torch file with all that it holds, and the
            average in the place of its weights; `weights` writes a state dict alone.
        max_shard_size: bytes of tensors in a file of a directory; None for the inputs' own.
        drop_aliases: of tied tensors, write one and name the others in the metadata.
        hash: record SHA-256 of the checkpoints' files.
        force: replace an existing output.
        fsync: wait until the output is on the disk.
        dry_run: write nothing, only return what would be written.
        threads: how many threads share the work; None for the processors that this process may
            use, 4 at most, and for 16 where bytes come over a network.
        progress: called as bytes are written.
        hash_progress: called as bytes are hashed.
        ranks: the processes that share the work, on a file system that all of them see; each calls
            the function with the same arguments.
    """

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
        """Refuse values that no option has.

        Raises:
            SelectionError: a value is unknown or too small, or two values contradict each other.
        """
        check_choice("container", self.container, ("weights", "last"))
        for name in ("threads", "max_shard_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SelectionError(f"{name} is at least 1, not {value}")
        if self.container == "last" and self.max_shard_size is not None:
            raise SelectionError("the last checkpoint's container is one file: no shards")


@dataclass(frozen=True, kw_only=True)
class AverageOptions(MergeOptions, WriteOptions):
    """The options of `average`: those of merging and of writing, and the choice of checkpoints.

    Attributes:
        select: which of the checkpoints are averaged.
    """

    select: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        """Refuse values that no option has.

        Raises:
            SelectionError: a value is wrong, or two values contradict each other.
        """
        MergeOptions.__post_init__(self)
        WriteOptions.__post_init__(self)
        if self.container == "last" and self.dtype is not None:
            raise SelectionError(
                "the last checkpoint's container keeps its dtypes: leave dtype out"
            )

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that the output depends on, where they are not the defaults."""
        container = {"container": self.container} if self.container != "weights" else {}
        return {**super().recorded, **container}


_Fields = ParamSpec("_Fields")
_Result = TypeVar("_Result")
_Inputs = PathLike | Iterable[PathLike]


def _takes_fields_of(
    options: Callable[_Fields, AverageOptions],
) -> Callable[
    [Callable[[_Inputs, PathLike, AverageOptions], _Result]],
    Callable[Concatenate[_Inputs, PathLike, _Fields], _Result],
]:
    """Let a function take the fields of its options as keywords, with their types."""

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


takes_fields = _takes_fields_of(AverageOptions)
"""Lets a function of inputs, output and options take the options' fields as keywords."""
