"""The greedy soup: of the checkpoints that are averaged, only those stay that do no harm.

Wortsman et al. 2022 (arXiv 2203.05482), recipe 1: the checkpoints in the order of their held-out
metric, best first; each stays if the uniform average of those that stayed before, with it, is not
worse than without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptavg.average import open_run, write_averages
from ckptavg.batchnorm.together import write_refreshed
from ckptavg.errors import SelectionError, printable, said_once
from ckptavg.evaluation.evaluate import EvaluateOptions, Evaluator
from ckptavg.evaluation.measures import metric_mode
from ckptavg.formats import SUFFIXES, open_checkpoint
from ckptavg.merge.patterns import any_matches
from ckptavg.merge.recipe import AverageOptions, Recipe
from ckptavg.merge.weights import uniform
from ckptavg.model.making import random_state_kept
from ckptavg.options import takes_fields_of
from ckptavg.select.rules import Selection, chosen, select
from ckptavg.write.temporary import temporary_beside
from ckptavg.write.writing import check_vacant, refuse_own_input

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from ckptavg.batchnorm.report import RefreshReport
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
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
        skip: regular expressions; tensors whose names match are not in the soup, and are not loaded
            from the candidates.
        take_last: regular expressions; tensors whose names match are those of the last checkpoint
            that is kept.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        threads: how many average at once; None as in `average`.
    """

    mode: Mode | None = None
    metrics: Path | None = None
    skip: Sequence[str] = ()
    take_last: Sequence[str] = ()
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
    target = Path(output)
    mode = metric_mode(options.metric, options.mode)
    check_vacant(target, force=options.force)
    averaging = AverageOptions(
        select=options.select, key=options.key, skip=options.skip, take_last=options.take_last,
        threads=options.threads, force=True, fsync=False,
    )  # fmt: skip
    with said_once(), temporary_beside(target, folder=True) as folder:
        run = open_run(inputs, averaging)
        refuse_own_input(target, run.files)
        candidates = [verdict.checkpoint for verdict in chosen(select(run, options.select))]
        given = None
        if options.metrics is not None:
            given = _read(run, candidates, options.metric_name, options.metrics, mode)
        # What cannot be averaged, or not be put there, is to be found out before the evaluations.
        _write(run, candidates, output, replace(averaging, dry_run=True))
        trial = folder / f"trial{target.suffix if target.suffix in SUFFIXES else SUFFIXES[0]}"
        trials = _Trials(run, candidates, options, averaging, mode=mode, trial=trial)
        steps = trials.greedy(given)
        members, value, uniform = trials.members, trials.value, trials.uniform()
        del trials  # with its model: the refresh makes one of its own
        trial.unlink(missing_ok=True)
        last = replace(averaging, force=options.force, fsync=options.fsync)
        report = None
        if options.refresh is None:
            summary = _write(run, members, output, last)
        else:
            recipe, last = _recipe(run, members, last)
            summary, report = write_refreshed(run, recipe, output, last, options.refresh)
    return Soup(options.metric_name, mode, tuple(steps), value, uniform, summary, report)


def _read(
    run: Run, candidates: Sequence[Checkpoint], metric: str, file: Path, mode: Mode
) -> list[float]:
    """The candidates' metrics from a file; NaN for those that it lacks.

    Raises:
        SelectionError: it has none of them.
    """
    rules = Selection(best=len(run.checkpoints), metric=metric, metrics=file, mode=mode)
    metrics = {verdict.checkpoint: verdict.metric for verdict in select(run, rules)}
    values = [metrics[checkpoint] for checkpoint in candidates]
    return [math.nan if value is None else value for value in values]


def _write(
    run: Run, members: Collection[Checkpoint], output: PathLike, options: AverageOptions
) -> Summary:
    """Write the uniform average of some of a run's checkpoints."""
    recipe, options = _recipe(run, members, options)
    [summary] = write_averages(run, [recipe], [output], options)
    return summary


