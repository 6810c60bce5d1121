"""The result of a sweep: a row for each average and each checkpoint, and which one is the best."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.evaluation.intervals import Difference, paired_difference
from ckptavg.select.metrics import Mode, indices_of_best, mode_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.batchnorm.report import RefreshReport
    from ckptavg.evaluation.measures import Units
    from ckptavg.write.provenance import Summary


BEST = "best average"


@dataclass(frozen=True)
class Row:
    """An average, or a checkpoint by itself, and what it is worth on the held-out data.

    Attributes:
        scheme: of the average's weights; empty for a checkpoint.
        last: the number of last checkpoints that were asked for; None for all, or a checkpoint.
        count: the number of checkpoints with a weight other than 0.
        oldest: name of the first of them.
        newest: name of the last of them, or of the checkpoint.
        step: of the last of them, where that is known.
        metrics: name to value; NaN and infinities as they are.
    """

    scheme: str
    last: int | None
    count: int
    oldest: str
    newest: str
    step: int | None
    metrics: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the metrics beside the others."""
        fields = vars(self) | {"kind": "average" if self.scheme else "checkpoint"}
        return {**{k: value for k, value in fields.items() if k != "metrics"}, **self.metrics}


Verdict = Literal["better", "worse", "higher", "lower", "not told apart", "no interval"]


@dataclass(frozen=True)
class Comparison:
    """The best average against a checkpoint, on the test loader.

    Attributes:
        metric: what is compared.
        against: `last checkpoint` or `best checkpoint`.
        checkpoint: its name.
        average: the metric of the best average.
        other: the metric of the checkpoint.
        difference: the one less the other, over examples or batches.
        unit: `example` or `batch`.
        mode: whether the metric should be low or high; None where that is not certain.
    """

    metric: str
    against: str
    checkpoint: str
    average: float
    other: float
    difference: Difference
    unit: str
    mode: Mode | None

    @property
    def verdict(self) -> Verdict:
        """What the interval says, which is nothing as long as it has 0."""
        if not self.difference.has_interval:
            return "no interval"
        if not self.difference.is_told_apart:
            return "not told apart"
        is_higher = self.difference.value > 0
        if self.mode is None:
            return "higher" if is_higher else "lower"
        return "better" if is_higher is (self.mode == "max") else "worse"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the averages and the checkpoints are worth.

    Attributes:
        metric: what the best was chosen by.
        mode: `min` or `max`: whether that should be low or high.
        averages: a row for each average.
        checkpoints: a row for each checkpoint that was evaluated, in the order of training.
        best: the row of the best average. It was picked among all averages on the same data.
        test: the best average against checkpoints on the test loader; empty without one.
        advice: what is recorded of the run, and what it means for averages.
        summary: what was written; None if nothing was.
        refresh: what the refresh of that has done, where one was asked for.
    """

    metric: str
    mode: Mode
    averages: tuple[Row, ...]
    checkpoints: tuple[Row, ...]
    best: Row
    test: tuple[Comparison, ...] = ()
    advice: tuple[str, ...] = ()
    summary: Summary | None = field(default=None, repr=False)
    refresh: RefreshReport | None = field(default=None, repr=False)

    @property
    def last_checkpoint(self) -> Row:
        """The row of the last checkpoint."""
        return self.checkpoints[-1]

    @property
    def best_checkpoint(self) -> Row | None:
        """The row of the best checkpoint; None where only the last one was evaluated."""
        return best_of(self.checkpoints, self.metric, self.mode) if self.checkpoints[1:] else None

    @property
    def baselines(self) -> dict[str, Row]:
        """The checkpoints that the best average is compared with, each once."""
        rows, best = {"last checkpoint": self.last_checkpoint}, self.best_checkpoint
        if best is not None and best is not self.last_checkpoint:
            rows["best checkpoint"] = best
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """All rows in plain values: those of averages first."""
        return [row.as_dict() for row in (*self.averages, *self.checkpoints)]

    def record(self) -> dict[str, Any]:
        """The table for the provenance of the best average; what is not finite is None."""
        rows = [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            }
            for row in self.rows()
        ]
        return {"metric": self.metric, "mode": self.mode, "rows": rows}

    def as_dict(self) -> dict[str, Any]:
        """The result in plain values, for JSON."""
        best_checkpoint = self.best_checkpoint
        return {
            "metric": self.metric,
            "mode": self.mode,
            "averages": [row.as_dict() for row in self.averages],
            "checkpoints": [row.as_dict() for row in self.checkpoints],
            "best": self.best.as_dict(),
            "last_checkpoint": self.last_checkpoint.as_dict(),
            "best_checkpoint": None if best_checkpoint is None else best_checkpoint.as_dict(),
            "test": [{**asdict(each), "verdict": each.verdict} for each in self.test],
            "advice": list(self.advice),
            "summary": self.summary,
            "refresh": self.refresh,
        }


def best_of(rows: Sequence[Row], metric: str, mode: Mode) -> Row | None:
    """The best row; of equal ones the later. None if no metric is a finite number."""
    found = indices_of_best([row.metrics.get(metric) for row in rows], 1, mode)
    return rows[found[0]] if found else None


def comparisons(
    sweep: Sweep,
    values: Mapping[str, Mapping[str, float]],
    units: Mapping[str, Mapping[str, Units]],
    unit: str,
) -> tuple[Comparison, ...]:
    """The best average against each baseline, in each metric.

    Args:
        sweep: the result so far.
        values: the metrics on the test loader by name, of `BEST` and of each baseline.
        units: the same in each example or batch.
        unit: which of the two.
    """
    found = []
    for against, row in sweep.baselines.items():
        for metric, value in values[BEST].items():
            mine, theirs = (units[name].get(metric) for name in (BEST, against))
            difference = Difference(value - values[against][metric], math.nan, math.nan, 0)
            if mine is not None and theirs is not None:
                difference = paired_difference(mine, theirs)
            mode = sweep.mode if metric == sweep.metric else mode_of(metric)
            found.append(
                Comparison(
                    metric, against, row.newest, value, values[against][metric], difference,
                    unit, mode,
                )
            )  # fmt: skip
    return tuple(found)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with a header; a metric that a row does not have is empty there."""
    text, names = io.StringIO(), dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
