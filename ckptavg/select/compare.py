"""Compare checkpoints: their names, shapes and dtypes, and the bytes of their tensors."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import MismatchError, printable
from ckptavg.formats.names import has_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ckptavg.formats.checkpoint import Checkpoint

_SAMPLES = 64
_SAMPLE_BYTES = 512
_FINGERPRINT_SAMPLES = 32


def differences(reference: Checkpoint, other: Checkpoint, *, any_rank: bool) -> Iterator[str]:
    """Every difference in names, shapes and dtypes, one line each.

    Args:
        reference: the first checkpoint.
        other: the second checkpoint.
        any_rank: let the ranks of LoRA factors differ.
    """
    if other.tensors is reference.tensors:
        return
    first, second = printable(reference.path), printable(other.path)
    for name, tensor in reference.tensors.items():
        twin = other.tensors.get(name)
        label = printable(name)
        if twin is None:
            yield f"{label}: in {first}, missing in {second}"
            continue
        if twin.shape != tensor.shape and not (any_rank and has_rank(name)):
            yield f"{label}: shape {tensor.shape} in {first}, {twin.shape} in {second}"
        if twin.dtype is not tensor.dtype:
            yield f"{label}: {tensor.dtype.name} in {first}, {twin.dtype.name} in {second}"
    for name in sorted(other.tensors.keys() - reference.tensors.keys()):
        yield f"{printable(name)}: in {second}, missing in {first}"


def check_one_model(checkpoints: Sequence[Checkpoint], *, any_rank: bool = False) -> None:
    """Refuse checkpoints that are not of one model.

    Args:
        checkpoints: at least one.
        any_rank: let the ranks of LoRA factors differ.

    Raises:
        MismatchError: their names, shapes or dtypes differ; it lists all differences.
    """
    first, *others = checkpoints
    lines = [line for other in others for line in differences(first, other, any_rank=any_rank)]
    if lines:
        raise MismatchError("the checkpoints are not of one model:", lines)


class Contents:
    """Compares the contents of checkpoints by digests of their tensors.

    Samples are compared first: checkpoints that differ do so nearly everywhere. Only those whose
    samples agree are read in full, each once.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[Checkpoint, bool], bytes] = {}

    def same(self, one: Checkpoint, other: Checkpoint) -> bool:
        """Whether two checkpoints have the same bytes in every tensor."""
        if next(differences(one, other, any_rank=False), None) is not None:
            return False
        return all(
            self._digest(one, whole=whole) == self._digest(other, whole=whole)
            for whole in (False, True)
        )

    def _digest(self, checkpoint: Checkpoint, *, whole: bool) -> bytes:
        key = (checkpoint, whole)
        if key not in self._digests:
            names = sorted(checkpoint.tensors)
            digest = hashlib.sha256()
            for name in names if whole else _spread(names, _SAMPLES):
                for piece in checkpoint.pieces(name, None if whole else _SAMPLE_BYTES):
                    digest.update(piece)
            self._digests[key] = digest.digest()
        return self._digests[key]


def fingerprint(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint's weights from others', from samples of some of its tensors.

    It depends neither on the container nor on the order of the tensors in it.
    """
    names = sorted(name for name, tensor in checkpoint.tensors.items() if tensor.count)
    digest = hashlib.sha256()
    for name in _spread(names, _FINGERPRINT_SAMPLES):
        digest.update(name.encode("utf-8", "surrogatepass"))
        [sample] = checkpoint.pieces(name, _SAMPLE_BYTES)
        digest.update(sample)
    return digest.hexdigest()[:32]


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, spread evenly over all of them."""
    places = np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)
    return [names[place] for place in places.tolist()]


def differing(names: Iterable[str], one: Checkpoint, other: Checkpoint) -> Iterator[str]:
    """Those of the names whose tensors have other bytes in one checkpoint than in the other."""
    for name in names:
        pairs = zip(one.pieces(name), other.pieces(name), strict=True)
        if any(first != second for first, second in pairs):
            yield name
