"""What torch's zip files and its older streams have in common: a pickle that names storages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckptavg.errors import FormatError, printable
from ckptavg.formats.checkpoint import Checkpoint, check_count, span_elements
from ckptavg.formats.pickled import PickledShard, PickledTensor, UnreadableTensor, is_tensor
from ckptavg.formats.recorded import training_record
from ckptavg.formats.statedict import (
    check_kind,
    choose,
    choose_several,
    find_state_dicts,
    is_trainers_average,
    place_of,
    without_state_dict,
)
from ckptavg.formats.tensors import Tensor, is_contiguous, is_possible

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.parts import Part
    from ckptavg.formats.statedict import Key, StateDicts

# Expanded tensors repeat their bytes, and have to be held in memory whole: bytes that any tensor
# may have, and how many times those of its storage.
_LARGEST_REPEATED, _MOST_REPEATED = 1 << 28, 16
_LONGEST_LABEL = 300


class Container(Protocol):
    """A file with a pickle and the storages that it names."""

    file: Part

    def storages(self, users: Mapping[str, str]) -> Mapping[str, tuple[int, int]]:
        """Find where storages begin in the file, and their bytes, by key.

        Each is given with the name of a tensor in it, for messages. Missing ones are left out.
        """


def describe(
    container: Container, root: object, key: Key, digest: str, metadata: Mapping[str, str]
) -> Checkpoint:
    """Describe one of the state dicts in a file, of which `root` is the pickle's content.

    Several are one checkpoint, in which the names of the tensors begin with the place of their
    state dict: `generator/conv.weight`.

    Raises:
        FormatError: a tensor has no plain strided bytes, or lies outside its storage.
        SelectionError: which state dict is wanted is unclear.
    """
    file = container.file
    state_dicts = find_state_dicts(root, file.path, key)
    check_kind(file.path, root, state_dicts)
    if not state_dicts:
        raise without_state_dict(file.path, root)
    models = _models(file.path, root, state_dicts, key)
    chosen = tuple(models.values())
    is_one = list(models) == [""]
    entries = {
        place + name: value
        for place, chosen_name in models.items()
        for name, value in state_dicts[chosen_name].items()
    }
    values = {name: value for name, value in entries.items() if is_tensor(value)}
    check_count(len(values), file.path)
    shards = {name: value for name, value in values.items() if isinstance(value, PickledShard)}
    local = {name: shards[name].local if name in shards else values[name] for name in values}
    tensors = locate(container, {name: v for name, v in local.items() if v is not None})
    others = {name: value for name, value in entries.items() if name not in values}
    inner = {
        f"{name[:_LONGEST_LABEL]}: {number}": tensor
        for number, (name, tensor) in enumerate(_inner_tensors(others))
    }
    return Checkpoint(
        path=file.path,
        container="torch",
        parts=(file,),
        tensors=dict(sorted(tensors.items(), key=lambda item: item[1].offset)),
        metadata=metadata,
        digest=digest,
        training=training_record(
            root, file.path.name, lambda wanted: scalars(container, wanted), whole=chosen == ("",)
        ),
        key=chosen[0] if is_one else chosen,
        other_keys=tuple(name for name in state_dicts if name not in chosen),
        other_content=all(state_dicts[name] is not root for name in chosen),
        is_trainers_average=all(is_trainers_average(state_dicts, name) for name in chosen),
        names=tuple(entries),
        other_entries=others,
        inner_tensors={inner[label]: t for label, t in locate(container, inner).items()},
        module_versions=_module_versions(models, state_dicts),
        shard_places={name: shard.place for name, shard in shards.items()},
        models={"": "model"} if is_one else models,
    )


def _models(path: Path, root: object, state_dicts: StateDicts, key: Key) -> dict[str, str]:
    """The names of the state dicts that are meant, by what the names of tensors begin with."""
    if not isinstance(key, tuple):
        return {"": choose(path, state_dicts, key)}
    return {place_of(root, name): name for name in choose_several(path, state_dicts, key)}


def _inner_tensors(entries: Mapping[str, object]) -> Iterator[tuple[str, PickledTensor]]:
    """The tensors within entries that are none themselves (`_extra_state`), each once."""
    seen: set[object] = set()
    for name, entry in entries.items():
        waiting = [entry]
        while waiting:
            value = waiting.pop()
            if isinstance(value, PickledTensor) and value not in seen:
                seen.add(value)
                yield name, value
            elif isinstance(value, dict | list | tuple) and id(value) not in seen:
                seen.add(id(value))
                waiting += value.values() if isinstance(value, dict) else value


def _module_versions(
    models: Mapping[str, str], state_dicts: StateDicts
) -> Mapping[str, Any] | None:
    """The `_metadata` of the state dicts; None where none of them has it."""
    versions = {
        place: getattr(state_dicts[name], "module_versions", None) for place, name in models.items()
    }
    if not any(isinstance(each, Mapping) for each in versions.values()):
        return None
    return {
        place + module: facts
        for place, each in versions.items()
        if isinstance(each, Mapping)
        for module, facts in each.items()
        if isinstance(module, str) and isinstance(facts, Mapping)
    }


def scalars(container: Container, values: Mapping[str, PickledTensor]) -> dict[str, float]:
    """Read tensors of one element each, by name; none of them if one cannot be read."""
    try:
        tensors = locate(container, values)
        spans = [(tensor.offset, tensor.nbytes) for tensor in tensors.values()]
        data = container.file.read_many(spans)
    except FormatError:
        return {}  # they are no part of the model
    return {
        name: float(np.frombuffer(value, tensor.dtype.numpy)[0])
        for (name, tensor), value in zip(tensors.items(), data, strict=True)
    }


def locate(container: Container, values: Mapping[str, object]) -> dict[str, Tensor]:
    """Find where pickled tensors are in a file, by name; FormatError as for `describe`."""
    path = container.file.path
    tensors = {name: readable(value, path, name) for name, value in values.items()}
    storages = container.storages({value.storage.key: name for name, value in tensors.items()})
    return {name: _locate(path, name, value, storages) for name, value in tensors.items()}


def readable(value: object, path: Path, name: str) -> PickledTensor:
    """Return a pickled tensor, unless it is one without plain strided bytes (FormatError)."""
    if isinstance(value, PickledTensor):
        return value
    reason = value.reason if isinstance(value, UnreadableTensor) else "no whole tensor"
    raise FormatError(f"cannot be averaged: {reason}", path=path, tensor=name)


def _locate(
    path: Path, name: str, value: PickledTensor, storages: Mapping[str, tuple[int, int]]
) -> Tensor:
    def fault(message: str) -> FormatError:
        return FormatError(message, path=path, tensor=name)

    dtype, shape, strides = value.dtype, value.shape, value.strides
    numbers = (value.offset, *shape, *strides)
    if (
        len(shape) != len(strides)
        or not all(0 <= number < 1 << 62 for number in numbers)
        or not is_possible(shape, dtype.itemsize)
    ):
        raise fault("has no valid shape and strides")
    if value.storage.key not in storages:
        raise fault(f"record data/{printable(value.storage.key)} is missing")
    start, size = storages[value.storage.key]
    if (value.offset + span_elements(shape, strides)) * dtype.itemsize > size:
        raise fault(f"reaches beyond its storage of {size} bytes")
    contiguous = is_contiguous(shape, strides)
    nbytes = math.prod(shape) * dtype.itemsize
    if not contiguous and nbytes > max(_LARGEST_REPEATED, _MOST_REPEATED * size):
        raise fault(f"repeats the {size} bytes of its storage to {nbytes}")
    # The stride of an axis with one index has no meaning, and any number may stand there.
    steps = tuple(step if extent > 1 else 1 for extent, step in zip(shape, strides, strict=True))
    offset = start + value.offset * dtype.itemsize
    return Tensor(dtype, shape, 0, offset, None if contiguous else steps)


def big_endian(path: Path) -> FormatError:
    """The error for a file of the other byte order."""
    remedy = "load it and save it again on a little-endian one"
    return FormatError("was saved on a big-endian machine", path=path, remedy=remedy)
