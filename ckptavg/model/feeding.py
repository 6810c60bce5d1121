"""The loader's batches: counted, and dealt out to processes."""

from __future__ import annotations

import itertools
import logging
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from ckptavg.errors import RefreshError
from ckptavg.model.batches import Numbered, attribute_of, count_examples, leaves
from ckptavg.model.datamodules import Transferred, loader_of
from ckptavg.model.factories import user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ckptavg.distributed import Ranks

log = logging.getLogger("ckptavg")

_NOTED = 1000  # batches whose order is compared
_PATIENCE = 10_000  # batches of a pass without a limit, before it is said that it has none

Fingerprint = tuple[bool, list[int]]
"""Whether it is of the examples' own numbers; and a checksum after each of the first batches."""


def limited(
    batches: Iterable[Any], max_samples: int | None = None, *, is_bounded: bool = False
) -> Iterator[Any]:
    """The batches up to the one that reaches a number of examples; None for all.

    If no end is in sight after many batches, that is logged, unless the caller `is_bounded`.

    Raises:
        UserCodeError: the loader raised.
    """
    with user_code("the loader"):
        iterator = iter(batches)
    drawn = 0
    known = known_length(batches)
    patience = _PATIENCE if known is None else 2 * known + _PATIENCE // 100
    for count in itertools.count(1):
        with user_code("the loader"):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        if count > patience and max_samples is None and not is_bounded:
            log.warning(
                "the loader has returned %s batches%s, and has not ended: if it is endless, "
                "interrupt the pass, and limit it with `max_samples`",
                f"{patience:,}", "" if known is None else f", though its length is {known:,}",
            )  # fmt: skip
            is_bounded = True
        yield batch
        drawn += count_examples(batch)
        if max_samples is not None and drawn >= max_samples:
            return


def known_length(batches: Any) -> int | None:  # noqa: ANN401
    """How many batches there are, where the loader says so."""
    try:
        return len(batches)
    except Exception:  # noqa: BLE001 - the user's own
        return None


def _is_cut_short(batches: Iterable[Any], max_samples: int | None) -> bool:
    """Whether the limit comes before the loader's end, as far as that is known."""
    known = known_length(batches.dataset if isinstance(batches, DataLoader) else batches)
    return max_samples is not None and (known is None or max_samples < known)


def _is_ordered(sampler: object) -> bool:
    return isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, DistributedSampler) and not sampler.shuffle
    )


def _warn_of_order(*, ends_early: bool) -> None:
    log.warning(
        "the loader does not shuffle%s",
        ", and the pass may end before the data do: the first examples may be similar (use "
        "shuffle=True)"
        if ends_early
        else ": if the data are sorted, for example by class, the statistics are wrong (use "
        "shuffle=True)",
    )


_PARTS = (
    *("batch_sampler", "sampler", "dataset"),
    *("base_dataloader", "state"),  # of accelerate
    *("_dataloader", "_distributed"),  # of Fabric; of datasets
)


def _parts(loader: object, depth: int = 4) -> Iterator[object]:
    """A loader, and what it draws from: samplers, the data set, what a wrapper wraps."""
    yield loader
    held = vars(loader) if hasattr(loader, "__dict__") else {}
    for name in _PARTS:
        # Beside a batch sampler torch gives a loader a sampler that it does not use.
        is_used = name != "sampler" or held.get("batch_sampler") is None
        if depth and is_used and held.get(name) is not None:
            yield from _parts(held[name], depth - 1)


def _dealt_out_to(parts: Iterable[object]) -> tuple[int, int] | None:
    """The number of processes that a loader's batches are dealt out to, and the number of this one.

    By a `DistributedSampler`, accelerate, Lightning's Fabric or `split_dataset_by_node`.
    """
    for part in parts:
        for size_name, rank_name in (
            ("num_replicas", "rank"),
            ("num_processes", "process_index"),
            ("world_size", "rank"),
        ):
            if size_name == "world_size" and type(part).__name__ != "DistributedConfig":
                continue  # of datasets; a data set of the user's may have such attributes
            size, rank = attribute_of(part, size_name), attribute_of(part, rank_name)
            if isinstance(size, int) and isinstance(rank, int) and size > 1:
                return size, rank
    return None


