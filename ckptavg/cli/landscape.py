"""`ckptavg landscape`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command, NoEffect, fields_of, names_of, without
from ckptavg.cli.console import Console, plural
from ckptavg.cli.declarations import parse, variant
from ckptavg.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ckptavg.distributed import Ranks
    from ckptavg.landscape.explore import ExploreOptions
    from ckptavg.landscape.result import Landscape
    from ckptavg.options import Progress


@click.group()
def landscape() -> None:
    """Evaluate around checkpoints, and between them.

    Does the average lie in a wider, flatter region? Each point is a model whose BatchNorm
    statistics are refreshed before it is evaluated.
    """


_LOADER, _TEST_LOADER, _TEST_LOADER_ARG, _OUTPUT, _FORCE, _NO_REFRESH, _NO_PLOTS = parse("""
--loader SPEC                Training batches, for the refresh and for the metric on training data:
                             an iterable, or a callable that returns it. [required]
--test-loader SPEC           Held-out batches, for the metric on test data.
--test-loader-arg KEY=VALUE  Keyword argument for the held-out loader; repeatable.
-o --output PATH             Directory for the results. A stopped run continues with the points
                             saved there. [required]
-f --force                   Discard the saved points.
--no-refresh                 Combine the statistics like weights, instead of refreshing them.
--no-plots                   Do not draw plots.
""")
_COMMON = {
    "Model, data and metric": (
        *(variant(options.MODEL, required=True), _LOADER, _TEST_LOADER),
        *(options.MODEL_ARG, options.LOADER_ARG, _TEST_LOADER_ARG, options.METRIC),
        *(
            options.IGNORE,
            options.FORWARD,
            options.MAX_SAMPLES,
            options.DEVICE,
            options.SEED,
            options.KEY,
        ),
    ),
    "Refresh of the norm statistics at each point": (_NO_REFRESH, *options.HOW_TO_REFRESH),
    "What is written": (_OUTPUT, _FORCE, _NO_PLOTS),
    RUNNING: options.COMMON,
}
_NO_EFFECT = (
    without("test_loader", "test_loader_args"),
    NoEffect(
        "with --no-refresh",
        lambda params: not params["refresh"],
        names_of(options.HOW_TO_REFRESH),
    ),
)
_RAYS = parse("""
--directions N       Number of random directions, the same for each checkpoint.  [default: 10]
--distances NUMBERS  Distances along each direction: 0,1,2 or FIRST:LAST:COUNT.
                     [default: 11, up to twice the distance between the first two checkpoints]
""")
_SEGMENT = parse("""
--positions NUMBERS  Points on the line, 0 for the first checkpoint and 1 for the second: 0,0.5,1 or
                     FIRST:LAST:COUNT.
                     [default: -0.5:1.5:21]
