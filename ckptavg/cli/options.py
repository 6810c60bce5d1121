"""Options that several commands share, each declared once.

An option is named after the field of the dataclass that it fills.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import types
from ckptavg.cli.command import fields_of, without
from ckptavg.cli.config import load_defaults

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptavg.norm.evaluate import EvaluationOptions
    from ckptavg.norm.options import RefreshOptions
    from ckptavg.select.rules import Selection

# What an option takes, by the placeholder of its value.
_SETTINGS: dict[str, dict[str, Any]] = {
    "N": {"type": click.IntRange(1)},
    "N,...": {"type": types.counts},
    "NUMBERS": {"type": types.numbers},
    "SIZE": {"type": types.size},
    "PATH": {"type": types.path_text},
    "SPEC": {"type": types.spec},
    "loss|accuracy|SPEC": {"type": types.metric},
    "GLOB": {"multiple": True},
    "REGEX": {"multiple": True},
    "KEY=VALUE": {
        "type": types.key_value,
        "multiple": True,
        "callback": lambda _context, _option, pairs: dict(pairs),
    },
}
_HELD_BACK = 8  # batches


def option(spelled: str, text: str, field: str = "", **settings: Any) -> click.Option:  # noqa: ANN401
    """An option as the help spells it, such as `-j --threads N` or `--ints equal|last`.

    One without a value is a flag; `--no-plots` sets the field `plots` to False.

    Args:
        spelled: names, and the value: the choices in small letters, or a placeholder.
        text: the help text.
        field: field of a dataclass that the option fills; empty for its own name.
        settings: what `click.Option` takes.
    """
    names = [word for word in spelled.split() if word.startswith("-")]
    value = spelled.removeprefix(" ".join(names)).strip()
    if not value and names[-1].startswith("--no-"):
        field, settings = names[-1].removeprefix("--no-"), {"flag_value": False, "default": True}
    elif not value:
        settings["is_flag"] = True
    elif value.islower():
        settings["type"] = click.Choice(value.split("|"))
    else:
        settings = {"metavar": value, **_SETTINGS.get(value, {}), **settings}
    shows_default = bool(value) and "default" in settings
    declared = [*names, field] if field else names
    return click.Option(declared, help=text, show_default=shows_default, **settings)


def variant(other: click.Option, text: str = "", **changes: Any) -> click.Option:  # noqa: ANN401
    """An option with another help text, or other attributes."""
    changed = copy.copy(other)
    vars(changed).update({"help": text or other.help, **changes})
    return changed


def keywords_for(name: str) -> click.Option:
    """The option with keyword arguments for the model or loader that another option names."""
    field = f"{name.replace('-', '_')}_args"
    return option(f"--{name}-arg KEY=VALUE", f"Keyword argument for --{name}; repeatable.", field)


def names_of(options: Iterable[click.Option]) -> list[str]:
    """The names of the options' parameters."""
    return [str(each.name) for each in options]


CHECKPOINTS = click.argument(
    "checkpoints", nargs=-1, required=True, type=types.path, metavar="CHECKPOINT..."
)

# Which checkpoints: the fields of `Selection`.
_BY_STEP = (
    option("--include GLOB", "Take only checkpoints whose names match; repeatable."),
    option("--exclude GLOB", "Leave out checkpoints whose names match; repeatable."),
    option("--start STEP|PERCENT", "Step to begin at, or share of the training, such as 75%."),
    option("--steps LIST|RANGE", "Steps to take: 100,200,300 or 100:1000:100."),
    option("--cycle N", "Take the checkpoints that end a cycle of N steps, counted from --start."),
    option("--lr-minima", "Take the checkpoints saved at local minima of the learning rate."),
    option(
        "--lr-recorded used|next",
        "Learning rate that a checkpoint records: the last one used, or the next one, as trainers "
        "do that save after scheduler.step().  [default: detected]",
    ),
)
MODE = option("--mode min|max", "Whether a low or a high metric is better.  [default: by its name]")
METRICS = option(
    "--metrics FILE",
    "CSV or JSON file with the metric of each checkpoint.",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
)
_BY_METRIC = (
    option("--best N", "Take the N checkpoints with the best --metric."),
    option(
        "--metric NAME",
        "Metric for --best: recorded in the checkpoints, in their names, or in --metrics.",
    ),
    *(MODE, METRICS),
)
_EVERY = (
    option("--every N", "Take every N-th checkpoint, counted back from the last."),
    option(
        "--unit global_step|step|epoch",
        "What steps are counted in.  [default: the first that all checkpoints record]",
    ),
)
KEY = option("--key NAME", "State dict to take, where a file holds several.")
SELECTION = (
    *_BY_STEP,
    *_BY_METRIC,
    option("--last N,...", "Take the last N checkpoints."),
    *_EVERY,
)
"""The rules in the order in which they apply."""
CANDIDATES = (*_BY_STEP, option("--last N", "Take the last N checkpoints."), *_EVERY)
"""The same for commands that compute metrics themselves."""
SELECTION_NO_EFFECT = (
    without("best", "mode"),
    without("metric", "metrics"),
    without("lr_minima", "lr_recorded"),
)

# What is written.
FORCE = option("-f --force", "Replace an existing output.")
CONTAINER = option(
    "--container weights|last",
    "Write the weights alone; or the last checkpoint's torch file with all that it holds, such as "
    "the optimizer, and the new weights in it.",
    default="weights",
)
MAX_SHARD_SIZE = option(
    "--max-shard-size SIZE",
    "Most bytes of tensors in one file of a directory, such as 5GB.  [default: as in the input]",
)
NO_FSYNC = option("--no-fsync", "Do not wait until the output is on the disk.")

