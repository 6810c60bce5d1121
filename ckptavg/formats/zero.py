"""Read the float32 weights that DeepSpeed's ZeRO spreads over the files of all ranks.

With stage 3 each rank has an equal part of every tensor's elements. Those of trained parameters lie
one after the other in `*_optim_states.pt`. Fragments of frozen ones, the shapes, and buffers are in
`*_model_states.pt`. With stages 1 and 2 each group of the optimizer's parameters is laid out as one
vector, of which each rank has a part, and `mp_rank_00_model_states.pt` has everything else.
DeepSpeed's own `zero_to_fp32.py` joins them in the same way.
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
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from ckptavg.formats.parts import Part

_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d{1,9})_mp_rank_00_(model|optim)_states\.pt")
_ITEMSIZE = 8  # bytes, at most
_TOOL = "join the files with the zero_to_fp32.py that DeepSpeed leaves beside the checkpoint"


def is_partitioned(files: Iterable[Path]) -> bool:
    """Whether files are named as ZeRO names those of its ranks."""
    return any(_FILE.fullmatch(file.name) for file in files)


def open_partitions(path: Path, folder: Path, key: str | None) -> Checkpoint:
    """Describe the weights in a folder of stage 3.

    Raises:
        FormatError: a file is damaged or missing, or is not as DeepSpeed writes it.
        SelectionError: a key is given, and it is not `module`.
    """
    names = {entry.name for entry in folder.iterdir() if entry.name.endswith("_states.pt")}
    models = [_Model(file) for file in _files(folder, names, "model")]
    optimizers = [_Optimizer(file) for file in _files(folder, names, "optim")]
    first, ranks = models[0], len(models)
    groups, frozen = first.shapes(), first.frozen_shapes()
    shapes = {name: shape for group in groups for name, shape in group.items()}
    for each in optimizers:
        each.check_ranks(ranks)
    flats = [_Flat(each.flat_groups("fp32_flat_groups")) for each in optimizers]
    pieces = {**_trained(flats, optimizers, shapes), **_frozen(models, frozen)}
    return _joined(
        path, key, models, optimizers, pieces=pieces, shapes=shapes | frozen, is_stage_3=True
    )


def open_groups(path: Path, model: Path, key: str | None) -> Checkpoint | None:
    """Describe the weights of stage 1 or 2; None if the optimizer has no float32 copy of them.

    Args:
        path: the checkpoint.
        model: the file with the model's state.
        key: the name of the state dict, which is `module`.

    Raises:
        FormatError: a file is damaged or missing, or is not as DeepSpeed writes it.
    """
    folder = model.parent
    names = {each.name for each in folder.iterdir() if each.name.endswith("_optim_states.pt")}
    if key not in (None, "module") or not any(map(_FILE.fullmatch, names)):
        return None
    first, name = _Model(model), "single_partition_of_fp32_groups"
    optimizers = [_Optimizer(file) for file in _files(folder, names, "optim")]
    if name not in optimizers[0].state:
        return None
    for each in optimizers:
        each.check_ranks(len(optimizers))
    by_rank = [each.flat_groups(name) for each in optimizers]
    groups = first.shapes()
    if {len(flat) for flat in by_rank} != {len(groups)}:
        raise first.fault(f"has param_shapes of {len(groups)} groups, and the optimizer has others")
    paddings = optimizers[0].paddings(groups)
    pieces: dict[str, Pieces] = {}
    for shapes, padding, *flats in zip(groups, paddings, *by_rank, strict=True):
        pieces |= _of_group(_Flat(flats), shapes, padding, optimizers)
    shapes = {name: shape for group in groups for name, shape in group.items()}
    return _joined(path, key, [first], optimizers, pieces=pieces, shapes=shapes, is_stage_3=False)


def _joined(
    path: Path,
    key: str | None,
    models: Sequence[_Model],
    optimizers: Sequence[_Optimizer],
    *,
    pieces: Mapping[str, Pieces],
    shapes: Mapping[str, tuple[int, ...]],
    is_stage_3: bool,
) -> Checkpoint:
    """The checkpoint of joined parameters, and of buffers and others that are whole in a file."""
    _refuse_copies(optimizers, pieces)
    first = models[0]
    module = first.mapping("module")
    chosen = choose(path, {"module": module}, key)
    files: tuple[_Model | _Optimizer, ...] = (*models, *optimizers)
    parts, joined = join(path, pieces, [each.archive.file for each in files])
    tensors = {name: replace(tensor, shape=shapes[name]) for name, tensor in joined.items()}
    values = {name: value for name, value in module.items() if is_tensor(value)}
    if not is_stage_3:
        values |= first.mapping("frozen_param_fragments")
    shared = {
        name: tensors[other]
        for name, other in first.mapping("shared_params").items()
        if isinstance(name, str) and isinstance(other, str) and other in tensors
    }
    others = {name: value for name, value in values.items() if name not in tensors | shared}
    for name, tensor in locate(first.archive, others).items():
        if is_stage_3 and name not in first.buffer_names:
            raise first.fault("has no shape in param_shapes", name)
        tensors[name] = replace(tensor, part=parts.index(first.archive.file))
    return Checkpoint(
        path=path,
        container="shards",
        parts=parts,
        tensors=tensors | shared,
        metadata={},
        digest=hashlib.sha256(b"".join(each.pickle_digest for each in files)).hexdigest(),
        training=training_record(
            first.root, path.name, lambda wanted: scalars(first.archive, wanted), whole=False
        ),
        key=chosen,
        other_content=True,
        names=tuple(module),
        other_entries={name: value for name, value in module.items() if name not in values},
    )


def _refuse_copies(optimizers: Sequence[_Optimizer], pieces: Mapping[str, Pieces]) -> None:
    """Raise a FormatError if two ranks have the same contents: the files do not record their ranks.

    Those of which nothing is read may be the same: they have nothing but padding.
    """
    used = {box.source.path for each in pieces.values() for box in each.boxes}
    known: dict[object, str] = {}
    for each in optimizers:
        path = each.archive.file.path
        twin = known.setdefault(each.checksums, path.name) if path in used else path.name
        if twin != path.name and any(checksum for checksum, _ in each.checksums):
            raise FormatError(f"has the same contents as {twin}: is it a copy?", path=path)


def _files(folder: Path, names: Iterable[str], kind: str) -> list[Path]:
    """The file of each rank that has the state of the `model` or of the optimizer (`optim`)."""
    known = {name: match for name in names if (match := _FILE.fullmatch(name))}
    if others := sorted(set(names) - known.keys()):
        what = "is of another save, or of tensor or expert parallelism, which is not read"
        raise FormatError(what, path=folder / others[0], remedy=_TOOL)
    found: dict[int, str] = {}
    for name, match in sorted(known.items()):
        if match[3] == kind and found.setdefault(int(match[2]), name) != name:
            what = f"is from another save than {found[int(match[2])]}"
            raise FormatError(what, path=folder / name)
    for rank in range(max(int(match[2]) for match in known.values()) + 1):
        if rank not in found:
            name = f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            raise FormatError("is missing; it has a part of the weights", path=folder / name)
    return [folder / found[rank] for rank in sorted(found)]


class _Model:
    """What one rank saved of the model.

    Attributes:
        archive: the file.
        root: what its pickle holds.
        pickle_digest: the pickle's SHA-256.
        buffer_names: the names of the model's buffers.
    """

    def __init__(self, path: Path) -> None:
        self.archive = Archive(open_source(path))
        root = self.archive.load()
        self.root: Mapping[Any, object] = root if isinstance(root, Mapping) else {}
        self.pickle_digest = hashlib.sha256(self.archive.content("data.pkl")).digest()
        names = self.root.get("buffer_names")
        names = names if isinstance(names, list) else []
        self.buffer_names = frozenset(name for name in names if isinstance(name, str))

    def mapping(self, name: str) -> Mapping[Any, object]:
        """A mapping in the model's file; empty if it has none of that name."""
        value = self.root.get(name)
        return value if isinstance(value, Mapping) else {}

    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of trained parameters by group, in the order in which their elements lie."""
        listed = self.root.get("param_shapes")
        groups: list[dict[str, tuple[int, ...]]] = []
        names = set[str]()
        for group in listed if isinstance(listed, list) else ():
            groups.append({})
            for name, shape in self._shapes_in(group):
                if name in names:
                    raise self.fault("is in param_shapes twice", name)
                names.add(name)
                groups[-1][name] = shape
        return groups

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
        located = locate(self.archive, {name: fragments[name] for name in names})
        return {name: _Flat([(self.archive.file, tensor)]) for name, tensor in located.items()}

    def fault(self, message: str, tensor: str | None = None) -> FormatError:
        """An error about the file."""
        return FormatError(message, path=self.archive.file.path, tensor=tensor)


class _Optimizer:
    """What one rank saved of the optimizer.

    Attributes:
        archive: the file.
        pickle_digest: the pickle's SHA-256.
        checksums: those of all records, with their sizes; 0 where torch was told to write none.
        state: the optimizer's state dict.
    """

    def __init__(self, path: Path) -> None:
        self.archive = Archive(open_source(path))
        self.pickle_digest = hashlib.sha256(self.archive.content("data.pkl")).digest()
        records = self.archive.records.values()
        self.checksums = tuple((each.CRC, each.file_size) for each in records)
        root: Any = self.archive.load()
        state = root.get("optimizer_state_dict") if isinstance(root, Mapping) else None
        self.state: Mapping[Any, Any] = state if isinstance(state, Mapping) else {}

    def check_ranks(self, ranks: int) -> None:
        """Raise a FormatError if it is not of so many ranks."""
        count = self.state.get("partition_count")
        if any(each != ranks for each in (count if isinstance(count, list) and count else [count])):
            what = f"is of another number of ranks than {ranks}, of which there are files"
            raise FormatError(what, path=self.archive.file.path)

    def paddings(self, groups: Sequence[Collection[str]]) -> list[list[int]]:
        """The elements behind each parameter of each group that are nobody's."""
        recorded = self.state.get("param_alignment_paddings", [[0] * len(each) for each in groups])
        paddings = recorded if isinstance(recorded, list) else []
        lengths = [len(each) if isinstance(each, list) else -1 for each in paddings]
        if lengths != [len(each) for each in groups] or not all(
            type(size) is int and size >= 0 for each in paddings for size in each
        ):
            what = "has no valid param_alignment_paddings"
            raise FormatError(what, path=self.archive.file.path)
        return paddings

    def flat_groups(self, name: str) -> list[tuple[Part, Tensor]]:
        """The tensors of that name, which have the weights; each with its file."""
        groups = self.state.get(name)
        if not isinstance(groups, list):
            what = f"has no {name}, where the weights are"
            raise FormatError(what, path=self.archive.file.path, remedy=_TOOL)
        named = {f"{name} {number}": group for number, group in enumerate(groups)}
        return [(self.archive.file, each) for each in locate(self.archive, named).values()]