""")
_PLANE = parse("""
--size POINTS  Points along each axis.  [default: 21]
""")


def _settings(points: Sequence[click.Option]) -> dict[str, Any]:
    """What the commands share: everything but the options for their points."""
    return {
        "cls": Command,
        "groups": {"Which points": points, **_COMMON},
        "no_effect": _NO_EFFECT,
    }


@landscape.command(**_settings(_RAYS))
@options.CHECKPOINTS
def rays(**params: Any) -> None:  # noqa: ANN401
    """Loss and error along random directions from each CHECKPOINT.

    Directions are drawn uniformly from the unit sphere of the parameters (Izmailov et al. 2018).
    Around a flatter minimum the loss rises more slowly. --model and --loader name your own code,
    which is imported and run.
    """
    from ckptavg.landscape.rays import rays as run

    _run(run, _RAYS, params, _say_rays)


@landscape.command(**_settings(_SEGMENT))
@options.CHECKPOINTS
def segment(**params: Any) -> None:  # noqa: ANN401
    """Loss and error along the line through two CHECKPOINTs.

    --model and --loader name your own code, which is imported and run.
    """
    from ckptavg.landscape.segment import segment as run

    _run(run, _SEGMENT, params, _say_segment)


@landscape.command(**_settings(_PLANE))
@options.CHECKPOINTS
def plane(**params: Any) -> None:  # noqa: ANN401
    """Loss and error on the plane through three CHECKPOINTs.

    --model and --loader name your own code, which is imported and run.
    """
    from ckptavg.landscape.plane import plane as run

    _run(run, _PLANE, params, _say_plane)


def _run(
    function: Callable[..., Any],
    points: Sequence[click.Option],
    params: Mapping[str, Any],
    say: Callable[[Console, Landscape], None],
) -> None:
    """Make a landscape, write it, and print what it shows."""
    if params["plots"]:
        import ckptavg.landscape.plots  # noqa: F401 - fails now, and not after all evaluations
    from ckptavg.formats.paths import as_path
    from ckptavg.landscape.saving import save

    console, folder = params["console"], as_path(params["output"])
    which = {name: params[name] for name in names_of(points)}
    files = []
    with console.ranks() as ranks:
        with console.others_to_stderr(), console.progress("evaluating", "point") as progress:
            explore = _explore_options(params, ranks, progress)
            made = function(params["checkpoints"], folder, explore, **which)
        if ranks.rank == 0:
            files = save(made, folder, plots=params["plots"])
    say(console, made)
    console.say(f"  wrote {', '.join(printable(file) for file in files)}")
    console.result({**made.as_dict(), "files": [str(file) for file in files]})


def _explore_options(
    params: Mapping[str, Any], ranks: Ranks, progress: Progress | None
) -> ExploreOptions:
    from ckptavg.evaluation.evaluate import EvaluationOptions
    from ckptavg.landscape.explore import ExploreOptions

    refresh = options.refresh_options(params) if params["refresh"] else None
    evaluation = EvaluationOptions(**{**fields_of(EvaluationOptions, params), "refresh": refresh})
    fields = fields_of(ExploreOptions, params)
    return ExploreOptions(**fields, evaluation=evaluation, ranks=ranks, progress=progress)


def _say_rays(console: Console, landscape: Landscape) -> None:
    from ckptavg.landscape.rays import rises

    names, risen = [*map(printable, landscape.checkpoints)], rises(landscape)
    console.say(
        f"{plural(len(landscape.axes['direction']), 'direction')} from "
        f"{plural(len(names), 'point')} in the space of {landscape.dimension:,} parameters"
    )
    rows = [
        (
            f"  {printable(rise.metric)}, risen at {rise.distance:.3g}",
            *(f"{value:+.4g}" for value in rise.rises),
        )
        for rise in risen
    ]
    console.say_table([("", *names), *rows])
    if len(names) > 1:
        for rise in risen:
            console.say(
                f"  {printable(rise.metric)} rises less from {names[-1]} than from {names[0]} in "
                f"{rise.lower} of {rise.directions} directions"
            )


def _say_segment(console: Console, landscape: Landscape) -> None:
    first, second = map(printable, landscape.checkpoints)
    console.say(
        f"{plural(len(landscape.axes['position']), 'point')} on the line from {first} to {second}, "
        f"which are {landscape.apart:.4g} apart"
    )
    for metric in landscape.values:
        if point := _least(landscape, metric):
            value, position = point[metric], point["position"]
            console.say(f"  least {printable(metric)}: {value:.4g} at {position:.3g}")


def _say_plane(console: Console, landscape: Landscape) -> None:
    columns, rows = len(landscape.axes["x"]), len(landscape.axes["y"])
    console.say(f"{columns} x {rows} points on the plane through")
    numbers = ("x", "y", *landscape.values)
    corners = [
        (f"  {corner['checkpoint']}", *(f"{corner[name]:.4g}" for name in numbers))
        for corner in landscape.corners
    ]
    console.say_table([("  weights", *map(printable, numbers)), *corners])
    for metric in landscape.values:
        if point := _least(landscape, metric):
            value, x, y = point[metric], point["x"], point["y"]
            console.say(f"  least {printable(metric)} on the grid: {value:.4g} at {x:.4g}, {y:.4g}")


def _least(landscape: Landscape, metric: str) -> dict[str, float] | None:
    """The point at which a metric is least; None if it is NaN at all of them."""
    points = [point for point in landscape.rows() if not math.isnan(point[metric])]
    return min(points, key=lambda point: point[metric], default=None)
