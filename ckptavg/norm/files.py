"""Refresh the statistics in a checkpoint file: load, pass the data through, write."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

try:
    import torch  # noqa: TC002 - whether it is there is found out here
except ModuleNotFoundError as error:
    from ckptavg.errors import CkptAvgError

    raise CkptAvgError(
        "refreshing norm statistics runs the model, and torch is not installed",
        remedy="pip install torch",
    ) from error

from ckptavg import __version__
from ckptavg.averages import default_threads
from ckptavg.averaging import average
from ckptavg.checkpoint import PROVENANCE, Checkpoint
from ckptavg.errors import OutputError, RefreshError, printable
from ckptavg.factories import load_object
from ckptavg.formats import huggingface, open_checkpoint
from ckptavg.norm.layers import norm_layers
from ckptavg.norm.loading import load_weights
from ckptavg.norm.making import make_batches, make_model, seed_everything
from ckptavg.norm.refresh import refresh_norm
from ckptavg.norm.report import RefreshReport
from ckptavg.output import check_vacant
from ckptavg.paths import is_remote
from ckptavg.plan import Plan, make_plan
from ckptavg.roles import is_norm_statistic
from ckptavg.sources import Collection
from ckptavg.summary import Summary, Variant
from ckptavg.weights import uniform
from ckptavg.writers import Destination, destination, lay_out
from ckptavg.writing import (
    Progress,
    check_output,
    encode_provenance,
    provenance_sources,
    refuse_own_input,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ckptavg.layout import Layout
    from ckptavg.tensors import AnyArray, DType

log = logging.getLogger("ckptavg")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Say nothing of what will be said again when it is done."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


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
    output: str | os.PathLike[str] | None,
    options: RefreshOptions,
    *,
    key: str | None = None,
    in_place: bool = False,
    container: Literal["weights", "last"] = "weights",
    max_shard_size: int | None = None,
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
        container: `last` writes the whole torch file with the new statistics in it, `weights` the
            state dict alone. In place it is always the whole.
        max_shard_size: bytes of tensors in a file of a directory; None for the checkpoint's own.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        progress: hears of each batch.

    Raises:
        CkptAvgError: the checkpoint does not fit the model, the pass failed, or the output cannot
            be written. The checkpoint is as it was then.
    """
    checkpoint = open_checkpoint(path, key=key)
    replaces = output is None or _is_same(Path(output), path)
    if replaces:
        _check_in_place(checkpoint, allowed=in_place, named=output is not None)
    target = _destination(
        checkpoint, output, container=container, max_shard_size=max_shard_size, replaces=replaces
    )
    _check(checkpoint, target, force=force or replaces, replaces=replaces)
    if target.kind in ("safetensors", "torch") and checkpoint.other_content:
        log.info("only the state dict is written, not what else %s holds", path.name)
    seed_everything(options.seed)
    model = make_model(options.model, options.model_args, options.device)
    names = load_weights(model, checkpoint)
    layers = norm_layers(model)
    report = RefreshReport("none", 0, 0, 0, (), ())
    if layers:
        report = _run(model, options, progress)
    elif any(map(is_norm_statistic, checkpoint.tensors)):
        log.warning(
            "the checkpoint has running statistics and the model no BatchNorm layer of torch's "
            "that tracks any (is it TorchScript?): they stay as they are"
        )
    else:
        log.info("the model has no norm layers that track statistics: a plain copy")
    used = [layers[layer.name] for layer in report.layers]
    refreshed = checkpoint.with_values(_statistics(model, used, names, checkpoint))
    entry = _provenance(checkpoint, report, options.seed)
    _write(checkpoint, refreshed, target, entry, force=force or replaces, fsync=fsync)
    return report


