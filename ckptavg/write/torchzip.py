"""Lay out the zip that `torch.save` would write for a state dict, without torch.

https://docs.pytorch.org/docs/stable/notes/serialization.html: stored records, each aligned to 64
bytes, the state dict as a pickle among them. Tied tensors share a storage.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ckptavg.errors import listed, printable
from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.merge.jobs import FileLayout, Layout, OutputTensor, StoredTensor
from ckptavg.write.pickling import (
    pickle_entries,
    pickle_one,
    pickle_state_dict,
    pickle_tensor,
)
from ckptavg.write.zipfile import Zip

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

log = logging.getLogger("ckptavg")


def lay_out_torch(
    path: Path, tensors: Sequence[OutputTensor], metadata: Mapping[str, str], last: Checkpoint
) -> Layout:
    """Lay out a file with a storage for each tensor, and a record for the provenance.

    Args:
        path: the output.
        tensors: in the order of their storages.
        metadata: strings; the file has no place for any but the provenance.
        last: the checkpoint that has the order of the names, the versions of the modules, and
            entries that are no tensors.
    """
    inner = [*last.inner_tensors.values()]
    storages = [
        *tensors, *(OutputTensor((), each.dtype, each.shape, each.nbytes) for each in inner)
    ]  # fmt: skip
    pickles = [pickle_tensor(str(number), tensor) for number, tensor in enumerate(storages)]
    entries = pickle_entries(
        last.other_entries, dict(zip(last.inner_tensors, pickles[len(tensors) :], strict=True))
    )
    mention_left_out(name for name in last.other_entries if name not in entries)
    mention_kept(last, entries)
    if not entries:
        inner, storages = [], [*tensors]
    values = {
        name: pickled
        for tensor, pickled in zip(tensors, pickles, strict=False)
        for name in tensor.names
    } | entries
    places = {name: place for place, name in enumerate(last.names)}
    names = sorted(values, key=lambda name: places.get(name, len(places)))
    archive = Zip()
    archive.add("data.pkl", _pickle_models({name: values[name] for name in names}, last))
    archive.add("byteorder", b"little")
    if PROVENANCE in metadata:
        archive.add(PROVENANCE, metadata[PROVENANCE].encode())
    starts = [
        archive.reserve(f"data/{number}", storage.nbytes)
        for number, storage in enumerate(storages)
    ]  # fmt: skip
    archive.add("version", b"3\n")
    archive.finish()
    return Layout(
        path,
        {"": FileLayout(archive.end, tuple(archive.blobs), tuple(archive.checksums))},
        tuple((start,) for start in starts[: len(tensors)]),
        tuple(
            (StoredTensor(last.parts[tensor.part], tensor), start)
            for tensor, start in zip(inner, starts[len(tensors) :], strict=True)
        ),
    )


def _pickle_models(values: Mapping[str, bytes], last: Checkpoint) -> bytes:
    """Pickle a state dict; each of several under the keys that it has in the last checkpoint.

    Args:
        values: pickles of the values by name.
        last: says which part of a name is the place of a model.
    """
    root: dict[str, Any] = {}
    for name, value in values.items():
        model = last.model_of(name)
        inside = root
        for key in model.split("/")[:-1]:
            inside = inside.setdefault(key, {})
        inside[name.removeprefix(model)] = value
    versions: dict[str, dict[str, Any]] = {}
    for module, facts in (last.module_versions or {}).items():
        model = last.model_of(module)
        versions.setdefault(model, {})[module.removeprefix(model)] = facts

    def pickled(inside: Mapping[str, Any], place: str) -> bytes:
        entries = {
            key: value if isinstance(value, bytes) else pickled(value, f"{place}{key}/")
            for key, value in inside.items()
        }
        return pickle_state_dict(entries, versions.get(place))

    return pickle_one(pickled(root, ""))


def mention_kept(last: Checkpoint, names: Iterable[str]) -> None:
    """Report the entries that an output has as the last checkpoint has them."""
    if shown := listed(names):
        log.info("entries that are not tensors are copied from %s: %s", printable(last.name), shown)


def mention_left_out(names: Iterable[str]) -> None:
    """Report the entries of a state dict that an output has no place for."""
    if shown := listed(names, 20):
        log.info("left out entries that are not tensors: %s", shown)
