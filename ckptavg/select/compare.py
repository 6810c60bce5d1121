"""Compare checkpoints: names, shapes and dtypes of their tensors, and the bytes in them."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import MismatchError, printable
from ckptavg.formats.lora_config import scales_beside
from ckptavg.formats.tensors import has_lora_factors, has_rank
from ckptavg.select.order import DIGITS, natural_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ckptavg.formats.checkpoint import Checkpoint

_SAMPLE_BYTES = 512
_SAMPLES = 64
_SAMPLES_OF_FINGERPRINT = 32
_THREADS = 4


def differences(first: Checkpoint, other: Checkpoint, *, any_rank: bool = False) -> Iterator[str]:
    """Every difference in names, shapes and dtypes of tensors, as a line of text.

    Args:
        first: a checkpoint.
        other: another checkpoint.
        any_rank: let the ranks of LoRA factors differ.
    """
    if other.tensors is first.tensors:
        return
    here, there = printable(first.path), printable(other.path)
    for name, tensor in first.tensors.items():
        label, twin = printable(name), other.tensors.get(name)
        if twin is None:
            yield f"{label}: in {here}, missing in {there}"
            continue
        if twin.shape != tensor.shape and not (any_rank and has_rank(name)):
            yield f"{label}: shape {tensor.shape} in {here}, {twin.shape} in {there}"
        if twin.dtype is not tensor.dtype:
            yield f"{label}: {tensor.dtype.name} in {here}, {twin.dtype.name} in {there}"
    for name in sorted(other.tensors.keys() - first.tensors.keys()):
        yield f"{printable(name)}: in {there}, missing in {here}"


def check_one_model(checkpoints: Sequence[Checkpoint], *, any_rank: bool = False) -> None:
    """Refuse checkpoints that are not of one model.

    Args:
        checkpoints: at least one.
        any_rank: let the ranks of LoRA factors differ.

    Raises:
        MismatchError: names, shapes or dtypes of tensors differ; it lists all differences.
    """
    first, *others = checkpoints
    lines = [line for other in others for line in differences(first, other, any_rank=any_rank)]
    if lines:
        raise MismatchError("the checkpoints are not of one model:", lines)


def find_copies(checkpoints: Sequence[Checkpoint]) -> dict[Checkpoint, Checkpoint]:
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
        name: b"".join(checkpoint.pieces(name, _SAMPLE_BYTES))
        for name in _spread(sorted(checkpoint.tensors), _SAMPLES)
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


def differing_tensors(names: Iterable[str], first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    """Those of the names whose tensors differ in their bytes between two checkpoints."""
    for name in names:
        for one, another in zip(first.pieces(name), other.pieces(name), strict=True):
            # Comparing memoryviews takes thirty times as long.
            if not np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(another, np.uint8)):
                yield name
                break


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of samples of a checkpoint's tensors, 32 hex digits.

    It depends neither on the container nor on the order of the tensors.
    """
    names = sorted(name for name, tensor in checkpoint.tensors.items() if tensor.count)
    digest = hashlib.sha256()
    for name in _spread(names, _SAMPLES_OF_FINGERPRINT):
        digest.update(name.encode("utf-8", "surrogatepass"))
        [sample] = checkpoint.pieces(name, _SAMPLE_BYTES)
        digest.update(sample)
    return digest.hexdigest()[:32]


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most this many of the names, evenly spaced."""
    places = np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)
    return [names[place] for place in places.tolist()]
