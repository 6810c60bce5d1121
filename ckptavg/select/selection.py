"""Choose among the checkpoints of a run, as the paper does, and say why the others are not taken.

The rules narrow the choice in this order: include and exclude, start, steps or cycle or minima of
the learning rate, best, last, every.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import Counter
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ckptavg.errors import SelectionError, printable
from ckptavg.formats.paths import absolute
from ckptavg.select.learning_rates import Reading, at_minima
from ckptavg.select.metrics import Mode, best, from_name, mode_of, read_metrics
from ckptavg.select.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.select.collect import Survey

log = logging.getLogger("ckptavg")

_PERCENT = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*%", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_RANGE = re.compile(r"(\d{1,18}):(\d{1,18})(?::(\d{1,18}))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which checkpoints to take.

    Attributes:
        include: patterns of names (`*`, `?`, `[...]`), of which one must fit; all where there
            are none.
        exclude: patterns of names, of which none may fit.
        start: the step with which to begin, or a share of the whole training such as `75%`.
        steps: steps such as `100,200,300`, or a range with its ends in it such as `100:1000:100`.
        cycle: take those at the ends of cycles of this length, counted from the start.
        lr_minima: take those saved at a local minimum of the learning rate.
        lr_recorded: what the trainer records: the rate that was `used`, or, saving after
            `scheduler.step()`, the `next` one; None to find out.
        best: take so many with the best metric.
        metric: which metric that is.
        mode: `min` or `max`; None where the metric's name says it.
        metrics: a file that has the metric, CSV or JSON.
        last: take so many of the last; several numbers make several averages.
        every: take every so many, counted back from the last.
        unit: what steps are: `global_step`, `step` or `epoch`; None for the first of these that
            all of the checkpoints record.
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
    last: int | Sequence[int] | None = None
    every: int | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense together.

        Raises:
            SelectionError: the first of it.
        """
        rules = [name for name in ("steps", "cycle", "lr_minima") if getattr(self, name)]
        if len(rules) > 1:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in rules)
            raise SelectionError(f"{options} are different ways of choosing: take one")
        if self.best is not None and self.metric is None:
            raise SelectionError("--best needs to know by what", remedy="name it with --metric")
        if self.metric is None and (self.metrics is not None or self.mode is not None):
            raise SelectionError("--metrics and --mode need a --metric")
        for name in ("cycle", "best", "last", "every"):
            value = getattr(self, name)
            for number in (value,) if isinstance(value, int) else value or ():
                if number < 1:
                    raise SelectionError(f"--{name} is at least 1, not {number}")
        if self.mode not in (None, "min", "max"):
            raise SelectionError(f"mode is 'min' or 'max', not {self.mode!r}")

    @property
    def counts(self) -> tuple[int | None, ...]:
        """How many of the last checkpoints each of several averages takes; None stands for all."""
        return tuple(self.last or (None,)) if not isinstance(self.last, int) else (self.last,)

    def unwanted(self, name: str) -> str | None:
        """Why a checkpoint is left out by its name alone, if it is."""
        if self.include and not _fits(name, self.include):
            return "not among --include"
        if pattern := _fits(name, self.exclude):
            return f"--exclude {pattern}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """The rules that were given, for the provenance: no paths."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["metrics"] = self.metrics is not None and self.metrics.name
        return {
            name: list(value) if isinstance(value, tuple | list) else value
            for name, value in given.items()
            if value
        }