class Feed:
    """This process's share of a loader's batches, each with its number in the whole pass.

    Batch `i` is that of process `i % size`. A `DataLoader` over a data set that can be indexed
    loads only what falls to this process; of anything else the rest is drawn and dropped. What a
    `DistributedSampler` has dealt out already is not dealt out again.

    Args:
        batches: the loader.
        ranks: the processes.
        max_samples: the last batch is the one that reaches this number of examples in all.
        ends_early: whether the pass may end before the loader does.

    Raises:
        RefreshError: the loader is an `IterableDataset` without a length, and is not limited; or it
            is dealt out to another number of processes.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        ranks: Ranks,
        *,
        max_samples: int | None = None,
        ends_early: bool = False,
    ) -> None:
        self._hooks = batches if isinstance(batches, Transferred) else None
        batches = loader_of(batches)
        self._batches, self._rank, self._size = batches, ranks.rank, ranks.size
        self._samples, self._checksums = max_samples, [0]
        parts = list(_parts(batches))
        dealt = _dealt_out_to(parts)
        is_endless = known_length(batches) is None and max_samples is None
        if is_endless and any(isinstance(part, IterableDataset) for part in parts):
            raise RefreshError(
                "the loader is an IterableDataset without a length, and may be endless",
                remedy="limit the pass with `max_samples`",
            )
        if any(map(_is_ordered, parts)):
            _warn_of_order(ends_early=ends_early or _is_cut_short(batches, max_samples))
        if dealt is not None and ranks.size == 1:
            log.warning(
                "the loader returns one of %d parts of the data, and no other process reads the "
                "rest",
                dealt[0],
            )
        elif dealt is not None and dealt != (ranks.size, ranks.rank):
            raise RefreshError(
                f"the loader is for process {dealt[1]} of {dealt[0]}, and this is process "
                f"{ranks.rank} of {ranks.size}",
                remedy="pass a plain DataLoader: ckptavg splits its batches among the processes",
            )
        self._shares = ranks.size > 1 and _can_share(batches)
        self._is_dealt = ranks.size > 1 and dealt is not None

    def __iter__(self) -> Numbered:
        """The batches."""
        for number, batch in self._own():
            yield number, batch if self._hooks is None else self._hooks.transfer(batch)

    def _own(self) -> Numbered:
        """This process's batches as the loader yields them."""
        if self._is_dealt:
            yield from self._dealt_out()
        elif self._shares:
            numbers: deque[int] = deque()
            sampler = self._indices(numbers)
            loader = _with_batches(self._batches, sampler)  # type: ignore[arg-type]
            for batch in limited(loader, is_bounded=True):
                yield numbers.popleft(), batch
        else:
            every = enumerate(limited(self._batches, is_bounded=self._samples is not None))
            for number, batch in self._up_to_limit(every, count_examples):
                if self._size > 1:
                    self._note(_beginning(batch))
                if number % self._size == self._rank:
                    yield number, batch

    def fingerprint(self) -> Fingerprint:
        """Of the order in which the examples come, which all processes must have in common."""
        return self._shares and not self._is_dealt, [] if self._is_dealt else self._checksums

    def _note(self, what: bytes) -> None:
        if len(self._checksums) < _NOTED:
            self._checksums.append(zlib.crc32(what, self._checksums[-1]))

    def _indices(self, numbers: deque[int]) -> Iterator[Any]:
        """The indices of this process's batches; their numbers are added to `numbers`."""
        every = enumerate(self._batches.batch_sampler)  # type: ignore[attr-defined]
        for number, indices in self._up_to_limit(every, len):
            self._note(repr(list(indices)).encode())
            if number % self._size == self._rank:
                numbers.append(number)
                yield indices

    def _dealt_out(self) -> Numbered:
        """What a sampler has left for this process; the limit is taken to be the same for all."""
        log.info("the loader splits the batches among the processes itself")
        own = (
            (number * self._size + self._rank, batch)
            for number, batch in enumerate(
                limited(self._batches, is_bounded=self._samples is not None)
            )
        )
        yield from self._up_to_limit(own, lambda batch: count_examples(batch) * self._size)

    def _up_to_limit(self, numbered: Numbered, size: Callable[[Any], int]) -> Numbered:
        drawn = 0
        for number, batch in numbered:
            yield number, batch
            drawn += size(batch)
            if self._samples is not None and drawn >= self._samples:
                return


def _beginning(batch: Any) -> bytes:  # noqa: ANN401
    """The first few numbers of a batch, where they can be had at no cost."""
    first = next((leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)), None)
    if first is None or first.device.type != "cpu" or first.layout != torch.strided:
        return b""
    return repr((first.shape, first.detach().flatten()[:16].tolist())).encode()


def _can_share(batches: Iterable[Any]) -> bool:
    return (
        type(batches) is DataLoader
        and batches.batch_sampler is not None
        and not isinstance(batches.dataset, IterableDataset)
    )


def _with_batches(loader: DataLoader[Any], sampler: Iterable[Any]) -> DataLoader[Any]:
    """The same loader with another batch sampler."""
    names = (
        *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn"),
        *("multiprocessing_context", "generator", "prefetch_factor", "persistent_workers"),
    )
    return DataLoader(
        loader.dataset,
        batch_sampler=sampler,
        **{name: getattr(loader, name) for name in names},
    )
