"""Averages in memory, one after the other, from one read of the checkpoints, the newest first.

Averages of the last 3 and of the last 5 checkpoints have the sum of the last 3 in common. So sums
begin with the newest checkpoint; averages whose weights have been the same so far share one, in
float64. The engine adds the oldest first. Both orders give the same sum of floats of up to 32 bits
as long as float64 holds it exactly; else they may differ in the last bit of the float64 sum, and
rarely in the last bit of a result.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.formats.computed import ComputedCheckpoint
from ckptavg.formats.tensors import is_norm_state, new_arrays
from ckptavg.merge.arithmetic import accumulator_dtype, rounded, widened
from ckptavg.merge.roles import frozen_layers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import AnyArray
    from ckptavg.merge.plan import Plan, PlannedTensor

Arrays = dict[str, "AnyArray"]


class Stop(NamedTuple):
    """A checkpoint in memory: a member, or an average that is complete.

    Attributes:
        is_average: which of the two it is.
        number: that of the member or of the average in the plan.
        checkpoint: its tensors.
    """

    is_average: bool
    number: int
    checkpoint: Checkpoint


@dataclass
class _Sum:
    """The sum of some averages whose weights have been the same so far.

    Attributes:
        averages: their numbers.
        values: the sum by the tensors' names; empty at the beginning.
        states: norm statistics and counters of the members so far, without what was read before.
    """

    averages: list[int]
    values: Arrays = field(default_factory=dict)
    states: list[Checkpoint] = field(default_factory=list)


def walk(plan: Plan, averages: Collection[int], members: Collection[int]) -> Iterator[Stop]:
    """Go from the newest member to the oldest, and read each of them once.

    Each stop is valid until the next one. An average is made when its oldest member has been read.

    Args:
        plan: the members, and the weights of the averages.
        averages: numbers of the averages that are wanted.
        members: numbers of the members that are wanted.
    """
    oldest = {each: _places(plan, each)[0] for each in averages}
    sums = [_Sum(sorted(averages))] if averages else []
    last_values: dict[int, Arrays] = {}
    for number in reversed(range(len(plan.members))):
        weights = {a: plan.weights[a].values[number] for each in sums for a in each.averages}
        if number not in members and not any(weights.values()):
            continue
        values = _read(plan, plan.members[number])
        if number in members:
            yield Stop(is_average=False, number=number, checkpoint=_held(plan, number, values))
        last_values |= {a: values for a in weights if plan.weights[a].last == number}
        grown = list[_Sum]()
        for each in sums:
            for average in each.averages:
                if oldest[average] == number:
                    made = _average(plan, average, each, values, last_values.pop(average))
                    yield Stop(is_average=True, number=average, checkpoint=made)
                    del made
            each.averages = [average for average in each.averages if oldest[average] != number]
            grown += _grown(plan, each, weights, number, values)
        sums = grown


def _places(plan: Plan, average: int) -> list[int]:
    """The numbers of an average's members."""
    return [place for place, weight in enumerate(plan.weights[average].values) if weight != 0]


def _read(plan: Plan, member: Checkpoint) -> Arrays:
    """A member's tensors, of which tied ones are read once."""
    values = dict[str, "AnyArray"]()
    for planned in plan.tensors:
        values |= dict.fromkeys(planned.names, member.read(planned.names[0]))
    return values


def _held(plan: Plan, number: int, values: Mapping[str, AnyArray]) -> Checkpoint:
    """A member whose tensors are in memory."""
    return ComputedCheckpoint(**vars(plan.members[number]), make=values.__getitem__)


def _grown(
    plan: Plan, total: _Sum, weights: Mapping[int, float], number: int, values: Arrays
) -> list[_Sum]:
    """A sum with a member added: one for each of the weights that its averages give to it."""
    groups = defaultdict[float, list[int]](list)
    for average in total.averages:
        groups[weights[average]].append(average)
    grown = []
    for place, (weight, averages) in enumerate(groups.items(), 1):
        in_place = place == len(groups)
        sums = total.values if in_place else {n: each.copy() for n, each in total.values.items()}
        each = _Sum(averages, sums, [*total.states])
        if weight != 0:
            for planned in _averaged(plan):
                name = planned.names[0]
                sums[name] = _added(sums.get(name), values[name], weight, planned, in_place=True)
            each.states.append(_states(plan.members[number], values))
        grown.append(each)
    return grown


def _states(member: Checkpoint, values: Mapping[str, AnyArray]) -> Checkpoint:
    """The norm statistics and counters alone."""
    states = {name: array for name, array in values.items() if is_norm_state(name)}
    tensors = {name: member.tensors[name] for name in states}
    return replace(member, tensors=tensors).with_values(states)


def _averaged(plan: Plan) -> Iterator[PlannedTensor]:
    return (planned for planned in plan.tensors if planned.role == "averaged")


def _added(
    total: AnyArray | None,
    values: AnyArray,
    weight: float,
    planned: PlannedTensor,
    *,
    in_place: bool,
) -> AnyArray:
    """A sum in float64 or complex128 with a member's values added, as the engine adds them."""
    dtype, allocate = accumulator_dtype(planned.dtype), new_arrays(values.shape)
    term = widened(values, allocate)
    if weight != 1:
        term = np.multiply(term, weight, out=np.empty(values.shape, dtype), dtype=dtype)
    if total is None:
        total = np.empty(values.shape, dtype)
        np.copyto(total, term, casting="same_kind")
        return total
    return np.add(total, term, out=total if in_place else np.empty_like(total))


def _average(
    plan: Plan, average: int, total: _Sum, values: Arrays, last_values: Mapping[str, AnyArray]
) -> Checkpoint:
    """An average whose oldest member has been read.

    Args:
        plan: the members and weights.
        average: its number.
        total: the sum of its other members.
        values: those of its oldest member.
        last_values: those of its last member.
    """
    weights, places = plan.weights[average], _places(plan, average)
    last, weight = plan.members[places[-1]], weights.values[places[0]]
    made = dict[str, "AnyArray"]()
    with np.errstate(all="ignore"):  # what cannot be written is refused when it is written
        for planned in plan.tensors:
            name = planned.names[0]
            if planned.role == "averaged":
                sums = _added(total.values.get(name), values[name], weight, planned, in_place=False)
                mean = np.divide(sums, weights.divisor, out=sums)
                array = rounded(mean, planned.dtype, new_arrays(mean.shape))
            else:
                array = last_values[name]
            made |= dict.fromkeys(planned.names, array)
    fields = {**vars(last), "tensors": {name: last.tensors[name] for name in made}}
    if len(places) > 1:
        states = [_states(last, values), *reversed(total.states)]
        frozen = frozen_layers(states)
        fields["metadata"] = {PROVENANCE: json.dumps({"norm_stats": {"frozen": frozen}})}
    return ComputedCheckpoint(**fields, make=made.__getitem__)
