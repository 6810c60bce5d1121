"""Which window, with which weights: averages in memory are evaluated on held-out data.

One walk from the newest checkpoint to the oldest reads each of them once, evaluates it, and every
average whose window it completes. Only the best average is written, by the ordinary way: it has the
very bytes that `average` and a refresh give it.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ckptavg.average import all_members, open_run, write_averages
from ckptavg.batchnorm.together import write_refreshed
from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import (
    RefreshError,
    SelectionError,
    UserCodeError,
    printable,
    said_once,
    without_notices,
)
from ckptavg.evaluation.evaluate import EvaluateOptions, Evaluator
from ckptavg.evaluation.journal import journal, task_of
from ckptavg.evaluation.measures import BUILT_IN, chosen_value, metric_mode
from ckptavg.evaluation.swept import BEST, Row, Sweep, best_of, comparisons
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import fingerprint
from ckptavg.formats.lora_adapter import is_adapter
from ckptavg.formats.paths import as_path
from ckptavg.merge.lora import check_adapters
from ckptavg.merge.names import choose_tensors
from ckptavg.merge.plan import make_plan
from ckptavg.merge.recipe import AverageOptions, recipes_of
from ckptavg.merge.schemes import schemes_of
from ckptavg.merge.walk import Stop, walk
from ckptavg.model.making import check_test_loader, import_all, random_state_kept
from ckptavg.options import takes_fields_of
from ckptavg.select.advice import advice
from ckptavg.select.order import timeline
from ckptavg.select.rules import require_order
from ckptavg.write.writing import check_vacant, refuse_own_input

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ckptavg.batchnorm.report import RefreshReport
    from ckptavg.evaluation.journal import Values
    from ckptavg.evaluation.measures import Units
    from ckptavg.evaluation.swept import Comparison
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
    from ckptavg.merge.plan import Plan
    from ckptavg.merge.recipe import Recipe
    from ckptavg.merge.schemes import Scheme
    from ckptavg.model.factories import Loader
    from ckptavg.select.metrics import Mode
    from ckptavg.select.run import Run
    from ckptavg.write.provenance import Summary

log = logging.getLogger("ckptavg")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(EvaluateOptions):
    """Which averages to evaluate, and how: keywords of `sweep`.

    `refresh` says how the norm statistics of averages are refreshed; checkpoints keep their own.

    Attributes:
        weights: the schemes. The windows are the numbers of `select.last`, None for all.
        mode: whether the metric should be low (`min`) or high; None where its name says it.
        members: evaluate every checkpoint as well; else the last one alone.
        test_loader: batches that choose nothing, on which the best average is compared with the
            last and the best checkpoint.
        test_loader_args: keywords for it.
        output: where the best average goes, as in `average`; None to write nothing.
        container: `last` writes it into the last checkpoint's torch file, as in `average`.
        journal: a directory that keeps each evaluation, so that a sweep that was stopped goes on.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        threads: how many write the output; None as in `average`.
        ranks: the processes that share the evaluations, all of which call this.
    """

    weights: str | Sequence[float] | Sequence[Scheme] = "uniform"
    mode: Mode | None = None
    members: bool = True
    test_loader: Loader | None = None
    test_loader_args: Mapping[str, Any] = field(default_factory=dict)
    output: PathLike | None = None
    container: Literal["weights", "last"] | None = None
    journal: PathLike | None = None
    force: bool = False
    fsync: bool = True
    threads: int | None = None
    ranks: Ranks = ALONE


@takes_fields_of(SweepOptions)
@random_state_kept()
def sweep(inputs: PathLike | Iterable[PathLike], options: SweepOptions) -> Sweep:
    """Evaluate averages of several windows and schemes, and find the best.

    Memory holds the model, one checkpoint, one average, and in float64 a sum for each scheme whose
    weights do not depend on the window (`uniform`, `ema`), else one for each window.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        options: the fields of `SweepOptions`, as keywords.

    Raises:
        CkptAvgError: the metric's mode is not certain, no average has a metric, norm statistics
            would be stale, or what `average`, `evaluate` and the refresh raise.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    mode, ranks = metric_mode(options.metric, options.mode), options.ranks
    averaging = AverageOptions(
        select=options.select, key=options.key, threads=options.threads, force=options.force,
        fsync=options.fsync, ranks=ranks, container=options.container,
    )  # fmt: skip
    with ranks.together(), said_once():
        run = open_run(inputs, averaging)
        require_order(run, "last")
        schemes = schemes_of(options.weights)
        recipes = _distinct(recipes_of(run, schemes, options.select, averaging))
        plan = _plan(run, recipes, averaging)
        _check(run, recipes, plan, options, averaging)
        import_all(options.seed, options.model, options.test_loader)  # what is wrong shows now
        evaluator = Evaluator(options, plan.members)
        if options.test_loader is not None:
            check_test_loader(
                (options.test_loader, options.test_loader_args),
                (options.loader, options.loader_args),
                "validate", plan.members,
            )  # fmt: skip
        rows, held = _evaluated(recipes, plan, evaluator, options, mode)
        averages, checkpoints = rows[: len(recipes)], rows[len(recipes) :]
        best = best_of(averages, options.metric_name, mode)
        if best is None:
            name = printable(options.metric_name)
            raise SelectionError(f"{name} is not finite for any of {len(averages)} averages")
        result = Sweep(
            metric=options.metric_name, mode=mode, best=best,
            averages=tuple(averages), checkpoints=tuple(checkpoints),
        )  # fmt: skip
        chosen = averages.index(best)
        if options.output is not None:
            recipe = replace(recipes[chosen], notes={"sweep": result.record()})
            summary, report = _written(run, recipe, options, averaging)
            result = replace(result, summary=summary, refresh=report)
        if options.test_loader is not None:
            test: tuple[Comparison, ...] = ()
            if ranks.rank == 0:
                stops = _stops(result, chosen, plan, held, options)
                test = _tested(result, stops, evaluator, options)
            result = replace(result, test=ranks.gather(test)[0])
        sentences = advice(run.checkpoints, recipes[chosen].members, options.select.lr_recorded)
        return replace(result, advice=tuple(sentences))


