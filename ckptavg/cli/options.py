"""The options that several commands share, as the help shows them.

An option is named after the field of the dataclass that it fills.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptavg.cli.command import NoEffect, fields_of, names_of, without
from ckptavg.cli.configuration import load_defaults
from ckptavg.cli.declarations import parse, path_or_url, variant
from ckptavg.errors import printable
from ckptavg.options import SHORT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ckptavg.batchnorm.options import RefreshOptions


CHECKPOINTS = click.argument(
    "checkpoints", nargs=-1, required=True, type=path_or_url, metavar="CHECKPOINT..."
)

# Which checkpoints: the fields of `Selection`, in the order in which they apply.
_BY_STEP = parse("""
--include GLOB           Select only checkpoints whose names match; repeatable.
--exclude GLOB           Leave out checkpoints whose names match; repeatable.
--start STEP|PERCENT     Step to begin at, or share of the training, such as 75%.
--steps LIST|RANGE       Steps to select: 100,200,300 or 100:1000:100.
--cycle N                Select the last checkpoint of each cycle of N steps, counted from --start.
--lr-minima              Select the checkpoints saved at local minima of the learning rate.
--lr-recorded used|next  Learning rate that checkpoints record: the last used one, or the next one
                         if the trainer saves after scheduler.step().
                         [default: as detected]
""")
_BEST, _METRIC, MODE, METRICS, _SEVERAL_LAST, _LAST, _EVERY, _UNIT, KEY = parse("""
--best N         Select the N checkpoints with the best --metric.
--metric NAME    Metric for --best: recorded in the checkpoints, in their names, or in --metrics.
--mode min|max   Whether a low or a high metric is better.  [default: by its name]
--metrics FILE   CSV or JSON file with the metric of each checkpoint.
--last N,...     Select the last N checkpoints.
--last N         Select the last N checkpoints.
--every N        Select every N-th checkpoint, counted back from the last.
--unit global_step|step|epoch
                 Unit of steps.  [default: the first that all checkpoints record]
