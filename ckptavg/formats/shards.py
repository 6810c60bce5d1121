"""Read directories with a file of each rank, which has that rank's pieces of the tensors.

They are `shard-00001-model-00001-of-00001.safetensors`, which torch's HuggingFaceStorageWriter
writes with `save_distributed=True`, in torchtitan's checkpoints into a folder `sharded`, and
`model_world_size_2_rank_0.pt`, in which verl saves the DTensors or ShardedTensors of FSDP.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, printable
from ckptavg.formats.blocks import Box, Pieces, join, misfit
from ckptavg.formats.files import open_shard
from ckptavg.formats.tensors import Place, is_possible
from ckptavg.formats.words import parse_shard_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ckptavg.formats.blocks import Region
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import Tensor
    from ckptavg.formats.words import ShardName

_FOLDER = "sharded"

log = logging.getLogger("ckptavg")


def matches(path: Path) -> bool:
    """Whether the directory has files with names of ranks."""
    return bool(shard_files(path))


def shard_files(path: Path) -> dict[Path, ShardName]:
    """The files of all ranks, and the numbers in their names, in the order of these."""
    files: dict[Path, ShardName] = {}
    for folder in (path, path / _FOLDER):
        if not files and folder.is_dir():
            for entry in folder.iterdir():
                if name := parse_shard_name(entry.name):
                    files[entry] = name
    order = sorted(files, key=lambda entry: (files[entry].rank, files[entry].model, entry.name))
    return {entry: files[entry] for entry in order}


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe the tensors that the pieces in all files make up.

    Raises:
        FormatError: a file is damaged or missing, or pieces contradict each other.
        SelectionError: it is unclear which state dict in the files is wanted.
    """
    files = shard_files(path)
    is_of_fsdp = _check_names(files)
    shards = [open_shard(file, key) for file in files]
    first = shards[0]
    if is_of_fsdp and len(shards) > 1 and not any(shard.shard_places for shard in shards):
        raise FormatError(
            "does not record how its tensors are split among the ranks",
            path=first.path,
            remedy="join the files with `python -m verl.model_merger merge`",
        )
    joined: dict[str, _Joined] = {}
    for shard in shards:
        for name in shard.tensors:
            # Each rank saves its copy of what is replicated; torch's writer saves one of them.
            joined.setdefault(name, _Joined(name)).add(shard, may_repeat=is_of_fsdp)
    pieces = {name: each.pieces(path, files) for name, each in joined.items()}
    parts, tensors = join(path, pieces, (shard.parts[0] for shard in shards))
    if not is_of_fsdp:  # without the last of them the tensors are shorter, and nothing else
        ranks = len({name.rank for name in files.values()})
        notice = "%s: joined the shards of %d ranks; they do not record whether there were more"
        log.info(notice, printable(path), ranks)
        _mention_last_missing(files)
    return replace(
        first,
        path=path,
        container="shards",
        parts=parts,
        tensors=tensors,
        metadata={},
        digest=hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest(),
        names=first.names if tensors.keys() <= set(first.names) else (),
        inner_tensors={},
        shard_places={},
    )


def _check_names(files: Mapping[Path, ShardName]) -> bool:
    """Raise a FormatError if names tell that a file is missing, or is of another save.

    Returns:
        Whether they are files of FSDP's ranks.
    """
    (file, name), *others = files.items()
    is_of_fsdp = name.ranks is not None
    for (before, earlier), (later, other) in itertools.pairwise(files.items()):
        if (other.ranks, other.models) != (earlier.ranks, earlier.models) or other == earlier:
            raise FormatError(
                f"is from another save than {before.name}",
                path=later,
                remedy="move the files of one of them elsewhere",
            )
    if name.ranks is not None:
        missing = _first_missing(0, (each.rank for each in files.values()))
        if missing < name.ranks:
            path = file.with_name(f"model_world_size_{name.ranks}_rank_{missing}.pt")
            raise FormatError("is missing", path=path)
        if len(others) >= name.ranks:
            last, _ = others[-1]
            raise FormatError(f"is not from any of {name.ranks} ranks", path=last)
    elif (missing := _first_missing(1, (each.model for each in files.values()))) <= name.models:
        pattern = f"shard-*-model-{missing:05}-of-{name.models:05}.safetensors"
        raise FormatError("is missing", path=file.with_name(pattern))
    return is_of_fsdp


