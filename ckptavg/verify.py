"""Verify an average: find its members again, average them again, and compare every bit."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.average import write_averages
from ckptavg.errors import (
    CkptAvgError,
    MismatchError,
    OutputError,
    SelectionError,
    VerificationError,
    listed,
    printable,
    without_notices,
)
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import fingerprint, without_wrappers
from ckptavg.formats.lora_config import CONFIG, METADATA
from ckptavg.formats.paths import absolute, as_path, as_paths, is_remote
from ckptavg.formats.statedict import ALL
from ckptavg.formats.tensors import is_norm_state
from ckptavg.merge.engine import default_threads
from ckptavg.merge.names import with_new_weight_norm
from ckptavg.merge.plan import tied_names
from ckptavg.merge.recipe import Recipe
from ckptavg.merge.record import Record, key_of
from ckptavg.select.candidates import find_candidates
from ckptavg.select.run import Run
from ckptavg.write.digests import hash_checkpoints
from ckptavg.write.temporary import temporary_beside

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
    from ckptavg.options import Progress


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    Attributes:
        output: path of the average.
        scheme: the scheme of its weights.
        sources: the number of its members.
        sources_hashed: the number of members whose recorded SHA-256 was checked.
        compared: the number of tensors that were averaged again and are equal in every bit.
        refreshed: the number of tensors that were not compared: refreshed norm statistics.
    """

    output: str
    scheme: str
    sources: int
    sources_hashed: int
    compared: int
    refreshed: int


def verify(
    output: PathLike,
    inputs: Iterable[PathLike],
    *,
    key: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    hash_progress: Progress | None = None,
) -> Verification:
    """Make an average again from its members, and compare every bit.

    The members must have the sizes and digests that the provenance records. They are averaged again
    into a temporary file as large as the output. Refreshed norm statistics are not compared.

    Args:
        output: the average.
        inputs: its members, as they were given to `average`.
        key: name of the averaged state dict in the output, where it holds several.
        threads: how many threads share the work; None as in `average`.
        progress: called with the bytes averaged since the last call, and with the bytes in all.
        hash_progress: called with the bytes hashed since the last call, and with the bytes in all.

    Raises:
        VerificationError: ckptavg did not make the output, or a tensor differs; it names the
            first one.
        MismatchError: the inputs are not its members; it lists all differences.
        CkptAvgError: a file cannot be read.
    """
    average, record = _open(as_path(output), key)
    paths = as_paths(inputs)
    if not paths:
        names = [member["name"] for member in record.members]
        raise VerificationError(
            f"is compared with the checkpoints that it was made of: {listed(names)}",
            path=average.path,
            remedy="name them, or their directory, as well: it does not record where they are",
        )
    members = _find_members(paths, record)
    hashed = _check_hashes(members, record, threads, hash_progress)
    if record.options.update:
        raise VerificationError(
            "was made with update from an earlier average, whose rounding cannot be repeated "
            "(its members are those that it records)",
            path=record.path,
        )
    places = {key: place for place, key in members[-1].models.items()}
    if record.kept is not None:  # one of several state dicts, or some
        if not places.keys() >= set(record.kept):
            problem = "records state dicts that its checkpoints do not have"
            raise VerificationError(problem, path=record.path)
        start = "" if average.has_several_models else places[record.kept[0]]
        average = average.renamed(lambda name: start + name)
    average, *alike = with_new_weight_norm([average, *members])
    groups = tied_names(alike)
    if record.is_copy and not (record.options.dtype or record.options.skip):
        compared, skipped = _compare(average, alike[0], groups, record)
    else:
        with _averaged_again(
            members, record, threads, progress, is_torch=average.container in ("torch", "dcp")
        ) as again:
            is_joined = record.options.lora == "exact"
            if is_joined and again.metadata.get(METADATA) != average.metadata.get(METADATA):
                problem = f"its {METADATA} is not what its members give"
                raise VerificationError(problem, path=average.path)
            kept = tuple(places[key] for key in record.kept) if record.kept is not None else ("",)
            left = [
                [name for name in names if name in again.tensors and name.startswith(kept)]
                for names in groups
            ]
            compared, skipped = _compare(average, again, [*filter(None, left)], record)
    return Verification(str(output), record.scheme, len(record.members), hashed, compared, skipped)


