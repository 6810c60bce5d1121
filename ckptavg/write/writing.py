"""Write the outputs of a plan: they are complete afterwards, or were never there."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from typing import TYPE_CHECKING

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import CkptAvgError, OutputError
from ckptavg.merge.engine import execute
from ckptavg.merge.jobs import BadValueError
from ckptavg.write.output import Output
from ckptavg.write.temporary import remove

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.merge.jobs import Layout
    from ckptavg.merge.options import Progress
    from ckptavg.merge.plan import Plan


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
    """Write the outputs of a plan: they are complete afterwards, or were never there.

    Args:
        plan: what they are computed from.
        outputs: path and layout of each.
        force: replace what is there.
        fsync: have the outputs on the disk before they get their names.
        threads: how many threads share the work.
        allow_nonfinite: let NaN and Inf pass.
        progress: called with the bytes written since the last call, and with the bytes in all.
        ranks: the processes that share the work; the first one makes the outputs and gives them
            their names.

    Raises:
        ValueRangeError: a value in an input is NaN or Inf, or one in an output would be.
        OutputError: an output cannot be written.
    """
    layouts = [layout for _, layout in outputs]
    total = sum(_bytes_made(plan, layout) for layout in layouts)
    with contextlib.ExitStack() as stack:
        sinks = _open(stack, plan, outputs, force=force, fsync=fsync, ranks=ranks)
        written = 0
        steps = execute(
            plan.jobs(layouts), sinks, threads, allow_nonfinite=allow_nonfinite,
            every=ranks.size, first=ranks.rank,
        )  # fmt: skip
        with contextlib.closing(steps):
            try:
                for step in steps:
                    written += step
                    if progress is not None:
                        progress(step, total // ranks.size)
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
            raise OutputError(f"only {written} of {total} bytes were made", path=outputs[0][0])
        if ranks.rank == 0:
            _publish(sinks, force=force)
        ranks.gather(None)  # no process returns before the outputs have their names


def _open(
    stack: contextlib.ExitStack,
    plan: Plan,
    outputs: Sequence[tuple[Path, Layout]],
    *,
    force: bool,
    fsync: bool,
    ranks: Ranks,
) -> list[Output]:
    """Begin the outputs in the first process; the others open what it has begun."""

    def open_one(path: Path, layout: Layout, temporary: Path | None = None) -> Output:
        output = Output(path, layout, force=force, fsync=fsync, temporary=temporary)
        return stack.enter_context(output)

    begun = [open_one(*output) for output in outputs] if ranks.rank == 0 else []
    if ranks.size == 1:
        return begun
    gathered = ranks.gather((_digest(plan, outputs), [output.temporary for output in begun]))
    if len({digest for digest, _ in gathered}) > 1:
        raise CkptAvgError(
            "the processes' checkpoints or options are not the same",
            remedy="wait until the training has finished writing, and start again",
        )
    temporary = gathered[0][1]
    return begun or [open_one(*each, name) for each, name in zip(outputs, temporary, strict=True)]


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


def _digest(plan: Plan, outputs: Sequence[tuple[Path, Layout]]) -> str:
    """A digest of all that the processes must agree on."""
    digest = hashlib.sha256()
    for member in plan.members:
        digest.update(repr((member.digest, member.size)).encode())
    for column, (path, layout) in zip(plan.weights, outputs, strict=True):
        digest.update(repr((path.name, column, layout.targets, layout.bases)).encode())
        for file in layout.files.values():
            for offset, blob in file.blobs:
                digest.update(offset.to_bytes(8, "little") + blob)
    return digest.hexdigest()


def _check_unchanged(plan: Plan, layouts: Sequence[Layout]) -> None:
    """Raise an error if a file that was read has changed since it was opened."""
    used = (part for member in plan.members for part in member.parts)
    copied = (copy.part for layout in layouts for copy in layout.copies)
    for part in {id(part): part for part in itertools.chain(used, copied)}.values():
        part.check_unchanged()


def _bytes_made(plan: Plan, layout: Layout) -> int:
    """Bytes of an output that the engine writes: tensors, and what is copied."""
    return sum(copied.size for copied in layout.copies) + sum(
        tensor.nbytes * (len(targets) + len(layout.scattered.get(position, ())))
        for position, (tensor, targets) in enumerate(zip(plan.outputs, layout.targets, strict=True))
    )
