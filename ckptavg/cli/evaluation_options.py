"""The options of an evaluation, which `evaluate` and `soup` have in common."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.refresh_options import OPTIONS, Command, add, check_spec, keywords, require
from ckptavg.cli.selection_options import selection_options, take_selection

if TYPE_CHECKING:
    from ckptavg.norm.evaluate import EvaluationOptions
    from ckptavg.norm.files import RefreshOptions
    from ckptavg.select.selection import Selection

# What a checkpoint is the best by is found out here, so `--metric` has another meaning.
_BY_METRIC = {"best": None, "metric": None, "mode": None, "metrics": None}
_OF_REFRESH = ("estimator", "memory_format", "train_mode")
_LIMITS = ("max_samples", "max_batches")


def candidate_options(command: Command) -> Command:
    """The rules of selection, but for `--best N` and what belongs to that."""
    before = len(_parameters(command))
    command = selection_options(command)
    found = _parameters(command)
    found[before:] = [option for option in found[before:] if option.name not in _BY_METRIC]
    return command


def _parameters(command: Command) -> list[click.Parameter]:
    """Where click's decorators collect a command's parameters."""
    found: list[click.Parameter] = getattr(command, "__click_params__", [])
    return found


def take_candidates(options: dict[str, Any]) -> Selection:
    """Take the rules out of a command's options."""
    options |= _BY_METRIC
    rules, last = take_selection(options)
    if len(last) > 1:
        raise click.UsageError("--last is one number here")
    return dataclasses.replace(rules, last=last[0] if last else None)


def evaluation_options(command: Command) -> Command:
    """Model, held-out data, and what is done with the norm statistics beforehand."""
    own = {
        "loader": click.option(
            "--loader",
            callback=check_spec,
            metavar="SPEC",
            help="An iterable of held-out batches, or a callable that makes it.",
        ),
        "refresh-loader": click.option(
            "--refresh-loader",
            callback=check_spec,
            metavar="SPEC",
            help="Refresh the BatchNorm statistics of whatever is evaluated with these training "
            "batches. Made like --loader.",
        ),
        "refresh-loader-arg": click.option(
            "--refresh-loader-arg",
            "refresh_loader_args",
            multiple=True,
            metavar="KEY=VALUE",
            help="For the refresh's loader.",
        ),
        "refresh-max-samples": click.option(
            "--refresh-max-samples",
            type=click.IntRange(1),
            metavar="N",
            help="Stop the refresh with the batch that reaches N examples.",
        ),
        "refresh-max-batches": click.option(
            "--refresh-max-batches",
            type=click.IntRange(1),
            metavar="N",
            help="Stop the refresh after N batches.",
        ),
    }
    order = (
        *("model", "loader", "model-arg", "loader-arg", "forward", "max-samples", "max-batches"),
        *("refresh-loader", "refresh-loader-arg", "refresh-max-samples", "refresh-max-batches"),
        *("estimator", "memory-format", "train-mode", "device", "seed"),
    )
    return add(command, [(OPTIONS | own)[name] for name in order])


def check_metric(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """Let `loss` and `accuracy` pass, and what names a function."""
    return value if value in {"loss", "accuracy"} else check_spec(context, parameter, value)


def take_evaluation(options: dict[str, Any], metric: str | None) -> EvaluationOptions:
    """Take an evaluation's options out of a command's."""
    require("an evaluation", model=options["model"], loader=options["loader"])
    refresh = _take_refresh(options)
    from ckptavg.norm.evaluate import EvaluationOptions

    names = ("model", "loader", "forward", "device", "seed", *_LIMITS)
    return EvaluationOptions(
        metric=metric,
        model_args=keywords(options.pop("model_args")),
        loader_args=keywords(options.pop("loader_args")),
        refresh=refresh,
        **{name: options.pop(name) for name in names},
    )


def _take_refresh(options: dict[str, Any]) -> RefreshOptions | None:
    """Take out what concerns the refresh alone; None where none was asked for."""
    loader, arguments = options.pop("refresh_loader"), options.pop("refresh_loader_args")
    limits = {name: options.pop(f"refresh_{name}") for name in _LIMITS}
    others = {name: options.pop(name) for name in _OF_REFRESH}
    if loader is None:
        if arguments or any(limits.values()):
            raise click.UsageError("--refresh-... options need a --refresh-loader")
        return None
    from ckptavg.norm.files import RefreshOptions

    return RefreshOptions(
        model=options["model"],
        loader=loader,
        model_args=keywords(options["model_args"]),
        loader_args=keywords(arguments),
        **others,
        **limits,
        **{name: options[name] for name in ("forward", "device", "seed")},
    )
