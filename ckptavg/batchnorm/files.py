"""Refresh the statistics in a checkpoint file: load, pass the data through, write."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    from ckptavg.errors import CkptAvgError

    raise CkptAvgError(
        "refreshing norm statistics runs the model, and torch is not installed",
        remedy="pip install torch",
    ) from error

from torch.nn.parameter import is_lazy

from ckptavg.batchnorm.layers import LeftLayer, explained, norm_layers, unwrapped
from ckptavg.batchnorm.options import RefreshCheckpointOptions
from ckptavg.batchnorm.refresh import refresh_norm
from ckptavg.batchnorm.rewriting import Rewriting, provenance
from ckptavg.errors import RefreshError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.formats.parts import as_path, is_remote
from ckptavg.formats.tensors import is_norm_statistic
from ckptavg.model.factories import load_object
from ckptavg.model.feeding import limited
from ckptavg.model.loading import load_weights
from ckptavg.model.making import import_all, make_batches, make_model, random_state_kept
from ckptavg.options import takes_fields_of
from ckptavg.write.output import followed
from ckptavg.write.replacement import put_back

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ckptavg.batchnorm.layers import NormLayer
    from ckptavg.batchnorm.options import RefreshOptions
    from ckptavg.batchnorm.report import RefreshReport
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.parts import PathLike
    from ckptavg.formats.tensors import AnyArray, DType

log = logging.getLogger("ckptavg")


@takes_fields_of(RefreshCheckpointOptions)
@random_state_kept()
def refresh_checkpoint(
    path: PathLike, output: PathLike | None, options: RefreshCheckpointOptions
) -> RefreshReport:
    """Refresh the norm statistics of a checkpoint; all else is copied byte for byte.

    Args:
        path: the checkpoint.
        output: where the result goes; None for the checkpoint itself, which ckptavg must have made
            unless `in_place`.
        options: the fields of `RefreshCheckpointOptions`, as keywords: `model`, `loader` and so on.

    Raises:
        CkptAvgError: the checkpoint does not fit the model, the pass failed, or the output cannot
            be written. The checkpoint is as it was then.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    path, ranks = as_path(path), options.ranks
    with ranks.together():
        if not is_remote(path) and ranks.rank == 0:
            put_back(followed(path))
        checkpoint = open_checkpoint(path, key=options.key)
        rewriting = Rewriting(checkpoint, output, options)
        ranks.gather(None)  # all processes have checked the output before the first writes it
        judge = options.judge if ranks.rank == 0 and not options.dry_run else None
        before = None if judge is None else judge.measure(checkpoint)
        refreshed, report = _refreshed(checkpoint, options)
        if options.dry_run:
            return replace(report, written=False)
        if judge is not None and before is not None:
            report = replace(report, verdict=judge.verdict(before, judge.measure(refreshed)))
        keeps_old = report.verdict is not None and report.verdict.kept == "old"
        if keeps_old and rewriting.replaces:
            report = replace(report, written=False)
        elif ranks.rank == 0:
            entry = provenance(checkpoint, None if keeps_old else report, options.seed)
            rewriting.write(checkpoint if keeps_old else refreshed, entry)
        ranks.gather(None)  # no process returns before the output is there
    return report


def _refreshed(
    checkpoint: Checkpoint, options: RefreshCheckpointOptions
) -> tuple[Checkpoint, RefreshReport]:
    """The checkpoint with other norm statistics.

    Raises:
        RefreshError: there are none, unless that is asked for.
    """
    import_all(options.seed, options.model)
    model = make_model(options.model, options.model_args, options.device)
    names = load_weights(model, checkpoint)
    left = layers_to_leave(model, names, checkpoint, options)
    layers = norm_layers(unwrapped(model))
    batches: Iterable[Any] = ()
    forward = None
    if len(left) < len(layers):
        with random_state_kept():
            import_all(options.seed, options.model, options.loader, options.forward)
        batches = make_batches(options.loader, options.loader_args, for_refresh=True)
        if options.dry_run:
            batches = list(islice(limited(batches), 1))
        forward = load_object(options.forward) if options.forward else None
    report = refresh_norm(
        model, batches, forward=forward, left=left,
        ranks=options.ranks, progress=options.progress, **options.keywords,
    )  # fmt: skip
    if not report.layers:
        _explain_nothing(report, checkpoint, is_optional=options.is_optional)
    used = [layers[layer.name] for layer in report.layers]
    _warn_of_frozen(report, layers, names)
    return checkpoint.with_values(_statistics(model, used, names, checkpoint)), report


def layers_to_leave(
    model: torch.nn.Module,
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    options: RefreshOptions,
) -> list[LeftLayer]:
    """The layers whose statistics are not in the checkpoint, or were frozen in the training.

    Args:
        model: the model, with the checkpoint's weights.
        names: the names of its tensors, with the checkpoint's.
        checkpoint: the checkpoint, whose provenance may record what was frozen.
        options: frozen layers are refreshed if the layers are named.
    """
    names_by_place: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in names and isinstance(tensor, torch.Tensor) and not is_lazy(tensor):
            names_by_place[tensor.data_ptr()] = names[name]
    left = []
    for name, layer in norm_layers(unwrapped(model)).items():
        assert layer.running_mean is not None  # noqa: S101 - see `tracks`
        place = None if is_lazy(layer.running_mean) else layer.running_mean.data_ptr()
        given = names_by_place.get(place) or names.get(f"{name}.running_mean")
        if given is None:
            reason = "not in the checkpoint"
            left.append(LeftLayer(name, reason, is_frozen=True))
        elif not options.layers and _was_frozen(given.rpartition(".")[0], checkpoint):
            reason = "frozen: the same in all members of the average"
            left.append(LeftLayer(name, reason, is_frozen=True))
    return left


def _was_frozen(layer: str, checkpoint: Checkpoint) -> bool:
    """Whether a layer had the same statistics in all members of the average, by its provenance."""
    entry = (checkpoint.provenance or {}).get("norm_stats")
    if not isinstance(entry, dict):
        return False
    frozen = entry.get("frozen")
    return entry.get("state") == "frozen" or (isinstance(frozen, list) and layer in frozen)


def _explain_nothing(report: RefreshReport, checkpoint: Checkpoint, *, is_optional: bool) -> None:
    """Say why nothing was refreshed.

    Raises:
        RefreshError: unless that is all right.
    """
    if report.left:
        reason = explained(report.left)
    elif any(map(is_norm_statistic, checkpoint.tensors)):
        raise RefreshError(
            "the checkpoint has running statistics and the model no norm layer that tracks any",
            path=checkpoint.path,
        )
    else:
        reason = "the model has no norm layers that track statistics"
    if not is_optional:
        raise RefreshError(f"there is nothing to refresh: {reason}", path=checkpoint.path)
    log.info("there is nothing to refresh: %s", reason)


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
            "if they were, leave them out with `skip_layers` (the first is %s)",
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
            remedy="let `model` be the module within, whose state_dict is torch's own",
        )
    return values


def _fits(values: AnyArray, dtype: DType) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(dtype.numpy).astype(np.float64)).all())
