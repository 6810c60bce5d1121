"""Hold an average against the checkpoints that its provenance names: digests, and every bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg import digests
from ckptavg.averages import default_threads
from ckptavg.checkpoint import Checkpoint, without_wrappers
from ckptavg.collect import survey
from ckptavg.errors import MismatchError, VerificationError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.lora import is_factor, join
from ckptavg.paths import as_path
from ckptavg.pauses import collector_at_rest
from ckptavg.plan import make_plan
from ckptavg.recomputing import Comparison
from ckptavg.record import Record
from ckptavg.roles import is_norm_statistic
from ckptavg.tensors import BY_NAME
from ckptavg.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptavg.collect import Survey
    from ckptavg.paths import PathLike
    from ckptavg.plan import Plan, Planned
    from ckptavg.sources import Source
    from ckptavg.writing import Progress

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Verification:
    """What was found to be right.

    Attributes:
        output: the average.
        scheme: of its weights.
        sources: how many checkpoints it was made of.
        hashed: whether its tensors have the SHA-256 that was recorded.
        sources_hashed: how many of the checkpoints' files have.
        compared: how many tensors were made again, and are the same in every bit.
        refreshed: how many were not, since they are statistics of data.
    """

    output: str
    scheme: str
    sources: int
    hashed: bool
    sources_hashed: int
    compared: int
    refreshed: int


def verify(
    output: PathLike,
    inputs: Iterable[PathLike] = (),
    *,
    key: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Verify an average.

    Its tensors are held against the digest that `average(hash=True)` recorded in it. Given its
    checkpoints, these are held against what it says of them, and the average is made again and
    compared bit for bit; of a refreshed one the norm statistics are left out.

    Args:
        output: the average.
        inputs: its checkpoints, as they were given to `average`; none for the digest alone.
        key: which state dict of the output is the average, where it holds several.
        threads: how many work at once; None as in `average`.
        progress: hears of the bytes compared.

    Raises:
        VerificationError: it is not what its provenance says; the first tensor that differs is
            named.
        MismatchError: the checkpoints are not those that it was made of: all differences.
        CkptAvgError: it was not made by ckptavg, or something cannot be read.
    """
    path = as_path(output)
    opened = open_checkpoint(path, key=key)
    record = Record.of(opened)
    made, _ = without_wrappers(opened, keep_prefix=bool(record.options.get("keep_prefix")))
    given = [as_path(one) for one in inputs]
    if not given and record.sha256 is None:
        raise VerificationError(
            "has no digest of its own, as --hash records",
            path=path,
            remedy="name the checkpoints that it was made of, and it is made again",
        )
    with collector_at_rest():
        hashed = _check_digest(made, record)
        checked, compared, refreshed = 0, 0, 0
        if given:
            found = survey(
                given, key=record.key, keep_prefix=bool(record.options.get("keep_prefix")),
                any_rank=record.is_exact, wanted=record.unwanted,
            )  # fmt: skip
            sources = _members(path, found, record)
            checked = _check_files(sources, record, threads or default_threads(sources))
            compared, refreshed = _compare(
                made, found, sources, record, threads=threads, progress=progress
            )
    return Verification(
        str(output), record.scheme, len(record.members), hashed, checked, compared, refreshed
    )


def _check_digest(made: Checkpoint, record: Record) -> bool:
    """Whether there is a digest of its tensors, which is theirs."""
    if record.sha256 is None:
        return False
    if digests.of_checkpoint(made) != record.sha256:
        raise VerificationError(
            "its tensors have not the SHA-256 that was recorded when they were written",
            path=record.path,
        )
    return True


def _members(path: Path, found: Survey, record: Record) -> list[Source]:
    """The checkpoints that it was made of, in its order.

    Raises:
        MismatchError: they are not among the inputs, or are others by now.
    """
    sources, faults = [], []
    for entry in record.members:
        named = [source for source in found.sources if _is_called(source, entry["name"])]
        alike = [source for source in named if not _difference(source, entry)]
        if alike or named:
            sources.append((alike or named)[0])
        name = printable(entry["name"])
        if not named:
            faults.append(f"{name}: is not among the inputs")
        elif not alike:
            faults.append(f"{printable(named[0].path)}: {_difference(named[0], entry)}")
    if faults:
        raise MismatchError(f"not the checkpoints that {printable(path)} was made of:", faults)
    return sources


