"""Refresh the statistics in a checkpoint file: load, pass the data through, write."""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    from ckptavg.errors import CkptAvgError

    raise CkptAvgError(
        "refreshing norm statistics runs the model, and torch is not installed",
        remedy="pip install torch",
    ) from error

from ckptavg import __version__
from ckptavg.averaging import (
    Progress,
    Summary,
    available_processors,
    average,
    encode_provenance,
    provenance_sources,
    write,
)
from ckptavg.checkpoint import PROVENANCE, Checkpoint
from ckptavg.collect import Collection
from ckptavg.errors import OutputError, RefreshError, printable
from ckptavg.factories import load_object, user_code
from ckptavg.formats import open_checkpoint
from ckptavg.norm.loading import load_weights
from ckptavg.norm.refresh import RefreshReport, norm_layers, refresh_norm
from ckptavg.output import check_destination
from ckptavg.plan import make_plan
from ckptavg.tensors import AnyArray
from ckptavg.weights import uniform
from ckptavg.writers import container_for, lay_out

log = logging.getLogger("ckptavg")


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """How to refresh a checkpoint.

    Attributes:
        model: spec of the model, or of a callable that returns it.
        loader: spec of an iterable of batches, or of a callable that returns it.
        model_args: keywords for the former.
        loader_args: keywords for the latter.
        forward: spec of a function that is called with model and batch.
        device: where it runs; None for a GPU if there is one.
        seed: of Python's, numpy's and torch's random numbers, before either is made.
        others: keywords of `refresh_norm`.
    """

    model: str
    loader: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    loader_args: Mapping[str, Any] = field(default_factory=dict)
    forward: str | None = None
    device: str | None = None
    seed: int = 0
    others: Mapping[str, Any] = field(default_factory=dict)


def refresh_checkpoint(
    path: Path,
    output: Path | None,
    options: RefreshOptions,
    *,
    key: str | None = None,
    in_place: bool = False,
    force: bool = False,
    fsync: bool = True,
    progress: Any = None,  # noqa: ANN401 - refresh_norm's
) -> RefreshReport:
    """Refresh the norm statistics of a checkpoint; all else is copied byte for byte.

    Args:
        path: the checkpoint.
        output: where the result goes; None for the checkpoint itself, which must be ours
            unless `in_place`.
        options: the model, the loader and how to run them.
        key: which state dict to take where the file holds several.
        in_place: let a file that is not ours be replaced.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        progress: hears of each batch.

    Raises:
        CkptAvgError: the checkpoint does not fit the model, the pass failed, or the output cannot
            be written. The checkpoint is as it was then.
    """
    checkpoint = open_checkpoint(path, key=key)
    target = output or path
    container_for(target)
    if output is None or (output.exists() and os.path.samefile(output, path)):
        _check_in_place(checkpoint, allowed=in_place, named=output is not None)
    else:
        check_destination(target, force=force)
    if checkpoint.other_content or checkpoint.other_entries:
        log.info("only the state dict's tensors are written, not what else %s holds", path.name)
    _seed(options.seed)
    model = _make_model(options)
    names = load_weights(model, checkpoint)
    report = RefreshReport("none", 0, 0, 0, (), ())
    if norm_layers(model):
        report = _run(model, options, progress)
    else:
        log.info("the model has no norm layers that track statistics: a plain copy")
    refreshed = checkpoint.with_values(_statistics(model, report, names))
    _write(refreshed, target, report, options.seed, fsync=fsync)
    return report


def _check_in_place(checkpoint: Checkpoint, *, allowed: bool, named: bool) -> None:
    if checkpoint.provenance is None and not allowed:
        what = "is the checkpoint itself" if named else "is not of our making"
        raise OutputError(
            what, path=checkpoint.path, remedy="write another file with -o, or allow --in-place"
        )
    if checkpoint.other_content:
        raise OutputError(
            "holds more than a state dict, which would be lost in place",
            path=checkpoint.path,
            remedy="write another file with -o",
        )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 - the generator that users' code draws from
    torch.manual_seed(seed)


