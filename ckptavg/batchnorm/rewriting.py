"""Where a refreshed checkpoint goes: itself but for its norm statistics, or another container."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg import __version__
from ckptavg.batchnorm.layers import SAME_IN_ALL_MEMBERS
from ckptavg.errors import OutputError, without_notices
from ckptavg.formats import huggingface, open_checkpoint
from ckptavg.formats.paths import is_remote
from ckptavg.formats.statedict import place_of
from ckptavg.formats.tensors import is_norm_statistic, norm_layers
from ckptavg.merge.engine import default_threads
from ckptavg.merge.plan import make_plan
from ckptavg.merge.recipe import COPY, AverageOptions, Recipe
from ckptavg.merge.weights import uniform
from ckptavg.write.layouts import destination, lay_out, with_container
from ckptavg.write.provenance import carried_on, source_entries
from ckptavg.write.writing import check_outputs, write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptavg.batchnorm.options import RefreshCheckpointOptions
    from ckptavg.batchnorm.report import RefreshReport
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
    from ckptavg.merge.jobs import Layout
    from ckptavg.merge.plan import Plan
    from ckptavg.merge.roles import Role
    from ckptavg.model.loading import Loaded
    from ckptavg.write.layouts import Destination

log = logging.getLogger("ckptavg")


class Rewriting:
    """A checkpoint, and where it goes with other norm statistics.

    Whatever stands against that is found out here, before the model is run.

    Args:
        checkpoint: the checkpoint.
        output: its destination; None for the checkpoint itself, which must be ours unless
            `in_place`.
        options: say what is written, and what may be replaced.

    Attributes:
        replaces: the destination is the checkpoint itself.
        is_container: the output has the rest of the checkpoint's file too.

    Raises:
        OutputError: it cannot go there.
    """

    def __init__(
        self, checkpoint: Checkpoint, output: PathLike | None, options: RefreshCheckpointOptions
    ) -> None:
        self._checkpoint = checkpoint
        self.replaces = output is None or _is_same(Path(output), checkpoint.path)
        if self.replaces:
            _check_in_place(checkpoint, allowed=options.in_place, named=output is not None)
        container, format_ = options.container, options.format
        if self.replaces and checkpoint.container == "torch":
            container = "last"  # the same file but for its norm statistics
        if self.replaces and checkpoint.container == "dcp":
            format_ = "dcp"
        where = output or checkpoint.path
        self._options = AverageOptions(
            key=options.key, container=container, format=format_,
            max_shard_size=options.max_shard_size, force=options.force or self.replaces,
            fsync=options.fsync,
        )  # fmt: skip
        self._mirrored = checkpoint.is_average
        target = destination(where, checkpoint, self._options)
        with without_notices():
            plan = self._plan(checkpoint)
        self._target = with_container(
            target, plan.tensors, [checkpoint], self._options, mirrored=self._mirrored
        )
        self.is_container = self._target.kind == "container"
        if self.replaces:
            _check_same_kind(checkpoint, self._target)
        try:
            with without_notices():
                layout = self._lay_out(plan, checkpoint.provenance or {})
        except OutputError as error:
            if self.replaces:
                error.remedy = "write another file with -o"
            raise
        inputs = () if self.replaces else [part.path for part in checkpoint.parts]
        check_outputs([layout], force=self._options.force, inputs=inputs)
        if self._target.kind in ("safetensors", "torch") and checkpoint.other_content:
            log.info("only the state dict is written, not the rest of %s", checkpoint.path.name)

    def write(self, refreshed: Checkpoint, entry: dict[str, Any]) -> None:
        """Write the checkpoint as it is now, with that provenance."""
        plan = self._plan(refreshed)
        layout = self._lay_out(plan, entry)
        check_outputs([layout], force=self._options.force)
        write(plan, [layout], self._options, default_threads(plan.members))

    def _plan(self, refreshed: Checkpoint) -> Plan:
        roles: dict[str, Role] = dict.fromkeys(refreshed.tensors, "kept")
        return make_plan([refreshed], [uniform(1)], self._options, roles=roles)

    def _lay_out(self, plan: Plan, entry: dict[str, Any]) -> Layout:
        """The output with that provenance."""
        return lay_out(
            self._target, plan.tensors, entry, self._checkpoint, self._options,
            mirrored=self._mirrored,
        )  # fmt: skip


def provenance(
    checkpoint: Checkpoint,
    report: RefreshReport | None,
    loaded: Loaded,
    seed: int,
    *,
    is_container: bool,
) -> dict[str, Any]:
    """The checkpoint's provenance, brought up to date.

    Args:
        checkpoint: as it was.
        report: what the refresh did; None if the old statistics stay.
        loaded: where the model's tensors are in the checkpoint.
        seed: of the random numbers.
        is_container: whether the other state dicts of the file are in the output.
    """
    entry = (checkpoint.provenance if is_container else carried_on(checkpoint)) or {
        "scheme": COPY,
        "sources": source_entries(Recipe(COPY, (checkpoint,), uniform(1))),
        "divisor": 1.0,
    }
    state: dict[str, Any] = {"state": "none"}
    if any(map(is_norm_statistic, checkpoint.tensors)):
        state = entry.get("norm_stats", {"state": "unknown"})
    if report is not None and report.layers:
        elsewhere = _stale_elsewhere(checkpoint, state) if is_container else []
        state = _refreshed_state(report, loaded, seed, before=state)
        if elsewhere:
            stale = [*state.get("stale", ()), *elsewhere]
            state |= {"state": "partly refreshed", "stale": stale}
    return {**entry, "version": __version__, "norm_stats": state}


def _stale_elsewhere(checkpoint: Checkpoint, before: Mapping[str, Any]) -> list[str]:
    """The stale layers in the file's other state dicts, where several were averaged in one go."""
    match (checkpoint.provenance or {}).get("sources"):
        case [*_, {"key": [*keys]}] if before.get("state") in ("stale", "partly refreshed"):
            pass
        case _:
            return []
    layers = {
        place_of(None, key) + layer
        for key in checkpoint.other_keys
        if key in keys
        for layer in norm_layers(open_checkpoint(checkpoint.path, key=key).tensors)
    }
    return sorted((layers - {*before.get("frozen", ())}) & {*before.get("stale", layers)})


