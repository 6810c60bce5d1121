"""What each average is made of: its members and their weights."""

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
    """What one average is made of.

    Attributes:
        label: tells it from the other averages of one command, such as `last5-ema0.9`.
        members: in the order of training, each with a weight other than 0.
        names: the paths of the members below the folder that they have in common.
        weights: one for each member.
        needs_order: whether the weights depend on the order of the members.
        rules: how the members were chosen, for the provenance.
        base: the member that is an earlier average, which the other members bring up to date.
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
        """The weights over more checkpoints than the members: 0 for the others."""
        weights = dict(zip(self.members, self.weights.values, strict=True))
        values = tuple(weights.get(checkpoint, 0.0) for checkpoint in checkpoints)
        return replace(self.weights, values=values)


def recipes_of(
    run: Run, schemes: Sequence[Scheme], rules: Selection, options: AverageOptions
) -> list[Recipe]:
    """The members and weights of each average: each scheme with each number of last checkpoints.

    Raises:
        SelectionError: no checkpoint is left, not as many as expected, or a scheme does not fit.
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
    weights = scheme.weights(
        steps if len(steps) == len(verdicts) else None,
        [str(verdict.checkpoint.path) for verdict in verdicts],
        normalize=options.normalize,
    )
    places = [place for place, value in enumerate(weights.values) if value != 0]
    if not places:
        raise SelectionError("all weights are zero, so there is nothing to average")
    members = tuple(verdicts[place].checkpoint for place in places)
    names = relative_names([member.path for member in members])
    if options.expect is not None and len(names) != options.expect:
        listed = ", ".join(map(printable, names))
        raise SelectionError(f"expected {options.expect} checkpoints, found {len(names)}: {listed}")
    said = rules.as_dict()
    if said.keys() & {"start", "steps", "cycle"}:
        said["unit"] = verdicts[0].unit
    if not options.normalize:
        said["normalized"] = False
    label = scheme.label if rules.last is None else f"last{rules.last}-{scheme.label}"
    return Recipe(label, members, names, weights.of(places), scheme.needs_order, said)
