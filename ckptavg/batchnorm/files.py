"""Refresh the statistics in a checkpoint file: load, pass the data through, write."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    from ckptavg.errors import CkptAvgError

    raise CkptAvgError(
        "refreshing norm statistics runs the model, and torch is not installed",
        remedy="pip install torch",
    ) from error

from ckptavg.batchnorm.layers import norm_layers, unwrapped
from ckptavg.batchnorm.refresh import refresh_norm
from ckptavg.batchnorm.report import RefreshReport, Verdict
from ckptavg.batchnorm.rewriting import Rewriting, provenance
from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import RefreshError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.formats.parts import as_path, is_remote
from ckptavg.formats.tensors import is_norm_statistic
from ckptavg.model.factories import load_object
from ckptavg.model.loading import load_weights
from ckptavg.model.making import import_all, make_batches, make_model, random_state_kept
from ckptavg.write.output import followed
from ckptavg.write.replacement import put_back

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.batchnorm.layers import NormLayer
    from ckptavg.batchnorm.options import RefreshOptions
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.parts import PathLike
    from ckptavg.formats.tensors import AnyArray, DType

log = logging.getLogger("ckptavg")


class Judge(Protocol):
    """Evaluates a checkpoint before and after its refresh."""

    def measure(self, checkpoint: Checkpoint) -> Mapping[str, float]:
        """The metrics of a checkpoint, by name."""

    def verdict(self, before: Mapping[str, float], after: Mapping[str, float]) -> Verdict:
        """Which of the two is kept."""


@random_state_kept()
def refresh_checkpoint(
    path: PathLike,
    output: PathLike | None,
    options: RefreshOptions,
    *,
    key: str | None = None,
    in_place: bool = False,
    container: Literal["weights", "last"] = "weights",
    max_shard_size: int | None = None,
    force: bool = False,
    fsync: bool = True,
    judge: Judge | None = None,
    ranks: Ranks = ALONE,
    progress: Any = None,  # noqa: ANN401 - refresh_norm's
) -> RefreshReport:
    """Refresh the norm statistics of a checkpoint; all else is copied byte for byte.

    Args:
        path: the checkpoint.
        output: where the result goes; None for the checkpoint itself, which ckptavg must have made
            unless `in_place`.
        options: the model, the loader and how to run them.
        key: which state dict to take where the file holds several.
        in_place: let a file that is not ours be replaced.
        container: `last` writes the whole torch file with the new statistics in it, `weights` the
            state dict alone. In place it is always the whole.
        max_shard_size: bytes of tensors in a file of a directory; None for the checkpoint's own.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        judge: evaluates the checkpoint before and after, and may keep the old statistics.
        ranks: the processes that share the pass, all of which call this; the first one writes.
        progress: hears of each batch.

    Raises:
        CkptAvgError: the checkpoint does not fit the model, the pass failed, or the output cannot
            be written. The checkpoint is as it was then.
    """
    path = as_path(path)
    with ranks.together():
        if not is_remote(path) and ranks.rank == 0:
            put_back(followed(path))
        checkpoint = open_checkpoint(path, key=key)
        rewriting = Rewriting(
            checkpoint, output, in_place=in_place, container=container,
            max_shard_size=max_shard_size, force=force,
        )  # fmt: skip
        ranks.gather(None)  # all processes have checked the output before the first writes it
        if ranks.rank:
            judge = None
        before = None if judge is None else judge.measure(checkpoint)
        refreshed, report = _refreshed(checkpoint, options, ranks, progress)
        if judge is not None and before is not None:
            report = replace(report, verdict=judge.verdict(before, judge.measure(refreshed)))
        keeps_old = report.verdict is not None and report.verdict.kept == "old"
        if keeps_old and rewriting.replaces:
            report = replace(report, written=False)
        elif ranks.rank == 0:
            entry = provenance(checkpoint, None if keeps_old else report, options.seed)
            rewriting.write(checkpoint if keeps_old else refreshed, entry, fsync=fsync)
        ranks.gather(None)  # no process returns before the output is there
    return report


def _refreshed(
    checkpoint: Checkpoint,
    options: RefreshOptions,
    ranks: Ranks,
    progress: Any,  # noqa: ANN401
) -> tuple[Checkpoint, RefreshReport]:
    """The checkpoint with other norm statistics."""
    import_all(options.seed, options.model)
    model = make_model(options.model, options.model_args, options.device)
    names = load_weights(model, checkpoint)
    report = RefreshReport("none", 0, 0, 0, (), ())
    layers = norm_layers(unwrapped(model))
    if layers:
        with random_state_kept():
            import_all(options.seed, options.model, options.loader, options.forward)
        batches = make_batches(options.loader, options.loader_args)
        forward = load_object(options.forward) if options.forward else None
        report = refresh_norm(
            model, batches, forward=forward, ranks=ranks, progress=progress, **options.keywords
        )
    elif any(map(is_norm_statistic, checkpoint.tensors)):
        log.warning(
            "the checkpoint has running statistics and the model no norm layer of torch's "
            "that tracks any (is it TorchScript?): they stay as they are"
        )
    else:
        log.info("the model has no norm layers that track statistics: a plain copy")
    used = [layers[layer.name] for layer in report.layers]
    _warn_of_frozen(report, layers, names)
    return checkpoint.with_values(_statistics(model, used, names, checkpoint)), report


def _warn_of_frozen(
    report: RefreshReport, layers: Mapping[str, NormLayer], names: Mapping[str, str]
) -> None:
    """Speak of layers without a counter, as torchvision's frozen ones are in a checkpoint."""
    uncounted = [
        layer.name
        for layer in report.layers
        if layers[layer.name].num_batches_tracked is not None
        and f"{layer.name}.running_mean" in names
        and f"{layer.name}.num_batches_tracked" not in names
    ]
    if uncounted:
        log.warning(
            "the checkpoint counts no batches for %d of the refreshed layers, as of frozen ones: "
            "if they were, leave them out with --skip-layers (the first is %s)",
            len(uncounted),
            printable(repr(uncounted[0])),
        )


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
    buffers = {buffer.data_ptr() for layer in layers for buffer in layer.buffers(recurse=False)}
    arrays: dict[int, AnyArray] = {}
    values: dict[str, AnyArray] = {}
    for name, buffer in model.state_dict(keep_vars=True).items():
        place = buffer.data_ptr() if isinstance(buffer, torch.Tensor) else None
        if place in buffers and name in names:
            if place not in arrays:
                arrays[place] = buffer.detach().cpu().double().numpy()
            dtype = checkpoint.tensors[names[name]].dtype
            if not _fits(arrays[place], dtype):
                raise RefreshError(
                    f"{printable(name)!r} is too large for the checkpoint's {dtype.name}",
                    remedy="keep the checkpoint's norm statistics in float32",
                )
            values[names[name]] = arrays[place]
    if layers and not arrays:
        raise RefreshError(
            "the model's state_dict does not hold the buffers of its norm layers, but copies",
            remedy="let --model be the module within, whose state_dict is torch's own",
        )
    return values


def _fits(values: AnyArray, dtype: DType) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(dtype.numpy).astype(np.float64)).all())
