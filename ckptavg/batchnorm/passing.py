"""The pass itself: batches go through the model, and what its norm layers saw is taken in."""

from __future__ import annotations

import itertools
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from ckptavg.batchnorm.estimators import Channels, Round, WeightedMoments, joined
from ckptavg.batchnorm.found import Found
from ckptavg.batchnorm.observer import UnfitBatchError
from ckptavg.errors import RefreshError, UserCodeError, printable
from ckptavg.model.batches import cloned, leading_size, moved, on_device
from ckptavg.model.factories import user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from ckptavg.batchnorm.observer import Observation
    from ckptavg.batchnorm.setting import Formats
    from ckptavg.distributed import Ranks
    from ckptavg.model.batches import Numbered
    from ckptavg.model.feeding import Feed

log = logging.getLogger("ckptavg")

# Before they are seen, how the batches scatter says little.
_LEAST_SAMPLES, _LEAST_BATCHES = 2048, 8
_GROWTH = 1.05  # of the number of batches between two looks at how they scatter


class Runner:
    """Passes batches through the model.

    Attributes:
        formats: memory formats in which the model is given its images.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        forward: Callable[[torch.nn.Module, Any], object],
        device: torch.device,
        formats: Formats,
        *,
        bf16: bool,
    ) -> None:
        self.model, self.device, self.formats = model, device, formats
        self._forward, self._bf16, self._is_changed = forward, bf16, False

    def __call__(self, batch: Any) -> None:  # noqa: ANN401 - whatever the loader yields
        """A forward pass.

        Raises:
            UserCodeError: it raised.
        """
        if self._is_changed:
            contiguous = {4: torch.contiguous_format, 5: torch.contiguous_format}
            batch = moved(batch, self.device, contiguous)
        with user_code("the forward pass"), self._precision():
            self._forward(self.model, batch)

    def _precision(self) -> AbstractContextManager[object]:
        if not self._bf16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def keep_contiguous(self) -> None:
        """Give the model contiguous images from here on."""
        self.formats, self._is_changed = {}, True


class Flag:
    """Yes or no, on its way from the device; reading it waits for nothing that came later."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value, self._arrived = value, None
        if value.device.type == "cuda":
            pinned = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value = pinned.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.current_stream(value.device).record_event()

    def read(self) -> bool:
        """The value."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)


@dataclass(frozen=True)
class _Staged:
    """What the layers saw of a batch, before it is known whether that is all finite."""

    number: int
    samples: int
    rounds: list[Round]
    finite: Flag


class Pass:
    """A pass of batches through a model under observation.

    Attributes:
        found: what it has found.
        held_back: batches that were not looked at.
        converged: whether it has ended because that was enough.
    """

    def __init__(
        self,
        run: Runner,
        seen: Observation,
        channels: Channels,
        names: list[str],
        *,
        strict: bool,
        may_change_format: bool,
    ) -> None:
        self._run, self._seen, self._names, self._strict = run, seen, names, strict
        self._may_change = may_change_format
        self._channels = channels
        self.found = Found(WeightedMoments.empty(channels, seen.home))
        self.held_back: list[Any] = []
        self.converged = False
        self._staged: _Staged | None = None

    def go(
        self,
        feed: Feed,
        ranks: Ranks,
        *,
        tol: float | None,
        progress: Callable[[], None] | None,
    ) -> None:
        """Run through this process's share, and join what all processes have found.

        Args:
            feed: the batches.
            ranks: the processes.
            tol: stop when each layer's errors are below that.
            progress: is called after each batch.

        Raises:
            RefreshError: NaN or Inf, if `strict`.
        """
        batches = on_device(self._held_back(feed), self._run.device, self._run.formats)
        most = None if tol is None else _share(_LEAST_BATCHES, ranks)
        while True:
            own = self.found
            own.ended = self._stretch(batches, most, ranks, progress)
            own.fingerprint = feed.fingerprint()
            everyone = ranks.gather(replace(own, moments=own.moments.on_cpu()))
            total = reduce(Found.merged, everyone)
            self.converged = tol is not None and _largest_error(total) <= tol
            if self.converged or total.ended:
                self.found = total
                return
            most = _share(_next_look(total) - total.batches, ranks)

    def _held_back(self, feed: Feed) -> Numbered:
        for number, batch in feed:
            if number < feed.held_back:
                self.held_back.append(cloned(batch))  # some loaders fill one tensor again and again
            else:
                yield number, batch

    def _stretch(
        self,
        batches: Iterator[tuple[int, Any]],
        most: int | None,
        ranks: Ranks,
        progress: Callable[[], None] | None,
    ) -> bool:
        """Up to so many batches of this process; returns whether there are no more."""
        for _ in itertools.count() if most is None else range(most):
            number, batch = next(batches, (None, None))
            if number is None:
                self._settle(None)
                return True
            # The last batch's verdict is read while the device works on this one.
            self._settle(self._through(number, batch))
            if progress is not None:
                progress()
            if ranks.has_failed_peer():
                break
        self._settle(None)
        return False

    def _through(self, number: int, batch: Any) -> _Staged | None:  # noqa: ANN401
        """Run a batch through the model; None if a layer could not normalise it."""
        untouched = cloned(batch) if self._may_change and self._run.formats else batch
        try:
            self._run_observed(batch)
        except UnfitBatchError as error:
            self.found.unfit[error.message] += 1
            self._seen.reset()  # layers before that one may have seen NaN
            return None
        except UserCodeError as error:
            if not self._takes_another_format(error):
                raise
            return self._through(number, untouched)
        self._may_change = False
        rounds = self._seen.seen()
        parts = [self._is_finite(one).all() for _, *both in rounds for one in both]
        finite = torch.stack(parts).all() if parts else torch.tensor(data=True)
        return _Staged(number, leading_size(batch), rounds, Flag(finite))

    def _run_observed(self, batch: Any) -> None:  # noqa: ANN401
        with self._seen.watching():
            self._run(batch)
        if self._seen.overheard:
            with self._seen.watching():
                self._run(batch)

    def _takes_another_format(self, error: UserCodeError) -> bool:
        """Whether the model's first batch may be tried again with contiguous images.

        `view` and custom kernels do not take all strides.
        """
        is_possible = self._may_change and self._run.formats
        if not is_possible or not isinstance(error.__cause__, RuntimeError):
            return False
        log.info("trying contiguous images: %s", str(error.__cause__).splitlines()[0])
        self._run.keep_contiguous()
        self._seen.keep_contiguous()
        return True

    def _settle(self, staged: _Staged | None) -> None:
        """Take in the batch that was staged before, and stage another.

        Raises:
            RefreshError: it has NaN or Inf, if that is an error.
        """
        last, self._staged = self._staged, staged
        if last is None:
            return
        if not last.finite.read():
            self._leave_out(last)
            return
        if last.rounds:
            self.found.moments.update(*joined(last.rounds, self._channels))
        self.found.batches += 1
        self.found.samples += last.samples

    def _is_finite(self, values: torch.Tensor) -> torch.Tensor:
        return torch.isfinite(values.to(self._seen.dtype))

    def _leave_out(self, staged: _Staged) -> None:
        bad = [~self._is_finite(one) for _, *both in staged.rounds for one in both]
        by_layer = self._channels.split(torch.stack(bad).any(0).cpu())
        culprit = next(
            name for name, one in zip(self._names, by_layer, strict=True) if bool(one.any())
        )
        if self._strict:
            raise RefreshError(
                f"batch number {staged.number}: the statistics of layer "
                f"{printable(repr(culprit))} came out NaN or Inf",
                remedy="look for NaN in the data, or for weights that overflow",
            )
        self.found.nonfinite.append(staged.number)
        self.found.culprit = self.found.culprit or culprit
        self._seen.reset()


def _share(batches: int, ranks: Ranks) -> int:
    return max(1, -(-batches // ranks.size))


def _largest_error(found: Found) -> float:
    """Of the layers that were called; inf as long as too little was seen."""
    called = found.moments.calls > 0
    if found.samples < _LEAST_SAMPLES or found.batches < _LEAST_BATCHES or not bool(called.any()):
        return math.inf
    return max(float(errors[called].max()) for errors in found.moments.errors())


def _next_look(found: Found) -> int:
    """The number of batches at which it is worth while to look again."""
    if not found.samples:
        return found.batches + _LEAST_BATCHES
    enough = math.ceil(_LEAST_SAMPLES * found.batches / found.samples)
    return max(_LEAST_BATCHES, enough, math.ceil(found.batches * _GROWTH))
