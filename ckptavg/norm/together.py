"""Average checkpoints and refresh the average in one go."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.average import average
from ckptavg.errors import OutputError
from ckptavg.norm.files import refresh_checkpoint
from ckptavg.write.checks import check_vacant, refuse_own_input
from ckptavg.write.temporary import temporary_beside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.merge.options import Progress
    from ckptavg.norm.options import RefreshOptions
    from ckptavg.norm.report import RefreshReport
    from ckptavg.write.summary import Summary


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
    with temporary_beside(target, folder=True) as folder:
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