def _fits(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that the name fits, or its last part does."""
    base = name.rpartition("/")[2]
    fitting = (
        pattern
        for pattern in patterns
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(base, pattern)
    )
    return next(fitting, None)


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is taken.

    Attributes:
        checkpoint: the checkpoint.
        name: its path below the folder that all have in common.
        reason: why not; empty where it is taken.
        step: its place in the training as it counts itself, where it is known.
        done: how much of the training was done, in the same unit.
        unit: what the step is: `global_step`, `step`, `epoch`, or the `number` in the name.
        rate: the learning rate that its weights were made with, where it was asked for.
        metric: its metric, where it was asked for.
    """

    checkpoint: Checkpoint
    name: str
    reason: str = ""
    step: int | None = None
    done: int | None = None
    unit: str = "step"
    rate: float | None = None
    metric: float | None = None

    @property
    def taken(self) -> bool:
        """Whether it is."""
        return not self.reason


def select(found: Survey, selection: Selection) -> list[Verdict]:
    """Say of each checkpoint whether it is taken, in the order of training.

    Raises:
        SelectionError: the rules need what the checkpoints do not record.
    """
    chooser = _Chooser(found, selection)
    for rule in (
        chooser.start, chooser.steps, chooser.cycle, chooser.lr_minima, chooser.best,
        chooser.last, chooser.every,
    ):  # fmt: skip
        rule()
    return chooser.verdicts()


def chosen(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those that are taken.

    Raises:
        SelectionError: there are none.
    """
    taken = [verdict for verdict in verdicts if verdict.taken]
    if not taken:
        last = verdicts[-1]
        raise SelectionError(
            f"none of {len(verdicts)} checkpoints is left; of the last one, "
            f"{printable(last.name)}: {last.reason}",
            remedy="`ckptavg inspect` with the same options tells of all",
        )
    return taken


class _Chooser:
    """The checkpoints while the rules narrow them down."""

    def __init__(self, found: Survey, selection: Selection) -> None:
        self._checkpoints, self._selection = found.checkpoints, selection
        self._names = found.labels()
        self._known = found.order_is_known
        self._reasons = [""] * len(self._checkpoints)
        self._rates: list[float | None] = [None] * len(self._checkpoints)
        self._metrics: list[float | None] = [None] * len(self._checkpoints)
        self._begin = 0
        self._timeline = Timeline.of(self._checkpoints, self._names, selection.unit)

    def verdicts(self) -> list[Verdict]:
        """What has come out."""
        unknown = [None] * len(self._checkpoints)
        columns = (
            *(self._checkpoints, self._names, self._reasons),
            *(self._timeline.numbers or unknown, self._timeline.done or unknown),
            *([self._timeline.unit] * len(self._checkpoints), self._rates, self._metrics),
        )
        return [Verdict(*row) for row in zip(*columns, strict=True)]

    def _left(self) -> list[int]:
        return [index for index, reason in enumerate(self._reasons) if not reason]

    def _keep(self, keep: Callable[[int], bool], reason: Callable[[int], str]) -> None:
        for index in self._left():
            if not keep(index):
                self._reasons[index] = reason(index)

    def _need_steps(self, option: str) -> None:
        if self._timeline.numbers is None:
            raise SelectionError(
                f"{option} needs to know the step of each checkpoint: not all record one, and "
                "their names do not tell",
                remedy="put the step into every name",
            )

    def start(self) -> None:
        """Those from a step on, or from a share of the whole on."""
        if self._selection.start is None:
            return
        self._need_steps("--start")
        text = str(self._selection.start).strip()
        timeline = self._timeline
        if percent := _PERCENT.fullmatch(text):
            # Exactly: 55 % of 100 is 55, and not 55.00000000000001.
            threshold = Fraction(percent[1]) * max(timeline.done) / 100
            self._keep(lambda i: timeline.done[i] >= threshold, lambda _: f"before {text}")
            left = self._left()
            self._begin = timeline.done[left[0]] if left else 0
        elif _NUMBER.fullmatch(text):
            first = int(text)
            numbers = timeline.checked
            self._keep(lambda i: numbers[i] >= first, lambda _: f"before {timeline.unit} {first}")
            self._begin = timeline.done_at(first)
        else:
            raise SelectionError(f"--start is a step or a share such as 75%, not {text!r}")

    def steps(self) -> None:
        """Those of certain steps."""
        if self._selection.steps is None:
            return
        self._need_steps("--steps")
        numbers, unit = self._timeline.checked, self._timeline.unit
        text = self._selection.steps.replace(" ", "")
        if found := _RANGE.fullmatch(text):
            first, last, stride = int(found[1]), int(found[2]), int(found[3] or 1)
            if stride < 1:
                raise SelectionError(f"--steps {text}: the stride is at least 1")
            wanted = range(first, last + 1, stride)
        elif all(map(_NUMBER.fullmatch, text.split(","))):
            listed = {int(number) for number in text.split(",")}
            if missing := sorted(listed - set(numbers)):
                absent = ", ".join(map(str, missing))
                raise SelectionError(f"there is no checkpoint of {unit} {absent}")
            self._keep(lambda i: numbers[i] in listed, lambda _: "not among --steps")
            return
        else:
            raise SelectionError(f"--steps is 100,200,300 or 100:1000:100, not {text!r}")
        self._keep(lambda i: numbers[i] in wanted, lambda _: "not among --steps")

    def cycle(self) -> None:
        """Those at the ends of cycles: `mod(i - start, c) = 0` (Izmailov et al. 2018, Algorithm 1).

        The start is one of them.
        """
        length = self._selection.cycle
        if length is None:
            return
        self._need_steps("--cycle")
        if self._selection.unit is None and "epoch" in self._timeline.others:
            raise SelectionError(
                f"--cycle may be counted in {self._timeline.unit} or in epochs, which the "
                "checkpoints record both",
                remedy=f"say --unit {self._timeline.unit} or --unit epoch",
            )
        done, begin = self._timeline.done, self._begin
        self._keep(lambda i: (done[i] - begin) % length == 0, lambda _: "not at the end of a cycle")

    def lr_minima(self) -> None:
        """Those saved at a local minimum of the learning rate."""
        if not self._selection.lr_minima:
            return
        if not self._known:
            raise SelectionError("--lr-minima needs to know the order of the checkpoints")
        rates, at_minimum = at_minima(self._checkpoints, self._names, self._selection.lr_recorded)
        self._rates = list(rates)
        self._keep(lambda i: at_minimum[i], lambda i: f"its rate {rates[i]:g} is no minimum")

    def best(self) -> None:
        """Those with the best metric."""
        metric = self._selection.metric
        if metric is None:
            return
        self._metrics = self._read_metric(metric)
        if self._selection.best is None:
            return
        mode = self._selection.mode or mode_of(metric)
        if mode is None:
            raise SelectionError(
                f"whether {printable(metric)} should be low or high is not certain from its name",
                remedy="say so with --mode min or --mode max",
            )
        left = self._left()
        values = [self._metrics[index] for index in left]
        if not any(value is not None for value in values):
            raise SelectionError(
                f"none of the checkpoints has the metric {printable(metric)}",
                remedy=f"{self._metrics_there()}--metrics FILE gives it",
            )
        winners = {left[position] for position in best(values, self._selection.best, mode)}
        self._keep(lambda i: i in winners, lambda i: self._lost(i, metric))

    def _lost(self, index: int, metric: str) -> str:
        value = self._metrics[index]
        what = f"no {printable(metric)}" if value is None else f"{printable(metric)} {value:g}"
        return f"not among the best {self._selection.best} ({what})"

    def _read_metric(self, metric: str) -> list[float | None]:
        """Each checkpoint's value, from the file, from the checkpoint, or from its name."""
        if self._selection.metrics is not None:
            table = read_metrics(self._selection.metrics, metric)
            return _look_up_all(table, self._named())
        values = []
        for name, checkpoint in self._named():
            recorded = checkpoint.training.metrics.get(metric)
            values.append(from_name(name, metric) if recorded is None else recorded)
        return values

    def _named(self) -> list[tuple[str, Checkpoint]]:
        return list(zip(self._names, self._checkpoints, strict=True))

    def _metrics_there(self) -> str:
        known = sorted({m for checkpoint in self._checkpoints for m in checkpoint.training.metrics})
        shown = ", ".join(map(printable, known[:10]))
        return f"recorded are: {shown}; " if shown else ""

    def last(self) -> None:
        """So many of the last."""
        count = max((count for count in self._selection.counts if count), default=None)
        if count is not None:
            last = set(self._left()[-count:])
            self._check_order("--last")
            self._keep(lambda i: i in last, lambda _: f"not among the last {count}")

    def every(self) -> None:
        """Every so many; the last stays in any case."""
        if self._selection.every is not None:
            stride = self._selection.every
            kept = set(self._left()[::-1][::stride])
            self._check_order("--every")
            self._keep(lambda i: i in kept, lambda _: f"between every {stride}")

    def _check_order(self, option: str) -> None:
        if not self._known:
            raise SelectionError(
                f"{option} needs to know the order of the checkpoints, and only some have a step",
                remedy="put the step into every name",
            )


def _look_up_all(
    table: dict[str, float], named: Sequence[tuple[str, Checkpoint]]
) -> list[float | None]:
    """Each checkpoint's value in a table, by its path, its label, or a name that no other has."""
    names = Counter(checkpoint.path.name for _, checkpoint in named)
    stems = Counter(checkpoint.path.stem for _, checkpoint in named)
    values: list[float | None] = []
    for name, checkpoint in named:
        path = checkpoint.path
        keys = [str(path), str(absolute(path)), name]
        keys += [path.name] if names[path.name] == 1 else []
        keys += [path.stem] if stems[path.stem] == 1 else []
        values.append(next((table[key] for key in keys if key in table), None))
    return values
