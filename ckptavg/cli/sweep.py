"""`ckptavg sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command, without
from ckptavg.cli.console import Console, cell, plural, size, with_options
from ckptavg.cli.declarations import parse
from ckptavg.cli.report import say_report
from ckptavg.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.evaluation.swept import Comparison, Row, Sweep


_LAST, _WEIGHTS, _NO_MEMBERS = parse("""
--last N|all,...  Windows: the last N checkpoints, or all of them.  [default: 3,5,10,all]
--weights SCHEME  Schemes, as in `average`: uniform,ema:0.9,decay:linear.  [default: uniform]
--no-members      Evaluate no single checkpoints, except the last one.
""")
_TEST_LOADER, _TEST_LOADER_ARG = parse("""
--test-loader SPEC           Batches that are not used to choose. They compare the best average
                             with the last checkpoint and with the best one.
--test-loader-arg KEY=VALUE  Keyword argument for the test loader; repeatable.
""")
_OUTPUT, _CSV, _PLOT, _JOURNAL = parse("""
-o --output PATH  Where the best average goes, refreshed, as in `average`.
                  [default: nothing is written]
--csv OUT         CSV file for the table.
--plot PICTURE    PNG, SVG or PDF file for a plot of the metric against the window.
--journal DIR     Directory to save each evaluation in, so that a stopped sweep can continue.
""")


@click.command(
    cls=Command,
    groups={
        "Which averages": (_LAST, _WEIGHTS, _NO_MEMBERS),
        "Which checkpoints": (*options.CANDIDATES_BUT_LAST, options.KEY),
        "Model, data and metric": (
            *options.EVALUATION, options.METRIC, options.MODE, _TEST_LOADER, _TEST_LOADER_ARG,
        ),
        "Refresh of each average": options.EVALUATION_REFRESH,
        "What is written": (
            _OUTPUT, options.CONTAINER, _CSV, _PLOT, _JOURNAL, options.FORCE, options.NO_FSYNC,
        ),
        RUNNING: (options.THREADS, *options.COMMON),
    },
    no_effect=(
        *options.EVALUATION_NO_EFFECT,
        without("test_loader", "test_loader_args"),
        without("output", "container"),
    ),
)  # fmt: skip
@options.CHECKPOINTS
def sweep(
    console: Console,
    checkpoints: tuple[Path, ...],
    csv: Path | None,
    plot: Path | None,
    **params: Any,  # noqa: ANN401 - the fields of `SweepOptions`
) -> None:
    """Evaluate averages of several windows and schemes on held-out data, and find the best.

    CHECKPOINT is a checkpoint, or a directory of them, which are read once. Each combination of
    --last and --weights is averaged in memory, refreshed, and evaluated. --model and the loaders
    name your own code, which is imported and run. Under `torchrun --no-python` the processes share
    the evaluations.
    """
    if plot is not None:
        import ckptavg.evaluation.pictures  # noqa: F401 - fails now, and not after all evaluations
    from ckptavg.evaluation.sweep import SweepOptions
    from ckptavg.evaluation.sweep import sweep as run
    from ckptavg.write.writing import check_vacant

    files = [file for file in (csv, plot) if file is not None]
    for file in files:
        check_vacant(file, force=params["force"])
    fields = options.evaluation_fields(SweepOptions, params)
    with console.ranks() as ranks:
        with console.others_to_stderr(), console.progress("evaluating", "model") as progress:
            result = run(checkpoints, **fields, ranks=ranks, progress=progress)
        if ranks.rank == 0:
            _write(result, csv, plot)
    _say(console, result)
    if result.refresh is not None:
        say_report(console, result.refresh)
    if result.summary is not None:
        written = size(result.summary.bytes_written)
        console.say(f"  wrote {printable(params['output'])} ({written})")
    for file in files:
        console.say(f"  wrote {printable(file)}")
    console.result(result.as_dict())


def _write(result: Sweep, csv: Path | None, plot: Path | None) -> None:
    """Write the table and the plot, each whole or not at all."""
    from ckptavg.evaluation.swept import to_csv
    from ckptavg.write.temporary import replacing

    if csv is not None:
        with replacing(csv) as made:
            made.write_text(to_csv(result.rows()), encoding="utf-8")
    if plot is not None:
        from ckptavg.evaluation.pictures import draw_sweep

        draw_sweep(result, plot)


def _say(console: Console, result: Sweep) -> None:
    """Print the table, and what may be concluded from it."""
    names = list(dict.fromkeys(name for row in result.averages for name in row.metrics))
    rows = [("average", "last", "checkpoints", *map(printable, names))]
    rows += [_average(row, names, is_best=row is result.best) for row in result.averages]
    for what, row in result.baselines.items():
        rows.append((what, "", printable(row.newest), *_metrics(row, names)))
    console.say_table(rows)
    best, name = result.best, printable(result.metric)
    console.say(
        f"* best of {plural(len(result.averages), 'average')} by {name}, which was measured on the "
        f"data that chose it: {best.metrics[result.metric]:.5g}"
    )
    if result.test:
        from ckptavg.evaluation.intervals import FEWEST

        units = result.test[0].difference.units
        unit = result.test[0].unit
        intervals = "with 95 % intervals"
        if 0 < units < FEWEST:
            intervals = f"no interval: fewer than {plural(FEWEST, unit)}"
        elif not any(each.difference.has_interval for each in result.test):
            intervals = "no interval"
        console.say(f"on the test loader ({plural(units, unit)}), {intervals}:")
        console.say_table([_comparison(each) for each in result.test])
    elif len(result.averages) > 1:
        console.say(
            "  it may be worse on other data: compare it with the checkpoints by --test-loader"
        )
    for sentence in result.advice:
        console.say(with_options(sentence))


def _average(row: Row, names: list[str], *, is_best: bool) -> tuple[str, ...]:
    last = "all" if row.last is None else str(row.last)
    span = printable(row.newest)
    if row.count > 1:
        span = f"{row.count}: {printable(row.oldest)} to {span}"
    first, *others = _metrics(row, names)
    return row.scheme, last, span, first + " *" * is_best, *others


def _metrics(row: Row, names: list[str]) -> list[str]:
    return [cell(row.metrics.get(name), ".5g") for name in names]


def _comparison(each: Comparison) -> tuple[str, ...]:
    difference = each.difference
    interval = f" ({difference.low:+.3g} to {difference.high:+.3g})" * difference.has_interval
    return (
        f"  {printable(each.metric)} {each.average:.5g}",
        f"{each.against} {each.other:.5g}",
        f"{difference.value:+.3g}{interval}",
        each.verdict if difference.has_interval else "",
    )
