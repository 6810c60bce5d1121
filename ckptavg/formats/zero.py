"""Read the weights that DeepSpeed's ZeRO stage 3 spread over the files of all ranks.

Each rank has an equal part of every tensor's elements. Those of trained parameters are float32 and
lie one after the other in `*_optim_states.pt`. Fragments of frozen ones, the shapes, and buffers
are in `*_model_states.pt`. DeepSpeed's own `zero_to_fp32.py` joins them in the same way.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError
from ckptavg.formats.blocks import Box, Pieces, join
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.parts import open_source
from ckptavg.formats.pickled import is_tensor
from ckptavg.formats.recorded import training_record
from ckptavg.formats.statedict import choose
from ckptavg.formats.tensors import BY_NAME, Tensor, is_possible
from ckptavg.formats.torchpickle import locate, scalars
from ckptavg.formats.torchzip import Archive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ckptavg.formats.parts import Part

_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d{1,9})_mp_rank_00_(model|optim)_states\.pt")
_ITEMSIZE = 8  # bytes, at most
_TOOL = "join the files with the zero_to_fp32.py that DeepSpeed leaves beside the checkpoint"


def is_partitioned(files: Iterable[Path]) -> bool:
    """Whether files are named as stage 3 names them."""
    return any(_FILE.fullmatch(file.name) for file in files)


def open_partitions(path: Path, folder: Path, key: str | None) -> Checkpoint:
    """Describe the weights in a folder of stage 3.

    Raises:
        FormatError: a file is damaged or missing, or is not as DeepSpeed writes it.
        SelectionError: a key is given, and it is not `module`.
    """
    ranks = [_Rank(model, optimizer) for model, optimizer in _files(folder)]
    first = ranks[0]
    module = first.mapping("module")
    chosen = choose(path, {"module": module}, key)
    shapes, frozen = first.shapes(), first.frozen_shapes()
    pieces = {**_trained(ranks, shapes), **_frozen(ranks, frozen)}
    sources = [part for rank in ranks for part in (rank.model.file, rank.optimizer.file)]
    parts, joined = join(path, pieces, sources)
    shapes |= frozen
    tensors = {name: replace(tensor, shape=shapes[name]) for name, tensor in joined.items()}
    shared = {
        name: tensors[other]
        for name, other in first.mapping("shared_params").items()
        if isinstance(name, str) and isinstance(other, str) and other in tensors
    }
    values = {name: value for name, value in module.items() if is_tensor(value)}
    buffers = {name: value for name, value in values.items() if name not in tensors | shared}
    for name, tensor in locate(first.model, buffers).items():
        if name not in first.buffer_names:
            raise first.fault("has no shape in param_shapes", name)
        tensors[name] = replace(tensor, part=parts.index(first.model.file))
    return Checkpoint(
        path=path,
        container="shards",
        parts=parts,
        tensors=tensors | shared,
        metadata={},
        digest=hashlib.sha256(b"".join(rank.pickles for rank in ranks)).hexdigest(),
        training=training_record(
            first.root, path.name, lambda wanted: scalars(first.model, wanted), whole=False
        ),
        key=chosen,
        other_content=True,
        names=tuple(module),
        other_entries={name: value for name, value in module.items() if name not in values},
    )


def _files(folder: Path) -> list[tuple[Path, Path]]:
    """The files with the model's and with the optimizer's state of each rank."""
    names = {entry.name for entry in folder.iterdir() if entry.name.endswith("_states.pt")}
    known = {name: match for name in names if (match := _FILE.fullmatch(name))}
    if others := sorted(names - known.keys()):
        what = "is of another save, or of tensor or expert parallelism, which is not read"
        raise FormatError(what, path=folder / others[0], remedy=_TOOL)
    found: dict[tuple[int, str], Path] = {}
    for name, match in sorted(known.items()):
        twin = found.setdefault((int(match[2]), match[3]), folder / name)
        if twin.name != name:
            raise FormatError(f"is of another save than {twin.name}", path=folder / name)
    count = max(rank for rank, _ in found) + 1
    for rank, kind in itertools.product(range(count), ("model", "optim")):
        if (rank, kind) not in found:
            name = f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            raise FormatError("is missing, a part of the weights", path=folder / name)
    return [(found[rank, "model"], found[rank, "optim"]) for rank in range(count)]


class _Rank:
    """What one rank saved.

    Attributes:
        model: the file with the model's state.
        root: what its pickle holds.
        buffer_names: the names of the model's buffers.
        optimizer: the file with the optimizer's state.
        pickles: digests of both pickles.
    """

    def __init__(self, model: Path, optimizer: Path) -> None:
        self.model, self.optimizer = Archive(open_source(model)), Archive(open_source(optimizer))
        root = self.model.load()
        self.root: Mapping[Any, object] = root if isinstance(root, Mapping) else {}
        content = [archive.content("data.pkl") for archive in (self.model, self.optimizer)]
        self.pickles = b"".join(hashlib.sha256(pickled).digest() for pickled in content)
        names = self.root.get("buffer_names")
        names = names if isinstance(names, list) else []
        self.buffer_names = frozenset(name for name in names if isinstance(name, str))

    def mapping(self, name: str) -> Mapping[Any, object]:
        """A mapping in the model's file; empty if it has none of that name."""
        value = self.root.get(name)
        return value if isinstance(value, Mapping) else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of trained parameters, in the order in which their elements lie."""
        groups = self.root.get("param_shapes")
        found: dict[str, tuple[int, ...]] = {}
        for group in groups if isinstance(groups, list) else ():
            for name, shape in self._shapes_in(group):
                if name in found:
                    raise self.fault("is in param_shapes twice", name)
                found[name] = shape
        return found

    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of frozen parameters."""
        return dict(self._shapes_in(self.mapping("frozen_param_shapes")))

    def _shapes_in(self, group: object) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in group.items() if isinstance(group, Mapping) else ():
            if not isinstance(name, str) or not isinstance(shape, tuple):
                raise self.fault("has no valid param_shapes")
            sizes_are_known = all(type(size) is int and size >= 0 for size in shape)
            if not sizes_are_known or not is_possible(shape, _ITEMSIZE):
                raise self.fault("has no valid shape", name)
            yield name, shape

    def frozen(self, names: Iterable[str]) -> dict[str, _Flat]:
        """The rank's elements of frozen parameters."""
        fragments = self.mapping("frozen_param_fragments")
        for name in names:
            if name not in fragments:
                raise self.fault("is not among frozen_param_fragments", name)
        located = locate(self.model, {name: fragments[name] for name in names})
        return {name: _Flat(self.model.file, [tensor]) for name, tensor in located.items()}

    def trained(self, ranks: int) -> _Flat:
        """The rank's elements of all trained parameters."""
        root: Any = self.optimizer.load()
        state = root.get("optimizer_state_dict") if isinstance(root, Mapping) else None
        match state:
            case {"fp32_flat_groups": list(groups), "partition_count": count}:
                named = {f"fp32_flat_groups {number}": group for number, group in enumerate(groups)}
            case _:
                what = "has no fp32_flat_groups, where stage 3 has the weights"
                raise FormatError(what, path=self.optimizer.file.path, remedy=_TOOL)
        if count != ranks:
            what = f"is of another number of ranks than {ranks}, of which there are files"
            raise FormatError(what, path=self.optimizer.file.path)
        return _Flat(self.optimizer.file, list(locate(self.optimizer, named).values()))

    def fault(self, message: str, tensor: str | None = None) -> FormatError:
        """An error about the model's file."""
        return FormatError(message, path=self.model.file.path, tensor=tensor)


