"""The options of a refresh, which `bn-refresh` and `average` have in common."""

from __future__ import annotations

import ast
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
        help="The model, or a callable that makes it: package.module:attr or file.py:attr.",
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
    "memory-format": click.option(
        "--memory-format",
        type=click.Choice(["auto", "channels_last", "contiguous"]),
        default="auto",
        show_default=True,
        help="Of images; auto is channels_last for convolutional models.",
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
        for name in ("estimator", "memory_format", "train_mode", "max_samples", "max_batches")
    }
    if not required and model is None and loader is None:
        return None
    require("a refresh", model=model, loader=loader)
    from ckptavg.norm.files import RefreshOptions

    return RefreshOptions(
        model=model,
        loader=loader,
        model_args=keywords(taken.pop("model_args")),
        loader_args=keywords(taken.pop("loader_args")),
        others=others,
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
        console.say("no norm statistics to refresh")
        return
    console.say(
        f"refreshed {plural(len(report.layers), 'norm layer')} with "
        f"{plural(report.batches, 'batch')} of {plural(report.samples, 'sample')} in all "
        f"(estimator {report.estimator})"
    )
    mean = max(report.layers, key=lambda layer: layer.mean_change)
    variance = max(report.layers, key=lambda layer: layer.variance_ratio)
    of_mean, of_variance = printable(mean.name), printable(variance.name)
    console.say(
        f"  largest change: mean by {mean.mean_change:.3g} standard deviations in {of_mean}, "
        f"variance by a factor of {variance.variance_ratio:.3g} in {of_variance}"
    )
