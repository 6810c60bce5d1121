"""Average checkpoints: from the files of a training run to one output, or to several."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptavg.errors import OutputError, SelectionError, listed, printable
from ckptavg.formats import SUFFIXES, open_checkpoint
from ckptavg.formats.checkpoint import fingerprint, without_wrappers
from ckptavg.formats.lora_adapter import is_adapter
from ckptavg.formats.paths import as_paths
from ckptavg.formats.statedict import as_key
from ckptavg.merge.engine import default_threads
from ckptavg.merge.lora import check_adapters, join_factors
from ckptavg.merge.names import choose_tensors
from ckptavg.merge.plan import make_plan
from ckptavg.merge.recipe import AverageOptions, recipes_of
from ckptavg.merge.schemes import schemes_of
from ckptavg.merge.update import find_base, fold
from ckptavg.options import takes_fields_of
from ckptavg.select.advice import advice
from ckptavg.select.candidates import find_candidates
from ckptavg.select.members import log_left_out
from ckptavg.select.order import remedy_without_order
from ckptavg.select.run import Run, find_run, log_averages, log_other_state_dicts
from ckptavg.write.digests import hash_checkpoints
from ckptavg.write.layouts import destination, lay_out, with_container
from ckptavg.write.provenance import Summary, carried_on, provenance, summarise
from ckptavg.write.writing import check_outputs, check_parent, check_room, check_vacant, write

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
    from ckptavg.merge.jobs import Layout
    from ckptavg.merge.plan import Plan
    from ckptavg.merge.recipe import Recipe
    from ckptavg.merge.roles import Role
    from ckptavg.write.layouts import Destination
    from ckptavg.write.provenance import Digests

log = logging.getLogger("ckptavg")


@takes_fields_of(AverageOptions)
def average(
    inputs: PathLike | Iterable[PathLike], output: PathLike, options: AverageOptions
) -> Summary:
    """Average checkpoints into one, in memory that does not grow with them.

    Floating tensors are summed in float64, divided once and rounded as `torch.Tensor.to` does.
    Integers must agree; a differing counter such as `num_batches_tracked` is the last
    checkpoint's. The statistics of norm layers are stale afterwards: see `refresh_norm`.

    Args:
        inputs: a directory of checkpoints, a checkpoint, or several of either; URLs such as
            `s3://bucket/run` as well.
        output: ends with `.safetensors`, or with `.pt`, `.pth`, `.bin`, `.ckpt` or `.tar` for a
            torch file, or with a slash for a directory in the layout of `format`.
        options: the fields of `AverageOptions`, as keywords.

    Raises:
        CkptAvgError: the checkpoints differ in names or shapes, have tensors that cannot be
            averaged, or the output cannot be written. Then nothing is left behind.
    """
    run, recipe = find_recipe(inputs, options)
    [summary] = write_averages(run, [recipe], [output], options)
    if options.dry_run:
        summary = replace(
            summary,
            advice=tuple(advice(run.checkpoints, recipe.members, options.select.lr_recorded)),
        )
    return summary


def find_recipe(
    inputs: PathLike | Iterable[PathLike], options: AverageOptions
) -> tuple[Run, Recipe]:
    """The checkpoints among the inputs, and what the one average is made of.

    Raises:
        CkptAvgError: as `average` does.
    """
    schemes = schemes_of(options.weights)
    if len(schemes) != 1 or len(options.select.counts) != 1:
        raise SelectionError("several averages are asked for", remedy="use average_many")
    if options.update and schemes[0].name != "uniform":
        raise SelectionError("only a uniform average can be updated")
    paths = as_paths(inputs)
    base = _open_base(paths, options) if options.update else None
    if base is not None:
        paths = [path for path in paths if path != base.path]
        if not paths:
            raise SelectionError("there are no checkpoints to add to it", path=base.path)
    run = open_run(paths, options)
    [recipe] = recipes_of(run, schemes, options.select, options)
    return run, recipe if base is None else fold(base, recipe)


@takes_fields_of(AverageOptions)
def average_many(
    inputs: PathLike | Iterable[PathLike], directory: PathLike, options: AverageOptions
) -> tuple[Summary, ...]:
    """Make several averages from one read of the checkpoints: each byte is read once.

    There is one average for each pair of a scheme in `weights` and a number in `select.last`.

    Args:
        inputs: as in `average`.
        directory: where the averages are written, under names such as `last5-ema0.9.safetensors`.
        options: the fields of `AverageOptions`, as keywords.

    Raises:
        CkptAvgError: as `average` does.
    """
    if options.update or options.lora == "exact":
        raise SelectionError("`update` and `lora=exact` make one average at a time")
    if "://" in os.fspath(directory):
        raise OutputError("outputs are written on this machine only", path=str(directory))
    folder = Path(directory)
    is_file_name = folder.suffix in SUFFIXES and not folder.is_dir()
    if is_file_name or (os.path.lexists(folder) and not folder.is_dir()):
        raise OutputError(
            "several averages need a directory as the output",
            path=folder,
            remedy="give it another name",
        )
    run = open_run(inputs, options)
    recipes = recipes_of(run, schemes_of(options.weights), options.select, options)
    # os.path.join keeps the slash at the end of a directory's name.
    outputs = [os.path.join(folder, _file_name(recipe, options)) for recipe in recipes]  # noqa: PTH118
    is_new = not folder.exists() and not options.dry_run
    if is_new:
        folder.mkdir(exist_ok=options.ranks.size > 1)  # another process may be faster
    try:
        return write_averages(run, recipes, outputs, options)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # not empty, or another process was faster
                folder.rmdir()
        raise


def open_run(inputs: PathLike | Iterable[PathLike], options: AverageOptions) -> Run:
    """The run of the checkpoints among the inputs.

    Raises:
        CkptAvgError: there is no checkpoint, or one cannot be read.
    """
    run = find_run(
        as_paths(inputs), key=as_key(options.key), keep_prefix=options.keep_prefix,
        exclusion_reason=options.select.exclusion_reason,
    )  # fmt: skip
    log_left_out(run.candidates)
    log_averages(run)
    return run


def _open_base(paths: Sequence[Path], options: AverageOptions) -> Checkpoint:
    """The earlier average that is to be updated: the one among the files that the user named.

    Raises:
        SelectionError: there is none, or it cannot be updated.
    """
    averages = []
    for path in (path for path, folder in find_candidates(paths).items() if folder is None):
        with contextlib.suppress(SelectionError):  # it holds several state dicts, and no average
            checkpoint = open_checkpoint(path, key=as_key(options.key))
            if checkpoint.is_average:
                averages.append(checkpoint)
    base, _ = without_wrappers(find_base(averages), keep_prefix=options.keep_prefix)
    return base


def _file_name(recipe: Recipe, options: AverageOptions) -> str:
    """The name of one of several outputs: a directory where the checkpoints are directories."""
    if recipe.last.is_of_directories or options.format == "dcp":
        return f"{recipe.label}/"
    is_torch = options.container == "last" or recipe.last.has_several_models
    return recipe.label + (".pt" if is_torch else ".safetensors")


def write_averages(
    run: Run,
    recipes: Sequence[Recipe],
    outputs: Sequence[PathLike],
    options: AverageOptions,
    *,
    folder: Path | None = None,
) -> tuple[Summary, ...]:
    """Write several averages of one run from one read of its checkpoints.

    Args:
        run: the checkpoints.
        recipes: the members and weights of each average.
        outputs: the path of each average.
        options: the options of all averages.
        folder: the averages are written into it, under the names of the outputs, which are checked
            all the same; None for the outputs themselves.

    Raises:
        CkptAvgError: as `average` does.
    """
    members = all_members(run, recipes)
    is_copy = recipes[0].is_copy
    read, skipped = choose_tensors(members, [recipe.last for recipe in recipes], options)
    if as_key(options.key) is None:
        log_other_state_dicts(members)
    if len(members) == 1 and not is_copy:
        name = printable(members[0].name)
        log.warning("only one checkpoint: the output is a copy of %s", name)
    targets = [
        destination(output, recipe.last, options)
        for output, recipe in zip(outputs, recipes, strict=True)
    ]
    read, files = _with_joined_factors(read, recipes[0], targets[0], options)
    contributing = dict(zip(members, read, strict=True))
    weights = [recipe.weights_over(members) for recipe in recipes]
    kept: dict[str, Role] = dict.fromkeys(read[-1].tensors, "kept")
    plan = make_plan(read, weights, options, roles=kept if is_copy else None, skipped=skipped)
    targets = [
        with_container(
            target, plan.tensors, [contributing[each] for each in recipe.members], options,
            mirrored=len(recipe.members) > 1, is_copy=is_copy,
        )
        for recipe, target in zip(recipes, targets, strict=True)
    ]  # fmt: skip
    if any(target.kind == "container" for target in targets):
        options = replace(options, container="last")
    _check_order(run, plan, recipes, targets)
    threads = options.threads or default_threads(members)
    hashes = _hashes(members, targets, options, threads)
    fingerprints = {} if options.lora == "exact" else {each: fingerprint(each) for each in members}
    layouts = []
    for recipe, target in zip(recipes, targets, strict=True):
        entry = provenance(plan, recipe, options.recorded, fingerprints, hashes)
        if is_copy and recipe.last.provenance and not (options.dtype or options.skip):
            entry = carried_on(recipe.last) or entry
        layouts.append(
            lay_out(
                target, plan.tensors, entry, contributing[recipe.last], options,
                replaced=files, mirrored=len(recipe.members) > 1,
            )
        )  # fmt: skip
    if options.hash:
        _check_provenance(layouts)
    _check_outputs(run, layouts, options)
    if folder is not None:
        elsewhere = [replace(layout, path=folder / layout.path.name) for layout in layouts]
        check_room([*layouts, *elsewhere])
        layouts = elsewhere
    if not options.dry_run:
        write(plan, layouts, options, threads)
    return tuple(
        summarise(plan, recipe, layout, written=not options.dry_run, threads=threads, hashes=hashes)
        for recipe, layout in zip(recipes, layouts, strict=True)
    )


def all_members(run: Run, recipes: Sequence[Recipe]) -> tuple[Checkpoint, ...]:
    """The members of all averages, in the order of training."""
    if len(recipes) == 1:
        return recipes[0].members
    wanted = {member for recipe in recipes for member in recipe.members}
    return tuple(checkpoint for checkpoint in run.checkpoints if checkpoint in wanted)


def _with_joined_factors(
    members: tuple[Checkpoint, ...], recipe: Recipe, target: Destination, options: AverageOptions
) -> tuple[tuple[Checkpoint, ...], dict[str, bytes]]:
    """With `lora="exact"`, put the LoRA factors of all members side by side.

    Returns:
        The members, the last of which has the joined factors; and the files that the output must
        have for them, by name.

    Raises:
        MismatchError: factors are averaged apart, and the adapters' scales differ.
        OutputError: the output has no place for what must be recorded of the joined factors.
    """
    if options.lora == "separate":
        if len(members) > 1 and is_adapter(members[0]):
            check_adapters(members)
        return members, {}
    joined, files = join_factors(members, recipe.weights, allow_nonfinite=options.allow_nonfinite)
    if target.kind != "directory" and (files or target.kind != "safetensors"):
        kinds = "Hugging Face directory" if files else ".safetensors or Hugging Face directory"
        ends = "a slash" if files else ".safetensors or a slash"
        raise OutputError(
            f"exact averages of such LoRA adapters need a {kinds}, which records their rank",
            path=target.path,
            remedy=f"let the output's name end with {ends}",
        )
    return joined, files


def _check_order(
    run: Run, plan: Plan, recipes: Sequence[Recipe], targets: Sequence[Destination]
) -> None:
    """Refuse outputs that depend on the order of the checkpoints if it is not known.

    Raises:
        SelectionError: an output depends on the order.
    """
    if run.order_is_known:
        return
    what = None
    if "last" in plan.counts or any(recipe.needs_order for recipe in recipes):
        what = "the result depends on it"
    elif any(
        target.kind == "container"
        or (target.kind in ("torch", "dcp") and recipe.last.other_entries)
        for recipe, target in zip(recipes, targets, strict=True)
    ):
        what = "the output contains other entries of the last one"
    if what is not None:
        names = listed(member.name for member in plan.members)
        raise SelectionError(
            f"the order of the checkpoints is not known, and {what}: {names}",
            remedy=remedy_without_order(plan.members),
        )


def _hashes(
    members: Sequence[Checkpoint],
    targets: Sequence[Destination],
    options: AverageOptions,
    threads: int,
) -> dict[Checkpoint, Digests]:
    """The SHA-256 of the members' files, where they are asked for."""
    if not options.hash or options.dry_run:
        return {}
    for target in targets:  # before minutes of hashing
        check_vacant(target.path, force=options.force)
    return hash_checkpoints(members, threads, options.hash_progress, options.ranks)


def _check_provenance(layouts: Sequence[Layout]) -> None:
    """Check that each output has a place for the provenance, which has the digests.

    Raises:
        OutputError: one of them has none.
    """
    for layout in layouts:
        if not any(file.blobs for file in layout.files.values()):
            raise OutputError(
                "a torch file in the format from before 1.6 has no place for digests",
                path=layout.path,
                remedy="leave `hash` out, or `container`",
            )


def _check_outputs(run: Run, layouts: Sequence[Layout], options: AverageOptions) -> None:
    """Check before the work starts that the outputs can be written.

    Raises:
        OutputError: one of them cannot. A dry run logs a warning instead.
    """
    try:
        folder = layouts[0].path.parent
        if len(layouts) > 1 and options.dry_run and not folder.exists():
            check_parent(folder)  # it would be made
        else:
            check_outputs(layouts, force=options.force, inputs=run.files)
    except OutputError as error:
        if not options.dry_run:
            raise
        log.warning("the average would fail: %s", error)
