"""Copies: checkpoints whose tensors are equal in every byte count once."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ckptavg.formats.checkpoint import (
    SAMPLE_BYTES,
    differing_tensors,
    fingerprint,
    have_equal_headers,
)
from ckptavg.formats.lora_config import recorded_settings
from ckptavg.formats.lora_names import has_lora

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from ckptavg.formats.checkpoint import Checkpoint

_THREADS = 4


def find_copies(checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, Checkpoint]:
    """The checkpoints that are copies, each with its original, whatever step they record.

    Hard links and symlinks are known as copies without reading a tensor. Others are compared by a
    sample of one tensor, those that are equal by their fingerprints, and only then in full.

    Args:
        checkpoints: the first of several equal ones is the original.
    """
    copies: dict[Checkpoint, Checkpoint] = {}
    by_files: dict[Hashable, Checkpoint] = {}
    by_sample: defaultdict[Hashable, list[Checkpoint]] = defaultdict(list)
    for checkpoint in checkpoints:
        files = tuple(part.identity for part in checkpoint.parts)
        if files in by_files:
            copies[checkpoint] = by_files[files]
        else:
            by_files[files] = checkpoint
            by_sample[_sample(checkpoint)].append(checkpoint)
    for alike in by_sample.values():
        copies |= _copies_among(alike)
    return copies


def _sample(checkpoint: Checkpoint) -> Hashable:
    """A key that copies share, for one small read: the first bytes of one of the tensors."""
    names = sorted(name for name, tensor in checkpoint.tensors.items() if 0 not in tensor.shape)
    name = names[len(names) // 2] if names else ""
    data = b"".join(checkpoint.pieces(name, SAMPLE_BYTES)) if names else b""
    # With another alpha, equal LoRA factors make another adapter.
    settings = recorded_settings(checkpoint) if has_lora(checkpoint.tensors) else {}
    return len(names), name, data, tuple(settings.items())


def _copies_among(alike: Sequence[Checkpoint]) -> dict[Checkpoint, Checkpoint]:
    """The copies among checkpoints with equal samples."""
    copies: dict[Checkpoint, Checkpoint] = {}
    originals: defaultdict[str, list[Checkpoint]] = defaultdict(list)
    for checkpoint in alike if len(alike) > 1 else ():
        rivals = originals[fingerprint(checkpoint)]
        original = next((each for each in rivals if _have_equal_tensors(each, checkpoint)), None)
        if original is None:
            rivals.append(checkpoint)
        else:
            copies[checkpoint] = original
    return copies


def _have_equal_tensors(first: Checkpoint, other: Checkpoint) -> bool:
    """Whether names, shapes, dtypes and bytes of all tensors are equal."""
    if not have_equal_headers(first, other):
        return False
    # A job for each tensor: a difference, or a signal, waits only for those under way.
    with ThreadPoolExecutor(_THREADS) as pool:
        return not any(
            pool.map(lambda name: any(differing_tensors((name,), first, other)), first.tensors)
        )
