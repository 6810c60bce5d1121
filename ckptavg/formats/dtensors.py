"""Find the piece of a tensor that a rank holds, from the pickle that the rank saved.

A DTensor has a mesh of ranks, and a placement for each dimension of the mesh. The ShardedTensor of
FSDP's first version has the places of its pieces. Both are placeholders here, with their states.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptavg.formats.pickled import PickledShard, PickledTensor, Placeholder, UnreadableTensor
from ckptavg.formats.tensors import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Described = PickledTensor | PickledShard | UnreadableTensor

_MOST_DIMENSIONS = 64
_LARGEST_SIZE = 1 << 60


def _dtensor(arguments: object, state: object) -> Described:
    shape = _whole_shape(arguments)
    match state:
        case (
            _,
            {
                "_local_tensor": PickledTensor() as local,
                "_spec": Placeholder(
                    state={
                        "mesh": Placeholder(state=dict(mesh)),
                        "placements": tuple(placements),
                        **others,
                    }
                ),
            },
        ) if shape is not None and _is_usual_order(others.get("shard_order")):
            return _placed(local, shape, mesh, placements)
    return UnreadableTensor("a DTensor of an unknown kind")


def _is_usual_order(order: object) -> bool:
    """Whether the dimensions of the mesh split the tensor from the first to the last.

    Older versions of torch record no order: there is no other.
    """
    for entry in order if isinstance(order, tuple) else ():
        match entry:
            case Placeholder(arguments=(_, numbers)) if (dims := _numbers(numbers)) is not None:
                if sorted(dims) != list(dims):
                    return False
            case _:
                return False
    return True


def _placed(
    local: PickledTensor,
    shape: tuple[int, ...],
    mesh: Mapping[str, object],
    placements: Sequence[object],
) -> Described:
    """Find a rank's piece from its coordinate in the mesh and the placements."""
    sizes = _mesh_sizes(mesh)
    coordinate = mesh.get("_coordinate_on_dim")
    if sizes is None or len(sizes) != len(placements):
        return UnreadableTensor("a DTensor without a valid mesh")
    ranks = math.prod(sizes)
    if coordinate is None:  # the rank is none of the mesh
        return PickledShard(None, Place((0,) * len(shape), shape, ranks))
    indices = _numbers(coordinate)
    if indices is None or len(indices) != len(sizes):
        return UnreadableTensor("a DTensor without a valid place in its mesh")
    corner, extents = [0] * len(shape), list(shape)
    for axis, index, size in _splits(placements, indices, sizes):
        if not 0 <= axis < len(shape) or index >= size:
            return UnreadableTensor("a DTensor whose placements are unknown")
        chunk = -(-extents[axis] // size)
        first = min(index * chunk, extents[axis])
        corner[axis] += first
        extents[axis] = min(chunk, extents[axis] - first)
    if 0 not in (*extents, *local.shape) and tuple(extents) != local.shape:
        return UnreadableTensor(
            f"a DTensor with a piece {list(local.shape)} where its placements say {extents}"
        )
    return _piece(local, Place(tuple(corner), shape, ranks))


def _splits(
    placements: Sequence[object], indices: Sequence[int], sizes: Sequence[int]
) -> list[tuple[int, int, int]]:
    """How the tensor was split, in this order: along which axis, which piece, of how many.

    Dimensions of the mesh split one after the other. With tensor parallelism FSDP splits what that
    has split: its `_StridedShard` stands first and comes last.
    """
    splits: list[tuple[int, int, int]] = []
    last: list[tuple[int, int, int]] = []
    for number, (placement, index, size) in enumerate(zip(placements, indices, sizes, strict=True)):
        unknown = (-1, index, size)
        match placement:
            case _ if size == 1:
                pass
            case Placeholder(origin=origin, state={"dim": int(axis), "split_factor": factor}):
                later = zip(placements[number + 1 :], sizes[number + 1 :], strict=True)
                before = math.prod(count for other, count in later if _splits_axis(other, axis))
                is_known = origin.endswith("._StridedShard") and factor == before and not last
                last.append((axis, index, size) if is_known else unknown)
            case Placeholder(origin=origin, state={"dim": int(axis)}) if origin.endswith(".Shard"):
                splits.append((axis, index, size))
            case Placeholder(origin=origin) if origin.endswith(".Replicate"):
                pass
            case _:
                splits.append(unknown)
    return splits + last


def _splits_axis(placement: object, axis: int) -> bool:
    match placement:
        case Placeholder(state={"dim": int(other)}):
            return other == axis
    return False


def _mesh_sizes(mesh: Mapping[str, object]) -> tuple[int, ...] | None:
    """Ranks along each dimension of a mesh; None where that is unknown."""
    match mesh:
        case {"mesh": PickledTensor(shape=shape)}:  # in older versions of torch
            return _numbers(shape)
        case {"_layout": Placeholder(state={"axes": tuple(axes)})}:
            sizes = [getattr(axis, "state", None) for axis in axes[:_MOST_DIMENSIONS]]
            shapes = [axis.get("shape") if isinstance(axis, dict) else None for axis in sizes]
        case {"_layout": Placeholder(state={"shape": shape})}:
            shapes = list(shape[:_MOST_DIMENSIONS]) if isinstance(shape, tuple) else [shape]
        case _:
            return None
    numbers = [_numbers(each if isinstance(each, tuple) else (each,)) for each in shapes]
    known = [math.prod(each) for each in numbers if each is not None]
    return tuple(known) if len(known) == len(numbers) else None


def _sharded_tensor(arguments: object, state: object) -> Described:
    shape = _whole_shape(arguments)
    match state:
        case ([], Placeholder(state={"shards_metadata": list(places)}), *_) if shape is not None:
            return PickledShard(None, Place((0,) * len(shape), shape, len(places)))
        case (
            [
                Placeholder(
                    state=(
                        _,
                        {
                            "tensor": PickledTensor() as local,
                            "metadata": Placeholder(state=(_, {"shard_offsets": offsets})),
                        },
                    )
                )
            ],
            Placeholder(state={"shards_metadata": list(places)}),
            *_,
        ) if shape is not None:
            corner = _numbers(offsets)
            if corner is not None and len(corner) == len(shape):
                return _piece(local, Place(corner, shape, len(places)))
    return UnreadableTensor("a ShardedTensor of an unknown kind")


def _piece(local: PickledTensor, place: Place) -> PickledTensor | PickledShard:
    return local if local.shape == place.shape else PickledShard(local, place)


def _whole_shape(arguments: object) -> tuple[int, ...] | None:
    """The shape among the arguments of torch's `_rebuild_wrapper_subclass`."""
    match arguments:
        case (_, _, shape, *_):
            return _numbers(shape)
    return None


def _numbers(value: object) -> tuple[int, ...] | None:
    """A few numbers that may be sizes or indices; None if they are something else."""
    if not isinstance(value, list | tuple) or len(value) > _MOST_DIMENSIONS:
        return None
    if not all(type(number) is int and 0 <= number < _LARGEST_SIZE for number in value):
        return None
    return tuple(value)


READERS: dict[str, Callable[[object, object], Described]] = {
    "DTensor": _dtensor,
    "ShardedTensor": _sharded_tensor,
}
"""By the name of the class: what describes a tensor by its pickled arguments and its state."""
