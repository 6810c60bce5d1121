"""Lay out the zip that `torch.save` would write for a state dict, without torch.

https://docs.pytorch.org/docs/stable/notes/serialization.html: stored records, each aligned to 64
bytes, the state dict as a pickle among them. Tied tensors share a storage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.formats.checkpoint import PROVENANCE, read_view
from ckptavg.formats.parts import Memory
from ckptavg.merge.layout import Copy, FileLayout, Layout, OutputTensor
from ckptavg.write.pickling import pickle_state_dict
from ckptavg.write.zipfile import Zip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.formats.parts import Part
    from ckptavg.formats.tensors import Tensor


@dataclass(frozen=True)
class Extras:
    """Entries of a state dict that are no tensors, such as `_extra_state`.

    Attributes:
        values: by name: plain values, with pickled tensors in them perhaps.
        tensors: those pickled tensors, and where they are in `parts`.
        parts: the checkpoint's.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    tensors: Mapping[object, Tensor] = field(default_factory=dict)
    parts: Sequence[Part] = ()


def lay_out_torch(
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    module_versions: Mapping[str, Any] | None,
    extras: Extras | None = None,
) -> Layout:
    """A zip with a storage for each tensor; our provenance is one more record.

    Args:
        tensors: in the order in which they are to stand.
        metadata: strings; all but the provenance are left out, for lack of a place.
        module_versions: the state dict's `_metadata`: a dict for each submodule.
        extras: what else the state dict has.

    Raises:
        OutputError: torch has no such dtype.
    """
    extras = extras or Extras()
    inner = {
        pickled: OutputTensor((), tensor.dtype, tensor.shape, tensor.nbytes)
        for pickled, tensor in extras.tensors.items()
    }
    archive = Zip()
    pickled = pickle_state_dict(tensors, module_versions, extras.values, inner)
    archive.add("data.pkl", pickled)
    archive.add("byteorder", b"little")
    if PROVENANCE in metadata:
        archive.add_unfinished(PROVENANCE, metadata[PROVENANCE].encode())
    starts = [
        archive.reserve(f"data/{index}", tensor.nbytes)
        for index, tensor in enumerate([*tensors, *inner.values()])
    ]
    archive.add("version", b"3\n")
    archive.finish()
    copies = tuple(
        _copy(extras.parts[tensor.part], tensor, start)
        for tensor, start in zip(extras.tensors.values(), starts[len(tensors) :], strict=True)
    )
    return Layout(
        {"": FileLayout(archive.end, tuple(archive.blobs), tuple(archive.checksums()))},
        tuple((start,) for start in starts[: len(tensors)]),
        copies,
    )


def _copy(part: Part, tensor: Tensor, target: int) -> Copy:
    if tensor.strides is None:
        return Copy(part, tensor.offset, tensor.nbytes, target)
    data = bytearray(np.ascontiguousarray(read_view(part, tensor)).tobytes())
    return Copy(Memory(part.path, data), 0, len(data), target)
