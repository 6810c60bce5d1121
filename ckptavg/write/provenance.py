"""What an average says of itself in its metadata: one entry of JSON, under the key `ckptavg`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg import __version__
from ckptavg.errors import SelectionError, VerificationError, printable
from ckptavg.merge.options import AverageOptions
from ckptavg.merge.update import recorded_members
from ckptavg.merge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.recipe import Recipe

Digests = str | dict[str, str]
"""SHA-256 of a checkpoint's file, or of each of its files by name, in hex."""


def encode_provenance(entry: Mapping[str, Any]) -> str:
    """The entry as JSON: the same text for the same facts."""
    return json.dumps(entry, separators=(",", ":"), sort_keys=True)


def provenance(
    recipe: Recipe,
    *,
    norm_stats: Mapping[str, Any],
    roles: Mapping[str, int],
    options: Mapping[str, Any],
    fingerprints: Mapping[Checkpoint, str],
    hashes: Mapping[Checkpoint, Digests],
) -> dict[str, Any]:
    """The entry of an average. It has no absolute paths and no times.

    Args:
        recipe: what the average is made of.
        norm_stats: the entry on the norm statistics, with their state.
        roles: the number of tensors with each role.
        options: those that the values depend on, where they are not the defaults.
        fingerprints: of the members' weights; empty to leave them out.
        hashes: SHA-256 of the members' files; empty to leave them out.
    """
    entry = {
        "version": __version__,
        "scheme": recipe.weights.scheme,
        "sources": source_entries(recipe, fingerprints, hashes),
        "divisor": recipe.weights.divisor,
        "options": dict(options),
        "roles": dict(roles),
        "selection": dict(recipe.rules),
        "norm_stats": dict(norm_stats),
    }
    return {name: value for name, value in entry.items() if value not in ({}, None)}


def source_entries(
    recipe: Recipe,
    fingerprints: Mapping[Checkpoint, str] | None = None,
    hashes: Mapping[Checkpoint, Digests] | None = None,
) -> list[dict[str, Any]]:
    """What is said of each member. An earlier average is replaced by its own members."""
    fingerprints, hashes = fingerprints or {}, hashes or {}
    entries: list[dict[str, Any]] = []
    for name, member, weight in zip(
        recipe.names, recipe.members, recipe.weights.values, strict=True
    ):
        if member is recipe.base:
            continue
        entry = {
            "name": name,
            "bytes": member.size,
            "header_sha256": member.digest,
            "key": member.key,
            "content": fingerprints.get(member),
            "sha256": hashes.get(member),
            "step": list(member.step) if member.step else None,
        }
        entries.append({k: value for k, value in entry.items() if value} | {"weight": weight})
    if recipe.base is not None:
        entries = [*recorded_members(recipe.base), *entries]
        steps = [entry.get("step") for entry in entries]
        if all(isinstance(step, list) and step[0] == (steps[0] or [""])[0] for step in steps):
            entries.sort(key=lambda entry: int(entry["step"][1]))
    return entries


@dataclass(frozen=True)
class Record:
    """The provenance of an average, read back and checked.

    Attributes:
        path: the average.
        scheme: of its weights; `none` for a copy with refreshed norm statistics.
        members: what is recorded of each member.
        weights: of the members.
        options: the options that its values depend on.
        version: of the ckptavg that made it.
        is_refreshed: whether its norm statistics come from data.
    """

    path: Path
    scheme: str
    members: tuple[dict[str, Any], ...]
    weights: Weights
    options: AverageOptions
    version: str
    is_refreshed: bool

    @staticmethod
    def of(average: Checkpoint) -> Record:
        """Read the provenance of an average.

        Raises:
            VerificationError: there is none, or it is damaged.
        """
        entry = average.provenance
        if entry is None:
            raise VerificationError("was not made by ckptavg", path=average.path)
        damaged = VerificationError("has a damaged provenance", path=average.path)
        members, state = entry.get("sources"), entry.get("norm_stats", {})
        divisor, options = entry.get("divisor"), entry.get("options", {})
        if (
            not isinstance(members, list)
            or not members
            or not all(map(_is_member, members))
            or not _is_number(divisor)
            or not divisor
            or not isinstance(state, dict)
            or not isinstance(options, dict)
        ):
            raise damaged
        try:
            checked = AverageOptions(**options)
        except (SelectionError, TypeError) as error:
            raise damaged from error
        if checked.recorded != options:
            raise damaged
        scheme = str(entry.get("scheme"))
        weights = Weights(scheme, tuple(member["weight"] for member in members), float(divisor))
        return Record(
            average.path, scheme, tuple(members), weights, checked, str(entry.get("version")),
            state.get("state") == "refreshed",
        )  # fmt: skip

    @property
    def key(self) -> str:
        """The state dict of the last member that was averaged; empty for the whole file."""
        key: str = self.members[-1].get("key") or ""
        return key

    @property
    def is_copy(self) -> bool:
        """Whether it is a checkpoint with refreshed norm statistics, and no average."""
        return self.scheme == "none"

    @property
    def is_update(self) -> bool:
        """Whether it was made from an earlier average."""
        return self.options.update

    @property
    def remedy(self) -> str | None:
        """What to say where a value differs."""
        if self.version == __version__:
            return None
        return f"it was made by ckptavg {printable(self.version)}, and this is {__version__}"


def _is_member(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("header_sha256"), str)
        and isinstance(entry.get("content"), str | None)
        and isinstance(entry.get("key"), str | None)
        and isinstance(entry.get("sha256"), str | dict | None)
        and _is_number(entry.get("weight"))
        and entry["weight"] != 0
    )


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, float | int):
        return False
    return abs(value) <= sys.float_info.max
