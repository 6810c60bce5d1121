"""The provenance of an average, read back: its members, their weights and the options."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg import __version__
from ckptavg.errors import SelectionError, VerificationError, printable
from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.merge.recipe import COPY, AverageOptions
from ckptavg.merge.weights import Weights, explicit

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.statedict import Key


@dataclass(frozen=True)
class Record:
    """The provenance of an average, read back and checked.

    Attributes:
        path: the average.
        scheme: the scheme of its weights; `none` for a copy with refreshed norm statistics.
        members: the entry of each member.
        weights: the weights of the members.
        options: the options that its values depend on.
        version: the version of ckptavg that made it.
        kept: of several state dicts that were averaged in one go, those that it has; None for all.
        is_refreshed: whether its norm statistics come from data.
    """

    path: Path
    scheme: str
    members: tuple[dict[str, Any], ...]
    weights: Weights
    options: AverageOptions
    version: str
    kept: tuple[str, ...] | None
    is_refreshed: bool

    @staticmethod
    def of(average: Checkpoint) -> Record:
        """Read the provenance of an average.

        Raises:
            VerificationError: there is none, or it is damaged.
        """
        entry = average.provenance
        if PROVENANCE not in average.metadata:
            raise VerificationError("was not made by ckptavg", path=average.path)
        damaged = VerificationError("has a damaged provenance", path=average.path)
        if entry is None:
            raise damaged
        members, state = entry.get("sources"), entry.get("norm_stats", {})
        divisor, options = entry.get("divisor"), entry.get("options", {})
        if (
            not isinstance(members, list)
            or not members
            or not all(map(_is_member, members))
            or not _is_number(divisor)
            or not divisor
            or not isinstance(options, dict)
        ):
            raise damaged
        try:
            checked = AverageOptions(**options)
            numbers = explicit([each["weight"] for each in members], len(members), normalize=False)
        except (SelectionError, TypeError) as error:
            raise damaged from error
        if checked.recorded != options:
            raise damaged
        scheme = str(entry.get("scheme"))
        weights = replace(numbers, divisor=float(divisor))
        return Record(
            average.path, scheme, tuple(members), weights, checked, str(entry.get("version")),
            _names_of(entry.get("key")), state.get("state") in ("refreshed", "partly refreshed"),
        )  # fmt: skip

    @property
    def key(self) -> str | tuple[str, ...]:
        """The key of the last member's state dict, or of several; empty for the whole file."""
        return key_of(self.members[-1]) or ""

    @property
    def is_copy(self) -> bool:
        """Whether it is a copy of one checkpoint with refreshed norm statistics."""
        return self.scheme == COPY

    @property
    def remedy(self) -> str | None:
        """A possible reason why values differ: another version of ckptavg."""
        if self.version == __version__:
            return None
        return f"it was made by ckptavg {printable(self.version)}, and this is {__version__}"


def key_of(member: dict[str, Any]) -> Key:
    """The state dict of a member, or those of several; None for the whole file."""
    key = member.get("key")
    return tuple(key) if isinstance(key, list) else key


def _is_member(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("header_sha256"), str)
        and isinstance(entry.get("content"), str | None)
        and isinstance(entry.get("sha256"), str | dict | None)
        and _is_step(entry.get("step"))
        and _is_number(entry.get("weight"))
        and entry["weight"] != 0
    )


def _names_of(key: str | list[str] | None) -> tuple[str, ...] | None:
    return (key,) if isinstance(key, str) else None if key is None else tuple(key)


def _is_step(value: object) -> bool:
    """Whether it is the entry of a step: its unit and its number, or None."""
    match value:
        case [str(), int() | float() as number]:
            return _is_number(number)
    return value is None


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, float | int):
        return False
    return abs(value) <= sys.float_info.max