def _distinct(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Each average once: those of the last 10 and of all of 8 checkpoints are the same."""
    distinct: dict[object, Recipe] = {}
    for recipe in recipes:
        first = distinct.setdefault((recipe.members, recipe.weights), recipe)
        if first is not recipe:
            log.info("%s is the same average as %s", recipe.label, first.label)
    return list(distinct.values())


def _plan(run: Run, recipes: Sequence[Recipe], options: AverageOptions) -> Plan:
    """The plan of all averages; what cannot be averaged is refused here."""
    members = all_members(run, recipes)
    read, skipped = choose_tensors(members, [recipe.last for recipe in recipes], options)
    if len(members) > 1 and is_adapter(members[0]):
        check_adapters(members)
    weights = [recipe.weights_over(members) for recipe in recipes]
    return make_plan(read, weights, options, skipped=skipped)


def _check(
    run: Run,
    recipes: Sequence[Recipe],
    plan: Plan,
    options: SweepOptions,
    averaging: AverageOptions,
) -> None:
    """Refuse what would be useless, or could not be written, before anything is evaluated.

    Raises:
        SelectionError: the averages' norm statistics would be stale.
        OutputError: the output cannot be written.
    """
    stale = any(plan.norm_stats(recipe)["state"] == "stale" for recipe in recipes)
    if stale and options.refresh is None:
        raise SelectionError(
            "the averages' norm statistics are stale, so the averages would look worse than they "
            "are",
            remedy="give training batches to refresh them: `refresh_loader`",
        )
    if options.output is None:
        return
    check_vacant(Path(options.output), force=options.force)
    refuse_own_input(Path(options.output), run.files)
    with without_notices():
        dry = replace(averaging, dry_run=True, ranks=ALONE)
        write_averages(run, recipes[-1:], [options.output], dry)


def _evaluated(
    recipes: Sequence[Recipe],
    plan: Plan,
    evaluator: Evaluator,
    options: SweepOptions,
    mode: Mode,
) -> tuple[list[Row], dict[int, Checkpoint]]:
    """Evaluate the averages and members that have not been evaluated yet.

    Returns:
        A row for each average, then for each member that was evaluated; and, if there is a test
        loader, the last and the best member in memory, as far as this process has read them.
    """
    ranks, progress = options.ranks, options.progress
    names = _names(plan, options)
    folder = None if options.journal is None else as_path(options.journal)
    held = _Held(len(plan.members) - 1, mode)
    with journal(folder, task_of("sweep", options), ranks) as kept:
        left = [each for each, name in names.items() if name not in kept.done]
        if progress is not None:
            progress(len(names) - len(left), len(names))
        averages, members = (
            [number for is_average, number in left if is_average is kind][ranks.rank :: ranks.size]
            for kind in (True, False)
        )
        for stop in walk(plan, averages, members):
            if ranks.has_failed_peer():
                break  # gathering says so
            values = _metrics(evaluator, stop, options)
            kept.add(names[stop.is_average, stop.number], values)
            if options.test_loader is not None and not stop.is_average:
                held.keep(stop, values[options.metric_name])
            if progress is not None:
                progress(ranks.size, len(names))
        done: dict[str, Values] = {}
        for each in ranks.gather(kept.done):
            done |= each
    order = [member.name for member in plan.members]
    steps = dict(zip(order, timeline(plan.members).steps, strict=False))

    def row(name: str, newest: Checkpoint, recipe: Recipe | None = None) -> Row:
        step, metrics = steps.get(newest.name), done[name]
        if recipe is None:
            return Row("", None, 1, newest.name, newest.name, step, metrics)
        count, oldest = len(recipe.members), recipe.members[0].name
        return Row(recipe.scheme, recipe.last_count, count, oldest, newest.name, step, metrics)

    rows = [
        row(name, recipes[number].last, recipes[number])
        if is_average
        else row(name, plan.members[number])
        for (is_average, number), name in names.items()
    ]
    return rows, held.checkpoints


@dataclass
class _Held:
    """The last checkpoint and the best one so far, kept in memory: they are not read again.

    Attributes:
        last: the number of the last one.
        mode: whether the metric should be low or high.
        value: the best so far, with the sign that makes low ones better.
        checkpoints: what is kept, by the numbers.
    """

    last: int
    mode: Mode
    value: float = math.inf
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)

    def keep(self, stop: Stop, value: float) -> None:
        """Keep a member if it is the last one, or the best so far."""
        value = value if self.mode == "min" else -value
        if value < self.value:
            self.value = value
            self.checkpoints = {n: each for n, each in self.checkpoints.items() if n == self.last}
            self.checkpoints[stop.number] = stop.checkpoint
        elif stop.number == self.last:
            self.checkpoints[stop.number] = stop.checkpoint


def _names(plan: Plan, options: SweepOptions) -> dict[tuple[bool, int], str]:
    """What tells each average and each member from others in the journal, averages first."""
    prints = [fingerprint(member) for member in plan.members]
    names: dict[tuple[bool, int], str] = {}
    for number, weights in enumerate(plan.weights):
        facts = [each for each in zip(prints, weights.values, strict=True) if each[1]]
        digest = hashlib.sha256(repr((facts, weights.divisor)).encode()).hexdigest()
        names[True, number] = f"average {digest}"
    last = len(prints) - 1
    for number in range(0 if options.members else last, len(prints)):
        names[False, number] = f"checkpoint {prints[number]}"
    return names


def _metrics(evaluator: Evaluator, stop: Stop, options: SweepOptions) -> Values:
    """The metrics of an average, refreshed, or of a member as it is.

    Raises:
        CkptAvgError: the metric that chooses the best does not come out.
    """
    try:
        evaluator.become(stop.checkpoint, as_it_is=not stop.is_average)
    except RefreshError as error:
        if not stop.is_average or options.refresh is None:
            raise
        log.warning("the norm statistics of an average cannot be refreshed: %s", error.message)
        return {options.metric_name: math.nan}
    metrics = evaluator.measured(options.loader, options.loader_args)
    chosen_value(metrics, options.metric)
    return metrics


def _written(
    run: Run, recipe: Recipe, options: SweepOptions, averaging: AverageOptions
) -> tuple[Summary, RefreshReport | None]:
    """Write the best average by the ordinary way, with the table in its provenance."""
    output = options.output or ""
    if options.refresh is not None:
        return write_refreshed(run, recipe, output, averaging, options.refresh)
    [summary] = write_averages(run, [recipe], [output], averaging)
    return summary, None


def _stops(
    result: Sweep,
    chosen: int,
    plan: Plan,
    held: Mapping[int, Checkpoint],
    options: SweepOptions,
) -> Iterator[tuple[str, Checkpoint]]:
    """The best average and the baselines: what is neither written nor in memory is read again."""
    names = [member.name for member in plan.members]
    baselines = {names.index(row.newest): what for what, row in result.baselines.items()}
    for number in baselines.keys() & held.keys():
        yield baselines[number], held[number]
    averages = [chosen] if options.output is None else []
    for stop in walk(plan, averages, baselines.keys() - held.keys()):
        yield BEST if stop.is_average else baselines[stop.number], stop.checkpoint
    if options.output is not None:
        key = options.key if options.container == "last" else None
        yield BEST, open_checkpoint(Path(options.output), key=key)


def _tested(
    result: Sweep,
    stops: Iterable[tuple[str, Checkpoint]],
    evaluator: Evaluator,
    options: SweepOptions,
) -> tuple[Comparison, ...]:
    """Evaluate the best average and the baselines on the test loader, each once."""
    values: dict[str, Mapping[str, float]] = {}
    units: dict[str, Mapping[str, Units]] = {}
    for what, checkpoint in stops:
        is_refreshed = what != BEST or options.output is not None
        evaluator.become(checkpoint, as_it_is=is_refreshed)
        values[what], units[what] = _test_metrics(evaluator, options)
    unit = "example" if options.metric in BUILT_IN else "batch"
    return comparisons(result, values, units, unit)


def _test_metrics(
    evaluator: Evaluator, options: SweepOptions
) -> tuple[Mapping[str, float], Mapping[str, Units]]:
    """The metrics on the test loader, and their values by example or by batch, if there are."""
    where = cast("Loader", options.test_loader), options.test_loader_args
    try:
        units = evaluator.measured_units(*where, "test")
    except UserCodeError as error:
        log.warning("no interval: the metric cannot be computed for one batch: %s", error.__cause__)
        units = {}
    if options.metric in BUILT_IN:
        return {name: each.mean for name, each in units.items()}, units
    return evaluator.measured(*where, "test"), units
