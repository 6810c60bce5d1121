"""Rules that choose among the checkpoints of a run.

They are applied in this order: include and exclude (before a file is opened); start; steps, cycle
or lr_minima; best; last; every.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ckptavg.errors import SelectionError, listed, printable
from ckptavg.options import Options
from ckptavg.select.learning_rates import Reading, rates_and_minima
from ckptavg.select.metrics import (
    Mode,
    certain_mode,
    indices_of_best,
    metric_in_name,
    no_metric,
    read_metrics,
    recorded_metrics,
    values_of,
)
from ckptavg.select.order import remedy_without_order, saved_before_training, timeline
from ckptavg.select.series import matches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from ckptavg.errors import CkptAvgError
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.select.order import Timeline
    from ckptavg.select.run import Run

log = logging.getLogger("ckptavg")

_PERCENT = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*%", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_RANGE = re.compile(r"(\d{1,18}):(\d{1,18})(?::(\d{1,18}))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Selection(Options):
    """The rules: which checkpoints to choose.

    Attributes:
        include: patterns of names (`*`, `?`, `[...]`), of which one must match; empty for any name.
        exclude: patterns of names, none of which may match.
        start: the first step, or a share of the training such as `75%`.
        steps: steps such as `100,200,300`, or a range that includes its ends: `100:1000:100`.
        cycle: choose the ends of cycles of this length, counted from the start.
        lr_minima: choose local minima of the learning rate.
        lr_recorded: the learning rate that checkpoints record: the one `used` last, or the `next`
            one if they are saved after `scheduler.step()`; None to find out.
        best: the number of checkpoints to choose, those with the best metric.
        metric: the name of the metric.
        mode: `min` if a low metric is good, `max` if a high one is; None to go by its name.
        metrics: a CSV or JSON file with the metric; None to use what the checkpoints record.
        last: the number of last checkpoints to choose, None for all; several make several averages.
        every: choose every n-th checkpoint, counted back from the last.
        unit: the unit of steps: `global_step`, `step` or `epoch`; None for the first of these
            that all checkpoints record.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    start: str | int | None = None
    steps: str | None = None
    cycle: int | None = None
    lr_minima: bool = False
    lr_recorded: Reading | None = None
    best: int | None = None
    metric: str | None = None
    mode: Mode | None = None
    metrics: Path | None = None
    last: int | Sequence[int | None] | None = None
    every: int | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that a rule cannot have, and rules that contradict each other.

        Raises:
            SelectionError: there is such a value or such a pair of rules.
        """
        super().__post_init__()
        exclusive = [name for name in ("steps", "cycle", "lr_minima") if getattr(self, name)]
        if len(exclusive) > 1:
            names = " and ".join(f"`{name}`" for name in exclusive)
            raise SelectionError(f"{names} exclude each other", remedy="give one of them")
        if not (self.metric or self.best) and (self.metrics is not None or self.mode is not None):
            what = "`metrics` and `mode` need a metric"
            raise SelectionError(what, remedy="name it with `metric`")
        numbers = [("cycle", self.cycle), ("best", self.best), ("every", self.every)]
        numbers += [("last", count) for count in self.counts]
        for name, number in numbers:
            if number is not None and number < 1:
                raise SelectionError(f"`{name}` must be at least 1, not {number}")
        if self.mode not in (None, "min", "max"):
            raise SelectionError(f"`mode` must be 'min' or 'max', not {self.mode!r}")

    @property
    def counts(self) -> tuple[int | None, ...]:
        """For each average, the number of last checkpoints in it; None for all."""
        return (self.last,) if isinstance(self.last, int) else tuple(self.last or (None,))

    def exclusion_reason(self, name: str) -> str | None:
        """Why a checkpoint of this name is left out; None if it is not."""
        if self.include and not any(matches(name, pattern) for pattern in self.include):
            return "not matched by include"
        pattern = next((each for each in self.exclude if matches(name, each)), None)
        return pattern and f"matched by exclude {pattern}"

    def as_dict(self) -> dict[str, Any]:
        """The rules that were given, for the provenance: no paths."""
        file_name = None if self.metrics is None else self.metrics.name
        return {
            name: list(value) if isinstance(value, tuple | list) else value
            for name, value in (vars(self) | {"metrics": file_name}).items()
            if value
        }


@dataclass(eq=False)
class Verdict:
    """What the rules decide on a checkpoint, and the values that they looked at.

    Attributes:
        checkpoint: the checkpoint.
        unit: the unit of its step: `global_step`, `step`, `epoch`, or the `number` in its name.
        step: its step; None if unknown.
        done: the number of units that were done when it was saved; None if unknown.
        rate: the learning rate of its last update; None if no rule needs it.
        metric: the value of its metric; None if it has none, or no rule needs it.
        fault: the error to raise if it is chosen.
        reason: why it is not chosen; empty if it is chosen.
    """

    checkpoint: Checkpoint
    unit: str
    step: int | None = None
    done: int | None = None
    rate: float | None = None
    metric: float | None = None
    fault: CkptAvgError | None = None
    reason: str = ""

    @property
    def is_chosen(self) -> bool:
        """Whether the checkpoint is chosen."""
        return not self.reason

    def reject(self, reason: str) -> None:
        """Do not choose the checkpoint; the first reason stays."""
        self.reason = self.reason or reason


def select(run: Run, rules: Selection) -> list[Verdict]:
    """The verdict of the rules on each checkpoint, in the order of training.

    Raises:
        SelectionError: the rules need what the checkpoints do not record.
    """
    times = timeline(run.checkpoints, rules.unit)
    faults = run.faults
    verdicts = [Verdict(each, times.unit, fault=faults.get(each)) for each in run.checkpoints]
    # The timeline has no steps if a checkpoint lacks one.
    for verdict, step in zip(verdicts, times.steps, strict=False):
        verdict.step, verdict.done = step, step + times.from_zero
    start = 0
    if rules.start is not None:
        start = _apply_start(verdicts, times, str(rules.start).strip())
    if rules.steps is not None:
        _apply_steps(verdicts, times, rules.steps.replace(" ", ""))
    if rules.cycle is not None:
        _apply_cycle(verdicts, times, rules.cycle, start)
    if rules.lr_minima:
        _apply_lr_minima(verdicts, run, rules.lr_recorded)
    if rules.metric is not None:
        _apply_metric(verdicts, rules.metric, rules)
    elif rules.best is not None:
        raise no_metric(run.checkpoints, rules.metrics, rules.mode)
    if rules.last:
        require_order(run, "last")
        _apply_last(verdicts, rules.counts)
    if rules.every is not None:
        _apply_every(verdicts, run, rules.every)
    return verdicts


def chosen(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts on the chosen checkpoints.

    Raises:
        SelectionError: no checkpoint is chosen, or one lacks the state dict that is asked for.
    """
    left = _remaining(verdicts)
    if not left:
        last = verdicts[-1]
        raise SelectionError(
            f"the selection leaves out all {len(verdicts)} checkpoints, such as "
            f"{printable(last.checkpoint.name)} ({last.reason})",
            remedy="`ckptavg inspect` with the same options says why",
        )
    for verdict in left:
        if verdict.fault is not None:
            raise verdict.fault
    return left


