"""The files and folders of a directory that may be checkpoints, by their names alone."""

from __future__ import annotations

import contextlib
import logging
from itertools import islice
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, listed, printable, without_notices
from ckptavg.formats import SUFFIXES, huggingface, is_checkpoint_directory, is_suffix, shards
from ckptavg.formats.modelfolders import NUMBERED, has_trainer_state
from ckptavg.formats.paths import check_exists, is_remote, remote_errors
from ckptavg.formats.words import is_no_checkpoint, parse_shard_name
from ckptavg.select.names import natural_key, parse_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

log = logging.getLogger("ckptavg")

_FOLDERS_OF_HINT = 4
_DEPTH_OF_HINT = 3
_MOST_NAMES = 10
_Visit = tuple["Path", int]  # a folder, without links, and the levels that were left
_LEVELS = 2  # of folders with a number: `iter_0001000/mp_rank_00/model.pt`


def find_candidates(inputs: Iterable[Path]) -> dict[Path, Path | None]:
    """The candidates among the inputs, each with its directory; None for those that were named.

    Args:
        inputs: candidates, and directories of candidates.

    Raises:
        SelectionError: an input does not exist, or is a directory without candidates.
        CkptAvgError: an input behind a URL does not exist, or cannot be reached.
    """
    candidates: dict[Path, Path | None] = {}
    for path in _joined(list(inputs)):
        with remote_errors(path):
            entries = []
            if path.is_dir():
                entries = _candidates_in(path)
                if not entries and not is_checkpoint_directory(path):
                    what = f"no checkpoint found in {printable(path)}"
                    raise SelectionError(what, remedy=_hint(path))
            elif is_remote(path):
                path.stat()
            else:
                check_exists(path)
            for entry in entries:
                candidates.setdefault(entry, path)
            if not entries:
                candidates[path] = None
    return candidates


def _joined(inputs: Sequence[Path]) -> Iterator[Path]:
    """The inputs; where all files of ranks in a directory are named, the directory instead."""
    named = set(inputs)
    for path in inputs:
        folder = path.parent
        is_shard = parse_shard_name(path.name) is not None
        if is_shard and folder.is_dir() and named.issuperset(shards.shard_files(folder)):
            yield folder
        else:
            yield path


def _candidates_in(folder: Path, known: set[_Visit] | None = None) -> list[Path]:
    """The candidates in a directory, in natural order; empty if it is a checkpoint itself.

    A directory with weights is a checkpoint unless numbered checkpoints are in it. Its own weights
    are then those that a Trainer saved at the end.

    Args:
        folder: the directory.
        known: folders that are not looked into again; those that are looked into are added.
    """
    unreadable: list[str] = []
    candidates = [*_entries_of(folder, _LEVELS, set() if known is None else known, unreadable)]
    if unreadable:
        log.info("left out %s: no permission to read it", listed(unreadable))
    if is_checkpoint_directory(folder):
        tops = {entry: entry.relative_to(folder).parts[0] for entry in candidates}
        numbered = [entry for entry, top in tops.items() if _is_numbered(top, folder)]
        kept = {tops[entry] for entry in numbered} or _weight_files(folder)
        beside = dict.fromkeys(top for top in tops.values() if top not in kept)
        others = [name for name in beside if not is_no_checkpoint(name)]
        if others:
            log.info("left out: %s", listed(others, _MOST_NAMES))
        return numbered
    return candidates if any(not is_no_checkpoint(each.name) for each in candidates) else []


def _entries_of(
    folder: Path, levels: int, known: set[_Visit], unreadable: list[str]
) -> Iterator[Path]:
    """The candidates in a directory, and in its numbered folders down to so many levels.

    Each folder is looked into once for a level, whatever links lead to it. Names of entries that
    cannot be looked into are added to `unreadable`.
    """
    # A folder of samples may have a million files: they are not even sorted.
    entries = [each for each in folder.iterdir() if is_suffix(each.suffix) or each.is_dir()]
    for entry in sorted(entries, key=lambda entry: natural_key(entry.name)):
        try:
            if not entry.name.startswith("."):
                yield from _below(entry, levels, known, unreadable)
        except PermissionError:
            unreadable.append(entry.name)


def _below(entry: Path, levels: int, known: set[_Visit], unreadable: list[str]) -> Iterator[Path]:
    """The entry if it is a candidate, else the candidates in it."""
    is_folder = entry.is_dir()
    if is_checkpoint_directory(entry) if is_folder else is_suffix(entry.suffix):
        yield entry
    elif is_folder and levels and parse_name(entry.name).numbers:
        place = entry if is_remote(entry) else entry.resolve()
        leads_upwards = not is_remote(entry) and entry.parent.resolve().is_relative_to(place)
        if (place, levels) not in known and not leads_upwards:
            known.add((place, levels))
            yield from _entries_of(entry, levels - 1, known, unreadable)


def _is_numbered(name: str, folder: Path) -> bool:
    """Whether an entry of a directory with weights is a numbered checkpoint, or contains one.

    DeepSpeed's `global_step500` in a Trainer's `checkpoint-500` is a part of that checkpoint.
    """
    is_part = name.startswith("global_step") and has_trainer_state(folder)
    return NUMBERED.fullmatch(name) is not None and not is_part


def _weight_files(folder: Path) -> set[str]:
    """The names of the files and folders that hold the weights of a directory itself."""
    if huggingface.matches(folder):
        return {name.partition("/")[0] for name in huggingface.weight_files(folder)}
    return {entry.name for entry in folder.iterdir()}


def _hint(folder: Path) -> str:
    """A remedy for a directory without checkpoints: the folders in it that have some.

    If several folders have one file each in the same place, the remedy is a pattern of these files.
    """
    inside = _folders_with_candidates(folder, _DEPTH_OF_HINT, set(), set())
    with without_notices():
        folders = list(islice(inside, _FOLDERS_OF_HINT))
    if folders:
        first, *others = _candidates_in(folders[0])
        parts = folders[0].relative_to(folder).parts
        numbered = [part for part in parts if parse_name(part).numbers] or parts
        stars = ["*" if part in numbered else part for part in parts]
        pattern = "/".join([*stars, first.relative_to(folders[0]).as_posix()])
        if not others and len(list(folder.glob(pattern))) > 1:
            return f"name them: {printable(folder / pattern)}"
        return f"name a directory that has some: {listed(folders)}"
    endings = " ".join(SUFFIXES)
    return (
        f"checkpoints are files ending with {endings}, and directories with weights; torch files "
        "with other endings can be named one by one"
    )


def _folders_with_candidates(
    folder: Path, depth: int, known: set[Path], inner: set[_Visit]
) -> Iterator[Path]:
    """The folders below one that have candidates, each once, whatever links lead to it."""
    with contextlib.suppress(PermissionError):
        if is_remote(folder) or not folder.is_dir() or folder.resolve() in known:
            return
        known.add(folder.resolve())
        if _candidates_in(folder, inner):
            yield folder
        elif depth:
            for entry in sorted(folder.iterdir()):
                yield from _folders_with_candidates(entry, depth - 1, known, inner)
