"""What an opened checkpoint is: its tensors' descriptions, and where their bytes are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.formats.jsontext import from_text
from ckptavg.formats.parts import Memory, Part, Readable
from ckptavg.formats.tensors import AnyArray, Tensor, bytes_of
from ckptavg.formats.training import TrainingRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

PROVENANCE = "ckptavg"
_PIECE = 1 << 20
# What torch.compile and Lightning's strategies put before all names.
_WRAPPERS = ("_orig_mod.", "_forward_module.")
STEP_FACTS = ("global_step", "step", "epoch")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One checkpoint: what its headers say. No tensor is read to make it.

    Attributes:
        path: the file or directory.
        container: `safetensors`, `torch`, `huggingface` or `dcp`.
        parts: the files that its tensors are in.
        tensors: name to description, in the order of the bytes.
        metadata: its own string metadata, the provenance of ours among it.
        digest: SHA-256 of what describes the tensors (header or pickle), in hex.
        facts: what it says of the training: `global_step`, `step`, `epoch`, `learning_rate`.
        training: what else it says of that: the schedule, metrics.
        key: which of its state dicts `tensors` is; empty where it is the whole file.
        other_keys: the other state dicts in the file.
        other_content: whether the file holds more than that state dict, such as an optimizer.
        names: those of the state dict's tensors and other entries, in its own order, where that
            may differ from the order of the bytes.
        other_entries: entries of the state dict that are no tensors (`_extra_state`), by name, as
            the pickle has them.
        inner_tensors: the pickled tensors within those, and where they are.
        module_versions: torch's `_metadata` of the state dict, if it came with one.
    """

    path: Path
    container: str
    parts: tuple[Part, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    digest: str
    facts: Mapping[str, int | float] = field(default_factory=dict)
    training: TrainingRecord = field(default_factory=TrainingRecord)
    key: str = ""
    other_keys: tuple[str, ...] = ()
    other_content: bool = False
    names: tuple[str, ...] = ()
    other_entries: Mapping[str, object] = field(default_factory=dict)
    inner_tensors: Mapping[object, Tensor] = field(default_factory=dict)
    module_versions: Mapping[str, Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of its files, optimizer state and all."""
        return sum(part.size for part in self.parts)

    @property
    def is_of_directories(self) -> bool:
        """Whether such checkpoints are directories, whose average is one by default."""
        return self.container in ("huggingface", "dcp")

    @property
    def step(self) -> tuple[str, int] | None:
        """What the file itself records of its place in the training: fact and value."""
        for name in STEP_FACTS:
            if name in self.facts:
                return name, int(self.facts[name])
        return None

    @property
    def is_average(self) -> bool:
        """Whether this tool made it out of others."""
        return self.provenance is not None and self.provenance.get("scheme") != "none"

    @property
    def provenance(self) -> dict[str, Any] | None:
        """Our own entry in the metadata, if this tool made the file."""
        try:
            entry = from_text(self.metadata.get(PROVENANCE, "null"))
        except (ValueError, RecursionError):
            return None
        return entry if isinstance(entry, dict) else None

    def read(self, name: str) -> AnyArray:
        """The tensor as an array of its shape, in C order. Packed types come as flat bytes."""
        tensor = self.tensors[name]
        if tensor.dtype.kind == "packed":
            out = np.empty(tensor.nbytes, np.uint8)
            self.parts[tensor.part].read_into(tensor.offset, bytes_of(out))
            return out
        return np.ascontiguousarray(read_view(self.parts[tensor.part], tensor)).reshape(
            tensor.shape
        )

    def pieces(self, name: str, end: int | None = None) -> Iterator[memoryview]:
        """The bytes of a tensor in C order, in pieces of 1 MiB.

        Args:
            name: of the tensor.
            end: how many of its bytes; None for all. A strided tensor is read in full.
        """
        tensor = self.tensors[name]
        end = tensor.nbytes if end is None else min(end, tensor.nbytes)
        if tensor.strides is not None:
            data = bytes_of(self.read(name))
            yield from (data[start : min(start + _PIECE, end)] for start in range(0, end, _PIECE))
            return
        for start in range(0, end, _PIECE):
            piece = memoryview(bytearray(min(_PIECE, end - start)))
            self.parts[tensor.part].read_into(tensor.offset + start, piece)
            yield piece

    def with_values(self, values: Mapping[str, AnyArray]) -> Checkpoint:
        """The same checkpoint with some tensors in memory instead. Shapes and dtypes stay.

        Names with the very same array stay tied.
        """
        memory = Memory(self.path)
        tensors = dict(self.tensors)
        places: dict[int, int] = {}
        for name, value in values.items():
            old = tensors[name]
            if id(value) not in places:
                places[id(value)] = memory.size
                memory.data += np.ascontiguousarray(value, old.dtype.numpy).tobytes()
            tensors[name] = Tensor(old.dtype, old.shape, len(self.parts), places[id(value)])
        return replace(self, parts=(*self.parts, memory), tensors=tensors)


def read_view(part: Readable, tensor: Tensor) -> AnyArray:
    """The tensor as an array `[*shape]` with the file's strides. Reads its span once.

    The span is what lies between its first and its last element; for a view of a larger storage
    that is more than the tensor's own bytes.
    """
    return read_span(part, tensor)[1]


def read_span(part: Readable, tensor: Tensor) -> tuple[AnyArray, AnyArray]:
    """The bytes from a tensor's first element to its last one, and the tensor as a view of them."""
    itemsize = tensor.dtype.itemsize
    strides = tensor.element_strides
    span = span_elements(tensor.shape, strides)
    out = np.empty(span * itemsize, np.uint8)
    part.read_into(tensor.offset, out.data)
    byte_strides = tuple(stride * itemsize for stride in strides)
    return out, np.ndarray(tensor.shape, tensor.dtype.numpy, out, 0, byte_strides)


def span_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided tensor, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def without_wrappers(checkpoint: Checkpoint, *, keep_prefix: bool) -> tuple[Checkpoint, str]:
    """Take off what DistributedDataParallel, torch.compile and AveragedModel add to all names.

    `AveragedModel`'s counter, `n_averaged` beside names in `module.`, is no part of the model and
    goes in any case.

    Returns:
        The checkpoint and the prefix that was taken off (empty where none was).
    """
    taken, names = "", list(checkpoint.tensors)
    while names:
        counter = f"{taken}n_averaged"
        others = [name for name in names if name != counter]
        if others and all(name.startswith(f"{taken}module.") for name in others):
            names, taken = others, f"{taken}module."
        elif inner := next(
            (one for one in _WRAPPERS if all(name.startswith(taken + one) for name in names)), None
        ):
            taken += inner
        else:
            break
    if not taken:
        return checkpoint, ""
    prefix = "" if keep_prefix else taken
    tensors = {name.removeprefix(prefix): checkpoint.tensors[name] for name in names}
    versions = checkpoint.module_versions and {
        f"{module}.".removeprefix(prefix).removesuffix("."): facts
        for module, facts in checkpoint.module_versions.items()
        if f"{module}.".startswith(prefix)
    }
    # Names of tied tensors that were dropped, as safetensors' save_model records them.
    aliases = {
        alias: kept for alias, kept in checkpoint.metadata.items() if kept in checkpoint.tensors
    }
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in aliases}
    metadata |= {a.removeprefix(prefix): kept.removeprefix(prefix) for a, kept in aliases.items()}
    entries = {name.removeprefix(prefix): value for name, value in checkpoint.other_entries.items()}
    unwrapped = replace(
        checkpoint,
        tensors=tensors,
        module_versions=versions,
        metadata=metadata,
        names=tuple(name.removeprefix(prefix) for name in checkpoint.names),
        other_entries=entries,
    )
    return unwrapped, prefix
