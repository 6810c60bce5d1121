"""The totals of a pass of data through a model, of one process or of all."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.errors import RefreshError, listed, printable

if TYPE_CHECKING:
    from ckptavg.batchnorm.moments import Moments
    from ckptavg.model.feeding import Fingerprint

log = logging.getLogger("ckptavg")

# The scatter of few batches says little.
LEAST_BATCHES = 8
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
                "the processes draw different batches: unless that is the augmentation alone, some "
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
        if self.samples < _LEAST_SAMPLES or self.batches < LEAST_BATCHES or not bool(called.any()):
            return math.inf
        return max(float(errors[called].max()) for errors in self.moments.errors())

    def next_look(self) -> int:
        """The number of batches at which to look at the errors again."""
        if not self.samples:
            return self.batches + LEAST_BATCHES
        enough = math.ceil(_LEAST_SAMPLES * self.batches / self.samples)
        return max(LEAST_BATCHES, enough, math.ceil(self.batches * _GROWTH))

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
                f"{printable(repr(self.culprit))} came out NaN or Inf in each",
                remedy="look for NaN in the data, or for weights that overflow",
            )
        if self.unfit:
            raise RefreshError(
                f"no batch could be used: each had {next(iter(self.unfit))}",
                remedy="make the loader's batches larger",
            )
        raise RefreshError(
            "the loader gave no batches",
            remedy="if it was used up before, name a callable that makes it anew",
        )
