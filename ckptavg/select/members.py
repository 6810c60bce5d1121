"""The members of a run among its candidates: the rules of docs/members.md, in their order."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, SelectionError, listed, printable
from ckptavg.formats.words import KINDS, is_no_checkpoint, words_in
from ckptavg.select.copies import find_copies
from ckptavg.select.names import (
    is_one_series,
    natural_key,
    order_in_names,
    parse_name,
    without_suffix,
)
from ckptavg.select.order import saved_before_training, timeline
from ckptavg.select.pieces import mark_pieces
from ckptavg.select.series import UNCLEAR, group, is_last_save, several_series

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptavg.errors import CkptAvgError
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.select.series import Candidate, CandidateKind, Series

log = logging.getLogger("ckptavg")

_LEFT_OUT: dict[CandidateKind, str] = {
    "unfinished": "left out as unfinished saves",
    "no weights": "left out, since they hold no weights",
    "average": "left out as averages",
    "pointer": "left out beside the numbered checkpoints",
    "start": "left out as the start of the training",
}
_BESIDE: dict[CandidateKind, str] = {
    "average": "an average, by its name or by what it records",
    "start": "the start of the training, by its name",
    "pointer": "a copy or a later save beside numbered checkpoints, by its name",
}
_COUNTED_ONCE = "counted once"
_MOST_NAMES = 10


def mark_by_name(candidates: Iterable[Candidate]) -> None:
    """Leave out interrupted saves, and the state of optimizers and the like, by their names."""
    for each in candidates:
        words = words_in(each.name)
        word = next((word for word in words if KINDS.get(word) == "unfinished"), None)
        if each.reason or each.folder is None:
            continue
        if is_no_checkpoint(each.path.name):
            each.leave_out("no weights", "the state of the training, by its name")
        elif word:
            each.leave_out("unfinished", f"an unfinished save ({word} in its name)")


def find_members(candidates: Sequence[Candidate]) -> CkptAvgError | None:
    """Leave out the candidates that are not members, and return the error if the rest are unclear.

    Candidates that the user named are only left out if they are copies.
    """
    error: CkptAvgError | None = mark_pieces([each for each in candidates if each.is_open])
    by_folder: defaultdict[Path | None, list[Candidate]] = defaultdict(list)
    for each in candidates:
        by_folder[each.folder].append(each)
    for inside in by_folder.values():
        _set_kinds([each for each in inside if each.is_open])
    _mark_copies(candidates)
    by_folder.pop(None, None)
    for inside in by_folder.values():
        _mark_recorded_averages(inside)
        error = error or _choose_series(inside)
        _mark_starts(inside)
        error = error or _without_weights(inside) or _same_step_twice(inside)
    return error


def _set_kinds(candidates: Sequence[Candidate]) -> None:
    """Set each kind by the words in the name, apart from words that all names have."""
    words = {each: frozenset(words_in(each.name)) for each in candidates}
    common = frozenset.intersection(*words.values()) if len(words) > 1 else frozenset()
    for each in candidates:
        kinds = {KINDS.get(word) for word in words[each] - common}
        if each.kind == "checkpoint":
            each.kind = next((kind for kind in _BESIDE if kind in kinds), "checkpoint")


def _mark_copies(candidates: Sequence[Candidate]) -> None:
    """Leave out copies: the original is the one in a plain series that records most."""
    opened = [each for each in candidates if each.is_open and each.fault is None]
    ordered = [each.checkpoint for each in sorted(opened, key=_preference)]
    copies = find_copies(each for each in ordered if each is not None)
    names = {each.checkpoint: each.name for each in opened}
    for each in opened:
        if each.checkpoint in copies:
            original = names[copies[each.checkpoint]]
            each.leave_out("copy", f"the same checkpoint as {printable(original)}")


def _preference(candidate: Candidate) -> tuple[object, ...]:
    """A sort key that puts originals before their copies."""
    checkpoint, path = candidate.checkpoint, candidate.path
    assert checkpoint is not None  # noqa: S101
    numbers = parse_name(path.name).numbers
    is_plain = any(not number.role for number in numbers) and candidate.kind == "checkpoint"
    training = checkpoint.training
    recorded = len(training.steps) + (training.learning_rate is not None) + checkpoint.other_content
    return not is_plain, not numbers, path.is_symlink(), -recorded, natural_key(candidate.name)


def _mark_recorded_averages(candidates: Sequence[Candidate]) -> None:
    """Leave out what Lightning's StochasticWeightAveraging wrote after the last update.

    It adds an epoch in which the model holds the average: the counter of averaged models does not
    grow, and the last update is further back than in other checkpoints.
    """
    updates = [
        (each.checkpoint.training.steps["epoch"], *each.checkpoint.training.averaged, each)
        for each in candidates
        if each.is_open and each.checkpoint and "epoch" in each.checkpoint.training.steps
        if each.checkpoint.training.averaged and each.checkpoint.training.averaged[0]
    ]
    lag = min((epoch - last for epoch, _, last, _ in updates if last is not None), default=0)
    for epoch, count, last, each in updates:
        grew = epoch == min(other for other, n, *_ in updates if n == count)
        if not grew or (last is not None and epoch - last > lag):
            each.leave_out("average", "the average of Lightning's StochasticWeightAveraging")


def _choose_series(candidates: Sequence[Candidate]) -> SelectionError | None:
    """Leave out all but the run's series in a directory; an error if that is not clear."""
    series = group([each for each in candidates if each.is_open])
    plain = [each for each in series if each.kind == "checkpoint" and each.is_numbered]
    if plain:
        _leave_out_beside(series, plain)
        series = [each for each in series if each.is_of_members]
    is_soup = len({each.kind for each in series}) == 1 and not any(
        each.is_numbered or each.is_of_run for each in series
    )
    if len(series) < 2 or is_soup:  # noqa: PLR2004
        return None
    for candidate in itertools.chain.from_iterable(each.candidates for each in series):
        candidate.leave_out(candidate.kind, UNCLEAR)
    return several_series(series)


