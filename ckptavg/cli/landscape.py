"""`ckptavg landscape`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.common import Console, PathType, common_options, plural
from ckptavg.cli.evaluation_options import check_metric
from ckptavg.cli.refresh_options import OPTIONS, Command, add, check_spec, keywords, require
from ckptavg.errors import printable
from ckptavg.landscape import spaced

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ckptavg.landscape.explore import ExploreOptions
    from ckptavg.landscape.plane import PlaneResult
    from ckptavg.landscape.rays import Rays
    from ckptavg.landscape.segment import Segment

_OF_REFRESH = ("estimator", "memory_format", "train_mode")


@click.group()
def landscape() -> None:
    """Evaluate around weights, and between them.

    Does the average lie in a wider, flatter region? Each point is a model with weights of its own,
    whose BatchNorm statistics are refreshed before it is evaluated.
    """


class Numbers(click.ParamType[Any]):
    """`0,0.5,1`, or `FIRST:LAST:COUNT`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """The numbers as a tuple."""
        if not isinstance(value, str):
            return value
        try:
            if ":" in value:
                first, last, count = value.split(":")
                if int(count) < 1:
                    raise ValueError  # noqa: TRY301
                numbers = spaced(float(first), float(last), int(count))
            else:
                numbers = tuple(float(one) for one in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is neither numbers (0,0.5,1) nor FIRST:LAST:COUNT", param, ctx)
        if not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} has what is no number", param, ctx)
        return numbers


def _landscape_options(command: Command) -> Command:
    """What all landscapes have in common."""
    own = {
        "output": click.option(
            "-o",
            "--output",
            required=True,
            type=PathType(),
            help="Directory of the results. A run that was stopped goes on from what is there.",
        ),
        "loader": click.option(
            "--loader",
            callback=check_spec,
            metavar="SPEC",
            help="An iterable of training batches, or a callable that makes it: for the refresh, "
            "and for loss and error on the training data.",
        ),
        "test-loader": click.option(
            "--test-loader",
            callback=check_spec,
            metavar="SPEC",
            help="Held-out batches, to evaluate on as well. Made like --loader.",
        ),
        "test-loader-arg": click.option(
            "--test-loader-arg",
            "test_loader_args",
            multiple=True,
            metavar="KEY=VALUE",
            help="For the held-out loader.",
        ),
        "metric": click.option(
            "--metric",
            callback=check_metric,
            metavar="loss|accuracy|SPEC",
            help="Mean cross-entropy, share of right classes, or a function that is called with "
            "the model and the batches.  [default: loss and accuracy]",
        ),
        "no-refresh": click.option(
            "--no-refresh",
            is_flag=True,
            help="Leave the BatchNorm statistics as the weights' own combination has them.",
        ),
        "no-plots": click.option("--no-plots", is_flag=True, help="Draw nothing."),
        "force": click.option(
            "-f", "--force", is_flag=True, help="Forget the points that are there."
        ),
        "key": click.option("--key", help="State dict to take where a file holds several."),
    }
    order = (
        *("output", "model", "loader", "test-loader", "model-arg", "loader-arg"),
        *("test-loader-arg", "metric", "forward", "max-samples", "max-batches", "no-refresh"),
        *("estimator", "memory-format", "train-mode", "device", "seed", "key", "no-plots", "force"),
    )
    return common_options(add(command, [(OPTIONS | own)[name] for name in order]))


_CHECKPOINTS = click.argument(
    "checkpoints", nargs=-1, required=True, type=PathType(), metavar="CHECKPOINT..."
)


@landscape.command()
@_CHECKPOINTS
@click.option(
    "--directions",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Random directions, the same from each of the weights.",
)
@click.option(
    "--distances",
    type=Numbers(),
    metavar="NUMBERS",
    help="Along each: 0,1,2 or FIRST:LAST:COUNT.  [default: 11 up to twice the distance of the "
    "first two]",
)
@click.option(
    "--filter-normalize",
    is_flag=True,
    help="Give each filter of a direction the norm of the weights' own (Li et al. 2018).",
)
@_landscape_options
def rays(checkpoints: tuple[Path, ...], *, filter_normalize: bool, **options: Any) -> None:  # noqa: ANN401
    """Loss and error along random directions from each CHECKPOINT.

    Directions are drawn uniformly from the unit sphere of the parameters (Izmailov et al. 2018).
    A flatter region shows by a slower rise. --model and --loader name your own code, which is
    imported and run.
    """
    from ckptavg.landscape.rays import rays as run

    own = {name: options.pop(name) for name in ("directions", "distances")}
    own["filter_normalize"] = filter_normalize
    _run("rays", lambda **explore: run(checkpoints, **own, **explore), options)


@landscape.command()
@_CHECKPOINTS
@click.option(
    "--positions",
    type=Numbers(),
    metavar="NUMBERS",
    help="0 is the first, 1 the second: 0,0.5,1 or FIRST:LAST:COUNT.  [default: -0.5:1.5:21]",
)
@_landscape_options
def segment(checkpoints: tuple[Path, ...], **options: Any) -> None:  # noqa: ANN401
    """Loss and error along the line between two CHECKPOINTs, and past both.

    --model and --loader name your own code, which is imported and run.
    """
    from ckptavg.landscape.segment import segment as run

    positions = options.pop("positions")
    _run("segment", lambda **explore: run(checkpoints, positions=positions, **explore), options)


