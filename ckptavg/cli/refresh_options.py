"""The options of a refresh, which `bn-refresh` and `average` have in common."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptavg.cli.common import Console, plural
from ckptavg.errors import printable

if TYPE_CHECKING:
    from ckptavg.norm.files import RefreshOptions
    from ckptavg.norm.refresh import RefreshReport

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Any], Any]


_HELD_BACK = 8  # batches


def check_spec(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    """Refuse what names no object."""
    if value is not None and (":" not in value.strip(":")):
        raise click.BadParameter(
            f"{value!r} is not of the form package.module:attr or file.py:attr"
        )
    return value


OPTIONS: dict[str, Option] = {
    "model": click.option(
        "--model",
        callback=check_spec,
        metavar="SPEC",
        help="The model, or a callable that makes it: package.module:attr or file.py:attr; or "
        "torchvision:NAME or timm:NAME, without weights.",
    ),
    "loader": click.option(
        "--loader",
        callback=check_spec,
        metavar="SPEC",
        help="An iterable of training batches, or a callable that makes it.",
    ),
    "model-arg": click.option(
        "--model-arg",
        "model_args",
        multiple=True,
        metavar="KEY=VALUE",
        help="For the model.",
    ),
    "loader-arg": click.option(
        "--loader-arg",
        "loader_args",
        multiple=True,
        metavar="KEY=VALUE",
        help="For the loader.",
    ),
    "forward": click.option(
        "--forward",
        callback=check_spec,
        metavar="SPEC",
        help="Function that is called with model and batch.  [default: model(batch), or "
        "model(batch[0]) of a list or tuple]",
    ),
    "estimator": click.option(
        "--estimator",
        type=click.Choice(["paper", "torch", "exact"]),
        default="paper",
        show_default=True,
        help="How the batches' statistics become one.",
    ),
    "layers": click.option(
        "--layers",
        multiple=True,
        metavar="REGEX",
        help="Refresh only norm layers in whose names this is found; may be repeated.",
    ),
    "skip-layers": click.option(
        "--skip-layers",
        multiple=True,
        metavar="REGEX",
        help="Let norm layers in whose names this is found keep their statistics.",
    ),
    "skip-frozen": click.option(
        "--skip-frozen",
        is_flag=True,
        help="Let norm layers whose weights need no gradient keep their statistics.",
    ),
    "amp": click.option(
        "--amp",
        type=click.Choice(["bf16"]),
        help="Run the model in bfloat16 (torch.autocast); statistics stay in float32.",
    ),
    "memory-format": click.option(
        "--memory-format",
        type=click.Choice(["auto", "channels_last", "contiguous"]),
        default="auto",
        show_default=True,
        help="Of images; auto is channels_last for convolutional models on the CPU and with --amp.",
    ),
    "train-mode": click.option(
        "--train-mode",
        type=click.Choice(["norm", "full"]),
        default="norm",
        show_default=True,
        help="What is in training mode during the pass: the norm layers, or all.",
    ),
    "max-samples": click.option(
        "--max-samples",
        type=click.IntRange(1),
        metavar="N",
        help="Stop with the batch that reaches N examples.",
    ),
    "max-batches": click.option(
        "--max-batches", type=click.IntRange(1), metavar="N", help="Stop after N batches."
    ),
    "tol": click.option(
        "--tol",
        type=click.FloatRange(0, min_open=True),
        metavar="T",
        help="Stop when in all layers the mean is known to T standard deviations, and the standard "
        "deviation to a factor of 1 + T, after 2,048 examples at least.",
    ),
    "strict": click.option(
        "--strict",
        is_flag=True,
        help="Let NaN and Inf be an error, and not a reason to leave out a batch.",
    ),
    "verify": click.option(
        "--verify",
        is_flag=True,
        help="Hold back the first batches, and say how far what eval mode sees in them is from "
        "the statistics.",
    ),
    "verify-batches": click.option(
        "--verify-batches",
        "held_back",
        type=click.IntRange(1),
        metavar="N",
        help="The same with so many, up to a quarter of all; they are kept in memory.  "
        f"[default: {_HELD_BACK}]",
    ),
    "device": click.option(
        "--device", help="Where the model runs.  [default: a GPU if there is one]"
    ),
    "seed": click.option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Of the random numbers that the loader shuffles with.",
    ),
}
"""How a model is made, fed and refreshed, by the options' long names."""