def _recipe(
    run: Run, members: Collection[Checkpoint], options: AverageOptions
) -> tuple[Recipe, AverageOptions]:
    """The uniform average of some of a run's checkpoints, in the order of training.

    A dry run is of all candidates, in which patterns must match; some members may lack the names.
    """
    ordered = tuple(checkpoint for checkpoint in run.checkpoints if checkpoint in members)
    if not options.dry_run:
        names = {name for each in ordered for name in (*each.tensors, *each.other_entries)}
        skip, take_last = (
            tuple(each for each in patterns if any(any_matches([each], name) for name in names))
            for patterns in (options.skip, options.take_last)
        )
        options = replace(options, skip=skip, take_last=take_last)
    return Recipe(SCHEME, ordered, uniform(len(ordered))), options


class _Trials:
    """The candidates, and what averages of them are worth.

    Attributes:
        members: the candidates that were kept so far.
        value: the metric of their average; NaN as long as there are none.
    """

    def __init__(
        self,
        run: Run,
        candidates: Sequence[Checkpoint],
        options: SoupOptions,
        averaging: AverageOptions,
        *,
        mode: Mode,
        trial: Path,
    ) -> None:
        self._run, self._candidates, self._options = run, candidates, options
        self._averaging, self._trial = averaging, trial
        self._sign = 1 if mode == "min" else -1
        skipped = replace(options, ignore=(*options.ignore, *options.skip))
        self._evaluator = Evaluator(skipped, candidates)
        self._evaluator.compare(candidates)
        self.members: list[Checkpoint] = []
        self.value = math.nan

    def greedy(self, given: Sequence[float] | None) -> list[SoupStep]:
        """Try the candidates, best first; of equals the later one.

        Args:
            given: their own metrics; None to find them out. The first is evaluated all the same:
                it is what the trials are held against.

        Raises:
            SelectionError: not one can be kept.
        """
        alone = given or [self._evaluated(checkpoint) for checkpoint in self._candidates]
        pairs = [*zip(self._candidates, alone, strict=True)]
        able = [pair for pair in reversed(pairs) if math.isfinite(pair[1])]
        able.sort(key=lambda pair: self._sign * pair[1])  # which leaves equals in their order
        steps = []
        for checkpoint, own in able:
            if self.members:
                value = self._average([*self.members, checkpoint], self._averaging)
            else:
                value = own if given is None else self._evaluated(checkpoint)
            is_kept = self._is_no_worse(value)
            if is_kept:
                self.members.append(checkpoint)
                self.value = value
            steps.append(_step(checkpoint, own, value, kept=is_kept))
        if not self.members:
            raise SelectionError(
                f"{printable(self._options.metric_name)} is not finite for any of "
                f"{len(alone)} checkpoints, so the soup cannot start"
            )
        unable = [pair for pair in pairs if not math.isfinite(pair[1])]
        return steps + [_step(*pair, math.nan, kept=False) for pair in unable]

    def uniform(self) -> float:
        """The metric of the uniform average of all, which is the soup if all were kept."""
        if len(self.members) == len(self._candidates):
            return self.value
        # For comparison only, so NaN may come out: whoever made it has not been kept.
        return self._average(self._candidates, replace(self._averaging, allow_nonfinite=True))

    def _is_no_worse(self, value: float) -> bool:
        """Whether a soup is as good as the last one; the first has to be a number only."""
        if not self.members or not math.isfinite(value):
            return math.isfinite(value)
        return self._sign * value <= self._sign * self.value

    def _average(self, members: Collection[Checkpoint], options: AverageOptions) -> float:
        """The metric of the average of some of the candidates."""
        _write(self._run, members, self._trial, replace(options, container="weights"))
        return self._evaluated(open_checkpoint(self._trial))

    def _evaluated(self, checkpoint: Checkpoint) -> float:
        value = self._evaluator.one(checkpoint)
        if self._options.progress is not None:
            self._options.progress(1, 2 * len(self._candidates))
        return value


def _step(checkpoint: Checkpoint, alone: float, soup: float, *, kept: bool) -> SoupStep:
    return SoupStep(checkpoint.name, str(checkpoint.path), alone, soup, kept)