def _remaining(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.is_chosen]


def require_order(run: Run, rule: str) -> None:
    """Raise a SelectionError if the order of the checkpoints is not known, which a rule needs."""
    if not run.order_is_known:
        what = f"`{rule}` needs to know the order of the checkpoints"
        raise SelectionError(what, remedy=remedy_without_order(run.checkpoints))


def _require_steps(verdicts: Sequence[Verdict], times: Timeline, rule: str) -> None:
    if not times.steps:
        what = f"`{rule}` needs to know the step of each checkpoint"
        checkpoints = [each.checkpoint for each in verdicts]
        raise SelectionError(what, remedy=remedy_without_order(checkpoints))


def _apply_start(verdicts: Sequence[Verdict], times: Timeline, start: str) -> int:
    """Reject checkpoints before the start, and return the number of units done at the start."""
    _require_steps(verdicts, times, "start")
    if percent := _PERCENT.fullmatch(start):
        if Fraction(percent[1]) > 100:  # noqa: PLR2004
            raise SelectionError(f"`start` must be at most 100%, not {start}")
        # A fraction is exact: 55 % of 100 is 55, not 55.00000000000001.
        threshold = Fraction(percent[1]) * max(times.done) / 100
        for verdict, done in zip(verdicts, times.done, strict=True):
            if done < threshold:
                verdict.reject(f"before {start}")
        return next((done for done in times.done if done >= threshold), 0)
    if not _NUMBER.fullmatch(start):
        raise SelectionError(f"`start` must be a step or a share such as 75%, not {start!r}")
    last = max(times.steps)
    if last < int(start):
        share = f"; for {int(start)} % of the training write `start` {int(start)}%"
        raise SelectionError(
            f"no checkpoint is from {times.unit} {int(start)} on: the last is {last}"
            + share * (0 < int(start) <= 100)  # noqa: PLR2004
        )
    _say_unit(verdicts, times, "start", lambda step: step >= int(start))
    for verdict, step in zip(verdicts, times.steps, strict=True):
        if step < int(start):
            verdict.reject(f"before {times.unit} {int(start)}")
    return int(start) + times.from_zero