# Running.
THREADS = option(
    "-j --threads N", "Threads to use.  [default: the processors, at most 4; 16 for URLs]"
)
COMMON = (
    option(
        "--config FILE",
        "TOML file with defaults, instead of the pyproject.toml in the working directory.",
        type=click.Path(dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=load_defaults,
    ),
    option("--json", "Print one JSON document on stdout, and nothing else there.", "as_json"),
    option("-q --quiet", "Print only warnings and errors."),
)
"""What every command has."""

# The model and its data.
MODEL = option(
    "--model SPEC",
    "The model, or a callable that returns it: package.module:attr or file.py:attr; or "
    "torchvision:NAME or timm:NAME, without weights.",
)
LOADER = option("--loader SPEC", "Training batches: an iterable, or a callable that returns it.")
ARGUMENTS = (keywords_for("model"), keywords_for("loader"))
FORWARD = option(
    "--forward SPEC",
    "Function that is called with the model and a batch.  [default: model(batch), or "
    "model(batch[0]) of a list or tuple]",
)
METRIC = option(
    "--metric loss|accuracy|SPEC",
    "Mean cross-entropy, share of right classes, or a function that is called with the model and "
    "the batches and returns a number, or several by name.  [default: loss and accuracy]",
)
LIMITS = (
    option("--max-samples N", "Stop after the batch that reaches N examples."),
    option("--max-batches N", "Stop after N batches."),
)
DEVICE = option("--device NAME", "Device of the model.  [default: a GPU if there is one]")
SEED = option(
    "--seed N",
    "Seed of Python's, numpy's and torch's random numbers.",
    type=click.IntRange(0),
    default=0,
)

# The refresh: the fields of `RefreshOptions`.
HOW_TO_REFRESH = (
    option(
        "--estimator paper|torch|exact",
        "How the statistics of the batches are combined.",
        default="paper",
    ),
    option(
        "--memory-format auto|channels_last|contiguous",
        "Memory format of images; auto is channels_last for convolutional models on the CPU, and "
        "with --amp.",
        default="auto",
    ),
    option(
        "--train-mode norm|full",
        "What is in training mode during the pass: the norm layers, or the whole model.",
        default="norm",
    ),
)
_PASS = (
    FORWARD,
    option("--layers REGEX", "Refresh only norm layers whose names match; repeatable."),
    option("--skip-layers REGEX", "Do not refresh norm layers whose names match; repeatable."),
    option("--skip-frozen", "Do not refresh norm layers whose weights require no gradient."),
    *HOW_TO_REFRESH,
    option(
        "--amp bf16", "Run the model in bfloat16 (torch.autocast); the statistics stay in float32."
    ),
    *LIMITS,
    option(
        "--tol T",
        "Stop when every layer's mean is known to T standard deviations and its standard "
        "deviation to a factor of 1 + T, after at least 2,048 examples.",
        type=click.FloatRange(0, min_open=True),
    ),
    option("--strict", "Fail at a batch that gives NaN or Inf, instead of leaving it out."),
    option(
        "--verify",
        "Hold the first batches back, and compare the new statistics with what these give in eval "
        "mode.",
    ),
    option(
        "--verify-batches N",
        "Hold N batches back, a quarter of all at most; they stay in memory.  "
        f"[default: {_HELD_BACK} with --verify]",
        "held_back",
    ),
    *(DEVICE, SEED),
)
REFRESH = (MODEL, LOADER, *ARGUMENTS, *_PASS)
REFRESH_NO_EFFECT = (
    without("loader", "model"),
    without("model", *names_of((LOADER, *ARGUMENTS, *_PASS))),
)

# The evaluation: the fields of `EvaluationOptions`.
EVALUATION = (
    variant(MODEL, required=True),
    variant(LOADER, "Held-out batches: an iterable, or a callable that returns it.", required=True),
    *(*ARGUMENTS, FORWARD, *LIMITS, DEVICE, SEED),
)
_ABOUT_REFRESH = (
    keywords_for("refresh-loader"),
    option("--refresh-max-samples N", "Stop a refresh after the batch that reaches N examples."),
    option("--refresh-max-batches N", "Stop a refresh after N batches."),
    *HOW_TO_REFRESH,
)
EVALUATION_REFRESH = (
    option(
        "--refresh-loader SPEC",
        "Training batches to refresh the statistics with, before each evaluation.",
    ),
    *_ABOUT_REFRESH,
)
EVALUATION_NO_EFFECT = (
    without("lr_minima", "lr_recorded"),
    without("refresh_loader", *names_of(_ABOUT_REFRESH)),
)


def candidate_rules(params: Mapping[str, Any]) -> Selection:
    """The rules that the options `CANDIDATES` set."""
    from ckptavg.select.rules import Selection

    return Selection(**{name: params[name] for name in names_of(CANDIDATES) if name in params})


def refresh_options(params: Mapping[str, Any]) -> RefreshOptions:
    """The options of a refresh."""
    from ckptavg.norm.options import RefreshOptions

    fields = fields_of(RefreshOptions, params)
    fields["held_back"] = params.get("held_back") or (_HELD_BACK if params.get("verify") else 0)
    return RefreshOptions(**fields)


def evaluation_options(params: Mapping[str, Any]) -> EvaluationOptions:
    """The options of an evaluation, and of the refresh before it if there is one."""
    from ckptavg.norm.evaluate import EvaluationOptions
    from ckptavg.norm.options import RefreshOptions

    refresh = None
    if params["refresh_loader"] is not None:
        refresh = RefreshOptions(**fields_of(RefreshOptions, params, prefix="refresh_"))
    return EvaluationOptions(**fields_of(EvaluationOptions, params), refresh=refresh)
