"""Average checkpoints and refresh the average in one go."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg.average import find_recipe, write_averages
from ckptavg.batchnorm.files import refresh_checkpoint
from ckptavg.errors import OutputError, SelectionError
from ckptavg.formats.statedict import as_key
from ckptavg.merge.recipe import AverageOptions
from ckptavg.model.making import import_all
from ckptavg.write.temporary import temporary_beside
from ckptavg.write.writing import check_vacant

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptavg.batchnorm.options import RefreshOptions
    from ckptavg.batchnorm.report import RefreshReport
    from ckptavg.distributed import Ranks
    from ckptavg.merge.recipe import Recipe
    from ckptavg.select.run import Run
    from ckptavg.write.provenance import Summary


def average_and_refresh(
    inputs: Sequence[Path],
    output: str | os.PathLike[str],
    refresh: RefreshOptions,
    *,
    refresh_progress: Any = None,  # noqa: ANN401 - refresh_norm's
    **fields: Any,  # noqa: ANN401 - those of AverageOptions
) -> tuple[Summary, RefreshReport]:
    """Average, and refresh the average, as one step: the output is there with both or not at all.

    The average waits beside the output, in a temporary folder. An output that cannot be written is
    refused before any tensor is read.

    Args:
        inputs: as in `average`.
        output: as in `average`.
        refresh: the model, the loader and how to run them.
        refresh_progress: called after each batch.
        fields: the fields of `AverageOptions`, as keywords of `average`.

    Raises:
        CkptAvgError: `average` or `refresh_checkpoint` raised it.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    options = AverageOptions(**fields)
    key = as_key(options.key)
    if isinstance(key, tuple):
        raise SelectionError(
            "a refresh needs one state dict, but `key` names several",
            remedy="average them without `model`, then refresh one `key` at a time",
        )
    with options.ranks.together():
        check_vacant(Path(output), force=options.force)
        run, recipe = find_recipe(inputs, options)
        return write_refreshed(run, recipe, output, options, refresh, progress=refresh_progress)


def write_refreshed(
    run: Run,
    recipe: Recipe,
    output: str | os.PathLike[str],
    options: AverageOptions,
    refresh: RefreshOptions,
    *,
    progress: Any = None,  # noqa: ANN401 - refresh_norm's
) -> tuple[Summary, RefreshReport]:
    """Write the average that a recipe describes, refreshed.

    Args:
        run: the checkpoints.
        recipe: the members and their weights.
        output: as in `average`.
        options: those of the average.
        refresh: the model, the loader and how to run them.
        progress: called after each batch.

    Raises:
        CkptAvgError: `average` or `refresh_checkpoint` raised it.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    target = Path(os.path.abspath(output))  # noqa: PTH100 - links stay links
    key = as_key(options.key)
    with contextlib.ExitStack() as stack:
        import_all(refresh.seed, refresh.model, refresh.loader, refresh.forward)
        folder = stack.enter_context(_shared_folder_beside(target, options.ranks))
        try:
            [summary] = write_averages(
                run, [recipe], [output], replace(options, fsync=False), folder=folder
            )
        except OutputError as error:
            error.path = target  # and not the folder, which is gone by now
            raise
        report = refresh_checkpoint(
            Path(summary.output), output, **vars(refresh),
            key=key if isinstance(key, str) and options.container == "last" else None,
            container=options.container, format=options.format,
            max_shard_size=options.max_shard_size, members=recipe.members, is_optional=True,
            force=options.force, fsync=options.fsync, ranks=options.ranks,
            progress=progress,
        )  # fmt: skip
    # What was written is the file of the refresh.
    size = sum(file.stat().st_size for file in (target, *target.rglob("*")) if file.is_file())
    state = report.state if report.layers else summary.norm_stats
    refreshed = replace(summary, output=str(Path(output)), norm_stats=state, bytes_written=size)
    return refreshed, report


@contextlib.contextmanager
def _shared_folder_beside(path: Path, ranks: Ranks) -> Iterator[Path]:
    """A temporary folder beside a path, which the first process makes for all of them."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(temporary_beside(path, folder=True)) if ranks.rank == 0 else path
        yield ranks.gather(made)[0]
