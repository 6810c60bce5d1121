"""The totals of a pass of data through a model, of one process or of all."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ckptavg.batchnorm.moments import Moments
from ckptavg.errors import RefreshError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptavg.batchnorm.moments import Observation
    from ckptavg.distributed import Ranks
    from ckptavg.model.batches import Numbered
    from ckptavg.model.feeding import Fingerprint

log = logging.getLogger("ckptavg")

# The scatter of few batches says little.
_LEAST_BATCHES = 8
_LEAST_SAMPLES = 2048
_GROWTH = 1.05  # of the number of batches between two looks at their scatter


@dataclass
class PassTotals:
    """The totals of a pass, of one process or of all.

    Attributes:
        moments: statistics of the layers.
        batches: the number of batches that were used.
        samples: the number of examples in them.
        unfit: the number of batches that a layer could not normalise, by the reason.
        nonfinite: numbers of the batches that were left out for NaN or Inf.
        culprit: name of the first layer that had any.
        has_ended: whether there are no more batches.
        fingerprint: of the order of the examples, where it is known.
    """

    moments: Moments
    batches: int = 0
    samples: int = 0
    unfit: Counter[str] = field(default_factory=Counter)
    nonfinite: list[int] = field(default_factory=list)
    culprit: str | None = None
    has_ended: bool = False
    fingerprint: Fingerprint = (False, [])

    def add(self, number: int, observation: Observation, samples: int, *, strict: bool) -> None:
        """Add what the layers saw of a batch, unless it is NaN or Inf.

        Args:
            number: of the batch in the whole pass.
            observation: what the layers saw.
            samples: the number of examples in the batch.
            strict: raise an error in place of leaving it out.

        Raises:
            RefreshError: the batch gives NaN or Inf, if `strict`.
        """
        is_odd = ~torch.isfinite(torch.stack([observation.mean, observation.variance])).all(0)
        if not bool(is_odd.any()):
            if not self.batches:
                self.moments = Moments.empty(self.moments.channels, observation.mean.device)
            self.moments.add(observation)
            self.batches += 1
            self.samples += samples
            return
        channels = self.moments.channels
        by_layer = zip(channels.names, channels.split(is_odd.cpu()), strict=True)
        culprit = next(name for name, flags in by_layer if bool(flags.any()))
        if strict:
            raise RefreshError(
                f"batch number {number}: the statistics of layer {printable(repr(culprit))} are "
                "NaN or Inf",
                remedy="look for NaN in the data, or for weights that overflow",
            )
        self.nonfinite.append(number)
        self.culprit = self.culprit or culprit

    def gathered(self, ranks: Ranks) -> PassTotals:
        """The totals of all processes, each of which calls this.

        Raises:
            PeerError: another process has failed.
            RefreshError: the processes draw the examples in different orders.
        """
        everyone = ranks.gather(replace(self, moments=self.moments.on_cpu()))
        return reduce(PassTotals.merged, everyone)

    def merged(self, other: PassTotals) -> PassTotals:
        """The totals of two processes.

        Raises:
            RefreshError: they draw the examples in different orders.
        """
        (is_sure, own), (_, others) = self.fingerprint, other.fingerprint
        known = min(len(own), len(others))
        if known and own[known - 1] != others[known - 1]:
            if is_sure:
                raise RefreshError(
                    "the processes draw the examples in different orders: some would count twice",
                    remedy="seed the loader alike in all of them",
                )
            log.warning(
                "the processes draw different batches: unless only the augmentation differs, some "
                "examples count twice and others not at all"
            )
        return PassTotals(
            self.moments.merged(other.moments),
            self.batches + other.batches,
            self.samples + other.samples,
            self.unfit + other.unfit,
            sorted(self.nonfinite + other.nonfinite),
            self.culprit or other.culprit,
            self.has_ended and other.has_ended,
            self.fingerprint,
        )

    def largest_error(self) -> float:
        """The largest error of a layer that was called; inf as long as too little was seen."""
        called = self.moments.calls > 0
        if self.samples < _LEAST_SAMPLES or self.batches < _LEAST_BATCHES or not bool(called.any()):
            return math.inf
        return max(float(errors[called].max()) for errors in self.moments.errors())

    def next_look(self) -> int:
        """The number of batches at which to look at the errors again."""
        if not self.samples:
            return self.batches + _LEAST_BATCHES
        enough = math.ceil(_LEAST_SAMPLES * self.batches / self.samples)
        return max(_LEAST_BATCHES, enough, math.ceil(self.batches * _GROWTH))

    def check(self) -> None:
        """Warn of the batches that were left out.

        Raises:
            RefreshError: no batch was used.
        """
        for reason, count in sorted(self.unfit.items()):
            log.warning("left out %d batches with %s", count, reason)
        if self.nonfinite:
            log.warning(
                "left out %d batches for NaN or Inf, first in layer %s: %s",
                len(self.nonfinite),
                printable(repr(self.culprit)),
                listed(f"number {number}" for number in self.nonfinite),
            )
        if self.batches:
            return
        if self.nonfinite:
            raise RefreshError(
                "no batch could be used: the statistics of layer "
                f"{printable(repr(self.culprit))} are NaN or Inf in each",
                remedy="look for NaN in the data, or for weights that overflow",
            )
        if self.unfit:
            raise RefreshError(
                f"no batch could be used: each had {next(iter(self.unfit))}",
                remedy="make the loader's batches larger",
            )
        raise RefreshError(
            "the loader gave no batches",
            remedy="if it can be iterated only once, name a callable that returns a new one",
        )


def until_converged(
    batches: Numbered, local: PassTotals, ranks: Ranks, tol: float | None
) -> Iterator[tuple[int, Any]]:
    """The batches of this process, until the errors in the totals of all processes are small.

    All processes look at these errors after the same number of batches.

    Args:
        batches: those of this process.
        local: its totals, to which the caller adds each batch.
        ranks: the processes.
        tol: the largest error to end with; None for all batches.
    """
    if tol is None:
        yield from batches
        return
    until_look = ranks.share(_LEAST_BATCHES)
    while True:
        drawn = 0
        for each in islice(batches, until_look):
            drawn += 1
            yield each
        local.has_ended = drawn < until_look
        totals = local.gathered(ranks)
        if totals.has_ended or totals.largest_error() <= tol:
            return
        until_look = max(1, ranks.share(totals.next_look() - totals.batches))