def _is_called(source: Source, name: str) -> bool:
    return f"/{source.path.as_posix()}".endswith(f"/{name}")


def _difference(source: Source, entry: dict[str, Any]) -> str:
    """Why a checkpoint is not the one that is recorded; empty if it may be."""
    if source.checkpoint.size != entry["bytes"]:
        return f"has {source.checkpoint.size} bytes, and had {entry['bytes']}"
    if source.checkpoint.digest != entry["header_sha256"]:
        return "has another header than it had"
    return ""


def _check_files(sources: Sequence[Source], record: Record, threads: int) -> int:
    """How many of the checkpoints have the SHA-256 that was recorded, as all of which one is have.

    Raises:
        MismatchError: some have another.
    """
    pairs = [
        (source.checkpoint, entry["sha256"])
        for source, entry in zip(sources, record.members, strict=True)
        if entry.get("sha256") is not None
    ]
    found = digests.of_files((checkpoint for checkpoint, _ in pairs), threads)
    faults = [
        f"{printable(checkpoint.path)}: has another SHA-256 than it had"
        for checkpoint, wanted in pairs
        if digests.told(checkpoint, found) != wanted
    ]
    if faults:
        where = printable(record.path)
        raise MismatchError(f"not the checkpoints that {where} was made of:", faults)
    return len(pairs)


def _compare(
    made: Checkpoint,
    found: Survey,
    sources: Sequence[Source],
    record: Record,
    *,
    threads: int | None,
    progress: Progress | None,
) -> tuple[int, int]:
    """Make the average again, and compare: how many tensors were, and how many were left out."""
    if record.options.get("update"):
        raise VerificationError(
            "was brought up to date with --update: what was rounded on the way cannot be made again"
            " (its checkpoints are those that it names)",
            path=record.path,
        )
    collection = dataclasses.replace(found.collection(sources), order_is_known=True)
    weights = Weights(
        record.scheme, tuple(entry["weight"] for entry in record.members), record.divisor
    )
    if record.is_exact:
        collection, _ = join(collection, weights, allow_nonfinite=True)
    dtype = record.options.get("dtype")
    plan = make_plan(
        collection,
        [weights],
        ints="last",
        norm_stats=record.options.get("norm_stats", "average"),
        dtype=BY_NAME[dtype] if dtype else None,
        joined=frozenset(filter(is_factor, collection.names) if record.is_exact else ()),
    )
    kept = [one for one in plan.tensors if not (record.is_refreshed and _is_of_data(one))]
    left_out = len(plan.tensors) - len(kept)
    plan = dataclasses.replace(plan, tensors=tuple(kept))
    _check_tensors(made, plan, collection.names, record)
    comparison = Comparison(made, plan, remedy=record.remedy)
    comparison.run(threads or default_threads(plan.used), progress)
    return len(kept), left_out


def _is_of_data(planned: Planned) -> bool:
    """Whether a refresh has written it."""
    name = planned.output.names[0]
    return is_norm_statistic(name) or name.rpartition(".")[2] == _COUNTER


def _check_tensors(made: Checkpoint, plan: Plan, names: Sequence[str], record: Record) -> None:
    """The average has the tensors that it should have, and no others.

    Raises:
        VerificationError: the first one that is missing, or another.
    """
    for one in plan.outputs:
        # Of tied ones some may have been dropped.
        present = [name for name in one.names if name in made.tensors]
        if not present:
            raise VerificationError("is not in it", path=record.path, tensor=one.names[0])
        for name in present:
            tensor = made.tensors[name]
            if (tensor.dtype, tensor.shape) != (one.dtype, one.shape):
                raise VerificationError(
                    f"is {tensor.dtype.name} {list(tensor.shape)} in it, and its checkpoints give "
                    f"{one.dtype.name} {list(one.shape)}",
                    path=record.path, tensor=name, remedy=record.remedy,
                )  # fmt: skip
    for name in sorted(made.tensors.keys() - set(names)):
        raise VerificationError(
            "is in it, and not in its checkpoints", path=record.path, tensor=name
        )
