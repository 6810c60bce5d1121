"""Copies of a checkpoint: the same files under other names, or equal bytes in every tensor."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.formats.lora_config import scales_beside
from ckptavg.formats.names import has_lora_factors
from ckptavg.select.order import DIGITS, natural
from ckptavg.select.structure import differences

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ckptavg.formats.checkpoint import Checkpoint

_SAMPLE_BYTES = 512
_SAMPLES = 64
_SAMPLES_OF_FINGERPRINT = 32
_THREADS = 4


def find_copies(checkpoints: Sequence[Checkpoint]) -> dict[Checkpoint, Checkpoint]:
    """The checkpoints that are copies, each with the checkpoint that it is a copy of.

    Hard links and symlinks are copies, which nothing is read for. So are checkpoints that record
    the same step and have equal bytes in every tensor: all bytes are compared only where samples
    of them are equal. The original is the one with a number in its name: `checkpoint-12`, not
    `last`.
    """
    samples = functools.cache(_samples)
    copies: dict[Checkpoint, Checkpoint] = {}
    by_files: dict[object, Checkpoint] = {}
    by_step: defaultdict[object, list[Checkpoint]] = defaultdict(list)
    for checkpoint in sorted(checkpoints, key=_preference):
        files = tuple(part.identity for part in checkpoint.parts)
        # Equal LoRA factors with another alpha are another adapter.
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
    return not DIGITS.search(path.name), path.is_symlink(), natural(str(path))


def _samples(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The first bytes of some tensors, by the names of the tensors."""
    return {
        name: b"".join(checkpoint.pieces(name, _SAMPLE_BYTES))
        for name in _spread(sorted(checkpoint.tensors), _SAMPLES)
    }


def _have_equal_tensors(first: Checkpoint, other: Checkpoint) -> bool:
    """Whether names, shapes, dtypes and bytes of all tensors are equal."""
    if next(differences(first, other), None) is not None:
        return False
    names = list(first.tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        shares = [names[number::_THREADS] for number in range(_THREADS)]
        return all(pool.map(lambda share: not any(differing(share, first, other)), shares))


def differing(names: Iterable[str], first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    """Those of the names whose tensors have other bytes in one checkpoint than in the other."""
    for name in names:
        for one, another in zip(first.pieces(name), other.pieces(name), strict=True):
            # To compare memoryviews takes thirty times as long.
            if not np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(another, np.uint8)):
                yield name
                break


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash that tells a checkpoint's weights from others', of samples of some tensors.

    It depends neither on the container nor on the order of the tensors in it.
    """
    names = sorted(name for name, tensor in checkpoint.tensors.items() if tensor.count)
    digest = hashlib.sha256()
    for name in _spread(names, _SAMPLES_OF_FINGERPRINT):
        digest.update(name.encode("utf-8", "surrogatepass"))
        [sample] = checkpoint.pieces(name, _SAMPLE_BYTES)
        digest.update(sample)
    return digest.hexdigest()[:32]


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, evenly spaced."""
    places = np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)
    return [names[place] for place in places.tolist()]