class _Flat:
    """Elements in flat tensors of several files, which are read one after the other."""

    def __init__(self, tensors: Sequence[tuple[Part, Tensor]]) -> None:
        self._tensors = tensors
        self._starts = [0, *itertools.accumulate(tensor.count for _, tensor in tensors)]
        self.count = self._starts[-1]
        for file, tensor in tensors:
            if len(tensor.shape) != 1 or tensor.strides is not None:
                raise FormatError("has a partition of the weights that is not flat", path=file.path)

    def check_count(self, count: int, path: Path) -> None:
        """Raise a FormatError about a file if there are not so many elements."""
        if self.count != count:
            what = f"has {self.count} elements of weights, and the shapes say {count}"
            raise FormatError(what, path=path)

    def boxes(self, first: int, count: int, corner: int) -> Iterator[Box]:
        """The elements from `first`, which begin at an index of a flattened tensor."""
        number = bisect_right(self._starts, first) - 1
        while count:
            file, tensor = self._tensors[number]
            skip = first - self._starts[number]
            size = min(count, tensor.count - skip)
            if size:
                offset = tensor.offset + skip * tensor.dtype.itemsize
                yield Box(file, (corner,), Tensor(tensor.dtype, (size,), 0, offset))
            first, count, corner, number = first + size, count - size, corner + size, number + 1