def _leave_out_beside(series: Sequence[Series], plain: Sequence[Series]) -> None:
    """Leave out what stands beside a plain series: pointers, starts, a single average."""
    for each in series:
        kind = each.kind
        if kind == "checkpoint" and any(is_last_save(each, other) for other in plain):
            kind = "pointer"
        if kind in _BESIDE and (kind != "average" or len(each.candidates) == 1):
            for candidate in each.candidates:
                candidate.leave_out(kind, _BESIDE[kind])


def _mark_starts(candidates: Sequence[Candidate]) -> None:
    """Leave out what was saved before the training."""
    opened = [each for each in candidates if each.is_open]
    checkpoints = [each.checkpoint for each in opened if each.checkpoint is not None]
    starts = saved_before_training(checkpoints, timeline(checkpoints).steps) if opened else ()
    for each in opened:
        if each.checkpoint in starts:
            each.leave_out("start", "saved before the training")


def _without_weights(candidates: Sequence[Candidate]) -> FormatError | None:
    """The error about a file without a state dict that is named like the members."""
    patterns = {parse_name(each.name).pattern for each in candidates if each.is_open}
    for each in candidates:
        if each.kind == "no weights" and parse_name(each.name).pattern in patterns:
            remedy = "leave it out with `exclude`"
            what = "holds no state dict, unlike others of such a name"
            return FormatError(what, path=each.path, remedy=remedy)
    return None


def _same_step_twice(candidates: Sequence[Candidate]) -> SelectionError | None:
    """The error about two members with the same step."""
    members = [each for each in candidates if each.is_open]
    checkpoints = [each.checkpoint for each in members if each.checkpoint is not None]
    names = [each.name for each in members]
    places = timeline(checkpoints).places if is_one_series(names) and members else ()
    if len(set(places)) == 1:
        places = order_in_names(names)  # each the last of its training
    steps: defaultdict[object, list[str]] = defaultdict(list)
    for number, name in enumerate(names):
        steps[places[number] if places else without_suffix(name)].append(name)
    for same in steps.values():
        if len(same) > 1:
            return SelectionError(
                f"the same step twice: {listed(same)}",
                path=members[0].folder,
                remedy="leave the wrong ones out with `exclude`, or name the files to average",
            )
    return None


def log_left_out(candidates: Sequence[Candidate]) -> None:
    """Log a notice for each kind of candidates that are left out."""
    copies = [f"{each.name} is {each.reason}" for each in candidates if each.kind == "copy"]
    if copies:
        log.info("%s: %s", _COUNTED_ONCE, listed(copies, _MOST_NAMES))
    for kind, text in _LEFT_OUT.items():
        left_out = [each for each in candidates if each.reason not in ("", UNCLEAR)]
        names = [each.name for each in left_out if each.kind == kind]
        if names:
            log.info("%s: %s", text, listed(names, _MOST_NAMES))


def warn_of_stale(checkpoints: Iterable[Checkpoint]) -> None:
    """Warn of averages whose norm statistics no data have passed through."""
    stale = []
    for checkpoint in checkpoints:
        match checkpoint.provenance:
            case {"norm_stats": {"state": "stale" | "partly refreshed"}}:
                stale.append(checkpoint.name)
    if stale:
        log.warning(
            "the BatchNorm statistics of %s are stale, so its metrics are worse than they need be: "
            "refresh them with `ckptavg bn-refresh`",
            listed(stale),
        )
