"""The greedy soup: of the checkpoints that are averaged, only those stay that do no harm.

Wortsman et al. 2022 (arXiv 2203.05482), recipe 1: the checkpoints in the order of their held-out
metric, best first; each stays if the uniform average of those that stayed before, with it, is not
worse than without it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg.average import average, open_run, write_averages
from ckptavg.batchnorm.files import refresh_checkpoint
from ckptavg.batchnorm.together import of_both
from ckptavg.errors import SelectionError, printable
from ckptavg.evaluation.evaluate import EvaluateOptions, Evaluator, said_once
from ckptavg.formats import SUFFIXES, open_checkpoint
from ckptavg.formats.parts import as_paths
from ckptavg.merge.recipe import AverageOptions, Recipe, recipes_of
from ckptavg.merge.schemes import parse
from ckptavg.merge.weights import Weights
from ckptavg.model.making import random_state_kept
from ckptavg.options import takes_fields_of
from ckptavg.select.metrics import mode_of
from ckptavg.select.rules import Selection, Verdict, chosen, select
from ckptavg.select.run import find_run
from ckptavg.write.temporary import temporary_beside
from ckptavg.write.writing import check_vacant, refuse_own_input

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ckptavg.batchnorm.options import RefreshOptions
    from ckptavg.batchnorm.report import RefreshReport
    from ckptavg.formats.parts import PathLike
    from ckptavg.select.metrics import Mode
    from ckptavg.select.run import Run
    from ckptavg.write.provenance import Summary

SCHEME = "greedy soup"


@dataclass(frozen=True)
class SoupStep:
    """What became of a candidate.

    Attributes:
        checkpoint: its path below the folder that all of them have in common.
        path: its path.
        alone: its own metric; NaN where it has none.
        soup: the metric of the average with it; NaN where that was not tried.
        kept: whether it stays.
    """

    checkpoint: str
    path: str
    alone: float
    soup: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """How a soup was made.

    Attributes:
        metric: what was measured.
        mode: `min` or `max`: whether that should be low or high.
        steps: one for each candidate, in the order in which they were tried.
        value: the metric of the soup.
        uniform: the metric of the uniform average of all candidates, for comparison.
        summary: what was written.
        refresh: what the refresh of that has done, where one was asked for.
    """

    metric: str
    mode: str
    steps: tuple[SoupStep, ...]
    value: float
    uniform: float
    summary: Summary
    refresh: RefreshReport | None


@dataclass(frozen=True, kw_only=True)
class SoupOptions(EvaluateOptions):
    """How to make a soup: keywords of `soup`.

    Attributes:
        mode: whether the metric should be low (`min`) or high; None where its name says it.
        metrics: a file that has the candidates' own metrics: then only trials are evaluated.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        threads: how many average at once; None as in `average`.
    """

    mode: Mode | None = None
    metrics: Path | None = None
    force: bool = False
    fsync: bool = True
    threads: int | None = None


@takes_fields_of(SoupOptions)
@random_state_kept()
def soup(inputs: PathLike | Iterable[PathLike], output: PathLike, options: SoupOptions) -> Soup:
    """Make a greedy soup of checkpoints.

    Trials are files in a directory beside the output, which goes away in any case, and not a sum
    that is kept in memory: what is evaluated has the very bits that are written in the end, rounded
    in the checkpoints' dtypes and made by the same code, and memory holds but the model.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        output: as in `average`.
        options: the fields of `SoupOptions`, as keywords: `model`, `loader` of held-out batches and
            so on. With `refresh`, the norm statistics of each checkpoint, each trial and the output
            are refreshed.

    Raises:
        CkptAvgError: the metric's mode is not certain, no candidate has a metric, or what
            `average`, `evaluate` and the refresh raise. There is no output then.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    inputs, target = as_paths(inputs), Path(output)
    mode = _mode_of(options.metric_name, options.mode)
    check_vacant(target, force=options.force)
    rules = options.select
    common: dict[str, Any] = {"select": rules, "key": options.key, "threads": options.threads}
    with said_once(), temporary_beside(target, folder=True) as folder:
        run = find_run(inputs, key=options.key, exclusion_reason=rules.exclusion_reason)
        refuse_own_input(target, run.files)
        taken = chosen(select(run, rules))
        given = None
        if options.metrics is not None:
            given = _read(run, taken, options.metric_name, options.metrics, mode)
        # What cannot be averaged, or not be put there, is to be found out before the evaluations.
        check = _Averager(inputs, AverageOptions(**common, force=True, dry_run=True))
        check.write([str(verdict.checkpoint.path) for verdict in taken], output)
        trial = folder / f"trial{target.suffix if target.suffix in SUFFIXES else SUFFIXES[0]}"
        trials = _Trials(inputs, taken, options, mode=mode, trial=trial, common=common)
        steps = trials.greedy(given)
        kept = [step.path for step in steps if step.kept]
        value, uniform = trials.value, trials.uniform(len(kept))
        del trials  # with its model: the refresh makes one of its own
        trial.unlink(missing_ok=True)
        last = AverageOptions(**common, force=options.force, fsync=options.fsync)
        summary, refresh = _write(
            inputs, output, kept, last, refresh=options.refresh, folder=folder
        )
    return Soup(options.metric_name, mode, tuple(steps), value, uniform, summary, refresh)


def _mode_of(metric: str, mode: Mode | None) -> Mode:
    """Whether the metric should be low or high.

    Raises:
        SelectionError: that is not certain.
    """
    found = mode or mode_of(metric)
    if found is None:
        raise SelectionError(
            f"whether {printable(metric)} should be low or high is not certain from its name",
            remedy="say so with --mode min or --mode max",
        )
    return found