class _Flat:
    """Elements of one rank, in flat tensors that are read one after the other."""

    def __init__(self, file: Part, tensors: Sequence[Tensor]) -> None:
        self._file, self._tensors = file, tensors
        self._starts = [0, *itertools.accumulate(tensor.count for tensor in tensors)]
        for tensor in tensors:
            if len(tensor.shape) != 1 or tensor.strides is not None:
                raise FormatError("has a tensor of weights that is not flat", path=file.path)

    def check_count(self, count: int) -> None:
        """Raise a FormatError if there are not so many elements."""
        if self._starts[-1] != count:
            what = f"has {self._starts[-1]} elements of weights, and the shapes say {count}"
            raise FormatError(what, path=self._file.path)

    def boxes(self, first: int, count: int, corner: int) -> Iterator[Box]:
        """The elements from `first`, which begin at an index of a flattened tensor."""
        number = bisect_right(self._starts, first) - 1
        while count:
            tensor, skip = self._tensors[number], first - self._starts[number]
            size = min(count, tensor.count - skip)
            if size:
                offset = tensor.offset + skip * tensor.dtype.itemsize
                yield Box(self._file, (corner,), Tensor(tensor.dtype, (size,), 0, offset))
            first, count, corner, number = first + size, count - size, corner + size, number + 1


def _part(rank: int, ranks: int, elements: int) -> tuple[int, int, int]:
    """What a rank has of a tensor: elements with padding, index of the first, without padding."""
    size = -(-elements // ranks)
    first = min(rank * size, elements)
    return size, first, min(size, elements - first)


def _trained(ranks: Sequence[_Rank], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Pieces]:
    """The elements of trained parameters, flattened."""
    boxes: dict[str, list[Box]] = {name: [] for name in shapes}
    for number, rank in enumerate(ranks):
        flat, offset = rank.trained(len(ranks)), 0
        flat.check_count(sum(_part(0, len(ranks), math.prod(each))[0] for each in shapes.values()))
        for name, shape in shapes.items():
            size, first, count = _part(number, len(ranks), math.prod(shape))
            boxes[name] += flat.boxes(offset, count, first)
            offset += size
    return _pieces(boxes, shapes)


def _frozen(ranks: Sequence[_Rank], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Pieces]:
    """The elements of frozen parameters, flattened."""
    boxes: dict[str, list[Box]] = {name: [] for name in shapes}
    for number, rank in enumerate(ranks):
        for name, flat in rank.frozen(shapes).items():
            size, first, count = _part(number, len(ranks), math.prod(shapes[name]))
            flat.check_count(size)
            boxes[name] += flat.boxes(0, count, first)
    return _pieces(boxes, shapes)


def _pieces(
    boxes: Mapping[str, Sequence[Box]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Pieces]:
    pieces = {}
    for name, found in boxes.items():
        dtypes = {box.tensor.dtype: box.source.path for box in found}
        if len(dtypes) > 1:
            kinds = " and ".join(dtype.name for dtype in dtypes)
            path = [*dtypes.values()][-1]
            raise FormatError(f"has pieces of {kinds}", path=path, tensor=name)
        [dtype] = dtypes or [BY_NAME["float32"]]
        pieces[name] = Pieces(dtype, (math.prod(shapes[name]),), found)
    return pieces
