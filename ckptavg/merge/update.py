"""Update an earlier average: add more checkpoints to it, so that all have the same weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptavg.errors import SelectionError, printable
from ckptavg.formats.checkpoint import fingerprint
from ckptavg.formats.tensors import is_extra_state
from ckptavg.merge.record import Record
from ckptavg.merge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.recipe import Recipe

_FEWEST_BITS = 32
_UNIFORM = ("uniform", "greedy soup")


def find_base(averages: Sequence[Checkpoint]) -> Checkpoint:
    """The only earlier average, if it can be updated.

    Args:
        averages: the earlier averages among the inputs.

    Raises:
        SelectionError: there is not exactly one; it is not uniform; or it has floats of fewer than
            32 bits, which each update would round again.
    """
    if len(averages) != 1:
        raise SelectionError(
            f"`update` needs one earlier average among the inputs, but there are {len(averages)}",
            remedy="name the average and the checkpoints to add to it",
        )
    [base] = averages
    _check_mean(base)
    for name, tensor in base.tensors.items():
        if tensor.dtype.averaged and tensor.dtype.bits < _FEWEST_BITS and not is_extra_state(name):
            raise SelectionError(
                f"has tensors of {tensor.dtype.name} ({printable(name)}), which each update would "
                "round again",
                path=base.path,
                remedy="average all checkpoints at once",
            )
    return base


def _check_mean(base: Checkpoint) -> None:
    """Refuse an average that is not the mean of its members.

    Raises:
        SelectionError: it is not.
    """
    record = Record.of(base)
    if record.scheme not in _UNIFORM:
        raise SelectionError(
            f"is not a uniform average but {printable(record.scheme)}: only a uniform one can be "
            "updated",
            path=base.path,
        )
    if record.weights.divisor != len(record.members):
        raise SelectionError("is not a mean: its provenance has another divisor", path=base.path)
    if any(weight != 1 for weight in record.weights.values):
        raise SelectionError("is not a mean: its provenance has other weights", path=base.path)


def fold(base: Checkpoint, new: Recipe) -> Recipe:
    """The recipe of the updated average, in which each checkpoint has the same weight.

    The result is `(n * average + x_1 + ... + x_m) / (n + m)`, where n is the number of members in
    the provenance of the earlier average.

    In the order of training, the earlier average stands where its newest member was. So it counts
    as the last checkpoint if that member is newer than all that are added.

    Args:
        base: the earlier average.
        new: the recipe of the checkpoints to add.

    Raises:
        SelectionError: a checkpoint is a member of the average already.
    """
    recorded = Record.of(base).members
    contents = {member["content"]: member for member in recorded if member.get("content")}
    for checkpoint in new.members:
        if member := contents.get(fingerprint(checkpoint)):
            raise SelectionError(
                f"contains {printable(checkpoint.path)} already, as "
                f"{printable(member.get('name'))}",
                path=base.path,
                remedy="leave it out",
            )
    count, place = len(recorded), sum(_is_newer(recorded, each) for each in new.members)
    members, values = [*new.members], [1.0] * len(new.members)
    members.insert(place, base)
    values.insert(place, float(count))
    weights = Weights(tuple(values), float(count + len(new.members)))
    return replace(new, members=tuple(members), weights=weights, needs_order=False, base=base)


def _is_newer(recorded: Sequence[dict[str, Any]], checkpoint: Checkpoint) -> bool:
    """Whether a recorded member has a later step than a checkpoint; False if steps are unknown."""
    step = checkpoint.step
    steps = [member.get("step") for member in recorded]
    return step is not None and any(
        isinstance(each, list) and each[0] == step[0] and each[1] > step[1] for each in steps
    )