def _refreshed_state(
    report: RefreshReport, loaded: Loaded, seed: int, *, before: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry on the norm statistics after a refresh, with the layers that are left by name."""
    stale = [_name_in_checkpoint(each.name, loaded) for each in report.stale]
    if before.get("state") == "refreshed":
        stale = []  # what is kept now was refreshed before
    elif before.get("state") == "partly refreshed":
        stale = [name for name in stale if name in before.get("stale", ())]
    frozen = [
        _name_in_checkpoint(each.name, loaded)
        for each in report.kept
        if each.reason == SAME_IN_ALL_MEMBERS
    ]
    state: dict[str, Any] = {
        "state": "partly refreshed" if stale else "refreshed",
        "estimator": report.estimator,
        "batches": report.batches,
        "samples": report.samples,
        "seed": seed,
    }
    return state | {key: each for key, each in (("stale", stale), ("frozen", frozen)) if each}


def _name_in_checkpoint(layer: str, loaded: Loaded) -> str:
    """A layer's name in the checkpoint; that in the model if it is not there."""
    names = loaded.of(layer, "running_mean") or loaded.of(layer, "running_var")
    return names[0].rpartition(".")[0] if names else layer


def _check_in_place(checkpoint: Checkpoint, *, allowed: bool, named: bool) -> None:
    if checkpoint.provenance is None and not allowed:
        what = "is the checkpoint itself" if named else "was not made by ckptavg"
        raise OutputError(
            what,
            path=checkpoint.path,
            remedy="write another file with `output`, or replace it with `in_place`",
        )
    if checkpoint.path.is_dir() and not _has_plain_weights(checkpoint):
        raise OutputError(
            "cannot be replaced: it is a directory with more than weights, or with weights in "
            "other files than safetensors",
            path=checkpoint.path,
            remedy="write another directory with `output`",
        )


def _has_plain_weights(checkpoint: Checkpoint) -> bool:
    """Whether a directory's weights are what would be written into it."""
    if checkpoint.container == "dcp":
        return not checkpoint.other_content
    names = (
        huggingface.weight_files(checkpoint.path) if checkpoint.container == "huggingface" else ()
    )
    return bool(names) and all(".safetensors" in name for name in names)


def _is_same(output: Path, path: Path) -> bool:
    return not is_remote(path) and output.exists() and output.samefile(path)


def _check_same_kind(checkpoint: Checkpoint, target: Destination) -> None:
    """Check that a checkpoint that is written in place stays what it is.

    Raises:
        OutputError: it would become a file of another kind.
    """
    kind = {"huggingface": "directory"}.get(checkpoint.container, checkpoint.container)
    if target.kind not in ("container", kind):
        raise OutputError(
            f"is a {checkpoint.container} file by its content, and its name is another format's",
            path=checkpoint.path,
            remedy="write another file with `output`",
        )
