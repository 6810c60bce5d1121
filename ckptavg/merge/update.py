"""Fold further checkpoints into a uniform average that was made earlier.

`(n * average + x_1 + ... + x_m) / (n + m)`, with n from the average's own provenance.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.errors import SelectionError, printable
from ckptavg.merge.weights import Weights
from ckptavg.select.compare import fingerprints
from ckptavg.select.order import in_order
from ckptavg.select.sources import Collection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ckptavg.merge.plan import Plan
    from ckptavg.select.collect import Survey
    from ckptavg.select.sources import Source
    from ckptavg.summary import Variant

_FEWEST_BITS = 32
_UNIFORM = ("uniform", "greedy soup")


@dataclass(frozen=True)
class Base:
    """An average made earlier.

    Attributes:
        source: its file.
        members: what its provenance says of the checkpoints in it.
        others: the checkpoints that are to be folded in.
    """

    source: Source
    members: tuple[dict[str, Any], ...]
    others: Survey

    @property
    def files(self) -> frozenset[Path]:
        """Its files, one of which may be the output."""
        return frozenset(part.path for part in self.source.checkpoint.parts)

    def refuse_member(self, other: Source) -> None:
        """Refuse a checkpoint that is in it already, by what it holds.

        Raises:
            SelectionError: it is.
        """
        tensors = self.others.references[self.others.models[other]].tensors
        own = fingerprints(Collection(tensors, (other,), order_is_known=True))[other]
        for member in self.members:
            if member.get("content") == own:
                name = printable(member.get("name"))
                raise SelectionError(
                    f"has {printable(other.path)} in it already, as {name}",
                    path=self.source.path,
                    remedy="leave it out",
                )

    def is_newer_than(self, other: Source) -> bool:
        """Whether its newest member was saved after a checkpoint, as far as steps are recorded."""
        step = other.checkpoint.step
        steps = [member.get("step") for member in self.members]
        return step is not None and any(
            isinstance(one, list) and one[0] == step[0] and one[1] > step[1] for one in steps
        )

    def check(self, plan: Plan) -> None:
        """Refuse what a rounded average cannot be.

        Raises:
            SelectionError: its floats have 16 bits: each update would round them again.
        """
        for planned in plan.tensors:
            if planned.role == "averaged" and planned.tensor.dtype.bits < _FEWEST_BITS:
                name = printable(planned.output.names[0])
                raise SelectionError(
                    f"has {planned.tensor.dtype.name} in it ({name}), which each update would "
                    "round again",
                    path=self.source.path,
                    remedy="average all checkpoints at once",
                )


def find_base(found: Survey, unwanted: Callable[[str], str | None]) -> Base:
    """The one earlier average among the checkpoints.

    Args:
        found: all of the inputs.
        unwanted: why a checkpoint of that name is not to be folded in, if it is not.

    Raises:
        SelectionError: there is none or several, or it is not uniform.
    """
    averages = [source for source in found.sources if source.checkpoint.is_average]
    if len(averages) != 1:
        raise SelectionError(
            f"--update needs one average made earlier among its inputs, and there are "
            f"{len(averages)}",
            remedy="name it: ckptavg average SWA NEW... --update -o OUTPUT",
        )
    [source] = averages
    members = _members(source)
    others = [
        other
        for other, name in zip(found.sources, found.labels(), strict=True)
        if other is not source and unwanted(name) is None
    ]
    if not others:
        raise SelectionError("there is nothing to fold into it", path=source.path)
    ordered, known = in_order(others)
    return Base(
        source,
        members,
        dataclasses.replace(found, sources=tuple(ordered), order_is_known=known),
    )


def _members(source: Source) -> tuple[dict[str, Any], ...]:
    entry = source.checkpoint.provenance or {}
    scheme, members = entry.get("scheme"), entry.get("sources")
    if scheme not in _UNIFORM or not isinstance(members, list) or not members:
        raise SelectionError(
            f"is no uniform average ({printable(scheme)}), which alone can be updated",
            path=source.path,
        )
    if entry.get("divisor") != len(members):
        raise SelectionError("is no mean: its provenance has another divisor", path=source.path)
    for member in members:
        if not isinstance(member, dict) or member.get("weight") != 1:
            raise SelectionError("is no mean: its provenance has other weights", path=source.path)
    return tuple(members)


def fold(base: Base, new: Variant) -> Variant:
    """The average and the new checkpoints, each checkpoint with one share.

    The average stands where its newest member would: of what is taken from the last checkpoint,
    it has that one's.

    Args:
        base: the average.
        new: the checkpoints to fold in.

    Raises:
        SelectionError: one of them is in it already.
    """
    for source in new.sources:
        base.refuse_member(source)
    count = len(base.members)
    place = sum(base.is_newer_than(source) for source in new.sources)
    sources, names, values = [*new.sources], [*new.names], [1.0] * len(new.sources)
    sources.insert(place, base.source)
    names.insert(place, base.source.path.name)
    values.insert(place, float(count))
    weights = Weights("uniform", tuple(values), float(count + len(new.sources)))
    return dataclasses.replace(
        new, sources=tuple(sources), names=tuple(names), weights=weights, needs_order=False
    )


def folded_sources(
    base: Base, variant: Variant, sources: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What the updated average says of its sources: all checkpoints, with equal shares.

    Args:
        base: the average.
        variant: it and the new ones.
        sources: what is to be said of each of these.
    """
    pairs = zip(variant.sources, sources, strict=True)
    new = [entry for source, entry in pairs if source is not base.source]
    every = [*base.members, *new]
    steps = [entry.get("step") for entry in every]
    if all(isinstance(step, list) and step[0] == (steps[0] or [""])[0] for step in steps):
        every.sort(key=lambda entry: int(entry["step"][1]))
    return [{**entry, "weight": 1.0} for entry in every]