@landscape.command()
@_CHECKPOINTS
@click.option(
    "--size", type=click.IntRange(2), default=21, show_default=True, help="Points along each axis."
)
@click.option(
    "--margin",
    type=click.FloatRange(0),
    default=0.2,
    show_default=True,
    help="How far the grid reaches beyond the three, relative to their extent.",
)
@click.option(
    "--project",
    multiple=True,
    type=PathType(),
    metavar="PATH",
    help="Checkpoints, or directories of them, whose projections are marked; may be repeated.",
)
@_landscape_options
def plane(checkpoints: tuple[Path, ...], **options: Any) -> None:  # noqa: ANN401
    """Loss and error on the plane through three CHECKPOINTs.

    --model and --loader name your own code, which is imported and run.
    """
    from ckptavg.landscape.plane import plane as run

    own = {name: options.pop(name) for name in ("size", "margin", "project")}
    _run("plane", lambda **explore: run(checkpoints, **own, **explore), options)


def _run(kind: str, call: Callable[..., Any], options: dict[str, Any]) -> None:
    """Make a landscape, write it, and say what it shows."""
    console = Console(as_json=options.pop("as_json"), quiet=options.pop("quiet"))
    folder, plots = options.pop("output"), not options.pop("no_plots")
    if plots:
        import ckptavg.landscape.plots  # noqa: F401 - now, and not when all is evaluated
    explore = _take(options)
    from ckptavg.distributed import launched_ranks
    from ckptavg.landscape.saving import refuse_others, save

    files = []
    with launched_ranks() as ranks:
        if ranks.rank:
            console.mute()
        refuse_others(folder, kind, force=explore.force)
        ranks.gather(None)  # all have looked
        with console.others_to_stderr(), console.progress("evaluating", "point") as progress:
            result = call(folder=folder, options=explore, ranks=ranks, progress=progress)
        if ranks.rank == 0:
            files = save(result, folder, kind, plots=plots)
    _SAY[kind](console, result)
    console.say(f"  wrote {', '.join(printable(file) for file in files)}")
    console.result({"kind": kind, **vars(result), "files": [str(file) for file in files]})


def _take(options: dict[str, Any]) -> ExploreOptions:
    """Take what concerns the evaluation out of a command's options."""
    require("a landscape", model=options["model"], loader=options["loader"])
    from ckptavg.landscape.explore import ExploreOptions
    from ckptavg.norm.evaluate import EvaluationOptions
    from ckptavg.norm.files import RefreshOptions

    limits = {name: options.pop(name) for name in ("max_samples", "max_batches")}
    common: dict[str, Any] = {
        "model_args": keywords(options.pop("model_args")),
        "loader_args": keywords(options.pop("loader_args")),
        **{name: options.pop(name) for name in ("model", "loader", "forward", "device", "seed")},
    }
    others = {name: options.pop(name) for name in _OF_REFRESH}
    refresh = None
    if not options.pop("no_refresh"):
        refresh = RefreshOptions(**others, **limits, **common)
    return ExploreOptions(
        evaluation=EvaluationOptions(
            metric=options.pop("metric"), refresh=refresh, **limits, **common
        ),
        test_loader=options.pop("test_loader"),
        test_loader_args=keywords(options.pop("test_loader_args")),
        key=options.pop("key"),
        force=options.pop("force"),
    )


def _say_rays(console: Console, result: Rays) -> None:
    console.say(
        f"{plural(result.directions, 'direction')} from {plural(len(result.checkpoints), 'point')} "
        f"in the space of {result.dimension:,} parameters"
    )
    header = ("", *map(printable, result.checkpoints))
    rows = [
        (
            f"  {printable(rise.metric)}, risen at {rise.distance:.3g}",
            *(f"{one:+.4g}" for one in rise.rises),
        )
        for rise in result.rises()
    ]
    console.say_table([header, *rows])
    if len(result.checkpoints) > 1:
        first, last = printable(result.checkpoints[0]), printable(result.checkpoints[-1])
        for rise in result.rises():
            console.say(
                f"  {printable(rise.metric)} rises less from {last} than from {first} in "
                f"{rise.lower} of {rise.directions} directions"
            )


def _say_segment(console: Console, result: Segment) -> None:
    first, second = map(printable, result.checkpoints)
    console.say(
        f"{plural(len(result.positions), 'point')} on the line from {first} to {second}, which are "
        f"{result.apart:.4g} apart"
    )
    for metric, values in result.curves.items():
        pairs = zip(values, result.positions, strict=True)
        if found := [pair for pair in pairs if not math.isnan(pair[0])]:
            console.say(f"  least {printable(metric)}: {min(found)[0]:.4g} at {min(found)[1]:.3g}")


def _say_plane(console: Console, result: PlaneResult) -> None:
    console.say(f"{len(result.xs)} x {len(result.ys)} points on the plane through")
    metrics = list(result.grids)
    rows = [("  weights", "x", "y", *map(printable, metrics))]
    for mark in result.checkpoints:
        values = (f"{mark.values[name]:.4g}" for name in metrics)
        rows.append((f"  {mark.checkpoint}", f"{mark.x:.4g}", f"{mark.y:.4g}", *values))
    console.say_table(rows)
    for metric, grid in result.grids.items():
        found = [
            (value, x, y)
            for y, row in zip(result.ys, grid, strict=True)
            for x, value in zip(result.xs, row, strict=True)
            if not math.isnan(value)
        ]
        if found:
            value, x, y = min(found)
            console.say(f"  least {printable(metric)} on the grid: {value:.4g} at {x:.4g}, {y:.4g}")


_SAY: dict[str, Callable[[Console, Any], None]] = {
    "rays": _say_rays,
    "segment": _say_segment,
    "plane": _say_plane,
}
