"""The recipe of an average: its members and their weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptavg.errors import SelectionError, printable
from ckptavg.select.order import relative_names
from ckptavg.select.rules import chosen, select

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.options import AverageOptions
    from ckptavg.merge.schemes import Scheme
    from ckptavg.merge.weights import Weights
    from ckptavg.select.rules import Selection
    from ckptavg.select.run import Run

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Recipe:
    """The members of an average and their weights.

    Attributes:
        label: the name of this average among several of one command, such as `last5-ema0.9`.
        members: the checkpoints with a weight other than 0, in the order of training.
        names: the members' paths relative to the folder that they have in common.
        weights: one weight for each member.
        needs_order: whether the weights depend on the order of the members.
        rules: the rules that chose the members, for the provenance.
        base: the member that is an earlier average, to be updated with the others.
    """

    label: str
    members: tuple[Checkpoint, ...]
    names: tuple[str, ...]
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
    return [
        _recipe(run, scheme, replace(rules, last=count), options)
        for count in rules.counts
        for scheme in schemes
    ]


def _recipe(run: Run, scheme: Scheme, rules: Selection, options: AverageOptions) -> Recipe:
    verdicts = chosen(select(run, rules))
    if isinstance(rules.last, int) and len(verdicts) < rules.last and rules.every is None:
        log.info("of the last %d there are only %d", rules.last, len(verdicts))
    steps = [verdict.done for verdict in verdicts if verdict.done is not None]
    paths = [verdict.checkpoint.path for verdict in verdicts]
    weights = scheme.weights(
        steps if len(steps) == len(verdicts) else None,
        list(map(str, paths)),
        normalize=options.normalize,
    )
    used = [place for place, value in enumerate(weights.values) if value != 0]
    if not used:
        raise SelectionError("all weights are zero, so there is nothing to average")
    members = tuple(verdicts[place].checkpoint for place in used)
    names = relative_names([paths[place] for place in used])
    if options.expect is not None and len(names) != options.expect:
        listed = ", ".join(map(printable, names))
        raise SelectionError(f"expected {options.expect} checkpoints, found {len(names)}: {listed}")
    recorded_rules = rules.as_dict()
    if recorded_rules.keys() & {"start", "steps", "cycle"}:
        recorded_rules["unit"] = verdicts[0].unit
    if not options.normalize:
        recorded_rules["normalized"] = False
    label = scheme.label if rules.last is None else f"last{rules.last}-{scheme.label}"
    weights = replace(weights, values=tuple(weights.values[place] for place in used))
    return Recipe(label, members, names, weights, scheme.needs_order, recorded_rules)