def _mention_last_missing(files: Mapping[Path, ShardName]) -> None:
    """Warn of the files that the last ranks lack: tensors are shorter without them, not torn.

    A rank without a part of the tensors writes none, so that it is no error.
    """
    ranks = max(name.rank for name in files.values())
    for path, name in files.items():
        last = max(each.rank for each in files.values() if each.model == name.model)
        if name.rank == last < ranks:
            log.warning(
                "%s does not exist, but other files of that rank do: if it was lost, tensors are "
                "too short",
                printable(_with_numbers(path, last + 1, name)),
            )


def _with_numbers(path: Path, rank: int, name: ShardName) -> Path:
    """The file of a rank beside another's."""
    file = f"shard-{rank:05}-model-{name.model:05}-of-{name.models:05}.safetensors"
    return path.with_name(file)


def _first_missing(start: int, numbers: Iterable[int]) -> int:
    """The first number from `start` on that is not among others."""
    present = set(numbers)
    return next(number for number in itertools.count(start) if number not in present)


class _Joined:
    """A tensor, to which each file adds its piece."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: tuple[Checkpoint, Place] | None = None
        self._extents: list[int] = []
        self._boxes: dict[Region, Box] = {}
        self._repeated: tuple[Checkpoint, Region] | None = None

    def add(self, shard: Checkpoint, *, may_repeat: bool) -> None:
        """Add the piece in a file; FormatError if it does not go with those before.

        Args:
            shard: the file.
            may_repeat: whether a piece may be in several files, which are then taken to be equal.
        """
        tensor = shard.tensors[self._name]
        place = shard.shard_places.get(self._name, Place((0,) * len(tensor.shape), tensor.shape))
        first, first_place = self._first = self._first or (shard, place)
        other = first.tensors[self._name]
        if (tensor.dtype, len(tensor.shape), place.shape) != (
            other.dtype,
            len(other.shape),
            first_place.shape,
        ):
            raise FormatError(
                f"has a piece of {_described(tensor, place)}, but {first.path.name} one of "
                f"{_described(other, first_place)}",
                path=shard.path,
                tensor=self._name,
            )
        ends = [start + size for start, size in zip(place.corner, tensor.shape, strict=True)]
        self._extents = [max(pair) for pair in zip(self._extents or ends, ends, strict=True)]
        region = (place.corner, tensor.shape)
        if region in self._boxes:
            self._repeated = self._repeated or (shard, region)
            if not may_repeat:
                raise self._repetition()
        if 0 not in tensor.shape:
            self._boxes.setdefault(region, Box(shard.parts[0], place.corner, tensor))

    def pieces(self, path: Path, files: Mapping[Path, ShardName]) -> Pieces:
        """The tensor; FormatError if the pieces do not make it up.

        Args:
            path: the checkpoint.
            files: its files.
        """
        assert self._first is not None  # noqa: S101
        first, place = self._first
        dtype, shape = first.tensors[self._name].dtype, place.shape or tuple(self._extents)
        boxes = list(self._boxes.values())
        if not is_possible(shape, dtype.itemsize):
            raise FormatError("has no valid shape", path=first.path, tensor=self._name)
        if fault := misfit(shape, list(self._boxes)):
            if fault.number is None and self._repeated:
                raise self._repetition(", and others are missing")
            raise FormatError(
                fault.message,
                path=path if fault.number is None else boxes[fault.number].source.path,
                tensor=self._name,
                remedy=_gap(first.path, files) if place.shape is None else None,
            )
        return Pieces(dtype, shape, boxes)

    def _repetition(self, more: str = "") -> FormatError:
        """The error about the first file whose piece is in a file before it."""
        assert self._repeated is not None  # noqa: S101
        shard, (corner, sizes) = self._repeated
        twin = self._boxes[corner, sizes].source.path.name
        what = f"has the piece at {list(corner)} that {twin} has too{more}"
        return FormatError(what, path=shard.path, tensor=self._name)


def _gap(path: Path, files: Mapping[Path, ShardName]) -> str | None:
    """Which file of a rank is not there, of those that share tensors with a file."""
    name = files[path]
    rank = _first_missing(1, (each.rank for each in files.values() if each.model == name.model))
    is_gap = rank <= max(each.rank for each in files.values())
    return f"{_with_numbers(path, rank, name).name} is not there" if is_gap else None


def _described(tensor: Tensor, place: Place) -> str:
    shape = tensor.shape if place.shape is None else place.shape
    return f"a tensor of {tensor.dtype.name} {list(shape)}"
