"""Find again the checkpoints that an average was made of, and hold them against what it says."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.errors import CkptAvgError, MismatchError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import without_wrappers
from ckptavg.formats.paths import absolute
from ckptavg.select.collect import gather
from ckptavg.select.compare import fingerprints
from ckptavg.select.discover import find
from ckptavg.select.sources import Collection
from ckptavg.write import digests

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.record import Record
    from ckptavg.write.writing import Progress


@dataclass(frozen=True)
class _Found:
    """What is there under the name of a member.

    Attributes:
        checkpoint: it, opened; None where it cannot be.
        difference: why it is not the member; empty if it is.
    """

    checkpoint: Checkpoint | None
    difference: str


def find_members(inputs: Sequence[Path], record: Record) -> Collection:
    """The checkpoints that an average was made of, in its order.

    They are told by the ends of their paths, and of several with one name by what they hold. One
    checkpoint stands for one member.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        record: what the average says.

    Raises:
        MismatchError: they are not among the inputs, or are others by now: all of them.
    """
    by_name: defaultdict[str, list[Path]] = defaultdict(list)
    for path, _ in find(inputs):
        by_name[absolute(path).name].append(path)
    checkpoints, faults = [], []
    taken: set[Path] = set()
    # Longer names first: `a/model.safetensors` is called `model.safetensors` as well.
    order = sorted(range(len(record.members)), key=lambda one: -len(record.members[one]["name"]))
    found: dict[int, Checkpoint] = {}
    for number in order:
        entry = record.members[number]
        paths = [
            path
            for path in by_name[entry["name"].rpartition("/")[2]]
            if path not in taken and _is_called(path, entry["name"])
        ]
        candidates = {path: _look(path, entry, record) for path in paths}
        right = next((path for path in paths if not candidates[path].difference), None)
        checkpoint = None if right is None else candidates[right].checkpoint
        if right is not None and checkpoint is not None:
            taken.add(right)
            found[number] = checkpoint
        elif paths:
            faults.append((number, f"{printable(paths[0])}: {candidates[paths[0]].difference}"))
        else:
            faults.append((number, f"{printable(entry['name'])}: is not among the inputs"))
    if faults:
        raise _mismatch(record, [fault for _, fault in sorted(faults)])
    checkpoints = [found[number] for number in range(len(record.members))]
    return gather(checkpoints, any_rank=record.is_exact)


def _mismatch(record: Record, faults: Sequence[str]) -> MismatchError:
    return MismatchError(f"not the checkpoints that {printable(record.path)} was made of:", faults)


def _is_called(path: Path, name: str) -> bool:
    return f"/{absolute(path).as_posix()}".endswith(f"/{name}")


def _look(path: Path, entry: dict[str, Any], record: Record) -> _Found:
    try:
        opened = open_checkpoint(path, key=entry.get("key"))
    except CkptAvgError as error:
        return _Found(None, error.message)
    if not record.is_copy:
        opened, _ = without_wrappers(opened, keep_prefix=record.keeps_prefix)
    return _Found(opened, _difference(opened, entry))


def _difference(checkpoint: Checkpoint, entry: dict[str, Any]) -> str:
    """Why a checkpoint is not the one that is recorded; empty if it may be."""
    if checkpoint.size != entry["bytes"]:
        return f"has {checkpoint.size} bytes, and had {entry['bytes']}"
    if checkpoint.digest != entry["header_sha256"]:
        return "has another header than it had"
    if entry.get("content") is not None:
        collection = Collection.of_one(checkpoint)
        if fingerprints(collection)[collection.sources[0]] != entry["content"]:
            return "has other values than it had"
    return ""


def check_files(
    collection: Collection, record: Record, threads: int, progress: Progress | None
) -> int:
    """How many of the checkpoints have the SHA-256 that was recorded: all for which one was.

    Raises:
        MismatchError: some have another: all of these.
    """
    pairs = [
        (source.checkpoint, entry["sha256"])
        for source, entry in zip(collection.sources, record.members, strict=True)
        if entry.get("sha256") is not None
    ]
    found = digests.of_files((checkpoint for checkpoint, _ in pairs), threads, progress)
    faults = []
    for checkpoint, wanted in pairs:
        told = digests.told(checkpoint, found)
        if told == wanted:
            continue
        where = printable(checkpoint.path)
        if isinstance(told, dict) and isinstance(wanted, dict):
            names = [name for name in {**told, **wanted} if told.get(name) != wanted.get(name)]
            where += f", {', '.join(map(printable, names))}"
        faults.append(f"{where}: has another SHA-256 than it had")
    if faults:
        raise _mismatch(record, faults)
    return len(pairs)
