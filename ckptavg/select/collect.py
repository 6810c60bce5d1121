"""Which checkpoints go into an average: find them, open them, hold them against each other."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import Checkpoint, without_wrappers
from ckptavg.formats.lora_config import scales_beside
from ckptavg.formats.names import has_lora_factors
from ckptavg.select.compare import Contents
from ckptavg.select.discover import find
from ckptavg.select.order import DIGITS, in_order, labels, natural

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class LeftOut:
    """What was found and is no candidate.

    Attributes:
        path: the checkpoint.
        reason: why not.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Survey:
    """All the checkpoints there are to choose from.

    Attributes:
        checkpoints: in the order of training; copies of one checkpoint count once.
        left_out: copies, and averages made earlier.
        order_is_known: whether the order comes from steps, or only from the names.
        files: all files that were opened, those of copies included.
        base: the earlier average that the checkpoints bring up to date; it is none of them.
    """

    checkpoints: tuple[Checkpoint, ...]
    left_out: tuple[LeftOut, ...]
    order_is_known: bool
    files: tuple[Path, ...]
    base: Checkpoint | None = None

    def labels(self) -> tuple[str, ...]:
        """The paths of the checkpoints below the folder that they have in common."""
        return labels([checkpoint.path for checkpoint in self.checkpoints])


def survey(
    inputs: Sequence[Path],
    *,
    key: str | None = None,
    keep_prefix: bool = False,
    wanted: Callable[[str], str | None] | None = None,
) -> Survey:
    """Find, open, compare and order the checkpoints.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        key: which state dict to take where a file holds several.
        keep_prefix: leave a wrapper's prefix on the names.
        wanted: given a label, why the checkpoint is not even opened; None if it is.

    Raises:
        SelectionError: there are none.
        FormatError: one of them is damaged or of an unknown kind.
    """
    prefixes: dict[str, int] = defaultdict(int)
    opened: list[Checkpoint] = []
    left_out: list[LeftOut] = []
    candidates = find(inputs)
    names = labels([path for path, _ in candidates]) if candidates else ()
    for (path, named), name in zip(candidates, names, strict=True):
        if wanted is not None and (reason := wanted(name)) is not None:
            left_out.append(LeftOut(path, reason))
            continue
        checkpoint = _open(path, key, named=named)
        if checkpoint is None:
            log.info("%s is an average made earlier: left out", printable(path.name))
            left_out.append(LeftOut(path, "an average made earlier"))
            continue
        checkpoint, prefix = without_wrappers(checkpoint, keep_prefix=keep_prefix)
        if prefix:
            prefixes[prefix] += 1
        opened.append(checkpoint)
    for prefix, count in prefixes.items():
        log.info("took the wrapper's prefix %r off all names in %d checkpoints", prefix, count)
    if not opened:
        where = ", ".join(printable(path) for path in inputs) or "no input"
        what = f" but {left_out[0].reason}" if left_out else ""
        raise SelectionError(f"no checkpoint found in {where}{what}")
    distinct, copies = _without_duplicates(opened)
    ordered, known = in_order(distinct)
    files = tuple(part.path for checkpoint in opened for part in checkpoint.parts)
    return Survey(tuple(ordered), (*left_out, *copies), known, files)


def _open(path: Path, key: str | None, *, named: bool) -> Checkpoint | None:
    """Open a checkpoint; None if it is an average of ours that nobody named."""
    try:
        opened = open_checkpoint(path, key=key)
    except SelectionError:
        # An average of ours is a state dict without a key, which is no reason to stop.
        if named or key is None or not open_checkpoint(path).is_average:
            raise
        return None
    if opened.is_average and named:
        log.info("%s is an average made earlier: taken, since it was named", printable(path.name))
    return None if opened.is_average and not named else opened


def mention_other_state_dicts(checkpoints: Sequence[Checkpoint]) -> None:
    """Say which state dicts the last checkpoint holds beside the one that is taken."""
    last = checkpoints[-1]
    if last.other_keys:
        log.info(
            "took %s; there is also %s, to be taken with --key",
            f"the state dict {printable(last.key)!r}" if last.key else "the tensors at the top",
            ", ".join(printable(name) or "the top ('')" for name in last.other_keys),
        )
    keys = sorted(
        {
            printable(checkpoint.key) or "the whole file"
            for checkpoint in checkpoints
            if not checkpoint.is_average  # which is a state dict alone
        }
    )
    if len(keys) > 1:
        log.warning("the checkpoints' state dicts are not of one name: %s", ", ".join(keys))


def _without_duplicates(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Hard links, symlinks and copies of one checkpoint count once.

    A copy has the same recorded step and the same bytes in every tensor. Of several names the one
    with a number in it stays: `checkpoint-12`, not `last`.
    """
    by_name = sorted(
        checkpoints,
        key=lambda checkpoint: (
            not DIGITS.search(checkpoint.path.name),
            checkpoint.path.is_symlink(),
            natural(str(checkpoint.path)),
        ),
    )
    names = dict(zip(checkpoints, labels([one.path for one in checkpoints]), strict=True))
    contents = Contents()
    by_file: dict[object, Checkpoint] = {}
    by_step: defaultdict[object, list[Checkpoint]] = defaultdict(list)
    copies: list[LeftOut] = []
    for checkpoint in by_name:
        files = tuple(part.identity for part in checkpoint.parts)
        # Equal factors under another alpha are another adapter.
        lora = has_lora_factors(checkpoint.tensors)
        scales = scales_beside(checkpoint.path) if lora else ()
        alike = by_step[checkpoint.step, scales]
        twin = by_file.get(files) or next(
            (other for other in alike if contents.same(other, checkpoint)), None
        )
        if twin is None:
            by_file[files] = checkpoint
            alike.append(checkpoint)
        else:
            pair = printable(names[checkpoint]), printable(names[twin])
            log.info("%s is the same checkpoint as %s: counted once", *pair)
            copies.append(LeftOut(checkpoint.path, f"the same checkpoint as {pair[1]}"))
    return list(by_file.values()), copies
