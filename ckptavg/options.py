"""The keywords of `average`, checked, and how many threads work unless they say it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import SelectionError
from ckptavg.formats.parts import any_remote
from ckptavg.formats.tensors import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptavg.select.selection import Selection
    from ckptavg.select.sources import Source
    from ckptavg.write.writing import Progress

# The most that stay within 64 MB.
_MOST_THREADS = 4
_REMOTE_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keywords of `average`, checked."""

    select: Selection | None = None
    normalize: bool = True
    update: bool = False
    key: str | None = None
    keep_prefix: bool = False
    drop_aliases: bool = False
    dtype: str | None = None
    ints: str = "equal"
    norm_stats: str = "average"
    lora: str = "separate"
    allow_nonfinite: bool = False
    expect: int | None = None
    force: bool = False
    fsync: bool = True
    container: str = "weights"
    max_shard_size: int | None = None
    threads: int | None = None
    dry_run: bool = False
    progress: Progress | None = None
    hash: bool = False
    hash_progress: Progress | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        """Refuse values that no option has.

        Raises:
            SelectionError: the first of them.
        """
        if self.dtype is not None and (
            self.dtype not in BY_NAME or BY_NAME[self.dtype].kind != "float"
        ):
            raise SelectionError(f"unknown floating dtype {self.dtype!r}")
        for option, known in (
            ("ints", ("equal", "last")),
            ("norm_stats", ("average", "last")),
            ("container", ("weights", "last")),
            ("lora", ("separate", "exact")),
        ):
            if (value := getattr(self, option)) not in known:
                raise SelectionError(f"{option} is {known[0]!r} or {known[1]!r}, not {value!r}")
        if self.threads is not None and self.threads < 1:
            raise SelectionError(f"at least 1 thread is needed, not {self.threads}")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise SelectionError(f"a shard has at least 1 byte, not {self.max_shard_size}")
        if self.container == "last" and self.dtype is not None:
            raise SelectionError(
                "the last checkpoint's container keeps its dtypes: leave dtype out"
            )
        if self.container == "last" and self.max_shard_size is not None:
            raise SelectionError("the last checkpoint's container is one file: no shards")

    @property
    def exact(self) -> bool:
        """Whether products of LoRA factors are averaged."""
        return self.lora == "exact"

    @property
    def recorded(self) -> dict[str, Any]:
        """What the values of the output depend on, where it is not as it usually is."""
        usual = Options()
        names = ("dtype", "ints", "norm_stats", "lora", "container", "keep_prefix", "update")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value != getattr(usual, name)}


def default_threads(sources: Iterable[Source] = ()) -> int:
    """The processors that this process may use, if they are not too many.

    Bytes that come over a network are waited for: then it is many, whatever the processors.
    """
    if any(any_remote(source.checkpoint.parts) for source in sources):
        return _REMOTE_THREADS
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    return min(os.cpu_count() or 1, _MOST_THREADS)