def _part(rank: int, ranks: int, elements: int) -> tuple[int, int, int]:
    """What a rank has of a tensor: elements with padding, index of the first, without padding."""
    size = -(-elements // ranks)
    first = min(rank * size, elements)
    return size, first, min(size, elements - first)


def _trained(
    flats: Sequence[_Flat], optimizers: Sequence[_Optimizer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Pieces]:
    """The elements of trained parameters of stage 3, flattened."""
    boxes: dict[str, list[Box]] = {name: [] for name in shapes}
    ranks = len(flats)
    total = sum(_part(0, ranks, math.prod(each))[0] for each in shapes.values())
    for number, (flat, optimizer) in enumerate(zip(flats, optimizers, strict=True)):
        flat.check_count(total, optimizer.archive.file.path)
        offset = 0
        for name, shape in shapes.items():
            size, first, count = _part(number, ranks, math.prod(shape))
            boxes[name] += flat.boxes(offset, count, first)
            offset += size
    return _pieces(boxes, shapes)


def _frozen(models: Sequence[_Model], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Pieces]:
    """The elements of frozen parameters of stage 3, flattened."""
    boxes: dict[str, list[Box]] = {name: [] for name in shapes}
    for number, model in enumerate(models):
        for name, flat in model.frozen(shapes).items():
            size, first, count = _part(number, len(models), math.prod(shapes[name]))
            flat.check_count(size, model.archive.file.path)
            boxes[name] += flat.boxes(0, count, first)
    return _pieces(boxes, shapes)


def _of_group(
    flat: _Flat,
    shapes: Mapping[str, tuple[int, ...]],
    paddings: Sequence[int],
    optimizers: Sequence[_Optimizer],
) -> dict[str, Pieces]:
    """The elements of trained parameters of a group of stage 1 or 2, flattened.

    Behind the last one, and with `paddings` behind each, there are elements that are nobody's.
    """
    path, alignment = optimizers[0].archive.file.path, 2 * len(optimizers)
    places, offset = {}, 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        places[name] = offset
        offset += math.prod(shape) + padding
    if not offset <= flat.count < offset + alignment:
        flat.check_count(offset, path)
    boxes = {
        name: [*flat.boxes(place, math.prod(shapes[name]), 0)] for name, place in places.items()
    }
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
