"""Check that outputs can be written, and write them: complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections import defaultdict
from typing import TYPE_CHECKING

from ckptavg.errors import CkptAvgError, OutputError, listed, printable
from ckptavg.formats import huggingface
from ckptavg.formats.dcpfiles import METADATA
from ckptavg.formats.parts import check_unchanged
from ckptavg.formats.paths import is_remote
from ckptavg.merge.engine import execute
from ckptavg.merge.jobs import BadValueError
from ckptavg.write.output import Output, followed
from ckptavg.write.replacement import put_back
from ckptavg.write.temporary import remove

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from ckptavg.merge.jobs import Layout
    from ckptavg.merge.plan import Plan
    from ckptavg.merge.recipe import AverageOptions


def write(plan: Plan, layouts: Sequence[Layout], options: AverageOptions, threads: int) -> None:
    """Write the outputs of a plan: they are complete afterwards, or were never there.

    Args:
        plan: what they are computed from.
        layouts: one for each output.
        options: `force`, `fsync`, `allow_nonfinite`, `progress` and `ranks`, of which the first one
            makes the outputs and gives them their names.
        threads: how many threads share the work.

    Raises:
        ValueRangeError: a value in an input is NaN or Inf, or one in an output would be.
        OutputError: an output cannot be written.
    """
    ranks = options.ranks
    total = _bytes_made(plan, layouts)
    with contextlib.ExitStack() as stack:
        sinks = _open(stack, plan, layouts, options)
        written = 0
        steps = execute(
            plan.jobs(layouts), sinks, threads, allow_nonfinite=options.allow_nonfinite,
            every=ranks.size, first=ranks.rank,
        )  # fmt: skip
        with contextlib.closing(steps):
            try:
                for step in steps:
                    written += step
                    if options.progress is not None:
                        options.progress(step, total // ranks.size)
                    if ranks.has_failed_peer():
                        break  # `gather` raises below
            except BadValueError as error:
                raise plan.explain(error) from error
        _check_unchanged(plan, layouts)
        if ranks.rank:
            for sink in sinks:
                sink.finish()
        written = sum(ranks.gather(written))
        if written != total:
            raise OutputError(f"only {written} of {total} bytes were made", path=layouts[0].path)
        if ranks.rank == 0:
            _publish(sinks, force=options.force)
        ranks.gather(None)  # no process returns before the outputs have their names


def _open(
    stack: contextlib.ExitStack,
    plan: Plan,
    layouts: Sequence[Layout],
    options: AverageOptions,
) -> list[Output]:
    """Begin the outputs in the first process; the others open what it has begun."""
    ranks = options.ranks

    def open_one(layout: Layout, temporary: Path | None = None) -> Output:
        return stack.enter_context(
            Output(layout, force=options.force, fsync=options.fsync, temporary=temporary)
        )

    begun = [open_one(layout) for layout in layouts] if ranks.rank == 0 else []
    if ranks.size == 1:
        return begun
    gathered = ranks.gather((_digest(plan, layouts), [output.temporary for output in begun]))
    if len({digest for digest, _ in gathered}) > 1:
        raise CkptAvgError(
            "the processes' checkpoints or options are not the same",
            remedy="wait until the training has finished writing, and start again",
        )
    return begun or list(map(open_one, layouts, gathered[0][1]))


def _publish(outputs: Sequence[Output], *, force: bool) -> None:
    """Give all outputs their names, or none if one of them cannot have it.

    With `force`, those that have it already keep it: what they replaced is gone.
    """
    published: list[Path] = []
    try:
        for output in outputs:
            output.publish()
            published.append(output.path)
    except BaseException:
        for path in () if force else published:
            with contextlib.suppress(OSError):
                remove(path)
        raise


def _digest(plan: Plan, layouts: Sequence[Layout]) -> str:
    """A digest of all that the processes must agree on."""
    digest = hashlib.sha256()
    for member in plan.members:
        digest.update(repr((member.digest, member.size)).encode())
    for weights, layout in zip(plan.weights, layouts, strict=True):
        facts = layout.path.name, weights, layout.targets, layout.bases
        digest.update(repr(facts).encode())
        for file in layout.files.values():
            for offset, blob in file.blobs:
                digest.update(offset.to_bytes(8, "little") + blob)
    return digest.hexdigest()


def _check_unchanged(plan: Plan, layouts: Sequence[Layout]) -> None:
    """Raise an error if a file that was read has changed since it was opened."""
    parts = [part for member in plan.members for part in member.parts]
    check_unchanged([*parts, *(copied.part for layout in layouts for copied, _ in layout.copies)])


def _bytes_made(plan: Plan, layouts: Sequence[Layout]) -> int:
    """Bytes of the outputs that the engine writes: tensors, and what is copied."""
    made = 0
    for layout in layouts:
        made += sum(copied.tensor.nbytes for copied, _ in layout.copies)
        for position, tensor in enumerate(plan.tensors):
            places = len(layout.targets[position]) + len(layout.scattered.get(position, ()))
            made += tensor.nbytes * places
    return made


def check_outputs(layouts: Sequence[Layout], *, force: bool, inputs: Collection[Path] = ()) -> None:
    """Check that outputs can be written where they are to go.

    Args:
        layouts: one for each output.
        force: what is there may be replaced.
        inputs: files that must not be replaced.

    Raises:
        OutputError: one of them cannot.
    """
    for layout in layouts:
        refuse_own_input(layout.path, inputs)
        if layout.is_directory:
            _check_directory(layout.path, layout.files, force=force)
        else:
            _check_file(layout.path, force=force)
    check_room(layouts)


def _check_file(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise OutputError("is a directory", path=path, remedy="name a file")
    if path.exists() and not path.is_file():
        raise OutputError("is not a regular file", path=path, remedy="name a file")
    check_vacant(path, force=force)


def _check_directory(path: Path, names: Collection[str], *, force: bool) -> None:
    """Check that a directory with these files can be written, and replaces no others."""
    folder = followed(path)
    put_back(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError("is no directory", path=path, remedy="choose another output")
    check_vacant(path, force=force)
    present = _entries(folder)
    if strangers := _strangers(folder, names) if present else []:
        raise OutputError(
            f"has files that the output does not have ({listed(strangers)}), and would be replaced",
            path=path,
            remedy="choose another output",
        )
    if folder.is_dir() and os.path.ismount(folder):
        raise OutputError(
            "is a mount point, which cannot be replaced", path=path, remedy="name a directory in it"
        )
    if present and not os.access(folder, os.W_OK | os.X_OK) and folder.exists():
        raise OutputError("is not writable", path=path, remedy="choose another output")


def _entries(folder: Path) -> list[str]:
    """The names in a directory; none if there is none, or if another run is replacing it."""
    try:
        return os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def _strangers(folder: Path, names: Collection[str]) -> list[str]:
    """The files in a directory, weights aside, that the directory replacing it would not have."""
    weights = huggingface.weight_files(folder)
    if METADATA in names:
        weights |= {path.name for path in folder.glob("*.distcp")}
    strangers = []
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        folder_is_kept = entry.is_dir() and any(kept.startswith(f"{name}/") for kept in names)
        if name not in names and name not in weights and not folder_is_kept:
            strangers.append(name)
    return strangers


def check_vacant(path: Path, *, force: bool) -> None:
    """Check that nothing is in the place of an output, be it a file or a directory.

    Raises:
        OutputError: it exists and is no empty directory, or nothing can be written beside it.
    """
    is_empty_directory = path.is_dir() and not _entries(path)
    if os.path.lexists(path) and not force and not is_empty_directory:
        raise OutputError("exists already", path=path, remedy="`force` replaces it")
    check_parent(followed(path))


def check_parent(path: Path) -> None:
    """Check that something can be written beside a path.

    Raises:
        OutputError: there is no such directory, or it is not writable.
    """
    if not path.parent.is_dir():
        raise OutputError(f"there is no directory {printable(path.parent)}", path=path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(path.parent)} is not writable", path=path)


def check_room(layouts: Iterable[Layout]) -> None:
    """Check that each file system has room for all outputs on it.

    Raises:
        OutputError: a file system has not.
    """
    by_device: defaultdict[int, list[Layout]] = defaultdict(list)
    for layout in layouts:
        with contextlib.suppress(OSError):
            folder = followed(layout.path).parent
            by_device[folder.stat().st_dev].append(layout)
    for group in by_device.values():
        path, needed = group[0].path, sum(layout.size for layout in group)
        free = _free_bytes(followed(path).parent)
        if free is not None and free < needed:
            what = "" if len(group) == 1 else f" for {len(group)} outputs"
            raise OutputError(
                f"cannot write it: {os.strerror(errno.ENOSPC)} "
                f"({needed} bytes are needed{what}, {free} are free)",
                path=path,
            )


def _free_bytes(folder: Path) -> int | None:
    """Bytes that are free on a file system; None if it does not tell."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    blocks = status.f_bavail if os.geteuid() else status.f_bfree  # some are kept for root
    return blocks * status.f_frsize if status.f_blocks else None


def refuse_own_input(output: Path, files: Iterable[Path]) -> None:
    """Refuse an output that would replace one of the inputs' files.

    Raises:
        OutputError: it would.
    """
    within = output.resolve() if output.is_dir() else None
    for path in files:
        if is_remote(path):
            continue
        places = (path.parent.resolve() / path.name, path.resolve())
        if within and any(place.is_relative_to(within) for place in places):
            raise OutputError(
                "is the directory of the checkpoints, and a directory is replaced as a whole",
                path=output,
                remedy="choose another one, or a file in it",
            )
        if output.exists() and path.exists() and output.samefile(path):
            raise OutputError(
                "is itself one of the checkpoints", path=output, remedy="choose another output"
            )
