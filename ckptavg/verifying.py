"""Hold an average against the checkpoints that its provenance names: digests, and every bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.errors import VerificationError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import Checkpoint, without_wrappers
from ckptavg.formats.lora_config import CONFIG
from ckptavg.formats.paths import as_path
from ckptavg.formats.pauses import collector_at_rest
from ckptavg.members import check_files, find_members
from ckptavg.merge.lora import is_factor, join
from ckptavg.merge.plan import make_plan
from ckptavg.merge.roles import is_norm_statistic
from ckptavg.options import default_threads
from ckptavg.recomputing import Comparison
from ckptavg.record import Record
from ckptavg.write import digests

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptavg.formats.paths import PathLike
    from ckptavg.merge.plan import Plan, Planned
    from ckptavg.select.sources import Collection
    from ckptavg.write.writing import Progress

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
    hash_progress: Progress | None = None,
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
        hash_progress: hears of the checkpoints' bytes hashed.

    Raises:
        VerificationError: it is not what its provenance says; the first tensor that differs is
            named.
        MismatchError: the checkpoints are not those that it was made of: all differences.
        CkptAvgError: it was not made by ckptavg, or something cannot be read.
    """
    path = as_path(output)
    opened, record = _open(path, key)
    given = [as_path(one) for one in inputs]
    if not given and record.sha256 is None:
        raise VerificationError(
            "has no digest of its own, as --hash records",
            path=path,
            remedy="name the checkpoints that it was made of, and it is made again",
        )
    with collector_at_rest():
        checked, compared, refreshed = 0, 0, 0
        if given:
            collection = find_members(given, record)
            workers = threads or default_threads(collection.sources)
            checked = check_files(collection, record, workers, hash_progress)
            compared, refreshed = _compare(opened, collection, record, workers, progress)
        hashed = _check_digest(opened, record)  # which names no tensor
    return Verification(
        str(output), record.scheme, len(record.members), hashed, checked, compared, refreshed
    )


def _open(path: Path, key: str | None) -> tuple[Checkpoint, Record]:
    """The average, with the names that it was made with, and what it says of itself."""
    opened = open_checkpoint(path, key=key)
    record = Record.of(opened)
    # A container has the average in the place of the last checkpoint's weights.
    if key is None and record.key != opened.key and record.key in opened.other_keys:
        opened = open_checkpoint(path, key=record.key)
    if record.is_container and not record.is_copy:
        opened, _ = without_wrappers(opened, keep_prefix=record.keeps_prefix)
    return opened, record


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


def _compare(
    made: Checkpoint,
    collection: Collection,
    record: Record,
    threads: int,
    progress: Progress | None,
) -> tuple[int, int]:
    """Make the average again, and compare: how many tensors were, and how many were left out."""
    if record.is_updated:
        raise VerificationError(
            "was brought up to date with --update: what was rounded on the way cannot be made again"
            " (its checkpoints are those that it names)",
            path=record.path,
        )
    plan = _plan(collection, record)
    _check_tensors(made, plan, plan.collection.names, record)
    kept = tuple(one for one in plan.tensors if not (record.is_refreshed and _is_of_data(one)))
    comparison = Comparison(made, dataclasses.replace(plan, tensors=kept), remedy=record.remedy)
    comparison.run(threads, progress)
    return len(kept), len(plan.tensors) - len(kept)


def _plan(collection: Collection, record: Record) -> Plan:
    """The plan by which it was made.

    Raises:
        VerificationError: the configuration beside joined LoRA factors is another.
    """
    if record.is_copy:
        return make_plan(collection, [record.weights], roles=["kept"] * len(collection.names))
    joined: frozenset[str] = frozenset()
    if record.is_exact:
        collection, config = join(collection, record.weights, allow_nonfinite=True)
        joined = frozenset(filter(is_factor, collection.names))
        path = record.path / CONFIG
        if record.path.is_dir() and (not path.is_file() or path.read_bytes() != config):
            raise VerificationError("is not what its checkpoints give", path=path)
    return make_plan(
        collection, [record.weights],
        ints=record.ints, norm_stats=record.norm_stats, dtype=record.dtype, joined=joined,
    )  # fmt: skip


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
        for name in one.names:
            if name not in made.tensors:
                # Of tied ones some may have been dropped, if the metadata say which is left.
                if made.metadata.get(name) in made.tensors.keys() & set(one.names):
                    continue
                raise VerificationError("is not in it", path=record.path, tensor=name)
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