def _read(found: Run, taken: Sequence[Verdict], metric: str, file: Path, mode: Mode) -> list[float]:
    """The candidates' metrics from a file; NaN for those that it lacks.

    Raises:
        SelectionError: it has none of them.
    """
    rules = Selection(best=len(found.checkpoints), metric=metric, metrics=file, mode=mode)
    metrics = {verdict.checkpoint: verdict.metric for verdict in select(found, rules)}
    values = [metrics[verdict.checkpoint] for verdict in taken]
    return [math.nan if value is None else value for value in values]


class _Averager:
    """The candidates, any of which make an average."""

    def __init__(self, inputs: Sequence[Path], options: AverageOptions) -> None:
        self._run, self._options = open_run(inputs, options), options
        [self._all] = recipes_of(self._run, parse("uniform"), options.select, options)

    def write(
        self,
        paths: Iterable[str],
        output: str | os.PathLike[str],
        *,
        make_folder: Callable[[], Path] | None = None,
    ) -> Summary:
        """Write the uniform average of some of the candidates, in the order of training.

        Args:
            paths: of these candidates.
            output: as in `average`.
            make_folder: as in `write_averages`.
        """
        wanted = set(paths)
        members = tuple(each for each in self._all.members if str(each.path) in wanted)
        weights = Weights(SCHEME, (1.0,) * len(members), float(len(members)))
        recipe = Recipe("", members, weights)
        [summary] = write_averages(
            self._run, [recipe], [output], self._options, make_folder=make_folder
        )
        return summary


class _Trials:
    """The candidates, and what averages of them are worth.

    Attributes:
        value: the metric of the soup so far.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        taken: Sequence[Verdict],
        options: SoupOptions,
        *,
        mode: Mode,
        trial: Path,
        common: Mapping[str, Any],
    ) -> None:
        self._taken, self._options, self._mode, self._trial = taken, options, mode, trial
        self._inputs, self._common = inputs, {**common, "force": True, "fsync": False}
        self._averager = _Averager(inputs, AverageOptions(**self._common))
        self._evaluator = Evaluator(options)
        self._evaluator.compare([verdict.checkpoint for verdict in taken])
        self.value = math.nan

    def greedy(self, given: Sequence[float] | None) -> list[SoupStep]:
        """Try the candidates, best first; of equals the later one.

        Args:
            given: their own metrics; None to find them out. The first is evaluated all the same:
                it is what the trials are held against.

        Raises:
            SelectionError: not one can be kept.
        """
        alone = [self._own(verdict) for verdict in self._taken] if given is None else given
        sign = 1 if self._mode == "min" else -1
        able = [index for index, value in enumerate(alone) if math.isfinite(value)]
        able.sort(key=lambda index: (sign * alone[index], -index))
        steps: list[SoupStep] = []
        members: list[str] = []
        for index in able:
            verdict = self._taken[index]
            path = str(verdict.checkpoint.path)
            if members:
                value = self._together([*members, path])
            else:
                value = alone[index] if given is None else self._own(verdict)
            kept = self._is_no_worse(value)
            if kept:
                members.append(path)
                self.value = value
            steps.append(SoupStep(verdict.checkpoint.name, path, alone[index], value, kept))
        if not members:
            raise SelectionError(
                f"{printable(self._options.metric_name)} is no finite number for any of "
                f"{len(alone)} checkpoints, so there is no first one"
            )
        unable = [index for index in range(len(alone)) if index not in able]
        for verdict, value in ((self._taken[index], alone[index]) for index in unable):
            path = str(verdict.checkpoint.path)
            steps.append(SoupStep(verdict.checkpoint.name, path, value, math.nan, kept=False))
        return steps

    def uniform(self, kept: int) -> float:
        """The metric of the uniform average of all, which is the soup if all were kept."""
        if kept == len(self._taken):
            return self.value
        # For comparison only, so NaN may come out: whoever made it has not been kept.
        average(self._inputs, self._trial, **self._common, allow_nonfinite=True)
        return self._evaluated(self._trial)

    def _is_no_worse(self, value: float) -> bool:
        """Whether a soup is as good as the last one; the first has to be a number only."""
        if math.isnan(self.value) or not math.isfinite(value):
            return math.isfinite(value)
        return value <= self.value if self._mode == "min" else value >= self.value

    def _own(self, verdict: Verdict) -> float:
        return self._evaluated(verdict.checkpoint.path, key=self._common["key"])

    def _together(self, paths: Sequence[str]) -> float:
        self._averager.write(paths, self._trial)
        return self._evaluated(self._trial)

    def _evaluated(self, path: Path, *, key: str | None = None) -> float:
        value = self._evaluator.one(open_checkpoint(path, key=key))
        if self._options.progress is not None:
            self._options.progress(1, 2 * len(self._taken))
        return value


def _write(
    inputs: Sequence[Path],
    output: str | os.PathLike[str],
    kept: Sequence[str],
    options: AverageOptions,
    *,
    refresh: RefreshOptions | None,
    folder: Path,
) -> tuple[Summary, RefreshReport | None]:
    """Write the soup, with its norm statistics refreshed if that is asked for."""
    if refresh is None:
        return _Averager(inputs, options).write(kept, output), None
    unsynced = dataclasses.replace(options, fsync=False)
    summary = _Averager(inputs, unsynced).write(kept, output, make_folder=lambda: folder)
    report = refresh_checkpoint(
        Path(summary.output),
        output,
        **vars(refresh),
        is_optional=True,
        force=options.force,
        fsync=options.fsync,
    )
    return of_both(summary, Path(output), report), report
