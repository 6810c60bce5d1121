"""What an average is made of, for people and for machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptavg.formats.paths import shown
from ckptavg.write.digests import told

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ckptavg.merge.layout import Layout
    from ckptavg.merge.plan import Plan
    from ckptavg.merge.weights import Weights
    from ckptavg.select.sources import Source

# Measured: an interpreter with numpy and ml_dtypes, and one thread's buffers.
_BASE_MEMORY = 38 << 20
_THREAD_MEMORY = 5 << 20
_TENSOR_MEMORY = 1500
# A sum of a chunk for each further output.
_OUTPUT_MEMORY = 8 * 64 * 1024


@dataclass(frozen=True)
class SourceSummary:
    """A checkpoint of the average.

    Attributes:
        name: its path below the folder that all of them have in common.
        path: its path.
        bytes: size of its files.
        digest: SHA-256 of what describes its tensors, in hex.
        weight: its share: of the sum of the weights, where these are normalised.
        step: what it records of its place in the training, such as `("global_step", 500)`.
        sha256: of its file, or of each of its files by name; None where they were not hashed.
    """

    name: str
    path: str
    bytes: int
    digest: str
    weight: float
    step: tuple[str, int] | None
    sha256: str | dict[str, str] | None = None


@dataclass(frozen=True)
class Summary:
    """What an average is made of, or would be.

    Attributes:
        output: the file or directory.
        written: whether it was written (False after a dry run).
        scheme: of the weights.
        sources: the checkpoints, in order of training.
        emulated_decay: the decay of the learning rate that the weights emulate: for each source
            the share of those from it on.
        tensors: number of tensors in the output, tied ones once.
        roles: how many of them were `averaged`, are the `last` checkpoint's, or were `kept`.
        norm_stats: state of the running statistics: `none` if there are none, `stale` in an
            average. A copy of one checkpoint has that checkpoint's state: of one of our outputs
            what it records, of others `kept`.
        bytes_read: bytes of tensors that are read, for all outputs that are made at once.
        bytes_written: bytes of the output.
        memory: bytes of memory at the peak, an estimate.
        sha256: of its tensors (see `docs/reliability.md`); None where they were not hashed.
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
    sha256: str | None = None


@dataclass(frozen=True)
class Variant:
    """One of the averages that are made from one read.

    Attributes:
        label: what tells it from the others.
        sources: the checkpoints that are its own, in order of training.
        names: their labels.
        weights: one for each of them.
        needs_order: whether these depend on the order of training.
        rules: how the checkpoints were chosen, for the provenance.
    """

    label: str
    sources: tuple[Source, ...]
    names: tuple[str, ...]
    weights: Weights
    needs_order: bool = False
    rules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> Source:
        """The last one with a weight."""
        pairs = zip(self.sources, self.weights.values, strict=True)
        return [source for source, value in pairs if value != 0][-1]


def summarise(
    plan: Plan,
    variant: Variant,
    layout: Layout,
    output: Path,
    *,
    norm_stats: str,
    written: bool,
    threads: int,
    sha256: str | None,
    hashes: Mapping[Path, str],
) -> Summary:
    """Put together what is to be said of one output."""
    weights = variant.weights
    return Summary(
        output=str(output),
        written=written,
        scheme=weights.scheme,
        sources=tuple(
            SourceSummary(
                name,
                shown(source.path),
                source.checkpoint.size,
                source.checkpoint.digest,
                value / weights.divisor,
                source.checkpoint.step,
                told(source.checkpoint, hashes) if hashes and value else None,
            )
            for name, source, value in zip(
                variant.names, variant.sources, weights.values, strict=True
            )
        ),
        emulated_decay=weights.emulated_decay,
        tensors=len(plan.outputs),
        roles=plan.counts,
        norm_stats=norm_stats,
        bytes_read=plan.bytes_to_read,
        bytes_written=layout.size,
        memory=_BASE_MEMORY
        + threads * (_THREAD_MEMORY + (len(plan.columns) - 1) * _OUTPUT_MEMORY)
        + len(plan.collection.names) * _TENSOR_MEMORY
        + plan.largest_strided,
        sha256=sha256,
    )
