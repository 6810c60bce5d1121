"""What an average is made of: its provenance, and the summary that the caller gets.

The provenance is one entry of JSON in the metadata of an output, under the key `ckptavg`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg import __version__
from ckptavg.formats.paths import shown
from ckptavg.merge.jobs import REMOTE
from ckptavg.merge.record import Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.jobs import Layout
    from ckptavg.merge.plan import Plan
    from ckptavg.merge.recipe import Recipe

Digests = str | dict[str, str]
"""SHA-256 of a checkpoint's file, or of each of its files by name, in hex."""


def encode_provenance(entry: Mapping[str, Any]) -> str:
    """The entry as JSON: the same text for the same facts."""
    return json.dumps(entry, separators=(",", ":"), sort_keys=True)


def provenance(
    plan: Plan,
    recipe: Recipe,
    options: Mapping[str, Any],
    fingerprints: Mapping[Checkpoint, str],
    hashes: Mapping[Checkpoint, Digests],
) -> dict[str, Any]:
    """The entry of one of the outputs of a plan. It has no absolute paths and no times.

    Args:
        plan: of all outputs.
        recipe: what the output is made of.
        options: those that the values depend on, where they are not the defaults.
        fingerprints: of the members' weights; empty to leave them out.
        hashes: SHA-256 of the members' files; empty to leave them out.
    """
    entry = {
        "version": __version__,
        "scheme": recipe.scheme,
        "sources": source_entries(recipe, fingerprints, hashes),
        "divisor": recipe.weights.divisor,
        "options": options,
        "roles": plan.counts,
        "selection": dict(recipe.rules),
        "norm_stats": plan.norm_stats(recipe),
        **recipe.notes,
    }
    return {name: value for name, value in entry.items() if value not in ({}, None)}


def carried_on(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The provenance of a checkpoint, for an output that has its tensors alone; None without one.

    Where several state dicts were averaged in one go, it names those that the output has.
    """
    entry = checkpoint.provenance
    match entry:
        case {"key": str()} | None:
            return entry
        case {"key": [*names]} | {"sources": [*_, {"key": [*names]}]}:
            kept = [checkpoint.key] if isinstance(checkpoint.key, str) else list(checkpoint.key)
            if set(kept) != set(names):
                return {**entry, "key": checkpoint.key}
    return entry


def source_entries(
    recipe: Recipe,
    fingerprints: Mapping[Checkpoint, str] | None = None,
    hashes: Mapping[Checkpoint, Digests] | None = None,
) -> list[dict[str, Any]]:
    """What is said of each member. An earlier average is replaced by its own members."""
    fingerprints, hashes = fingerprints or {}, hashes or {}
    names, entries = recipe.names, list[dict[str, Any]]()
    for member, weight in zip(recipe.members, recipe.weights.values, strict=True):
        if member is recipe.base:
            continue
        entry = {
            "name": names[member.path],
            "bytes": member.size,
            "header_sha256": member.digest,
            "key": member.key,
            "content": fingerprints.get(member),
            "sha256": hashes.get(member),
            "step": list(member.step) if member.step else None,
        }
        entries.append({k: value for k, value in entry.items() if value} | {"weight": weight})
    if recipe.base is not None:
        entries = [*Record.of(recipe.base).members, *entries]
        steps = [entry.get("step") for entry in entries]
        if all(isinstance(step, list) and step[0] == (steps[0] or [""])[0] for step in steps):
            entries.sort(key=lambda entry: int(entry["step"][1]))
    return entries


# Measured: an interpreter with numpy and ml_dtypes, and the buffers of a thread.
_BASE_MEMORY = 38 << 20
_THREAD_MEMORY = 5 << 20
_TENSOR_MEMORY = 1500
_OUTPUT_MEMORY = 8 * 64 * 1024  # the sum of a chunk for each further output


@dataclass(frozen=True)
class SourceSummary:
    """A member of an average.

    Attributes:
        name: its path below the folder that all members have in common.
        path: its path.
        bytes: size of its files.
        digest: SHA-256 of what describes its tensors (header or pickle), in hex.
        weight: its weight divided by the divisor.
        step: its recorded place in the training, such as `("global_step", 500)`.
        sha256: of its file, or of each of its files by name; None where they were not hashed.
    """

    name: str
    path: str
    bytes: int
    digest: str
    weight: float
    step: tuple[str, int] | None
    sha256: Digests | None = None


@dataclass(frozen=True)
class Summary:
    """What an average is made of, or would be.

    Attributes:
        output: the file or directory.
        written: whether it was written (False after a dry run).
        scheme: of the weights.
        sources: the members, in the order of training.
        emulated_decay: the decay of the learning rate that the weights emulate: for each member
            the sum of the weights from that member on, divided by the divisor.
        tensors: the number of tensors in the output; tied tensors count once.
        roles: the number of tensors that are `averaged`, the `last` checkpoint's, `kept` or
            `joined`.
        norm_stats: `none` where the model has no running statistics; `stale` in an average of
            several members, `frozen` if all of them have the same statistics; `refreshed` or
            `partly refreshed` after a refresh; else the state of the only member's statistics.
        bytes_read: bytes of tensors that are read, for all outputs of the command.
        bytes_written: bytes of the output.
        memory: bytes of memory at the peak, an estimate.
        advice: of a dry run, what the checkpoints record and what it means for their average.
    """

    output: str
    written: bool
    scheme: str
    sources: tuple[SourceSummary, ...]
    emulated_decay: tuple[float, ...]
    tensors: int
    roles: dict[str, int]
    norm_stats: str
    bytes_read: int
    bytes_written: int
    memory: int
    advice: tuple[str, ...] = ()


def summarise(
    plan: Plan,
    recipe: Recipe,
    layout: Layout,
    *,
    written: bool,
    threads: int,
    hashes: Mapping[Checkpoint, Digests],
) -> Summary:
    """The summary of one of the outputs of a plan.

    Args:
        plan: of all outputs.
        recipe: what the output is made of.
        layout: of the output.
        written: False after a dry run.
        threads: how many threads share the work.
        hashes: SHA-256 of the members' files, if they were hashed.
    """
    weights, names = recipe.weights, recipe.names
    chunks = REMOTE if any(member.is_remote for member in plan.members) else 1
    sources = tuple(
        SourceSummary(
            names.get(member.path, member.path.name), shown(member.path), member.size,
            member.digest, value / weights.divisor, member.step, hashes.get(member),
        )
        for member, value in zip(recipe.members, weights.values, strict=True)
    )  # fmt: skip
    return Summary(
        output=str(layout.path),
        written=written,
        scheme=recipe.scheme,
        sources=sources,
        emulated_decay=weights.emulated_decay,
        tensors=len(plan.tensors),
        roles=plan.counts,
        norm_stats=plan.norm_stats(recipe)["state"],
        bytes_read=plan.bytes_to_read,
        bytes_written=layout.size,
        memory=_BASE_MEMORY
        + threads * chunks * (_THREAD_MEMORY + (len(plan.weights) - 1) * _OUTPUT_MEMORY)
        + len(plan.tensors) * _TENSOR_MEMORY
        + plan.largest_strided,
    )
