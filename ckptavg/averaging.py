"""Average checkpoints: the whole way from a directory to one file."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from ckptavg import __version__
from ckptavg.checkpoint import PROVENANCE
from ckptavg.collect import Source, collect
from ckptavg.errors import OutputError, SelectionError, printable
from ckptavg.layout import Layout, OutputTensor
from ckptavg.lora import is_factor, is_lora, join
from ckptavg.lora_config import CONFIG
from ckptavg.parts import any_remote
from ckptavg.paths import as_path, is_remote
from ckptavg.plan import Plan, make_plan
from ckptavg.roles import is_norm_statistic
from ckptavg.tensors import BY_NAME
from ckptavg.weights import Weights, explicit, uniform
from ckptavg.writers import Destination, destination, lay_out
from ckptavg.writing import (
    Progress,
    check_output,
    encode_provenance,
    provenance_sources,
    refuse_own_input,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

log = logging.getLogger("ckptavg")

PathLike = str | os.PathLike[str]

# Measured: an interpreter with numpy and ml_dtypes, and one thread's buffers.
_BASE_MEMORY = 38 << 20
_THREAD_MEMORY = 5 << 20
_TENSOR_MEMORY = 1500
# The most that stay within 64 MB.
_MOST_THREADS = 4
_REMOTE_THREADS = 16


@dataclass(frozen=True)
class SourceSummary:
    """A checkpoint of the average.

    Attributes:
        name: its path below the folder that all of them have in common.
        path: its path.
        bytes: size of its files.
        digest: SHA-256 of what describes its tensors, in hex.
        weight: its normalised share.
        step: what it records of its place in the training, such as `("global_step", 500)`.
    """

    name: str
    path: str
    bytes: int
    digest: str
    weight: float
    step: tuple[str, int] | None


@dataclass(frozen=True)
class Summary:
    """What an average is made of, or would be.

    Attributes:
        output: the file.
        written: whether it was written (False after a dry run).
        scheme: of the weights.
        sources: the checkpoints, in order of training.
        tensors: number of tensors in the output, tied ones once.
        roles: how many of them were `averaged`, are the `last` checkpoint's, or were `kept`.
        norm_stats: `none` where the model has no running statistics; else `stale`.
        bytes_read: bytes of tensors that are read.
        bytes_written: bytes of the output.
        memory: bytes of memory at the peak, an estimate.
    """

    output: str
    written: bool
    scheme: str
    sources: tuple[SourceSummary, ...]
    tensors: int
    roles: dict[str, int]
    norm_stats: str
    bytes_read: int
    bytes_written: int
    memory: int


def average(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike,
    *,
    weights: Sequence[float] | None = None,
    key: str | None = None,
    keep_prefix: bool = False,
    drop_aliases: bool = False,
    dtype: str | None = None,
    ints: Literal["equal", "last"] = "equal",
    norm_stats: Literal["average", "last"] = "average",
    lora: Literal["separate", "exact"] = "separate",
    allow_nonfinite: bool = False,
    expect: int | None = None,
    force: bool = False,
    fsync: bool = True,
    container: Literal["weights", "last"] = "weights",
    max_shard_size: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Average checkpoints into one, in memory that does not grow with them.

    Floating tensors are summed in float64, divided once and rounded as `torch.Tensor.to` does;
    integers must agree, but for scalars such as `num_batches_tracked`, which are the last
    checkpoint's. The statistics of norm layers are stale afterwards: see `refresh_norm`.

    Args:
        inputs: a directory of checkpoints, a checkpoint, or several of either; URLs such as
            `s3://bucket/run` as well.
        output: ends with `.safetensors`, or with `.pt`, `.pth`, `.bin`, `.ckpt` or `.tar` for a
            torch file, or with a slash for a directory such as `from_pretrained` takes.
        weights: one for each checkpoint, in order of training; None for the mean.
        key: which state dict to take where a file holds several.
        keep_prefix: leave a wrapper's prefix (`module.`, `_orig_mod.`) on the names.
        drop_aliases: of tied tensors, write one and name the others in the metadata.
        dtype: of the floating tensors in the output, by torch's name; None for the inputs' own.
        ints: `last` takes differing integer tensors from the last checkpoint.
        norm_stats: `last` takes running statistics from the last checkpoint.
        lora: of LoRA adapters, `separate` averages the factors A and B apart, and `exact` their
            products: the ranks then add up, and the output must be a directory.
        allow_nonfinite: let NaN and Inf pass.
        expect: how many checkpoints there must be.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        container: `last` writes the last checkpoint's torch file with all that it holds, and the
            average in the place of its weights; `weights` writes a state dict alone.
        max_shard_size: bytes of tensors in a file of a directory; None for the inputs' own.
        threads: how many work at once; None for the processors that this process may use, 4 at
            most, and for 16 where bytes come over a network.
        dry_run: write nothing, only say what would be done.
        progress: hears of the bytes written.

    Raises:
        CkptAvgError: the checkpoints do not fit together, hold what cannot be averaged, or the
            output cannot be written. Nothing is left behind then.
    """
    _check_options(
        dtype=dtype, ints=ints, norm_stats=norm_stats, threads=threads, container=container,
        max_shard_size=max_shard_size, lora=lora,
    )  # fmt: skip
    one = isinstance(inputs, str | os.PathLike) or is_remote(inputs)
    paths = [as_path(path) for path in cast("Iterable[PathLike]", [inputs] if one else inputs)]
    exact = lora == "exact"
    collection = collect(paths, key=key, keep_prefix=keep_prefix, expect=expect, any_rank=exact)
    count = len(collection.sources)
    column = uniform(count) if weights is None else explicit(weights, count)
    target = destination(
        output,
        collection.sources[-1].checkpoint,
        container=container,
        max_shard_size=max_shard_size,
    )
    if count == 1:
        name = printable(collection.labels()[0])
        log.warning("only one checkpoint: the output is a copy of %s", name)
    replaced: dict[str, bytes] = {}
    if exact:
        if target.kind != "directory":
            raise OutputError(
                "the ranks add up, and a file of weights alone does not say so",
                path=target.path,
                remedy="let the output be a directory: end its name with a slash",
            )
        collection, replaced[CONFIG] = join(collection, column, allow_nonfinite=allow_nonfinite)
    elif count > 1 and is_lora(collection.names):
        log.warning(
            "averaging the factors A and B of LoRA adapters apart is not averaging their products; "
            "--lora exact does"
        )
    plan = make_plan(
        collection,
        column,
        ints=ints,
        norm_stats=norm_stats,
        dtype=BY_NAME[dtype] if dtype else None,
        joined=frozenset(filter(is_factor, collection.names)) if exact else frozenset(),
    )
    layout = _layout(plan, column, target, replaced, drop_aliases=drop_aliases)
    try:
        refuse_own_input(target.path, collection.files)
        check_output(target.path, layout, force=force)
    except OutputError as error:
        if not dry_run:
            raise
        log.warning("it would fail: %s", error)
    workers = threads or default_threads(plan.used)
    if not dry_run:
        write(
            plan, layout, target.path,
            force=force, fsync=fsync, threads=workers, allow_nonfinite=allow_nonfinite,
            progress=progress,
        )  # fmt: skip
    return _summary(plan, layout, column, target.path, written=not dry_run, threads=workers)


