"""What in a directory is a checkpoint: files and folders, by their names and what is in them."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, printable
from ckptavg.formats import SUFFIXES, huggingface, is_checkpoint_directory
from ckptavg.order import DIGITS, natural
from ckptavg.paths import is_remote, reaching

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

log = logging.getLogger("ckptavg")

# What trainers leave beside their checkpoints in files and folders of the same kinds.
_NOT_WEIGHTS = re.compile(
    r"(optim(izer)?|(lr_)?scheduler|rng_state|random_states|training_args|(grad_)?scaler|sampler)"
    r"([_-][A-Za-z_-]*\d+)?(\.(pt|pth|bin))?|.*_optim_states\.pt"
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
        with reaching(path):
            for checkpoint in _of(path, passed):
                found[checkpoint] = found.get(checkpoint, False) or checkpoint == path
    if passed:
        log.info("left out: %s", ", ".join(map(printable, passed)))
    return list(found.items())


def _of(path: Path, passed: list[str]) -> list[Path]:
    """The checkpoints that an input stands for: itself, or those in it."""
    if path.is_dir():
        inner = _inside(path, passed)
        return inner if inner or not is_checkpoint_directory(path) else [path]
    if not path.exists():
        raise SelectionError("does not exist", path=path)
    return [path]


def _inside(path: Path, passed: list[str]) -> list[Path]:
    """The checkpoints in a directory; none where it is one itself."""
    own = is_checkpoint_directory(path)
    if own and not huggingface.matches(path, b""):
        return []
    entries = sorted(path.iterdir(), key=lambda entry: natural(entry.name))
    folders, files, rest = [], [], []
    for entry in entries:
        mine = own and huggingface.is_own(entry.name)
        if entry.name.startswith(".") or (mine and entry.is_dir()):
            continue
        if _NOT_WEIGHTS.fullmatch(entry.name):
            rest.append(entry.name)
        elif is_checkpoint_directory(entry):
            folders.append(entry)
        elif looks_like_checkpoint(entry):
            files.append(entry)
    others = [entry for entry in files if not huggingface.is_own(entry.name)]
    if own and not folders and not any(DIGITS.search(entry.name) for entry in others):
        return []
    if own and folders:
        # The model that a Trainer leaves at the end beside the checkpoints that led to it.
        rest += [entry.name for entry in files if huggingface.is_own(entry.name)]
        files = others
    passed += rest
    return sorted([*folders, *files], key=lambda entry: natural(entry.name))


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a file in a directory is a checkpoint by its name."""
    return (
        path.suffix in SUFFIXES
        and not path.name.startswith(".")
        and not _NOT_WEIGHTS.fullmatch(path.name)
        and not path.is_dir()
    )


def hint(inputs: Iterable[Path]) -> str:
    """Where checkpoints might be, for whoever named a directory without any."""
    for path in inputs:
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