--key NAME       State dict to use, if a file holds several.
""")
[KEYS] = parse("""
--key KEY  State dict to use, if a torch file holds several; '*' uses all. Repeatable.
""")
SELECTION = (*_BY_STEP, _BEST, _METRIC, MODE, METRICS, _SEVERAL_LAST, _EVERY, _UNIT)
CANDIDATES = (*_BY_STEP, _LAST, _EVERY, _UNIT)  # for commands that compute metrics themselves
CANDIDATES_BUT_LAST = (*_BY_STEP, _EVERY, _UNIT)
SELECTION_NO_EFFECT = (
    without("best", "mode"),
    NoEffect(
        "without --metric", lambda params: not (params["metric"] or params["best"]), ["metrics"]
    ),
    without("lr_minima", "lr_recorded"),
)

FORCE, CONTAINER, FORMAT, MAX_SHARD_SIZE, NO_FSYNC = parse("""
-f --force                Replace an existing output.
--container weights|last  Write the weights alone, or the last checkpoint's whole torch file
                          (optimizer, hyper-parameters) with the new weights.
                          [default: last for a .ckpt of Lightning's checkpoints, else weights]
--format huggingface|dcp  Write a directory for from_pretrained, or for
                          torch.distributed.checkpoint.  [default: huggingface]
--max-shard-size SIZE     Largest size of a file in a directory, such as 5GB.
                          [default: as in the input; one file for dcp]
--no-fsync                Do not wait until the output is on the disk.
""")

_LONG = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = (*_LONG, *SHORT_DTYPES)
SKIP, TAKE_LAST, DTYPE, DROP_ALIASES = parse(f"""
--skip REGEX    Leave out the tensors whose names match; repeatable.
--take-last REGEX
                Copy the tensors whose names match from the last checkpoint; repeatable.
--dtype {"|".join(DTYPES)}
                Dtype of floating tensors.  [default: as in the input]
--drop-aliases  Write tied tensors once, and their other names into the metadata.
""")


def _is_one_file(params: Mapping[str, Any]) -> bool:
    from ckptavg.formats import SUFFIXES

    path = Path(params["output"])
    is_directory = params["output"].endswith(os.sep) or path.is_dir()
    return path.suffix in SUFFIXES and not is_directory


OUTPUT_NO_EFFECT = (
    NoEffect("with an --output that is one file", _is_one_file, ["format", "max_shard_size"]),
    NoEffect(
        "with --format dcp, which has tied tensors once",
        lambda params: params["format"] == "dcp",
        ["drop_aliases"],
    ),
    NoEffect(
        "with an --output that is a torch file",
        lambda params: _is_one_file(params) and not params["output"].endswith(".safetensors"),
        ["drop_aliases"],
    ),
)

THREADS, DRY_RUN = parse("""
-j --threads N  Threads to use.  [default: the processors, at most 4; 16 for URLs]
-n --dry-run    Show what would be read and written, and write nothing.
""")
COMMON = (
    click.Option(
        ["--config"],
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=load_defaults,
        help="TOML file with defaults, instead of the pyproject.toml in the working directory.",
    ),
    *parse("""
--json      Print one JSON document on stdout, and nothing else there.
-q --quiet  Print only warnings and errors.
"""),
)

# The model and its data.
MODEL, LOADER, MODEL_ARG, LOADER_ARG, FORWARD, METRIC, DEVICE, SEED = parse("""
--model SPEC            The model, or a callable that returns it: package.module:attr or
                        file.py:attr.
--loader SPEC           Training batches: an iterable, or a callable that returns it.
--model-arg KEY=VALUE   Keyword argument for the model; repeatable.
--loader-arg KEY=VALUE  Keyword argument for the loader; repeatable.
--forward SPEC          Function that is called with the model and a batch.
                        [default: model(batch); model(batch[0]) of a list or tuple;
                        model(**batch) of a dict]
--metric loss|accuracy|SPEC
                        loss is the mean cross-entropy, or the loss that the model returns; accuracy
                        is the share of correct predictions. SPEC is a function of the model and the
                        batches that returns a number, or a dict of them. FILE.py:FUNCTION:NAME
                        chooses by the entry NAME of the dict.
                        [default: loss and accuracy]
--device NAME           Device of the model.  [default: a GPU if there is one]
--seed SEED             Seed of Python's, numpy's and torch's random numbers.  [default: 0]
""")
MAX_SAMPLES, IGNORE = parse("""
--max-samples N  Stop after the batch that reaches N examples.
--ignore REGEX   Do not load tensors whose names match: the model keeps its own, and an output
                 those of the checkpoint. Repeatable.
""")

# The refresh: the fields of `RefreshOptions`.
HOW_TO_REFRESH = parse("""
--estimator paper|torch|exact
                        How the statistics of the batches are combined.  [default: paper]
--memory-format auto|channels_last|contiguous
                        Memory format of images. auto uses channels_last for convolutional models
                        on the CPU, and with --amp.  [default: auto]
--train-mode norm|full  Part of the model that is in training mode during the pass: the norm layers,
                        or all of it.  [default: norm]
""")
_PASS = (
    FORWARD,
    *parse("""
--layers REGEX       Refresh only norm layers whose names match; repeatable.
--skip-layers REGEX  Do not refresh norm layers whose names match; repeatable.
"""),
    *HOW_TO_REFRESH,
    MAX_SAMPLES,
    *parse("""
--amp bf16           Run the model in bfloat16 (torch.autocast); the statistics stay in float32.
--tol TOL            Stop once two standard errors are small in every layer: below TOL standard
                     deviations for the mean, and below a factor of 1 + TOL for the standard
                     deviation. Not before 2,048 examples.
--strict             Fail if a batch gives NaN or Inf, instead of leaving it out.
"""),
    *(DEVICE, SEED),
)
REFRESH = (MODEL, LOADER, MODEL_ARG, LOADER_ARG, *_PASS)
REFRESH_NO_EFFECT = (
    without("loader", "model"),
    without("model", *names_of((LOADER, MODEL_ARG, LOADER_ARG, *_PASS))),
)

# The evaluation: the fields of `EvaluationOptions`.
EVALUATION = (
    variant(MODEL, required=True),
    *parse("""
--loader SPEC  Held-out batches: an iterable, or a callable that returns it. [required]
"""),
    *(MODEL_ARG, LOADER_ARG, IGNORE, FORWARD, MAX_SAMPLES, DEVICE, SEED),
)
_REFRESH_LOADER, *_ABOUT_REFRESH = parse("""
--refresh-loader SPEC           Training batches, to refresh the BatchNorm statistics before each
                                evaluation. Averages of a model with BatchNorm need them;
                                checkpoints that the training saved do not.
--refresh-loader-arg KEY=VALUE  Keyword argument for the loader of the refresh; repeatable.
--refresh-max-samples N         Stop the refresh after the batch that reaches N examples.
""")
EVALUATION_REFRESH = (_REFRESH_LOADER, *_ABOUT_REFRESH, *HOW_TO_REFRESH)
EVALUATION_NO_EFFECT = (
    without("lr_minima", "lr_recorded"),
    without("refresh_loader", *names_of((*_ABOUT_REFRESH, *HOW_TO_REFRESH))),
)


def refresh_options(params: Mapping[str, Any], prefix: str = "") -> RefreshOptions:
    """The options of a refresh, some of which have a prefix as in `fields_of`."""
    from ckptavg.batchnorm.options import RefreshOptions

    return RefreshOptions(**fields_of(RefreshOptions, params, prefix))


def evaluation_fields(kind: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `EvaluateOptions` or `SoupOptions` that a command's parameters have."""
    from ckptavg.select.rules import Selection

    select = Selection(**{name: params[name] for name in names_of(CANDIDATES) if name in params})
    refresh = None
    if params["refresh_loader"] is not None:
        refresh = refresh_options(params, "refresh_")
    return {**fields_of(kind, params), "select": select, "refresh": refresh}


def model_of_transformers(*checkpoints: Path, directory: Path | None = None) -> str:
    """The options that make the model of the first directory that transformers wrote.

    Empty if it wrote none of them. URLs are not opened.

    Args:
        checkpoints: those that the model is for.
        directory: the last to be looked at; it is named, as it is none of the checkpoints.
    """
    from ckptavg.formats.huggingface import architecture
    from ckptavg.formats.paths import is_remote

    for folder in (*checkpoints, directory):
        if folder is not None and not is_remote(folder) and (name := architecture(folder)):
            model = f"--model transformers:{name}.from_pretrained"
            if folder is not directory:
                return model
            place = shlex.quote(printable(folder))
            return f"{model} --model-arg pretrained_model_name_or_path={place}"
    return ""
