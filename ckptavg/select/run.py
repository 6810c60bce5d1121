"""Find the checkpoints of a training run: open the candidates, choose the members, sort them."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptavg.errors import (
    CkptAvgError,
    FormatError,
    NoStateDictError,
    SelectionError,
    listed,
    printable,
)
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import without_wrappers
from ckptavg.formats.words import is_average
from ckptavg.select.candidates import find_candidates
from ckptavg.select.members import find_members, mark_by_name
from ckptavg.select.names import relative_names
from ckptavg.select.order import sort_checkpoints
from ckptavg.select.series import Candidate, group

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.statedict import Key
    from ckptavg.select.series import Series


log = logging.getLogger("ckptavg")

MADE_EARLIER = "an average made earlier"


@dataclass(frozen=True)
class Run:
    """The checkpoints of a training run.

    Attributes:
        members: the checkpoints in the order of training.
        order_is_known: whether the steps give the order; if not, it is the order of the names.
        candidates: all that may be checkpoints, each with the reason if it is not a member.
        error: why the run cannot be averaged; then there are no members.
    """

    members: tuple[Checkpoint, ...]
    order_is_known: bool = True
    candidates: tuple[Candidate, ...] = ()
    error: CkptAvgError | None = None

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The members.

        Raises:
            CkptAvgError: there are none, since a candidate is damaged, of an unknown format, or a
                piece of a model; or since it is unclear which candidates are the run's.
        """
        if self.error is not None:
            raise self.error
        return self.members

    @property
    def series(self) -> list[Series]:
        """The candidates by name and by what they are."""
        return group(self.candidates)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the run, those of copies included, but not averages made earlier."""
        others = (each.checkpoint for each in self.candidates if each.reason != MADE_EARLIER)
        opened = dict.fromkeys((*self.members, *filter(None, others)))
        return tuple(part.path for each in opened for part in each.parts)

    @property
    def faults(self) -> Mapping[Checkpoint, CkptAvgError]:
        """What is wrong with checkpoints that do no harm unless they are chosen."""
        return {c.checkpoint: c.fault for c in self.candidates if c.checkpoint and c.fault}


def find_run(
    inputs: Sequence[Path],
    *,
    key: Key = None,
    keep_prefix: bool = False,
    exclusion_reason: Callable[[str], str | None] = lambda _: None,
) -> Run:
    """Find, open and sort the checkpoints among the inputs.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        key: name of the state dict, where a file holds several; or several names.
        keep_prefix: do not remove a wrapper's prefix from the names of tensors.
        exclusion_reason: returns why a candidate of this name is left out; None to open it.

    Raises:
        SelectionError: an input does not exist, or has no candidates. Errors about candidates are
            in the result.
    """
    folders = find_candidates(inputs)
    names = relative_names(folders)
    candidates = [Candidate(path, names[path], folder) for path, folder in folders.items()]
    for each in candidates:
        if reason := exclusion_reason(each.name):
            each.leave_out("excluded", reason)
    mark_by_name(candidates)
    waiting = [each for each in candidates if not each.reason]
    for each in waiting:
        _open(each, key)
    _unwrap(waiting, keep_prefix=keep_prefix)
    error = find_members(candidates)
    members = [each.checkpoint for each in candidates if each.is_open and each.checkpoint]
    if error is None and not members:
        error = _no_checkpoint(inputs, candidates)
    error = next((each.fault for each in candidates if each.kind == "damaged"), error)
    if error is not None:
        return Run((), candidates=tuple(candidates), error=error)
    ordered, order_is_known = sort_checkpoints(members)
    return Run(tuple(ordered), order_is_known, tuple(candidates))


def _open(candidate: Candidate, key: Key) -> None:
    """Open a candidate, or set why it is left out."""
    is_named = candidate.folder is None
    try:
        checkpoint = _open_or_defer(candidate, key)
    except CkptAvgError as error:
        if isinstance(error, NoStateDictError) and not is_named:
            remedy = f" ({error.remedy})" if error.remedy else ""
            candidate.leave_out("no weights", error.message + remedy)
        else:
            candidate.leave_out("damaged", error.message)
            if isinstance(error, FormatError) and not is_named and error.remedy is None:
                name = shlex.quote(printable(candidate.path.name))
                error.remedy = f"leave it out with `exclude` {name}"
            candidate.fault = error
        return
    candidate.checkpoint = replace(checkpoint, name_in_run=candidate.name)
    if checkpoint.is_average and not is_named:
        candidate.leave_out("average", MADE_EARLIER)


def _open_or_defer(candidate: Candidate, key: Key) -> Checkpoint:
    """Open a candidate; if it lacks the state dict of `key`, open another one instead.

    The error is kept in `fault`, and raised only if the rules choose the candidate.
    """
    try:
        checkpoint = open_checkpoint(candidate.path, key=key)
    except SelectionError as error:
        if not error.choices and key is None:
            raise
        candidate.fault = error
        other = error.choices[0] if error.choices else None
        return open_checkpoint(candidate.path, key=other)
    if not checkpoint.tensors:
        remedy = "leave it out with `exclude`"
        raise FormatError("has no tensors", path=candidate.path, remedy=remedy)
    return checkpoint


def _unwrap(candidates: Sequence[Candidate], *, keep_prefix: bool) -> None:
    """Remove wrappers' prefixes from names of tensors, and share equal mappings of tensors."""
    prefixes: Counter[str] = Counter()
    first: Checkpoint | None = None
    for each in candidates:
        if each.checkpoint is None:
            continue
        if each.checkpoint.is_average or "n_averaged" in each.checkpoint.tensors:
            each.kind = "average"
        checkpoint, prefix = without_wrappers(each.checkpoint, keep_prefix=keep_prefix)
        prefixes[prefix] += 1
        # Most checkpoints of a run have the same tensors at the same places.
        checkpoint = checkpoint.sharing(first or checkpoint)
        first = first or checkpoint
        each.checkpoint = checkpoint
    for prefix, count in prefixes.items():
        if prefix:
            log.info("removed the wrapper's %r from names in %d checkpoints", prefix, count)