def _check_in_place(checkpoint: Checkpoint, *, allowed: bool, named: bool) -> None:
    if checkpoint.provenance is None and not allowed:
        what = "is the checkpoint itself" if named else "is not of our making"
        raise OutputError(
            what, path=checkpoint.path, remedy="write another file with -o, or allow --in-place"
        )
    if checkpoint.path.is_dir() and not _has_plain_weights(checkpoint):
        raise OutputError(
            "is a directory without weights in safetensors files, and not written in place",
            path=checkpoint.path,
            remedy="write another output with -o",
        )


def _has_plain_weights(checkpoint: Checkpoint) -> bool:
    """Whether a directory's weights are what would be written into it."""
    names = (
        huggingface.weight_files(checkpoint.path) if checkpoint.container == "huggingface" else ()
    )
    return bool(names) and all(".safetensors" in name for name in names)


def _check(checkpoint: Checkpoint, target: Destination, *, force: bool, replaces: bool) -> None:
    """Find out before the model is run whether the output can be put there."""
    check_vacant(target.path, force=force)
    if not replaces:
        refuse_own_input(target.path, [part.path for part in checkpoint.parts])
    with quietly():
        _, layout = _lay_out(checkpoint, checkpoint, target, checkpoint.provenance or {})
    check_output(target.path, layout, force=force)


def _is_same(output: Path, path: Path) -> bool:
    return not is_remote(path) and output.exists() and output.samefile(path)


def _destination(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str] | None,
    *,
    container: str,
    max_shard_size: int | None,
    replaces: bool,
) -> Destination:
    """Where the result goes, and as what: in place nothing of a training checkpoint is lost.

    Raises:
        OutputError: the output's name does not say what it is to be, or not what it is in place.
    """
    holds_more = checkpoint.other_content or bool(checkpoint.other_entries)
    if replaces and checkpoint.container == "torch" and holds_more:
        container = "last"
    target = destination(
        output or checkpoint.path, checkpoint, container=container, max_shard_size=max_shard_size
    )
    kinds = {"safetensors": "safetensors", "torch": "torch", "huggingface": "directory"}
    if replaces and target.kind not in ("container", kinds.get(checkpoint.container)):
        raise OutputError(
            f"is a {checkpoint.container} file by its content, and would become another in place",
            path=checkpoint.path,
            remedy="write another file with -o",
        )
    return target


def _run(model: torch.nn.Module, options: RefreshOptions, progress: Any) -> RefreshReport:  # noqa: ANN401
    batches = make_batches(options.loader, options.loader_args)
    forward = load_object(options.forward) if options.forward else None
    return refresh_norm(model, batches, forward=forward, progress=progress, **options.others)


def _statistics(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    names: Mapping[str, str],
    checkpoint: Checkpoint,
) -> dict[str, AnyArray]:
    """The layers' buffers by their names in the checkpoint, shared ones under each name.

    Raises:
        RefreshError: they do not fit into the checkpoint's dtype.
    """
    buffers = {id(buffer) for layer in layers for buffer in layer.buffers(recurse=False)}
    arrays: dict[int, AnyArray] = {}
    values: dict[str, AnyArray] = {}
    for name, buffer in model.state_dict(keep_vars=True).items():
        if id(buffer) in buffers and name in names:
            if id(buffer) not in arrays:
                arrays[id(buffer)] = buffer.detach().cpu().double().numpy()
            dtype = checkpoint.tensors[names[name]].dtype
            if not _fits(arrays[id(buffer)], dtype):
                raise RefreshError(
                    f"{printable(name)!r} is too large for the checkpoint's {dtype.name}",
                    remedy="keep the checkpoint's norm statistics in float32",
                )
            values[names[name]] = arrays[id(buffer)]
    return values


def _fits(values: AnyArray, dtype: DType) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(dtype.numpy).astype(np.float64)).all())


