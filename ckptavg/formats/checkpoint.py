"""An opened checkpoint: where its tensors are, and what it records of the training."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.errors import FormatError
from ckptavg.formats.parts import Memory, Part
from ckptavg.formats.paths import is_remote
from ckptavg.formats.provenances import read_provenance
from ckptavg.formats.tensors import AnyArray, Place, Tensor, bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from pathlib import Path

PROVENANCE = "ckptavg"
_PIECE = 1 << 20
MOST_TENSORS = 100_000  # of a file
# Prefixes that DistributedDataParallel, torch.compile and Lightning's strategies give to all names.
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")
_COMPILED = "._orig_mod."
_COUNTERS = ("n_averaged", "steps")
STEP_NAMES = ("global_step", "step", "epoch")
SAMPLE_BYTES = 512
_SAMPLES_OF_FINGERPRINT = 32


@dataclass(frozen=True)
class TrainingRecord:
    """Steps, learning rate, schedule and metrics at the time of saving, where they are recorded.

    Attributes:
        steps: `global_step`, `step` and `epoch`, those that are recorded.
        epochs_from_zero: whether the trainer counts epochs from 0, so that the checkpoint of epoch
            e was saved after e + 1 epochs (Lightning, timm).
        learning_rate: rate of the optimizer's first parameter group. It may already be that of the
            next update: see `select.learning_rates`.
        other_rates: rates of the other parameter groups.
        initial_rate: `initial_lr` of the first group, which torch's schedulers set.
        scheduler: plain values of the first scheduler's state dict (`last_epoch`, `T_0`, ...).
        logged_rate: rate that the trainer logged at the checkpoint's step (Hugging Face).
        logged_before: rate that it logged one step earlier.
        metrics: name to value, NaN and Inf included.
        has_optimizer_state: whether the optimizer has momenta or the like; None if not recorded.
        averaged: models in Lightning's `StochasticWeightAveraging`, and the epoch of the last.
        hyper_parameters: those of Lightning's model by name, as the pickle describes them.
        data_hyper_parameters: those of its data module.
    """

    steps: Mapping[str, int] = field(default_factory=dict)
    epochs_from_zero: bool = False
    learning_rate: float | None = None
    other_rates: tuple[float, ...] = ()
    initial_rate: float | None = None
    scheduler: Mapping[str, Any] | None = None
    logged_rate: float | None = None
    logged_before: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    has_optimizer_state: bool | None = None
    averaged: tuple[int, int | None] | None = None
    hyper_parameters: Mapping[Any, object] = field(default_factory=dict)
    data_hyper_parameters: Mapping[Any, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint as its headers describe it; the tensors are not read yet.

    Attributes:
        path: the file or directory.
        container: `safetensors`, `torch`, `huggingface`, `dcp` or `shards`.
        parts: the files that hold its tensors.
        tensors: the tensors by name; in the order of their bytes where it is one file.
        metadata: strings by name. An average of ours has its provenance here.
        digest: SHA-256 of the header or the pickle that describes the tensors, in hex.
        training: what it records of the training.
        key: name of the state dict that has the tensors, or names of several; empty where it is the
            whole file.
        other_keys: names of the other state dicts in the file.
        other_content: whether the file holds more than that state dict, such as an optimizer.
        is_trainers_average: whether the state dict is an average that the trainer made.
        names: names of the state dict's tensors and other entries in its own order, where that may
            differ from the order of the bytes.
        other_entries: entries of the state dict that are not tensors (`_extra_state`), by name, as
            the pickle describes them.
        inner_tensors: the pickled tensors in such entries, and their places.
        places: keys under which a DCP directory had each entry in the nested state dict, by name.
        module_versions: the `_metadata` that torch gives to a state dict; None where there is none.
        shard_places: of pieces, which are all that the file has of some tensors, by name.
        name_in_run: its path below the folder that all candidates of its run have in common.
        models: where a directory has the weights of each model, without the ending, by what the
            names of its tensors begin with: `{"": "model", "2_Dense/": "2_Dense/model"}`. In a
            torch file these are state dicts: `{"generator/": "generator"}`.
    """

    path: Path
    container: str
    parts: tuple[Part, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    digest: str
    training: TrainingRecord = field(default_factory=TrainingRecord)
    key: str | tuple[str, ...] = ""
    other_keys: tuple[str, ...] = ()
    other_content: bool = False
    is_trainers_average: bool = False
    names: tuple[str, ...] = ()
    other_entries: Mapping[str, object] = field(default_factory=dict)
    inner_tensors: Mapping[object, Tensor] = field(default_factory=dict)
    places: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    module_versions: Mapping[str, Any] | None = None
    shard_places: Mapping[str, Place] = field(default_factory=dict)
    name_in_run: str = ""
    models: Mapping[str, str] = field(default_factory=lambda: {"": "model"})

    @property
    def name(self) -> str:
        """Its name in messages: that in its run, else the last part of the path."""
        return self.name_in_run or self.path.name

    @property
    def size(self) -> int:
        """Bytes of its files, the optimizer's state included."""
        return sum(part.size for part in self.parts)

    @property
    def is_remote(self) -> bool:
        """Whether bytes of it come over a network."""
        return any(is_remote(part.path) for part in self.parts)

    @property
    def is_of_directories(self) -> bool:
        """Whether its layout is a directory; its average is then one by default."""
        return self.container in ("huggingface", "dcp", "shards")

    @property
    def has_several_models(self) -> bool:
        """Whether the names of its tensors begin with the places of models."""
        return list(self.models) != [""]

    def model_of(self, name: str) -> str:
        """The place of a model, with which a name begins."""
        end = len(name)
        while (end := name.rfind("/", 0, end)) >= 0:
            if name[: end + 1] in self.models:
                return name[: end + 1]
        return ""

    @property
    def step(self) -> tuple[str, int] | None:
        """The first of `STEP_NAMES` that the file records, and its value."""
        steps = self.training.steps
        return next(((name, steps[name]) for name in STEP_NAMES if name in steps), None)

    @property
    def is_average(self) -> bool:
        """Whether ckptavg made it from other checkpoints."""
        return self.provenance is not None and self.provenance.get("scheme") != "none"

    @property
    def provenance(self) -> dict[str, Any] | None:
        """The entry of ckptavg in the metadata; None where ckptavg did not write the file."""
        text = self.metadata.get(PROVENANCE)
        return None if text is None else read_provenance(text)

    def renamed(self, new_name: Callable[[str], str]) -> Checkpoint:
        """The same checkpoint with other names of tensors and entries."""
        # safetensors' save_model records the names of tied tensors that it leaves out as metadata.
        metadata = dict(
            (new_name(alias), new_name(name)) if name in self.tensors else (alias, name)
            for alias, name in self.metadata.items()
        )
        return replace(
            self,
            tensors={new_name(name): tensor for name, tensor in self.tensors.items()},
            metadata=metadata,
            names=tuple(map(new_name, self.names)),
            places={new_name(name): place for name, place in self.places.items()},
            other_entries={new_name(name): value for name, value in self.other_entries.items()},
        )

    def sharing(self, first: Checkpoint) -> Checkpoint:
        """The same checkpoint, with another one's mappings where they are equal."""
        names = [n for n in ("tensors", "places") if getattr(self, n) == getattr(first, n)]
        return replace(self, **{name: getattr(first, name) for name in names})

    def read(self, name: str) -> AnyArray:
        """A tensor as an array in C order."""
        tensor = self.tensors[name]
        return np.asarray(read_view(self.parts[tensor.part], tensor), order="C")

    def pieces(self, name: str, end: int | None = None) -> Iterator[memoryview]:
        """The bytes of a tensor in C order, in pieces of 1 MiB. Each is valid until the next one.

        Args:
            name: name of the tensor.
            end: number of bytes; None for all. A strided tensor is read in full anyway.
        """
        tensor = self.tensors[name]
        end = tensor.nbytes if end is None else min(end, tensor.nbytes)
        if tensor.strides is not None:
            data = bytes_of(self.read(name))
            yield from (data[start : min(start + _PIECE, end)] for start in range(0, end, _PIECE))
            return
        room = memoryview(bytearray(min(_PIECE, end)))
        for start in range(0, end, _PIECE):
            piece = room[: end - start]
            self.parts[tensor.part].read_into(tensor.offset + start, piece)
            yield piece

    def with_values(self, values: Mapping[str, AnyArray]) -> Checkpoint:
        """The same checkpoint with arrays in memory instead of some of its tensors.

        Args:
            values: arrays by name, of the tensors' shapes. They are converted to the tensors'
                dtypes. Names that have the same object are tied.
        """
        data = bytearray()
        tensors = dict(self.tensors)
        places: dict[int, int] = {}
        for name, value in values.items():
            old = tensors[name]
            if id(value) not in places:
                places[id(value)] = len(data)
                data += np.ascontiguousarray(value, old.dtype.numpy).tobytes()
            tensors[name] = Tensor(old.dtype, old.shape, len(self.parts), places[id(value)])
        return replace(self, parts=(*self.parts, Memory(self.path, data)), tensors=tensors)


def check_count(count: int, path: Path) -> None:
    """Raise a FormatError for more tensors than a file may have."""
    if count > MOST_TENSORS:
        message = f"has {count:,} tensors, more than the {MOST_TENSORS:,} that a file may have"
        raise FormatError(message, path=path, remedy="save them in several files, with an index")


def read_view(part: Part, tensor: Tensor) -> AnyArray:
    """A tensor as an array of its shape and with its strides.

    All bytes between its first and its last element are read. Where the tensor is a view of a
    larger storage, these are more than its own.
    """
    return read_span(part, tensor)[1]


def read_span(part: Part, tensor: Tensor) -> tuple[AnyArray, AnyArray]:
    """The bytes from the first element of a tensor to the last, and the tensor as a view of them.

    Returns:
        uint8 `[num_bytes]`, and an array of the tensor's shape that shares its memory.
    """
    itemsize = tensor.dtype.itemsize
    strides = tensor.element_strides
    out = np.empty(span_elements(tensor.shape, strides) * itemsize, np.uint8)
    part.read_into(tensor.offset, out.data)
    byte_strides = tuple(stride * itemsize for stride in strides)
    return out, np.ndarray(tensor.shape, tensor.dtype.numpy, out, 0, byte_strides)


def span_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of elements of the storage from the first to the last element of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def without_wrappers(checkpoint: Checkpoint, *, keep_prefix: bool) -> tuple[Checkpoint, str]:
    """Remove what DistributedDataParallel, torch.compile or AveragedModel add to names.

    That is a prefix on all of them, and `_orig_mod.` within them, where a submodule is compiled.
    The counters of torch's `AveragedModel` and of MMEngine's averages, `n_averaged` and `steps`
    beside names in `module.`, are not part of the model and are removed in any case. Each of
    several models has its own wrappers.

    Returns:
        The checkpoint and what was removed from names; empty where that was nothing.
    """
    by_model: dict[str, set[str]] = {model: set() for model in checkpoint.models}
    for name in checkpoint.tensors:
        by_model[checkpoint.model_of(name)].add(name)
    wrapped, kept = {}, set[str]()
    for model, of_model in by_model.items():
        wrapped[model], inside = _with_wrappers(model, of_model)
        kept |= inside
    names = [name for name in checkpoint.tensors if name in kept]
    wrappers = dict.fromkeys(start.removeprefix(model) for model, start in wrapped.items())
    is_compiled = any(_COMPILED in name for name in names)
    if not any(wrappers) and not is_compiled:
        return checkpoint, ""

    def plain(name: str) -> str:
        if keep_prefix:
            return name
        model = checkpoint.model_of(name)
        rest = name.removeprefix(wrapped[model])
        return (name if rest == name else model + rest).replace(_COMPILED, ".")

    versions = checkpoint.module_versions and {
        plain(f"{module}.").removesuffix("."): facts
        for module, facts in checkpoint.module_versions.items()
        if keep_prefix or f"{module}.".startswith(wrapped[checkpoint.model_of(module)])
    }
    tensors = {name: checkpoint.tensors[name] for name in names}
    unwrapped = replace(checkpoint, tensors=tensors, module_versions=versions).renamed(plain)
    removed = [*filter(None, wrappers)] or [_COMPILED[1:]]
    return unwrapped, "" if keep_prefix else " and ".join(removed)


def _with_wrappers(start: str, names: AbstractSet[str]) -> tuple[str, AbstractSet[str]]:
    """What all of the names begin with, the wrappers included, and the names without counters."""
    while True:
        for prefix in _WRAPPERS:
            counters = {start + each for each in _COUNTERS} if prefix == "module." else set[str]()
            inside = names - counters
            if inside and all(name.startswith(start + prefix) for name in inside):
                start, names = start + prefix, inside
                break
        else:
            return start, names


def have_equal_headers(first: Checkpoint, other: Checkpoint) -> bool:
    """Whether names, shapes and dtypes of all tensors are equal."""
    if other.tensors is first.tensors:
        return True
    kinds = ({n: (t.dtype, t.shape) for n, t in each.tensors.items()} for each in (first, other))
    return next(kinds) == next(kinds)


def differing_tensors(names: Iterable[str], first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    """Those of the names whose tensors differ in dtype or bytes between two checkpoints."""
    for name in names:
        if first.tensors[name].dtype is not other.tensors[name].dtype:
            yield name
            continue
        for one, another in _pairs(name, first, other):
            # Comparing memoryviews takes thirty times as long.
            if not np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(another, np.uint8)):
                yield name
                break


def _pairs(
    name: str, first: Checkpoint, other: Checkpoint
) -> Iterator[tuple[memoryview, memoryview]]:
    """The bytes of a tensor in two checkpoints, in pieces; without what neither has on the disk.

    A file may claim any size, and take up no room: holes of it, which read as zeros, are not read.
    """
    places = [(each.parts[each.tensors[name].part], each.tensors[name]) for each in (first, other)]
    if any(tensor.strides is not None for _, tensor in places):
        yield from zip(first.pieces(name), other.pieces(name), strict=True)
        return
    nbytes = places[0][1].nbytes
    rooms = [memoryview(bytearray(min(_PIECE, nbytes))) for _ in places]
    start = 0
    while start < nbytes:
        begin = min(
            part.next_data(tensor.offset + start) - tensor.offset for part, tensor in places
        )
        if begin > start:
            start = begin
            continue
        pair = [room[: nbytes - start] for room in rooms]
        for (part, tensor), piece in zip(places, pair, strict=True):
            part.read_into(tensor.offset + start, piece)
        yield pair[0], pair[1]
        start += _PIECE


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of samples of a checkpoint's tensors, 32 hex digits.

    It depends neither on the container nor on the order of the tensors.
    """
    names = sorted(name for name, tensor in checkpoint.tensors.items() if 0 not in tensor.shape)
    chosen = spread(names, _SAMPLES_OF_FINGERPRINT)

    def sample(name: str) -> bytes:
        return b"".join(checkpoint.pieces(name, SAMPLE_BYTES))

    digest = hashlib.sha256()
    with ThreadPoolExecutor(_SAMPLES_OF_FINGERPRINT) as pool:
        samples = pool.map(sample, chosen) if checkpoint.is_remote else map(sample, chosen)
        for name, data in zip(chosen, samples, strict=True):
            digest.update(name.encode("utf-8", "surrogatepass") + data)
    return digest.hexdigest()[:32]


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most this many of the names, evenly spaced."""
    places = np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)
    return [names[place] for place in places.tolist()]