def _open(path: Path, key: str | None) -> tuple[Checkpoint, Record]:
    """The average, with its tensors named as in the members, and its provenance."""
    try:
        average = open_checkpoint(path, key=key)
    except SelectionError as error:
        if key is not None or not error.choices:
            raise
        average = open_checkpoint(path, key=error.choices[0])
    record = Record.of(average)
    # A container has the average in the place of the last member's weights, and a DCP directory
    # has the keys of the last member's.
    if record.kept is not None:
        average = open_checkpoint(path, key=record.kept if len(record.kept) > 1 else key)
    elif isinstance(record.key, tuple):
        average = _open_several(path, record)
    elif key is None and record.key != average.key and record.key in average.other_keys:
        average = open_checkpoint(path, key=record.key)
    keeps_wrappers = record.options.container == "last" or average.container == "dcp"
    if keeps_wrappers and not record.is_copy:
        average, _ = without_wrappers(average, keep_prefix=record.options.keep_prefix)
    return average, record


def _open_several(path: Path, record: Record) -> Checkpoint:
    """The state dicts that were averaged; `skip` may have left out all of one."""
    try:
        return open_checkpoint(path, key=record.key)
    except SelectionError:
        if not record.options.skip:
            raise
        return open_checkpoint(path, key=(ALL,))


def _find_members(inputs: Sequence[Path], record: Record) -> tuple[Checkpoint, ...]:
    """The members of an average, in its order.

    The ends of their paths must be the recorded names. Of several such files, the one with the
    recorded size and digest is used. No checkpoint counts as two members.

    Raises:
        MismatchError: members are missing or have changed; it lists all of them.
    """
    paths_by_name: defaultdict[str, list[Path]] = defaultdict(list)
    for path in find_candidates(inputs):
        paths_by_name[absolute(path).name].append(path)
    members: dict[int, Checkpoint] = {}
    faults: dict[int, str] = {}
    assigned: set[Path] = set()
    # Longer names first: `a/model.safetensors` also ends with `model.safetensors`.
    for number, entry in sorted(enumerate(record.members), key=lambda pair: -len(pair[1]["name"])):
        name = entry["name"]
        paths = [
            path
            for path in paths_by_name[name.rpartition("/")[2]]
            if path not in assigned and f"/{absolute(path).as_posix()}".endswith(f"/{name}")
        ]
        if not paths:
            faults[number] = f"{printable(name)}: is not among the inputs"
        for path in paths:
            try:
                member = _open_member(path, entry, record)
            except CkptAvgError as error:
                faults.setdefault(number, f"{printable(path)}: {error.message}")
            else:
                members[number] = member.sharing(next(iter(members.values()), member))
                assigned.add(path)
                faults.pop(number, None)
                break
    if faults:
        raise _mismatch(record, [fault for _, fault in sorted(faults.items())])
    return tuple(members[number] for number in range(len(record.members)))


def _mismatch(record: Record, faults: Sequence[str]) -> MismatchError:
    return MismatchError(f"not the checkpoints that {printable(record.path)} was made of:", faults)


def _open_member(path: Path, entry: dict[str, Any], record: Record) -> Checkpoint:
    """The checkpoint at a path, if it is as the entry of a member records it.

    Raises:
        VerificationError: it differs.
        CkptAvgError: it cannot be opened.
    """
    member = open_checkpoint(path, key=key_of(entry))
    if not record.is_copy:
        member, _ = without_wrappers(member, keep_prefix=record.options.keep_prefix)
    if member.size != entry["bytes"]:
        raise VerificationError(f"has {member.size} bytes, but had {entry['bytes']}", path=path)
    if member.digest != entry["header_sha256"]:
        raise VerificationError("has another header than recorded", path=path)
    if entry.get("content") not in (None, fingerprint(member)):
        raise VerificationError("has other values than recorded", path=path)
    return member


def _check_hashes(
    members: Sequence[Checkpoint], record: Record, threads: int | None, progress: Progress | None
) -> int:
    """Check the members' recorded SHA-256, and return how many members have one.

    Raises:
        MismatchError: files have another SHA-256; it lists all of them.
    """
    pairs = zip(members, record.members, strict=True)
    wanted = {member: entry["sha256"] for member, entry in pairs if entry.get("sha256")}
    hashes = hash_checkpoints(tuple(wanted), threads or default_threads(wanted), progress)
    faults = []
    for member, digests in hashes.items():
        recorded = wanted[member]
        if digests == recorded:
            continue
        where = printable(member.path)
        if isinstance(digests, dict) and isinstance(recorded, dict):
            names = sorted(digests.keys() | recorded.keys())
            changed = [name for name in names if digests.get(name) != recorded.get(name)]
            where += f", {listed(changed)}"
        faults.append(f"{where}: has another SHA-256 than it had")
    if faults:
        raise _mismatch(record, faults)
    return len(wanted)


