"""What in a directory is a checkpoint: files and folders, by their names and what is in them."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, printable
from ckptavg.formats import SUFFIXES, huggingface, is_checkpoint_directory
from ckptavg.formats.paths import is_remote, remote_errors
from ckptavg.select.order import natural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

log = logging.getLogger("ckptavg")

# What trainers leave beside their checkpoints in files and folders of the same kinds.
_NOT_WEIGHTS = re.compile(
    r"(optim(izer)?|(lr_)?scheduler|rng_state|random_states|training_args|(grad_)?scaler|sampler)"
    r"([_-][A-Za-z_-]*\d+)?(\.(pt|pth|bin))?|.*_optim_states\.pt"
)
# Checkpoints by their names: in a directory with weights of its own only these are further ones.
_NUMBERED = re.compile(
    r"(global_step|step|iter|iteration|epoch|checkpoint|ckpt)[-_=]?\d.*", re.IGNORECASE
)
_DEEPEST_HINT = 3


def find(inputs: Iterable[Path]) -> list[tuple[Path, bool]]:
    """The checkpoints among the inputs, each once, and whether it was named itself.

    Raises:
        SelectionError: an input does not exist.
    """
    found: dict[Path, bool] = {}
    passed: list[str] = []
    for path in inputs:
        with remote_errors(path):
            for checkpoint in _of(path, passed):
                found[checkpoint] = found.get(checkpoint, False) or checkpoint == path
    if passed:
        log.info("left out: %s", ", ".join(map(printable, passed)))
    return list(found.items())


def _of(path: Path, passed: list[str]) -> list[Path]:
    """The checkpoints that an input stands for: itself, or those in it."""
    if not path.is_dir():
        if not path.exists():
            raise SelectionError("does not exist", path=path)
        return [path]
    inner = _inside(path, passed)
    if not inner and not is_checkpoint_directory(path):
        raise SelectionError(f"no checkpoint found in {printable(path)}", remedy=_hint(path))
    return inner or [path]


def _inside(path: Path, passed: list[str]) -> list[Path]:
    """The checkpoints in a directory; none where it is one itself.

    A directory with weights of its own is one, unless it has numbered checkpoints as well: then it
    is what a Trainer leaves, and its own weights are what those led to.
    """
    entries = sorted(path.iterdir(), key=lambda entry: natural(entry.name))
    rest = [entry.name for entry in entries if is_no_checkpoint(entry.name)]
    found = [entry for entry in entries if _is_checkpoint(entry)]
    if is_checkpoint_directory(path):
        others, found = found, [entry for entry in found if _is_further(entry, path)]
        mine = frozenset() if found else _weight_files(path)
        rest += [entry.name for entry in others if entry not in found and entry.name not in mine]
    passed += rest
    return found


def _weight_files(path: Path) -> frozenset[str]:
    """What a directory's own weights are, where these are files in it."""
    if huggingface.matches(path):
        return huggingface.weight_files(path)
    return frozenset(entry.name for entry in path.iterdir())


def _is_checkpoint(entry: Path) -> bool:
    if entry.name.startswith(".") or is_no_checkpoint(entry.name):
        return False
    try:
        return is_checkpoint_directory(entry) or looks_like_checkpoint(entry)
    except PermissionError:
        log.info("%s cannot be looked into: left out", printable(entry.name))
        return False


def _is_further(entry: Path, path: Path) -> bool:
    """Whether what is in a checkpoint's directory is one beside it, and no part of it."""
    if not _NUMBERED.fullmatch(entry.name):
        return False
    # DeepSpeed's `global_step500/` in `checkpoint-500/` is.
    return not (entry.name.startswith("global_step") and huggingface.has_trainer_state(path))


def is_no_checkpoint(name: str) -> bool:
    """Whether a file or folder is what trainers leave beside checkpoints, by its name."""
    return _NOT_WEIGHTS.fullmatch(name) is not None


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a file in a directory is a checkpoint by its name."""
    return (
        path.suffix in SUFFIXES
        and not path.name.startswith(".")
        and not is_no_checkpoint(path.name)
        and not path.is_dir()
    )


def _hint(path: Path) -> str:
    """Where checkpoints might be, for whoever named a directory without any."""
    folder = next(_folders_with_checkpoints(path, _DEEPEST_HINT), None)
    if folder is not None:
        return f"there are checkpoints in {printable(folder)}"
    return f"files ending with {' '.join(SUFFIXES)} and directories with weights are looked for"


def _folders_with_checkpoints(path: Path, depth: int) -> Iterator[Path]:
    if is_remote(path) or not path.is_dir():
        return
    if _inside(path, []):
        yield path
    elif depth:
        for entry in sorted(path.iterdir()):
            yield from _folders_with_checkpoints(entry, depth - 1)