def _no_checkpoint(inputs: Sequence[Path], candidates: Sequence[Candidate]) -> SelectionError:
    where = listed(inputs) or "no input"
    names_by_reason: dict[str, list[str]] = {}
    for each in candidates:
        names_by_reason.setdefault(each.reason, []).append(each.name)
    reasons = [f"; {listed(names)}: {reason}" for reason, names in names_by_reason.items()]
    return SelectionError(f"no checkpoint found in {where}{''.join(reasons[-3:])}")


def log_averages(run: Run) -> None:
    """Log which members are averages already, by what they record or by their names."""
    averages = [
        each.name
        for each in run.candidates
        if each.is_open
        and each.checkpoint is not None
        and (each.kind == "average" or each.checkpoint.is_trainers_average or is_average(each.name))
    ]
    if not averages or run.error is not None:
        return
    if len(averages) == sum(each.is_open for each in run.candidates):
        log.info("these are averages already: %s", listed(averages))
    else:
        log.warning(
            "these are averages already: %s; if their members are here too, these count twice",
            listed(averages),
        )


def log_other_state_dicts(checkpoints: Sequence[Checkpoint]) -> None:
    """Log the last checkpoint's other state dicts, and warn if the checkpoints' keys differ."""
    last = checkpoints[-1]
    if last.other_keys:
        log.info(
            "using %s; `key` can choose %s instead",
            f"the state dict {printable(last.key)!r}" if last.key else "the tensors at the top",
            listed((name or "the top ('')" for name in last.other_keys), 20),
        )
    # Earlier averages are left out here: they are always bare state dicts.
    keys = {each.key for each in checkpoints if not each.is_average}
    if len(keys) > 1:
        names = listed(sorted(str(key) or "the whole file" for key in keys))
        log.warning("the checkpoints' state dicts have different names: %s", names)