@contextlib.contextmanager
def _averaged_again(
    members: tuple[Checkpoint, ...],
    record: Record,
    threads: int | None,
    progress: Progress | None,
    *,
    is_torch: bool,
) -> Iterator[Checkpoint]:
    """The average of the members, made again in a temporary file.

    Raises:
        VerificationError: the configuration beside joined LoRA factors differs.
        CkptAvgError: the members cannot be averaged.
    """
    recipe = Recipe(record.scheme, members, record.weights)
    again = replace(
        record.options, container="weights", allow_nonfinite=True, fsync=False, threads=threads,
        progress=progress,
    )  # fmt: skip
    with _temporary_folder(record.path) as folder:
        # Names and dtypes of a torch file may have no place in safetensors, which is faster.
        is_of_state_dicts = isinstance(record.key, tuple)
        ending = ".pt" if is_torch or is_of_state_dicts else ".safetensors"
        is_joined = record.options.lora == "exact" and record.path.is_dir()
        if is_joined or (members[-1].has_several_models and not is_of_state_dicts):
            ending = "/"
        output = f"{folder}/average{ending}"
        try:
            with without_notices():
                write_averages(Run(members), [recipe], [output], again)
        except OutputError as error:
            message = f"the copy to compare it with: {error.message}"
            raise OutputError(message, path=record.path) from error
        for made in Path(output).rglob(CONFIG):
            path = record.path / made.relative_to(output)
            if not path.is_file() or path.read_bytes() != made.read_bytes():
                raise VerificationError("differs from that of its members", path=path)
        yield (
            _open_several(Path(output), record)
            if is_of_state_dicts
            else open_checkpoint(Path(output))
        )


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside the average; in the system's temporary folder if that is not possible."""
    if is_remote(path) or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        with temporary_beside(path.absolute(), folder=True) as folder:
            yield folder


def _compare(
    average: Checkpoint, again: Checkpoint, groups: Sequence[Sequence[str]], record: Record
) -> tuple[int, int]:
    """Compare an average with the one that was made again.

    Args:
        average: the average.
        again: the one that was made again.
        groups: the names of all tensors, tied ones together: they count once.
        record: the provenance of the average.

    Returns:
        The number of tensors that are equal in every bit, and of those that were not compared.

    Raises:
        VerificationError: a tensor is missing, superfluous or different; it names the first one.
    """
    compared = skipped = 0
    for names in groups:
        tensor = again.tensors[names[0]]
        for name in names:
            recorded = average.tensors.get(name)
            if recorded is None:
                # Aliases of tied tensors may be left out: the metadata name the one that is kept.
                if average.metadata.get(name) in average.tensors.keys() & set(names):
                    continue
                raise VerificationError("is missing from it", path=record.path, tensor=name)
            if (recorded.dtype, recorded.shape) != (tensor.dtype, tensor.shape):
                raise VerificationError(
                    f"is {recorded.dtype.name} {list(recorded.shape)} in it, but its checkpoints "
                    f"give {tensor.dtype.name} {list(tensor.shape)}",
                    path=record.path, tensor=name, remedy=record.remedy,
                )  # fmt: skip
        if record.is_refreshed and is_norm_state(names[0]):
            skipped += 1
            continue
        for name in names:
            if name in average.tensors:
                _compare_values(average, again, name, record)
        compared += 1
    for name in sorted(average.tensors.keys() - again.tensors.keys()):
        raise VerificationError(
            "is in it, but not in its checkpoints", path=record.path, tensor=name
        )
    return compared, skipped


def _compare_values(average: Checkpoint, again: Checkpoint, name: str, record: Record) -> None:
    dtype, start = again.tensors[name].dtype, 0
    for piece, expected_piece in zip(average.pieces(name), again.pieces(name), strict=True):
        if piece == expected_piece:
            start += len(piece)
            continue
        have, expected = np.frombuffer(piece, np.uint8), np.frombuffer(expected_piece, np.uint8)
        first = int(np.flatnonzero(have != expected)[0]) // dtype.itemsize * dtype.itemsize
        values = [
            data[first : first + dtype.itemsize].view(dtype.numpy)[0] for data in (have, expected)
        ]
        if str(values[0]) == str(values[1]):  # two kinds of NaN
            values = [value.tobytes().hex() for value in values]
        element = (start + first) // dtype.itemsize
        raise VerificationError(
            f"element {element} is {values[0]}, but its checkpoints give {values[1]}",
            path=record.path, tensor=name, remedy=record.remedy,
        )  # fmt: skip
