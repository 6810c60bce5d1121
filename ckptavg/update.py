"""Fold further checkpoints into a uniform average that was made earlier.

`(n * average + x_1 + ... + x_m) / (n + m)`, with n from the average's own provenance.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.errors import SelectionError, printable
from ckptavg.order import in_order
from ckptavg.summary import Variant
from ckptavg.weights import Weights

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.collect import Survey
    from ckptavg.plan import Plan
    from ckptavg.sources import Source

_FEWEST_BITS = 32


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


def find_base(found: Survey) -> Base:
    """The one earlier average among the checkpoints.

    Raises:
        SelectionError: there is none or several, it is not uniform, or has one of the others in
            it already.
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
    others = [other for other in found.sources if other is not source]
    if not others:
        raise SelectionError("there is nothing to fold into it", path=source.path)
    for other in others:
        _refuse_member(source, members, other)
    ordered, known = in_order(others)
    return Base(
        source, members, dataclasses.replace(found, sources=tuple(ordered), order_is_known=known)
    )


def _members(source: Source) -> tuple[dict[str, Any], ...]:
    entry = source.checkpoint.provenance or {}
    scheme, members = entry.get("scheme"), entry.get("sources")
    if scheme != "uniform" or not isinstance(members, list) or not members:
        raise SelectionError(
            f"is no uniform average ({printable(scheme)}), which alone can be updated",
            path=source.path,
        )
    if not all(isinstance(member, dict) for member in members):
        raise SelectionError("does not say what it is made of", path=source.path)
    return tuple(members)


def _refuse_member(source: Source, members: tuple[dict[str, Any], ...], other: Source) -> None:
    checkpoint = other.checkpoint
    for member in members:
        name = str(member.get("name", ""))
        if (
            name.rpartition("/")[2] == other.path.name
            and member.get("bytes") == checkpoint.size
            and member.get("header_sha256") == checkpoint.digest
        ):
            raise SelectionError(
                f"has {printable(name)} in it already", path=source.path, remedy="leave it out"
            )


def fold(base: Base, new: Variant) -> Variant:
    """The average and the new checkpoints, each checkpoint with one share.

    Args:
        base: the average.
        new: the checkpoints to fold in, uniform.
    """
    count = len(base.members)
    values = (float(count), *new.weights.values)
    name = base.source.path.name
    weights = Weights("uniform", values, count + new.weights.divisor)
    return Variant(new.label, (base.source, *new.sources), (name, *new.names), weights)


def folded_sources(base: Base, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the updated average says of its sources: all checkpoints, with equal shares."""
    count = len(base.members) + len(sources) - 1
    return [{**entry, "weight": 1 / count} for entry in (*base.members, *sources[1:])]
