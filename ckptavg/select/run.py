"""A training run: the checkpoints that may be members of an average, in the order of training."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import without_wrappers
from ckptavg.select.candidates import find_candidates
from ckptavg.select.compare import find_copies
from ckptavg.select.order import relative_names, sort_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Run:
    """The checkpoints of a training run.

    Attributes:
        checkpoints: in the order of training.
        order_is_known: whether steps tell the order; otherwise it is that of the names.
        left_out: for each candidate that is not among `checkpoints` the reason, by path.
        files: all files that were opened, those of copies included.
        base: an earlier average that is to be updated with the checkpoints; not one of them.
    """

    checkpoints: tuple[Checkpoint, ...]
    order_is_known: bool = True
    left_out: Mapping[Path, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    base: Checkpoint | None = None


def find_run(
    inputs: Sequence[Path],
    *,
    key: str | None = None,
    keep_prefix: bool = False,
    exclusion_reason: Callable[[str], str | None] = lambda _: None,
) -> Run:
    """Find and open the checkpoints among the inputs, leave copies out, and sort the rest.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        key: which state dict to take if a file holds several.
        keep_prefix: leave a wrapper's prefix on the names of tensors.
        exclusion_reason: gives the reason to leave out a candidate of this name; None to open it.

    Raises:
        SelectionError: there are no checkpoints.
        FormatError: a candidate is damaged, of an unknown format, or has no tensors.
    """
    left_out: dict[Path, str] = {}
    opened: list[Checkpoint] = []
    prefixes: Counter[str] = Counter()
    candidates = find_candidates(inputs)
    for path, name in relative_names(candidates).items():
        reason = exclusion_reason(name)
        checkpoint = None if reason else _open(path, key, is_named=candidates[path])
        if checkpoint is None:
            left_out[path] = reason or "an average made earlier"
            continue
        checkpoint, prefix = without_wrappers(checkpoint, keep_prefix=keep_prefix)
        prefixes[prefix] += 1
        # Most checkpoints of a run have the same tensors at the same places: they share a mapping.
        is_alike = opened and checkpoint.tensors == opened[0].tensors
        tensors = opened[0].tensors if is_alike else checkpoint.tensors
        opened.append(replace(checkpoint, name=name, tensors=tensors))
    if not opened:
        where = ", ".join(map(printable, inputs)) or "no input"
        reasons = [f"; {printable(path.name)}: {reason}" for path, reason in left_out.items()]
        raise SelectionError(f"no checkpoint found in {where}{''.join(reasons[-1:])}")
    for prefix, count in prefixes.items():
        if prefix:
            log.info("took the wrapper's prefix %r off all names in %d checkpoints", prefix, count)
    members, others = members_among(opened)
    ordered, order_is_known = sort_checkpoints(members)
    files = tuple(part.path for checkpoint in opened for part in checkpoint.parts)
    return Run(tuple(ordered), order_is_known, left_out | others, files)


def members_among(candidates: Sequence[Checkpoint]) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The members of the run among the candidates; and the reason for each other one, by path.

    Further reasons to leave out a candidate belong here: another series, another tool's average, a
    pointer such as `last`.
    """
    copies = find_copies(candidates)
    left_out = {}
    for copy, original in copies.items():
        name = printable(original.name)
        log.info("%s is the same checkpoint as %s: counted once", printable(copy.name), name)
        left_out[copy.path] = f"the same checkpoint as {name}"
    return [candidate for candidate in candidates if candidate not in copies], left_out


def _open(path: Path, key: str | None, *, is_named: bool) -> Checkpoint | None:
    """Open a checkpoint; None for an average by ckptavg that the user did not name."""
    name = printable(path.name)
    try:
        checkpoint = open_checkpoint(path, key=key)
    except SelectionError:
        # An earlier average is a bare state dict, without the key.
        if is_named or key is None or not (checkpoint := open_checkpoint(path)).is_average:
            raise
    if checkpoint.is_average and not is_named:
        log.info("%s is an average made earlier: left out", name)
        return None
    if checkpoint.is_average:
        log.info("%s is an average made earlier: taken, since it was named", name)
    if not checkpoint.tensors:
        raise FormatError("has no tensors", path=path, remedy="leave it out with `exclude`")
    return checkpoint


def log_other_state_dicts(checkpoints: Sequence[Checkpoint]) -> None:
    """Log the last checkpoint's other state dicts, and warn if the checkpoints' keys differ."""
    last = checkpoints[-1]
    if last.other_keys:
        log.info(
            "took %s; there is also %s, which `key` chooses",
            f"the state dict {printable(last.key)!r}" if last.key else "the tensors at the top",
            ", ".join(printable(name) or "the top ('')" for name in last.other_keys),
        )
    # Earlier averages are left out here: they are always bare state dicts.
    keys = {each.key for each in checkpoints if not each.is_average}
    if len(keys) > 1:
        names = ", ".join(sorted(printable(key) or "the whole file" for key in keys))
        log.warning("the checkpoints' state dicts are not of one name: %s", names)
