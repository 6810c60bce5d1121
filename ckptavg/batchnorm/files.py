"""Refresh the statistics in a checkpoint file: load, pass the data through, write."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.batchnorm.layers import (
    CHANGED,
    NOT_IN_CHECKPOINT,
    SAME_IN_ALL_MEMBERS,
    KeptLayer,
    holds_statistics,
    norm_layers,
    nothing_refreshed,
)
from ckptavg.batchnorm.options import RefreshCheckpointOptions
from ckptavg.batchnorm.refresh import refresh_norm
from ckptavg.batchnorm.rewriting import Rewriting, provenance
from ckptavg.errors import RefreshError, printable, said_once
from ckptavg.formats import open_checkpoint
from ckptavg.formats.paths import as_path, is_remote
from ckptavg.formats.statedict import place_of
from ckptavg.formats.tensors import is_norm_statistic
from ckptavg.model.factories import load_function, user_code
from ckptavg.model.feeding import Feed, limited
from ckptavg.model.loading import check_ignore, load_weights, unwrapped
from ckptavg.model.making import import_all, make_batches, make_model, random_state_kept
from ckptavg.model.modes import start_training
from ckptavg.options import takes_fields_of
from ckptavg.write.output import followed
from ckptavg.write.replacement import put_back

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import torch

    from ckptavg.batchnorm.layers import NormLayer
    from ckptavg.batchnorm.report import RefreshReport
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
    from ckptavg.formats.tensors import AnyArray, DType
    from ckptavg.model.loading import Loaded

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
    with ranks.together(), said_once():
        if not is_remote(path) and ranks.rank == 0:
            put_back(followed(path))
        checkpoint = open_checkpoint(path, key=options.key)
        rewriting = Rewriting(checkpoint, output, options)
        ranks.gather(None)  # all processes have checked the output before the first writes it
        judge = options.judge if ranks.rank == 0 and not options.dry_run else None
        before = None if judge is None else judge.measure(checkpoint)
        refreshed, report, loaded = _refreshed(checkpoint, options)
        if options.dry_run:
            return replace(report, written=False)
        if judge is not None and before is not None:
            report = replace(report, verdict=judge.verdict(before, judge.measure(refreshed)))
        keeps_old = report.verdict is not None and report.verdict.kept == "old"
        if keeps_old and rewriting.replaces:
            report = replace(report, written=False)
        elif ranks.rank == 0:
            entry = provenance(
                checkpoint, None if keeps_old else report, loaded, options.seed,
                is_container=rewriting.is_container,
            )  # fmt: skip
            rewriting.write(checkpoint if keeps_old else refreshed, entry)
        ranks.gather(None)  # no process returns before the output is there
    return report


def _refreshed(
    checkpoint: Checkpoint, options: RefreshCheckpointOptions
) -> tuple[Checkpoint, RefreshReport, Loaded]:
    """The checkpoint with other norm statistics.

    Returns:
        The checkpoint, the report, and where the model's tensors are in the checkpoint.

    Raises:
        RefreshError: no layer was refreshed, unless that `is_optional`.
    """
    import_all(options.seed, options.model)
    sources = (checkpoint, *reversed(options.members))
    model = make_model(options.model, options.model_args, options.device, sources)
    check_ignore(options.ignore, model, [checkpoint])
    was_training = model.training
    start_training(model)
    loaded = load_weights(model, checkpoint, options.ignore)
    kept = layers_to_keep(model, loaded, checkpoint)
    layers = norm_layers(unwrapped(model))
    batches: Iterable[Any] = ()
    forward = None
    if layers:
        with random_state_kept():
            import_all(options.seed, options.model, options.loader, options.forward)
        batches = make_batches(options.loader, options.loader_args, "fit", model, sources)
        if options.dry_run:
            ends_early = options.tol is not None  # the loader is checked whole, not its first batch
            Feed(batches, options.ranks, max_samples=options.max_samples, ends_early=ends_early)
            batches = list(islice(limited(batches), 1))
        forward = load_function(options.forward) if options.forward else None
    report = refresh_norm(
        model, batches, forward=forward, kept=kept,
        ranks=options.ranks, progress=options.progress, **options.keywords,
    )  # fmt: skip
    if not report.layers:
        _explain_nothing(report, checkpoint, is_optional=options.is_optional)
    used = {layer.name: layers[layer.name] for layer in report.layers}
    _warn_of_uncounted(used, loaded)
    refreshed = checkpoint.with_values(_statistics(used, loaded, checkpoint))
    if not was_training:
        with user_code("the model's eval()"):
            model.eval()
    return refreshed, report, loaded


def layers_to_keep(
    model: torch.nn.Module, loaded: Loaded, checkpoint: Checkpoint, frozen: Collection[str] = ()
) -> list[KeptLayer]:
    """The layers whose statistics are not in the checkpoint, or were frozen in the training.

    Args:
        model: the model, with the checkpoint's weights.
        loaded: where its tensors are in the checkpoint.
        checkpoint: the checkpoint, whose provenance may record what was frozen.
        frozen: names in the checkpoint of layers that are known to be frozen.
    """
    kept = []
    for name, module in unwrapped(model).named_modules():
        if not holds_statistics(module):
            continue
        buffers = (buffer for buffer, _ in module.named_buffers(recurse=False))
        given = [loaded.of(name, each) for each in buffers if each != "num_batches_tracked"]
        found = [names[0] for names in given if names]
        if loaded.lost and len(found) < len(given):
            kept.append(KeptLayer(name, CHANGED, is_intended=False))
        elif not found:
            kept.append(KeptLayer(name, NOT_IN_CHECKPOINT, is_intended=True))
        elif _was_frozen(found[0].rpartition(".")[0], checkpoint, frozen):
            kept.append(KeptLayer(name, SAME_IN_ALL_MEMBERS, is_intended=True))
    return kept


def _was_frozen(layer: str, checkpoint: Checkpoint, known: Collection[str]) -> bool:
    """Whether a layer is known to be frozen, or by the checkpoint's provenance."""
    provenance = checkpoint.provenance or {}
    entry = provenance.get("norm_stats", {})
    recorded = entry.get("frozen", [])
    # A container keeps the wrapper's prefix, which the average's names do not have. Names in an
    # average of several state dicts begin with the place of one.
    key = provenance.get("key", checkpoint.key)
    place = place_of(None, key) if isinstance(key, str) else ""
    return entry.get("state") == "frozen" or any(
        each in (layer, place + layer) or layer.endswith(f".{each}") for each in (*known, *recorded)
    )


