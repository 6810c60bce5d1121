"""What an average is made of, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.formats.paths import shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.layout import Layout
    from ckptavg.merge.plan import Plan
    from ckptavg.merge.recipe import Recipe
    from ckptavg.write.provenance import Digests

# Measured: an interpreter with numpy and ml_dtypes, and the buffers of a thread.
_BASE_MEMORY = 38 << 20
_THREAD_MEMORY = 5 << 20
_TENSOR_MEMORY = 1500
# The sum of a chunk for each further output.
_OUTPUT_MEMORY = 8 * 64 * 1024


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
            several members; else the state of the only member's statistics.
        bytes_read: bytes of tensors that are read, for all outputs of the command.
        bytes_written: bytes of the output.
        memory: bytes of memory at the peak, an estimate.
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


def summarise(
    plan: Plan,
    number: int,
    recipe: Recipe,
    output: Path,
    layout: Layout,
    *,
    written: bool,
    threads: int,
    hashes: Mapping[Checkpoint, Digests],
) -> Summary:
    """The summary of one of the outputs of a plan.

    Args:
        plan: of all outputs.
        number: of the output.
        recipe: what the output is made of.
        layout: of the output.
        output: its path.
        written: False after a dry run.
        threads: how many threads share the work.
        hashes: SHA-256 of the members' files, if they were hashed.
    """
    weights = recipe.weights
    sources = tuple(
        SourceSummary(
            name, shown(member.path), member.size, member.digest, value / weights.divisor,
            member.step, hashes.get(member),
        )
        for name, member, value in zip(recipe.names, recipe.members, weights.values, strict=True)
    )  # fmt: skip
    return Summary(
        output=str(output),
        written=written,
        scheme=weights.scheme,
        sources=sources,
        emulated_decay=weights.emulated_decay,
        tensors=len(plan.tensors),
        roles=plan.counts,
        norm_stats=plan.norm_stats(number)["state"],
        bytes_read=plan.bytes_to_read,
        bytes_written=layout.size,
        memory=_BASE_MEMORY
        + threads * (_THREAD_MEMORY + (len(plan.weights) - 1) * _OUTPUT_MEMORY)
        + sum(len(planned.output.names) for planned in plan.tensors) * _TENSOR_MEMORY
        + plan.largest_strided,
    )
