"""What torch's zip and its older stream have in common: a pickle whose tensors name storages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.errors import FormatError, printable
from ckptavg.formats.checkpoint import Checkpoint, span_elements
from ckptavg.formats.pickled import PickledTensor, UnreadableTensor
from ckptavg.formats.recorded import training_facts, training_record
from ckptavg.formats.shapes import is_possible
from ckptavg.formats.statedict import check_kind, choose, find_state_dicts
from ckptavg.formats.tensors import Tensor, is_contiguous

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.parts import ByteSource
    from ckptavg.formats.pickled import Storage

# Expanded tensors repeat their bytes, and have to be held in memory whole.
_LARGEST_REPEATED, _MOST_REPEATED = 1 << 28, 16
_LONGEST_LABEL = 300

Places = Callable[[Mapping[str, str]], Mapping[str, tuple[int, int]]]
"""Where storages begin in the file, and their bytes; missing ones are left out.

Given are their keys, and for each the name of a tensor in it, for messages."""


def describe(
    file: ByteSource,
    root: object,
    key: str | None,
    places: Places,
    *,
    digest: str,
    metadata: Mapping[str, str],
) -> Checkpoint:
    """Describe one of the state dicts in a file.

    Args:
        file: what is being read.
        root: what its pickle describes.
        key: which state dict is wanted, if the user said so.
        places: where the storages are.
        digest: of the pickle.
        metadata: the file's own.

    Raises:
        FormatError: a tensor has no plain strided bytes, or lies outside its storage.
        SelectionError: which state dict is wanted is unclear.
    """
    found = find_state_dicts(root, file.path, key)
    check_kind(file.path, root, found)
    taken = choose(file.path, found, key)
    entries = found[taken]
    values = {name: value for name, value in entries.items() if is_tensor(value)}
    others = {name: value for name, value in entries.items() if name not in values}
    inner = {
        f"{name[:_LONGEST_LABEL]}: {number}": tensor
        for number, (name, tensor) in enumerate(_inner(others))
    }
    located = locate(file.path, values, places)
    inner_located = locate(file.path, inner, places)
    return Checkpoint(
        path=file.path,
        container="torch",
        parts=(file,),
        tensors=dict(sorted(located.items(), key=lambda item: item[1].offset)),
        metadata=metadata,
        digest=digest,
        facts=training_facts(root),
        training=training_record(
            root, file.path.name, lambda wanted: scalars(file, wanted, places), whole=not taken
        ),
        key=taken,
        other_keys=tuple(name for name in found if name != taken),
        other_content=entries is not root,
        other_entries=others,
        inner_tensors={inner[label]: tensor for label, tensor in inner_located.items()},
        module_versions=_module_versions(entries),
    )


def _inner(entries: Mapping[str, object]) -> Iterator[tuple[str, PickledTensor]]:
    """The tensors within entries that are none themselves (`_extra_state`), each once."""
    seen: set[int] = set()
    found: set[PickledTensor] = set()
    for name, entry in entries.items():
        waiting = [entry]
        while waiting:
            value = waiting.pop()
            if isinstance(value, PickledTensor) and value.is_sound and value not in found:
                found.add(value)
                yield name, value
            elif isinstance(value, dict | list | tuple) and id(value) not in seen:
                seen.add(id(value))
                waiting += value.values() if isinstance(value, dict) else value


def is_tensor(value: object) -> bool:
    """Whether a pickled value is a tensor, be it one that can be read or not."""
    return isinstance(value, PickledTensor | UnreadableTensor)


def locate(path: Path, values: Mapping[str, object], places: Places) -> dict[str, Tensor]:
    """Where tensors' bytes are in the file, checked against the sizes of their storages.

    Args:
        path: the file, for messages.
        values: name to pickled tensor.
        places: where the storages are.

    Raises:
        FormatError: a tensor has no plain strided bytes, or lies outside its storage.
    """
    found = places(
        {
            value.storage.key: name
            for name, value in values.items()
            if isinstance(value, PickledTensor)
        }
    )
    return {name: _locate(path, name, value, found) for name, value in values.items()}


def scalars(
    file: ByteSource, values: Mapping[str, PickledTensor], places: Places
) -> dict[str, float]:
    """The values of tensors of one element each, as far as they can be read.

    Args:
        file: what they are in.
        values: name to pickled tensor, of shape `()`.
        places: where the storages are.
    """
    try:
        located = locate(file.path, values, places)
        spans = [(tensor.offset, tensor.nbytes) for tensor in located.values()]
        found = zip(located.items(), file.read_many(spans), strict=True)
    except FormatError:
        return {}  # they are no part of the model
    return {
        name: float(np.frombuffer(data, tensor.dtype.numpy)[0]) for (name, tensor), data in found
    }


def _locate(path: Path, name: str, value: object, places: Mapping[str, tuple[int, int]]) -> Tensor:
    if not isinstance(value, PickledTensor):
        reason = value.reason if isinstance(value, UnreadableTensor) else "no tensor"
        raise FormatError(f"cannot be averaged: {reason}", path=path, tensor=name)
    numbers = (value.offset, *value.shape, *value.strides)
    if (
        len(value.shape) != len(value.strides)
        or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        or not is_possible(value.shape, 8 * value.dtype.itemsize)
    ):
        raise FormatError("has no valid shape and strides", path=path, tensor=name)
    itemsize = value.dtype.itemsize
    # Of one index along an axis the stride says nothing: any number may stand there.
    steps = tuple(
        step if extent > 1 else 1 for extent, step in zip(value.shape, value.strides, strict=True)
    )
    start, size = _storage(path, name, value.storage, places)
    if (value.offset + span_elements(value.shape, value.strides)) * itemsize > size:
        raise FormatError(f"reaches beyond its storage of {size} bytes", path=path, tensor=name)
    strides = None if is_contiguous(value.shape, steps) else steps
    nbytes = math.prod(value.shape) * itemsize
    if strides is not None and nbytes > max(_LARGEST_REPEATED, _MOST_REPEATED * size):
        raise FormatError(f"repeats {size} bytes to {nbytes}", path=path, tensor=name)
    shape = value.shape
    if value.dtype.kind == "packed":
        if strides is not None or not shape:
            raise FormatError("is packed and not contiguous", path=path, tensor=name)
        # torch counts bytes, safetensors (and so we) the elements in them.
        shape = (*shape[:-1], shape[-1] * 8 // value.dtype.bits)
    return Tensor(value.dtype, shape, 0, start + value.offset * itemsize, strides)


def _storage(
    path: Path, name: str, storage: Storage, places: Mapping[str, tuple[int, int]]
) -> tuple[int, int]:
    if storage.key not in places:
        raise FormatError(
            f"record data/{printable(storage.key)} is missing", path=path, tensor=name
        )
    return places[storage.key]


def _module_versions(entries: Mapping[str, object]) -> Mapping[str, Any] | None:
    versions = getattr(entries, "module_versions", None)
    if not isinstance(versions, Mapping):
        return None
    return {
        module: facts
        for module, facts in versions.items()
        if isinstance(module, str) and isinstance(facts, Mapping)
    }