def _explain_nothing(report: RefreshReport, checkpoint: Checkpoint, *, is_optional: bool) -> None:
    """Say why nothing was refreshed.

    Raises:
        RefreshError: `is_optional` is False, or the model does not show its norm layers.
    """
    error = nothing_refreshed(report.kept)
    error.path = checkpoint.path
    is_hidden = not report.kept and any(map(is_norm_statistic, checkpoint.tensors))
    if is_hidden:
        error.message += ", though the checkpoint has such statistics"
    elif not report.kept:
        error.remedy = "use the checkpoint as it is: it needs no refresh"
    if is_hidden or not is_optional:
        raise error
    log.info(error.message)


def _warn_of_uncounted(layers: Mapping[str, NormLayer], loaded: Loaded) -> None:
    """Speak of layers without a counter, as torchvision's frozen ones are in a checkpoint."""
    uncounted = [
        name
        for name, layer in layers.items()
        if layer.num_batches_tracked is not None
        and loaded.of(name, "running_mean")
        and not loaded.of(name, "num_batches_tracked")
    ]
    if uncounted:
        log.warning(
            "%d refreshed layers have no num_batches_tracked in the checkpoint, like frozen "
            "layers of torchvision; if they were frozen, leave them out with `skip_layers` (the "
            "first is %s)",
            len(uncounted),
            printable(repr(uncounted[0])),
        )


def _statistics(
    layers: Mapping[str, NormLayer], loaded: Loaded, checkpoint: Checkpoint
) -> dict[str, AnyArray]:
    """The layers' buffers by their names in the checkpoint, shared ones under each name.

    Raises:
        RefreshError: they do not fit into the checkpoint's dtype, or two layers into one place.
    """
    values: dict[str, AnyArray] = {}
    for layer, module in layers.items():
        for buffer, tensor in module.named_buffers(recurse=False):
            array = tensor.detach().cpu().double().numpy()
            for name in loaded.of(layer, buffer):
                dtype = checkpoint.tensors[name].dtype
                if name in values:
                    raise RefreshError(
                        f"{printable(name)!r} was loaded into several layers, whose new "
                        "statistics differ",
                        remedy="refresh one of them, and leave out the others with `skip_layers`",
                    )
                if not _fits(array, dtype):
                    raise RefreshError(
                        f"{printable(name)!r} is too large for the checkpoint's {dtype.name}",
                        remedy="keep the checkpoint's norm statistics in float32",
                    )
                values[name] = array
    return values


def _fits(values: AnyArray, dtype: DType) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(dtype.numpy).astype(np.float64)).all())
