"""Carry out a plan: the output is complete afterwards, or was never there."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
from typing import TYPE_CHECKING

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import CkptAvgError, OutputError
from ckptavg.formats.paths import is_remote
from ckptavg.merge.engine import execute
from ckptavg.merge.jobs import BadValueError
from ckptavg.write.output import OutputFile
from ckptavg.write.output_directory import OutputDirectory, check_directory_destination
from ckptavg.write.scratch import clear_beside
from ckptavg.write.shared_output import JoinedOutput
from ckptavg.write.vacancy import check_destination, check_room

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptavg.merge.layout import Layout
    from ckptavg.merge.plan import Plan
    from ckptavg.write.options import Progress


def refuse_own_input(output: Path, files: Iterable[Path]) -> None:
    """An output must not take the place of what it is made of.

    Args:
        output: where it goes.
        files: the inputs' files.

    Raises:
        OutputError: it is one of them.
    """
    within = output.resolve() if output.is_dir() else None
    for path in files:
        if is_remote(path):
            continue
        places = (path.parent.resolve() / path.name, path.resolve())
        if within and any(place.is_relative_to(within) for place in places):
            raise OutputError(
                "is the directory of the checkpoints", path=output, remedy="choose another output"
            )
        if output.exists() and path.exists() and output.samefile(path):
            raise OutputError(
                "is itself one of the checkpoints", path=output, remedy="choose another output"
            )


def check_output(path: Path, layout: Layout, *, force: bool) -> None:
    """Find out before the work starts whether the output can be put there.

    Raises:
        OutputError: it cannot.
    """
    if layout.is_directory:
        check_directory_destination(path, layout.files, force=force)
    else:
        check_destination(path, force=force)
    check_room(path, sum(file.size for file in layout.files.values()))


def write(
    plan: Plan,
    outputs: Sequence[tuple[Path, Layout]],
    *,
    force: bool,
    fsync: bool,
    threads: int,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Carry a plan out: the outputs are complete afterwards, or were never there.

    Args:
        plan: what is to be done.
        outputs: where each goes, and what stands around its tensors.
        force: replace what is there.
        fsync: have the outputs on the disk before they get their names.
        threads: how many work at once.
        allow_nonfinite: let NaN and Inf pass.
        progress: hears of the bytes written.
        ranks: the processes that do it together, each its share of the chunks; the first one makes
            the outputs and gives them their names.

    Raises:
        ValueRangeError: a value in an input is NaN or Inf, or one in an output would be.
        OutputError: an output cannot be written.
    """
    layouts = [layout for _, layout in outputs]
    total = sum(_bytes_made(plan, layout) for layout in layouts)
    written = 0
    with contextlib.ExitStack() as stack:
        sinks = _enter(stack, plan, outputs, force=force, fsync=fsync, ranks=ranks)
        steps = execute(
            plan.jobs(layouts), sinks, threads, allow_nonfinite=allow_nonfinite,
            every=ranks.size, first=ranks.rank,
        )  # fmt: skip
        with contextlib.closing(steps):
            try:
                for done in steps:
                    written += done
                    if progress is not None:
                        progress(done, total // ranks.size)
                    if ranks.has_failed_peer():
                        break  # gathering says so
            except BadValueError as error:
                raise plan.explain(error) from error
        _check_unchanged(plan, layouts)
        for sink in sinks:
            if isinstance(sink, JoinedOutput):
                sink.finish()
        written = sum(ranks.gather(written))
        if written != total:
            raise OutputError(f"only {written} of {total} bytes were made", path=outputs[0][0])
        own = [sink for sink in sinks if not isinstance(sink, JoinedOutput)]
        _commit(own, force=force)
        ranks.gather(None)  # no process returns before the outputs have their names


def _enter(
    stack: contextlib.ExitStack,
    plan: Plan,
    outputs: Sequence[tuple[Path, Layout]],
    *,
    force: bool,
    fsync: bool,
    ranks: Ranks,
) -> list[OutputFile | OutputDirectory | JoinedOutput]:
    """Make the outputs, or join those that the first process has made.

    Raises:
        OutputError: they cannot be made.
        CkptAvgError: the processes do not have the same to do.
    """
    together = ranks.size > 1
    made: list[OutputFile | OutputDirectory] = []
    if ranks.rank == 0:
        for path in {path.parent: path for path, _ in outputs}.values():
            clear_beside(path)
        made = [_open(path, layout, force, fsync, shared=together) for path, layout in outputs]
        for sink in made:
            stack.enter_context(sink)
    if not together:
        return [*made]
    found = ranks.gather((_digest(plan, outputs), [sink.temporary for sink in made]))
    if len({digest for digest, _ in found}) > 1:
        raise CkptAvgError(
            "the processes' checkpoints or options are not the same",
            remedy="wait until the training has finished writing, and start again",
        )
    if made:
        return [*made]
    return [
        stack.enter_context(JoinedOutput(path, layout, temporary, fsync=fsync))
        for (path, layout), temporary in zip(outputs, found[0][1], strict=True)
    ]


def _digest(plan: Plan, outputs: Sequence[tuple[Path, Layout]]) -> str:
    """What tells whether other processes are about to do the same."""
    digest = hashlib.sha256()
    for member in plan.members:
        digest.update(repr((member.digest, member.size)).encode())
    for column, (path, layout) in zip(plan.columns, outputs, strict=True):
        digest.update(repr((path.name, column, layout.targets, layout.bases)).encode())
        for file in layout.files.values():
            for offset, blob in file.blobs:
                digest.update(offset.to_bytes(8, "little") + blob)
    return digest.hexdigest()


def _check_unchanged(plan: Plan, layouts: Sequence[Layout]) -> None:
    """Raise if a file that was read is no longer what it was."""
    used = (part for member in plan.members for part in member.parts)
    copied = (copy.part for layout in layouts for copy in layout.copies)
    for part in {id(part): part for part in itertools.chain(used, copied)}.values():
        part.check_unchanged()


def _commit(sinks: Sequence[OutputFile | OutputDirectory], *, force: bool) -> None:
    """Give all outputs their names; where one cannot have it, none has.

    What replaced something stays: that is gone.
    """
    done: list[Path] = []
    try:
        for sink in sinks:
            sink.commit()
            done.append(sink.path)
    except BaseException:
        for path in () if force else done:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _bytes_made(plan: Plan, layout: Layout) -> int:
    """What an output has of tensors and of what is copied into it."""
    return sum(copied.size for copied in layout.copies) + sum(
        tensor.nbytes * (len(targets) + len(layout.scattered.get(position, ())))
        for position, (tensor, targets) in enumerate(zip(plan.outputs, layout.targets, strict=True))
    )


def _open(
    output: Path,
    layout: Layout,
    force: bool,  # noqa: FBT001
    fsync: bool,  # noqa: FBT001
    *,
    shared: bool,
) -> OutputFile | OutputDirectory:
    if layout.is_directory:
        return OutputDirectory(output, layout, force=force, fsync=fsync, shared=shared)
    return OutputFile(output, layout.files[""], force=force, fsync=fsync, shared=shared)
