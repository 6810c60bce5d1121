"""Find candidates: files and folders that look like checkpoints."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, printable
from ckptavg.formats import SUFFIXES, huggingface, is_checkpoint_directory
from ckptavg.formats.paths import is_remote, remote_errors
from ckptavg.select.order import natural_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

log = logging.getLogger("ckptavg")

# Names of optimizers, schedulers and the like, which trainers save beside checkpoints.
_NO_WEIGHTS = re.compile(
    r"(optim(izer)?|(lr_)?scheduler|rng_state|random_states|training_args|(grad_)?scaler|sampler)"
    r"([_-][A-Za-z_-]*\d+)?(\.(pt|pth|bin))?|.*_optim_states\.pt"
)
_NUMBERED = re.compile(
    r"(global_step|step|iter|iteration|epoch|checkpoint|ckpt)[-_=]?\d.*", re.IGNORECASE
)
_DEPTH_OF_HINT = 3


def find_candidates(inputs: Iterable[Path]) -> dict[Path, bool]:
    """The candidates among the inputs; True for those that the user named.

    Args:
        inputs: candidates, and directories of candidates.

    Raises:
        SelectionError: an input does not exist, or is a directory without candidates.
    """
    candidates: dict[Path, bool] = {}
    ignored: list[str] = []
    for path in inputs:
        with remote_errors(path):
            entries = []
            if path.is_dir():
                entries = _candidates_in(path, ignored)
                if not entries and not is_checkpoint_directory(path):
                    what = f"no checkpoint found in {printable(path)}"
                    raise SelectionError(what, remedy=_hint(path))
            elif not path.exists():
                raise SelectionError("does not exist", path=path)
            for candidate in entries or [path]:
                candidates[candidate] = candidates.get(candidate, False) or candidate == path
    if ignored:
        log.info("left out: %s", ", ".join(map(printable, ignored)))
    return candidates


def _candidates_in(folder: Path, ignored: list[str]) -> list[Path]:
    """The candidates in a directory, in natural order; empty if it is a checkpoint itself.

    A directory with weights is a checkpoint unless numbered checkpoints are in it. Its own weights
    are then those that a Trainer saved at the end.

    Args:
        folder: the directory.
        ignored: a list to which the names of ignored entries are appended.
    """
    candidates = []
    for entry in sorted(folder.iterdir(), key=lambda entry: natural_key(entry.name)):
        if is_no_checkpoint(entry.name):
            ignored.append(entry.name)
        elif _is_candidate(entry):
            candidates.append(entry)
    if not is_checkpoint_directory(folder):
        return candidates
    numbered = [entry for entry in candidates if _is_numbered(entry, folder)]
    kept = frozenset(entry.name for entry in numbered) or _weight_files(folder)
    ignored += [entry.name for entry in candidates if entry.name not in kept]
    return numbered


def _is_candidate(entry: Path) -> bool:
    if entry.name.startswith("."):
        return False
    try:
        return is_checkpoint_directory(entry) if entry.is_dir() else entry.suffix in SUFFIXES
    except PermissionError:
        log.info("%s cannot be looked into: left out", printable(entry.name))
        return False


def is_no_checkpoint(name: str) -> bool:
    """Whether trainers give this name to optimizers, schedulers and the like."""
    return _NO_WEIGHTS.fullmatch(name) is not None


def _is_numbered(entry: Path, folder: Path) -> bool:
    """Whether an entry of a directory with weights is a numbered checkpoint.

    DeepSpeed's `global_step500` in a Trainer's `checkpoint-500` is a part of that checkpoint.
    """
    is_part = entry.name.startswith("global_step") and huggingface.has_trainer_state(folder)
    return _NUMBERED.fullmatch(entry.name) is not None and not is_part


def _weight_files(folder: Path) -> frozenset[str]:
    """The names of the files with a directory's own weights."""
    if huggingface.matches(folder):
        return huggingface.weight_files(folder)
    return frozenset(entry.name for entry in folder.iterdir())


def _hint(folder: Path) -> str:
    """A remedy for a directory without checkpoints: a folder in it that has some."""
    inner = next(_folders_with_candidates(folder, _DEPTH_OF_HINT), None)
    if inner is not None:
        return f"there are checkpoints in {printable(inner)}"
    return f"files ending with {' '.join(SUFFIXES)} and directories with weights are looked for"


def _folders_with_candidates(folder: Path, depth: int) -> Iterator[Path]:
    if is_remote(folder) or not folder.is_dir():
        return
    if _candidates_in(folder, []):
        yield folder
    elif depth:
        for entry in sorted(folder.iterdir()):
            yield from _folders_with_candidates(entry, depth - 1)
