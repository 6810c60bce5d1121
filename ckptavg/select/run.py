"""Find a training run: the files that look like checkpoints, opened, each once, in order."""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats import SUFFIXES, huggingface, is_checkpoint_directory, open_checkpoint
from ckptavg.formats.checkpoint import (
    SAMPLE_BYTES,
    differences,
    differing_tensors,
    spread,
    without_wrappers,
)
from ckptavg.formats.lora_config import scales_beside
from ckptavg.formats.parts import is_remote, remote_errors
from ckptavg.formats.tensors import has_lora_factors
from ckptavg.select.order import DIGITS, natural_key, relative_names, sort_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint


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
_SAMPLES, _THREADS = 64, 4  # for finding copies


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
        opened.append(replace(checkpoint, name_in_run=name, tensors=tensors))
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
    copies = _find_copies(candidates)
    left_out = {}
    for copy, original in copies.items():
        name = printable(original.name)
        log.info("%s is the same checkpoint as %s: counted once", printable(copy.name), name)
        left_out[copy.path] = f"the same checkpoint as {name}"
    return [candidate for candidate in candidates if candidate not in copies], left_out


def _find_copies(checkpoints: Sequence[Checkpoint]) -> dict[Checkpoint, Checkpoint]:
    """The checkpoints that are copies, each with its original.

    Hard links and symlinks are copies, for which no tensor is read. Checkpoints that record the
    same step are copies if all their tensors are equal. They are compared in full only if samples
    are equal. The original is the one with a number in its name: `checkpoint-12`, not `last`.
    """
    samples = functools.cache(_samples)
    copies: dict[Checkpoint, Checkpoint] = {}
    by_files: dict[object, Checkpoint] = {}
    by_step: defaultdict[object, list[Checkpoint]] = defaultdict(list)
    for checkpoint in sorted(checkpoints, key=_preference):
        files = tuple(part.identity for part in checkpoint.parts)
        # With another alpha, equal LoRA factors make another adapter.
        is_lora = has_lora_factors(checkpoint.tensors)
        rivals = by_step[checkpoint.step, scales_beside(checkpoint.path) if is_lora else ()]
        original = by_files.get(files)
        for rival in rivals if original is None else ():
            if samples(rival) == samples(checkpoint) and _have_equal_tensors(rival, checkpoint):
                original = rival
                break
        if original is not None:
            copies[checkpoint] = original
        else:
            by_files[files] = checkpoint
            rivals.append(checkpoint)
    return copies


def _preference(checkpoint: Checkpoint) -> tuple[object, ...]:
    """A sort key that puts originals before their copies."""
    path = checkpoint.path
    return not DIGITS.search(path.name), path.is_symlink(), natural_key(str(path))


def _samples(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The first bytes of some of the tensors, by name."""
    return {
        name: b"".join(checkpoint.pieces(name, SAMPLE_BYTES))
        for name in spread(sorted(checkpoint.tensors), _SAMPLES)
    }


def _have_equal_tensors(first: Checkpoint, other: Checkpoint) -> bool:
    """Whether names, shapes, dtypes and bytes of all tensors are equal."""
    if next(differences(first, other), None) is not None:
        return False
    # A job for each tensor: a difference, or a signal, waits only for those under way.
    with ThreadPoolExecutor(_THREADS) as pool:
        return not any(
            pool.map(lambda name: any(differing_tensors((name,), first, other)), first.tensors)
        )


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