def _say_unit(
    verdicts: Sequence[Verdict], times: Timeline, rule: str, is_wanted: Callable[[int], bool]
) -> None:
    """Log the unit that numbers have, if as numbers of epochs they would select others."""
    hint = _epochs_hint(verdicts, times, is_wanted)
    if hint:
        log.info("`%s` counts in %s%s", rule, times.unit, hint)


def _epochs_hint(
    verdicts: Sequence[Verdict], times: Timeline, is_wanted: Callable[[int], bool]
) -> str:
    """How to count in epochs, if that would select some checkpoints, and not the same ones."""
    if "epoch" not in times.other_units:
        return ""
    by_epoch = [is_wanted(verdict.checkpoint.training.steps["epoch"]) for verdict in verdicts]
    differs = by_epoch != [*map(is_wanted, times.steps)]
    return "; for epochs add `unit` epoch" if any(by_epoch) and differs else ""


def _apply_steps(verdicts: Sequence[Verdict], times: Timeline, steps: str) -> None:
    """Reject checkpoints whose step is not in a list or a range."""
    _require_steps(verdicts, times, "steps")
    wanted: range | set[int]
    if ends := _RANGE.fullmatch(steps):
        stride = int(ends[3] or 1)
        if stride < 1:
            raise SelectionError(f"`steps` {steps}: the stride must be at least 1")
        wanted = range(int(ends[1]), int(ends[2]) + 1, stride)
    elif all(map(_NUMBER.fullmatch, steps.split(","))):
        wanted = {int(number) for number in steps.split(",")}
        if missing := sorted(wanted - set(times.steps)):
            absent = ", ".join(map(str, missing))
            raise SelectionError(
                f"there is no checkpoint of {times.unit} {absent}",
                remedy=f"there are those of {times.unit} {listed(sorted(set(times.steps)), 20)}"
                + _epochs_hint(verdicts, times, wanted.__contains__),
            )
    else:
        raise SelectionError(
            f"`steps` must be a list such as 100,200 or a range such as 100:1000:100, not {steps!r}"
        )
    _say_unit(verdicts, times, "steps", wanted.__contains__)
    for verdict, step in zip(verdicts, times.steps, strict=True):
        if step not in wanted:
            verdict.reject("not among steps")