def _check_options(
    *,
    dtype: str | None,
    ints: str,
    norm_stats: str,
    threads: int | None,
    container: str,
    max_shard_size: int | None,
    lora: str,
) -> None:
    """Refuse values that no option has.

    Raises:
        SelectionError: the first of them.
    """
    if dtype is not None and (dtype not in BY_NAME or BY_NAME[dtype].kind != "float"):
        raise SelectionError(f"unknown floating dtype {dtype!r}")
    for option, value, known in (
        ("ints", ints, ("equal", "last")),
        ("norm_stats", norm_stats, ("average", "last")),
        ("container", container, ("weights", "last")),
        ("lora", lora, ("separate", "exact")),
    ):
        if value not in known:
            raise SelectionError(f"{option} is {known[0]!r} or {known[1]!r}, not {value!r}")
    if threads is not None and threads < 1:
        raise SelectionError(f"at least 1 thread is needed, not {threads}")
    if max_shard_size is not None and max_shard_size < 1:
        raise SelectionError(f"a shard has at least 1 byte, not {max_shard_size}")
    if container == "last" and dtype is not None:
        raise SelectionError("the last checkpoint's container keeps its dtypes: leave dtype out")
    if container == "last" and max_shard_size is not None:
        raise SelectionError("the last checkpoint's container is one file: no shards")


def default_threads(sources: Iterable[Source] = ()) -> int:
    """The processors that this process may use, if they are not too many.

    Bytes that come over a network are waited for: then it is many, whatever the processors.
    """
    if any(any_remote(source.checkpoint.parts) for source in sources):
        return _REMOTE_THREADS
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    return min(os.cpu_count() or 1, _MOST_THREADS)


def _layout(
    plan: Plan,
    weights: Weights,
    target: Destination,
    replaced: dict[str, bytes],
    *,
    drop_aliases: bool,
) -> Layout:
    """The output's layout with its provenance in it."""
    last = plan.used[-1].checkpoint
    metadata = {"format": "pt"} | dict(last.metadata)
    outputs = plan.outputs
    if drop_aliases and target.kind in ("safetensors", "directory"):
        metadata |= {alias: one.names[0] for one in outputs for alias in one.names[1:]}
        outputs = tuple(
            OutputTensor(one.names[:1], one.dtype, one.shape, one.nbytes) for one in outputs
        )
    metadata[PROVENANCE] = encode_provenance(
        {
            "version": __version__,
            "scheme": weights.scheme,
            "sources": provenance_sources(plan.collection, weights),
            "roles": plan.counts,
            **({"key": last.key} if last.key else {}),
            "norm_stats": {"state": _norm_state(plan)},
        }
    )
    return lay_out(target, outputs, metadata, last, places=plan.places_in_last, replaced=replaced)


def _norm_state(plan: Plan) -> str:
    return "stale" if any(is_norm_statistic(name) for name in plan.collection.names) else "none"


def _summary(
    plan: Plan, layout: Layout, weights: Weights, output: Path, *, written: bool, threads: int
) -> Summary:
    sources = tuple(
        SourceSummary(
            label,
            str(source.path),
            source.checkpoint.size,
            source.checkpoint.digest,
            value / weights.divisor,
            source.checkpoint.step,
        )
        for label, source, value in zip(
            plan.collection.labels(),
            plan.collection.sources,
            weights.values,
            strict=True,
        )
    )
    return Summary(
        output=str(output),
        written=written,
        scheme=weights.scheme,
        sources=sources,
        tensors=len(plan.outputs),
        roles=plan.counts,
        norm_stats=_norm_state(plan),
        bytes_read=plan.bytes_to_read,
        bytes_written=layout.size,
        memory=_BASE_MEMORY
        + threads * _THREAD_MEMORY
        + len(plan.collection.names) * _TENSOR_MEMORY
        + plan.largest_strided,
    )