def _make_model(options: RefreshOptions) -> torch.nn.Module:
    made = load_object(options.model)
    if not isinstance(made, torch.nn.Module):
        with user_code(options.model):
            made = made(**options.model_args)
    if not isinstance(made, torch.nn.Module):
        raise RefreshError(f"{options.model} is a {type(made).__name__}, not a torch.nn.Module")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return made.to(device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise RefreshError(f"cannot use device {device!r}: {error}") from error


def _run(model: torch.nn.Module, options: RefreshOptions, progress: Any) -> RefreshReport:  # noqa: ANN401
    batches = load_object(options.loader)
    if isinstance(batches, type) or not hasattr(batches, "__iter__"):
        if not callable(batches):
            raise RefreshError(f"{options.loader} is a {type(batches).__name__}: no batches")
        with user_code(options.loader):
            batches = batches(**options.loader_args)
    forward = load_object(options.forward) if options.forward else None
    return refresh_norm(model, batches, forward=forward, progress=progress, **options.others)


def _statistics(
    model: torch.nn.Module, report: RefreshReport, names: Mapping[str, str]
) -> dict[str, AnyArray]:
    """The refreshed buffers by their names in the checkpoint, shared ones under each name."""
    refreshed = {layer.name for layer in report.layers}
    buffers = {
        id(buffer)
        for name, layer in norm_layers(model).items()
        if name in refreshed
        for buffer in layer._buffers.values()  # noqa: SLF001
        if buffer is not None
    }
    arrays: dict[int, AnyArray] = {}
    values: dict[str, AnyArray] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if id(buffer) in buffers and name in names:
            if id(buffer) not in arrays:
                arrays[id(buffer)] = buffer.detach().cpu().double().numpy()
            values[names[name]] = arrays[id(buffer)]
    return values


def _write(
    checkpoint: Checkpoint, output: Path, report: RefreshReport, seed: int, *, fsync: bool
) -> None:
    """Write the checkpoint, its provenance brought up to date."""
    collection, weights = Collection.of_one(checkpoint), uniform(1)
    entry = checkpoint.provenance or {
        "scheme": "none",
        "sources": provenance_sources(collection, weights),
    }
    state: dict[str, Any] = {"state": "none"}
    if report.layers:
        state = {
            "state": "refreshed",
            "estimator": report.estimator,
            "batches": report.batches,
            "samples": report.samples,
            "seed": seed,
        }
    entry = {**entry, "version": __version__, "norm_stats": state}
    metadata = {"format": "pt", **checkpoint.metadata, PROVENANCE: encode_provenance(entry)}
    plan = make_plan(collection, weights, roles=["kept"] * len(collection.names))
    layout = lay_out(output, plan.outputs, metadata, checkpoint.module_versions)
    write(plan, layout, output, force=True, fsync=fsync, threads=available_processors())


def average_and_refresh(
    inputs: Sequence[Path],
    output: Path,
    options: RefreshOptions,
    *,
    refresh_progress: Any = None,  # noqa: ANN401 - refresh_norm's
    progress: Progress | None = None,
    force: bool = False,
    fsync: bool = True,
    **others: Any,  # noqa: ANN401 - `average`'s
) -> tuple[Summary, RefreshReport]:
    """Average, and refresh the average, as one step: the output is there with both or not at all.

    The average waits beside its destination, in a directory that goes away in any case.

    Args:
        inputs: as in `average`.
        output: as in `average`.
        options: the model, the loader and how to run them.
        refresh_progress: hears of each batch.
        progress: hears of the bytes averaged.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        others: the other keywords of `average`.

    Raises:
        CkptAvgError: what either of them raises.
    """
    check_destination(output, force=force)
    with tempfile.TemporaryDirectory(prefix=f".{output.name[:200]}.", dir=output.parent) as folder:
        average_path = Path(folder) / output.name
        summary = average(inputs, average_path, progress=progress, fsync=False, **others)
        report = refresh_checkpoint(
            average_path, output, options, force=force, fsync=fsync, progress=refresh_progress
        )
    return summary, report