def _apply_cycle(verdicts: Sequence[Verdict], times: Timeline, cycle: int, start: int) -> None:
    """Reject all but the ends of cycles: `mod(i - start, c) = 0` (Izmailov et al. 2018, Alg. 1)."""
    _require_steps(verdicts, times, "cycle")
    if "epoch" in times.other_units:
        raise SelectionError(
            f"`cycle` may count {times.unit} or epochs: the checkpoints record both",
            remedy=f"set `unit` to {times.unit} or to epoch",
        )
    if times.unit == "epoch" and times.from_zero and not start:
        log.info(
            "epochs are counted from 0: cycles end with epoch %d, %d, ...", cycle - 1, 2 * cycle - 1
        )
    starts = saved_before_training([each.checkpoint for each in verdicts], times.steps)
    for verdict, done in zip(verdicts, times.done, strict=True):
        if verdict.checkpoint in starts:
            verdict.reject("saved before the training")
        elif (done - start) % cycle:
            verdict.reject("not at the end of a cycle")


def _apply_lr_minima(verdicts: Sequence[Verdict], run: Run, recorded: Reading | None) -> None:
    """Reject checkpoints that are not at a local minimum of the learning rate."""
    require_order(run, "lr_minima")
    rates, minima = rates_and_minima(run.checkpoints, recorded)
    for verdict, rate, is_minimum in zip(verdicts, rates, minima, strict=True):
        verdict.rate = rate
        if not is_minimum:
            verdict.reject(f"its rate {rate:g} is no minimum")


def _apply_metric(verdicts: Sequence[Verdict], metric: str, rules: Selection) -> None:
    """Set each checkpoint's metric; with `best`, reject all but the best."""
    if rules.metrics is not None:
        table = read_metrics(rules.metrics, metric)
        for verdict, found in zip(
            verdicts, values_of([each.checkpoint for each in verdicts], table), strict=True
        ):
            verdict.metric = found
    else:
        for verdict in verdicts:
            checkpoint = verdict.checkpoint
            recorded = checkpoint.training.metrics.get(metric)
            in_name = metric_in_name(checkpoint.name, metric)
            verdict.metric = in_name if recorded is None else recorded
    if rules.best is None:
        return
    left = _remaining(verdicts)
    values = [verdict.metric for verdict in left]
    if all(value is None for value in values):
        known = listed(recorded_metrics([each.checkpoint for each in verdicts]), 20)
        raise SelectionError(
            f"none of the checkpoints has the metric {printable(metric)}",
            remedy=(f"recorded are: {known}; " if known else "")
            + "name a file that has it with `metrics`",
        )
    winners = indices_of_best(values, rules.best, certain_mode(metric, rules.mode))
    if len(winners) < rules.best:
        log.info("there are only %d of the best %d by %s", len(winners), rules.best, metric)
    if rules.best < len(left):
        best = [f"{left[place].checkpoint.name} ({values[place]:.4g})" for place in winners]
        log.info("the best by %s: %s", printable(metric), listed(best, 20))
    for place, verdict in enumerate(left):
        if place not in winners:
            value = "none" if verdict.metric is None else f"{verdict.metric:g}"
            verdict.reject(f"not among the best {rules.best} ({printable(metric)} {value})")


def _apply_last(verdicts: Sequence[Verdict], counts: Iterable[int | None]) -> None:
    """Reject all but the last checkpoints, by the largest of the numbers."""
    left = _remaining(verdicts)
    last = max(len(left) if count is None else count for count in counts)
    if not left:
        return
    if len(left) < last:
        log.info("there are only %d of the last %d", len(left), last)
    for verdict in left[:-last]:
        verdict.reject(f"not among the last {last}")


def _apply_every(verdicts: Sequence[Verdict], run: Run, every: int) -> None:
    """Reject all but every n-th checkpoint, counted back from the last."""
    require_order(run, "every")
    for place, verdict in enumerate(reversed(_remaining(verdicts))):
        if place % every:
            verdict.reject(f"between every {every}")
