"""The recipe of an average: its members and their weights; and that of an updated average."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptavg.errors import SelectionError, printable
from ckptavg.formats.checkpoint import fingerprint
from ckptavg.formats.tensors import is_extra_state
from ckptavg.merge.weights import Weights
from ckptavg.select.rules import chosen, select

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.options import AverageOptions
    from ckptavg.merge.schemes import Scheme
    from ckptavg.select.rules import Selection, Verdict
    from ckptavg.select.run import Run

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Recipe:
    """The members of an average and their weights.

    Attributes:
        label: the name of this average among several of one command, such as `last5-ema0.9`.
        members: the checkpoints with a weight other than 0, in the order of training.
        weights: one weight for each member.
        needs_order: whether the weights depend on the order of the members.
        rules: the rules that chose the members, for the provenance.
        base: the member that is an earlier average, to be updated with the others.
    """

    label: str
    members: tuple[Checkpoint, ...]
    weights: Weights
    needs_order: bool = False
    rules: Mapping[str, Any] = field(default_factory=dict)
    base: Checkpoint | None = None

    @property
    def last(self) -> Checkpoint:
        """The last member."""
        return self.members[-1]

    def weights_over(self, checkpoints: Sequence[Checkpoint]) -> Weights:
        """The weights of these checkpoints: 0 for those that are no members."""
        weights = dict(zip(self.members, self.weights.values, strict=True))
        values = tuple(weights.get(checkpoint, 0.0) for checkpoint in checkpoints)
        return replace(self.weights, values=values)


def recipes_of(
    run: Run, schemes: Sequence[Scheme], rules: Selection, options: AverageOptions
) -> list[Recipe]:
    """The recipe of each average: one for each number of last checkpoints and each scheme.

    Raises:
        SelectionError: no checkpoint is chosen, their number is not the expected one, or a scheme
            cannot weight them.
    """
    recipes = []
    for count in rules.counts:
        narrowed = replace(rules, last=count)
        verdicts = chosen(select(run, narrowed))
        if count is not None and len(verdicts) < count and rules.every is None:
            log.info("of the last %d there are only %d", count, len(verdicts))
        recipes += [_recipe(verdicts, scheme, narrowed, options) for scheme in schemes]
    return recipes


def _recipe(
    verdicts: Sequence[Verdict], scheme: Scheme, rules: Selection, options: AverageOptions
) -> Recipe:
    steps = [verdict.done for verdict in verdicts if verdict.done is not None]
    weights = scheme.weights(
        steps if len(steps) == len(verdicts) else None,
        [str(verdict.checkpoint.path) for verdict in verdicts],
        normalize=options.normalize,
    )
    used = [place for place, value in enumerate(weights.values) if value != 0]
    if not used:
        raise SelectionError("all weights are zero, so there is nothing to average")
    members = tuple(verdicts[place].checkpoint for place in used)
    if options.expect is not None and len(members) != options.expect:
        listed = ", ".join(printable(member.name) for member in members)
        raise SelectionError(
            f"expected {options.expect} checkpoints, found {len(members)}: {listed}"
        )
    recorded_rules = rules.as_dict()
    if recorded_rules.keys() & {"start", "steps", "cycle"}:
        recorded_rules["unit"] = verdicts[0].unit
    if not options.normalize:
        recorded_rules["normalized"] = False
    label = scheme.label if rules.last is None else f"last{rules.last}-{scheme.label}"
    weights = replace(weights, values=tuple(weights.values[place] for place in used))
    return Recipe(label, members, weights, scheme.needs_order, recorded_rules)


_FEWEST_BITS = 32
_UNIFORM = ("uniform", "greedy soup")


def find_base(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The earlier average among the checkpoints.

    Raises:
        SelectionError: there is none or several; it is not uniform; or it has floats of fewer than
            32 bits, which each update would round again.
    """
    averages = [checkpoint for checkpoint in checkpoints if checkpoint.is_average]
    if len(averages) != 1:
        raise SelectionError(
            f"an update needs one earlier average among its inputs, and there are {len(averages)}",
            remedy="name it, and the checkpoints to fold into it",
        )
    [base] = averages
    if len(checkpoints) == 1:
        raise SelectionError("there is nothing to fold into it", path=base.path)
    recorded_members(base)
    for name, tensor in base.tensors.items():
        if tensor.dtype.averaged and tensor.dtype.bits < _FEWEST_BITS and not is_extra_state(name):
            raise SelectionError(
                f"has {tensor.dtype.name} in it ({printable(name)}), which each update would "
                "round again",
                path=base.path,
                remedy="average all checkpoints at once",
            )
    return base


def recorded_members(base: Checkpoint) -> list[dict[str, Any]]:
    """The entries of the members in the provenance of a uniform average.

    Raises:
        SelectionError: it is not a uniform average.
    """
    entry = base.provenance or {}
    scheme, members = entry.get("scheme"), entry.get("sources")
    if scheme not in _UNIFORM or not isinstance(members, list) or not members:
        raise SelectionError(
            f"is no uniform average ({printable(scheme)}): only such an average can be updated",
            path=base.path,
        )
    if entry.get("divisor") != len(members):
        raise SelectionError("is no mean: its provenance has another divisor", path=base.path)
    if not all(isinstance(member, dict) and member.get("weight") == 1 for member in members):
        raise SelectionError("is no mean: its provenance has other weights", path=base.path)
    return members


def fold(base: Checkpoint, new: Recipe) -> Recipe:
    """The recipe of the updated average, in which each checkpoint has the same share.

    The result is `(n * average + x_1 + ... + x_m) / (n + m)`, where n is the number of members in
    the provenance of the earlier average.

    The earlier average takes the place of its newest member in the order of training. So it counts
    as the last checkpoint if that member is the newest of all.

    Args:
        base: the earlier average.
        new: the recipe of the checkpoints to fold in.

    Raises:
        SelectionError: a checkpoint is a member of the average already.
    """
    recorded = recorded_members(base)
    contents = {member["content"]: member for member in recorded if member.get("content")}
    for checkpoint in new.members:
        if member := contents.get(fingerprint(checkpoint)):
            raise SelectionError(
                f"has {printable(checkpoint.path)} in it already, as "
                f"{printable(member.get('name'))}",
                path=base.path,
                remedy="leave it out",
            )
    count, place = len(recorded), sum(_is_newer(recorded, each) for each in new.members)
    members, values = [*new.members], [1.0] * len(new.members)
    members.insert(place, base)
    values.insert(place, float(count))
    weights = Weights("uniform", tuple(values), float(count + len(new.members)))
    return replace(new, members=tuple(members), weights=weights, needs_order=False, base=base)


def _is_newer(recorded: Sequence[dict[str, Any]], checkpoint: Checkpoint) -> bool:
    """Whether a recorded member has a later step than a checkpoint; False if not recorded."""
    step = checkpoint.step
    steps = [member.get("step") for member in recorded]
    return step is not None and any(
        isinstance(each, list) and each[0] == step[0] and each[1] > step[1] for each in steps
    )