def _provenance(checkpoint: Checkpoint, report: RefreshReport, seed: int) -> dict[str, Any]:
    """The checkpoint's provenance, brought up to date."""
    entry = checkpoint.provenance or {
        "scheme": "none",
        "sources": provenance_sources(_alone(checkpoint)),
    }
    state: dict[str, Any] = {"state": "none"}
    if any(map(is_norm_statistic, checkpoint.tensors)):
        state = entry.get("norm_stats", {"state": "unknown"})
    if report.layers:
        state = {
            "state": "refreshed",
            "estimator": report.estimator,
            "batches": report.batches,
            "samples": report.samples,
            "seed": seed,
        }
    return {**entry, "version": __version__, "norm_stats": state}


def _alone(checkpoint: Checkpoint) -> Variant:
    source = Collection.of_one(checkpoint).sources[0]
    return Variant("", (source,), (checkpoint.path.name,), uniform(1))


def _lay_out(
    original: Checkpoint, refreshed: Checkpoint, target: Destination, entry: dict[str, Any]
) -> tuple[Plan, Layout]:
    """The output with that provenance."""
    collection = Collection.of_one(refreshed)
    metadata = {"format": "pt", **original.metadata, PROVENANCE: encode_provenance(entry)}
    plan = make_plan(collection, [uniform(1)], roles=["kept"] * len(collection.names))
    places = [original.tensors[one.names[0]] for one in plan.outputs]
    return plan, lay_out(
        target, plan.outputs, metadata, original, places=places, mirrored=original.is_average
    )


def _write(
    original: Checkpoint,
    refreshed: Checkpoint,
    target: Destination,
    entry: dict[str, Any],
    *,
    force: bool,
    fsync: bool,
) -> None:
    """Write the refreshed checkpoint with that provenance."""
    plan, layout = _lay_out(original, refreshed, target, entry)
    check_output(target.path, layout, force=force)
    threads = default_threads(plan.used)
    write(plan, [(target.path, layout)], force=force, fsync=fsync, threads=threads)


def average_and_refresh(
    inputs: Sequence[Path],
    output: str | os.PathLike[str],
    options: RefreshOptions,
    *,
    key: str | None = None,
    container: Literal["weights", "last"] = "weights",
    max_shard_size: int | None = None,
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
        key: as in `average`.
        container: as in `average`.
        max_shard_size: as in `average`.
        refresh_progress: hears of each batch.
        progress: hears of the bytes averaged.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        others: the other keywords of `average`.

    Raises:
        CkptAvgError: what either of them raises.
    """
    target = Path(os.path.abspath(output))  # noqa: PTH100 - links stay links
    check_vacant(target, force=force)
    with tempfile.TemporaryDirectory(prefix=".ckptavg-", dir=target.parent) as folder:
        # With the slash that makes a directory of it, if there is one.
        average_path = os.path.join(folder, target.name, "")  # noqa: PTH118
        if not os.fspath(output).endswith(os.sep) and not target.is_dir():
            average_path = average_path.rstrip(os.sep)
        try:
            summary = average(
                inputs, average_path, key=key, container=container, max_shard_size=max_shard_size,
                progress=progress, fsync=False, **others,
            )  # fmt: skip
        except OutputError as error:
            error.path = target
            raise
        sources = [Path(source.path) for source in summary.sources]
        refuse_own_input(target, [file for path in sources for file in (path, *path.rglob("*"))])
        report = refresh_checkpoint(
            Path(average_path), output, options, key=key if container == "last" else None,
            container=container, max_shard_size=max_shard_size, force=force, fsync=fsync,
            progress=refresh_progress,
        )  # fmt: skip
    return of_both(summary, target, report), report


def of_both(summary: Summary, output: Path, report: RefreshReport) -> Summary:
    """The average's summary, made to speak of the file that the refresh has written."""
    state = "refreshed" if report.layers else summary.norm_stats
    size = sum(file.stat().st_size for file in (output, *output.rglob("*")) if file.is_file())
    return replace(summary, output=str(output), norm_stats=state, bytes_written=size)