def refresh_options(command: Command) -> Command:
    """Model, loader, and how the pass is done."""
    return add(command, OPTIONS.values())


def add(command: Command, options: Iterable[Option]) -> Command:
    """Give a command options, in this order."""
    for option in reversed(tuple(options)):
        command = option(command)
    return command


def require(what: str, **values: str | None) -> None:
    """Refuse a pass through a model that lacks one of these options.

    Raises:
        click.UsageError: a value is None.
    """
    for name, value in values.items():
        if value is None:
            raise click.UsageError(
                f"{what} needs --{name} (or {name} in [tool.ckptavg] of pyproject.toml)"
            )


def take_refresh_options(options: dict[str, Any], *, required: bool) -> RefreshOptions | None:
    """Take a refresh's options out of a command's; None where no refresh was asked for."""
    model, loader = options.pop("model"), options.pop("loader")
    taken = {
        name: options.pop(name)
        for name in ("model_args", "loader_args", "forward", "device", "seed")
    }
    others = {
        name: options.pop(name)
        for name in (
            *("estimator", "layers", "skip_layers", "skip_frozen", "memory_format", "amp"),
            *("train_mode", "max_samples", "max_batches", "tol", "strict", "held_back"),
        )
    }
    if others["held_back"] is None:
        others["held_back"] = _HELD_BACK if options["verify"] else 0
    del options["verify"]
    if not required and model is None and loader is None:
        return None
    require("a refresh", model=model, loader=loader)
    from ckptavg.norm.files import RefreshOptions

    return RefreshOptions(
        model=model,
        loader=loader,
        model_args=keywords(taken.pop("model_args")),
        loader_args=keywords(taken.pop("loader_args")),
        **others,
        **taken,
    )


def keywords(pairs: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE`, the value a Python literal where it is one."""
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(f"{pair!r} is not of the form KEY=VALUE")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def say_report(console: Console, report: RefreshReport) -> None:
    """A refresh's report for people."""
    if not report.layers:
        idle = "no norm layer was called: nothing was refreshed"
        console.say(idle if report.unused else "no norm statistics to refresh")
        return
    shared = f" in {report.processes} processes" if report.processes > 1 else ""
    console.say(
        f"refreshed {plural(len(report.layers), 'norm layer')} with "
        f"{plural(report.batches, 'batch')} of {plural(report.samples, 'sample')} in all{shared} "
        f"(estimator {report.estimator})"
    )
    mean = report.largest(lambda layer: layer.mean_change)
    variance = report.largest(lambda layer: layer.variance_ratio)
    console.say(
        f"  largest change: mean by {mean.mean_change:.3g} standard deviations in "
        f"{printable(mean.name)}, variance by a factor of {variance.variance_ratio:.3g} in "
        f"{printable(variance.name)}"
    )
    _say_convergence(console, report)
    _say_gaps(console, report)


def _say_convergence(console: Console, report: RefreshReport) -> None:
    """How much more data would change, and whether that was enough."""
    known = [layer for layer in report.layers if math.isfinite(layer.mean_error)]
    if known:
        mean = max(known, key=lambda layer: layer.mean_error)
        std = max(known, key=lambda layer: layer.log_std_error)
        console.say(
            f"  remaining error: mean {mean.mean_error:.2g} standard deviations in "
            f"{printable(mean.name)}, log of the standard deviation {std.log_std_error:.2g} in "
            f"{printable(std.name)}"
        )
    if report.converged:
        console.say(f"  that is within {report.tol:g}: the pass ended here")
    elif report.converged is not None:
        console.say(f"  the data ended before that was within {report.tol:g}")


def _say_gaps(console: Console, report: RefreshReport) -> None:
    """What eval mode sees, in the layers that are farthest from what they hold."""
    gaps = {layer.name: layer.gap for layer in report.layers if layer.gap is not None}
    if not gaps:
        return
    mean = max(gaps, key=lambda name: gaps[name].mean)
    std = max(gaps, key=lambda name: gaps[name].log_std)
    console.say(
        f"  eval mode on {plural(report.held_back, 'batch')} held back: means off by "
        f"{gaps[mean].mean:.2g} standard deviations in {printable(mean)} "
        f"({gaps[mean].mean_noise:.2g} may be chance), log of the standard deviation by "
        f"{gaps[std].log_std:.2g} in {printable(std)} ({gaps[std].log_std_noise:.2g})"
    )
