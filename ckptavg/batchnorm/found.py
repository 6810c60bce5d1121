"""What a pass has found, in one process or in all."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.errors import RefreshError, listed, printable

if TYPE_CHECKING:
    from ckptavg.batchnorm.estimators import WeightedMoments
    from ckptavg.model.feeding import Fingerprint

log = logging.getLogger("ckptavg")


@dataclass
class Found:
    """What a pass has found so far.

    Attributes:
        moments: statistics of the layers.
        batches: batches that were used.
        samples: examples in them.
        unfit: batches that a layer could not normalise, by the reason.
        nonfinite: numbers of the batches that were left out for NaN or Inf.
        culprit: name of the first layer that had any.
        ended: there are no more batches.
        fingerprint: of the order of the examples, where that is known.
    """

    moments: WeightedMoments
    batches: int = 0
    samples: int = 0
    unfit: Counter[str] = field(default_factory=Counter)
    nonfinite: list[int] = field(default_factory=list)
    culprit: str | None = None
    ended: bool = False
    fingerprint: Fingerprint = (False, [])

    def merged(self, other: Found) -> Found:
        """What two processes have found."""
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
        return Found(
            self.moments.merged(other.moments),
            self.batches + other.batches,
            self.samples + other.samples,
            self.unfit + other.unfit,
            sorted(self.nonfinite + other.nonfinite),
            self.culprit or other.culprit,
            self.ended and other.ended,
            self.fingerprint,
        )

    def check(self) -> None:
        """Speak of the batches that were left out.

        Raises:
            RefreshError: none is left.
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
