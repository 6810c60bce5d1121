"""Read `torch.distributed.checkpoint` directories: `.metadata`, and `*.distcp` files.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html. Each rank writes what it holds of
the tensors into files of its own. The model's pieces are put together while they are read (see
`blocks`), and nothing else is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError
from ckptavg.formats import unpickler
from ckptavg.formats.blocks import Blocks, Pieces
from ckptavg.formats.checkpoint import STEP_FACTS, Checkpoint
from ckptavg.formats.dcpmetadata import Metadata
from ckptavg.formats.dcpshards import Shards
from ckptavg.formats.pickled import PickledTensor, UnreadableTensor
from ckptavg.formats.recorded import training_facts, training_record
from ckptavg.formats.remote import open_source
from ckptavg.formats.statedict import choose, find_state_dicts
from ckptavg.formats.tensors import Tensor
from ckptavg.formats.torchpickle import is_tensor, scalars
from ckptavg.formats.torchzip import Archive
from ckptavg.formats.training import TrainingRecord

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.statedict import StateDicts

_METADATA = ".metadata"
# Lightning writes what is no tensor beside the shards.
_LIGHTNING_META = "meta.pt"
_FACT_FOLDERS = ("train_state",)
_CHAINED = re.compile(r"chained_\d+\.")  # Megatron's optimizers, where they are several
# Exact words: a model may have a `scaler` or a `down_sampler`.
_STATE_OF_TRAINING = re.compile(
    r"(optim|optims|optimizer|optimizers|opt|lr_scheduler|lr_schedulers|scheduler|schedulers"
    r"|rng|rng_state|rng_states|random_states)(_\d+)?"
)

log = logging.getLogger("ckptavg")


def matches(path: Path) -> bool:
    """Whether it is a directory with DCP's metadata, or with its shards."""
    return any(map(_is_own, path.iterdir()))


def _is_own(entry: Path) -> bool:
    return entry.name == _METADATA or entry.suffix == ".distcp"


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe the model's part.

    Raises:
        FormatError: a file is missing or damaged, or the pieces do not make up the tensors.
        SelectionError: which state dict is wanted is unclear.
    """
    if not (path / _METADATA).exists():
        raise FormatError(f"has shards and no {_METADATA}: was the saving interrupted?", path=path)
    file = open_source(path / _METADATA)
    pickled = file.read(0, min(file.size, unpickler.LARGEST_PICKLE + 1))
    metadata = Metadata(file.path, _load(file.path, pickled))
    tree = _tree(metadata)
    found, key = _state_dicts(metadata, tree, key)
    taken = choose(path, found, key)
    values = {name: value for name, value in found[taken].items() if is_tensor(value)}
    others = {name: value for name, value in found[taken].items() if name not in values}
    shards = Shards(path, metadata)
    tensors, blocks = _describe(shards, values)
    facts, training = _lightning(path)
    return Checkpoint(
        path=path,
        container="dcp",
        parts=(blocks, *shards.files.values(), file),
        tensors=tensors,
        metadata={},
        digest=hashlib.sha256(pickled).hexdigest(),
        facts=facts | _facts(shards, tree),
        training=training,
        key=taken,
        other_keys=tuple(name for name in found if name != taken),
        other_content=len(values) + len(others) < len(metadata.names),
        other_entries=others,
    )


def _load(path: Path, pickled: bytes) -> object:
    try:
        return unpickler.load(pickled)
    except unpickler.PickleError as error:
        raise FormatError(str(error), path=path) from error


def _tree(metadata: Metadata) -> dict[Any, Any]:
    """The state dict as it was nested when it was saved."""
    tree: dict[Any, Any] = {}
    for name in metadata.names:
        *folders, last = metadata.place(name)
        node: Any = tree
        for folder in folders:
            node = node.setdefault(folder, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise FormatError("is in the place of another entry", path=metadata.path, tensor=name)
        node[last] = metadata.leaf(name)
    return tree


def _state_dicts(
    metadata: Metadata, tree: Mapping[Any, object], key: str | None
) -> tuple[StateDicts, str | None]:
    """The state dicts in it, and the key as they have it.

    Where names are flat, a key is what they begin with. Where the optimizer's stand flat beside
    the model's, and nothing says how they were nested, that is `model` if all begin with it.
    """
    kept = {name: value for name, value in tree.items() if not _is_state_of_training(name)}
    if any(map(is_tensor, tree.values())) and not any(map(is_tensor, kept.values())):
        kept = {**tree}
    if left := [str(name) for name in tree if name not in kept and is_tensor(tree[name])]:
        log.info("left out %d tensors of the training's state, such as %s", len(left), left[0])
    key = key.removesuffix(".") if key else key
    found = find_state_dicts(kept, metadata.path, key)
    tensors = [name for name, value in kept.items() if is_tensor(value)]
    if key is None and "" in found and _is_flat(metadata, tree, kept):
        key = "model" if all(name.startswith("model.") for name in tensors) else None
    if key and key not in found and any(str(name).startswith(f"{key}.") for name in tensors):
        found = {key: _below(kept, f"{key}.")} | found
    return found, key


def _is_state_of_training(name: object) -> bool:
    """Whether a name at the top, or its first word where names are flat, is the optimizer's."""
    first, _, _ = _CHAINED.sub("", str(name)).partition(".")
    return _STATE_OF_TRAINING.fullmatch(first.lower()) is not None


def _is_flat(metadata: Metadata, tree: Mapping[Any, object], kept: Mapping[Any, object]) -> bool:
    """Whether the optimizer's tensors stand beside the model's, as nested names would be flat."""
    left_out = [name for name in tree if name not in kept and is_tensor(tree[name])]
    return bool(left_out) and not any(metadata.has_place(name) for name in left_out)


def _below(entries: Mapping[Any, object], prefix: str) -> dict[str, object]:
    return {
        name.removeprefix(prefix): value
        for name, value in entries.items()
        if isinstance(name, str) and name.startswith(prefix)
    }


def _describe(shards: Shards, values: Mapping[str, object]) -> tuple[dict[str, Tensor], Blocks]:
    """The tensors, and the part that they are in.

    They lie there with wide element types first, as the output has them, and then by name: torch's
    order changes with the ranks. So neighbours are the same in all, and averaged in one run.
    """
    leaves = {name: _readable(shards.path, name, value) for name, value in values.items()}
    order = sorted(leaves, key=lambda name: (-leaves[name].dtype.bits, name))
    boxes = shards.boxes({leaf.storage.key: leaf for leaf in leaves.values()})
    pieces = {
        name: Pieces.of(leaves[name].dtype, leaves[name].shape, boxes[leaves[name].storage.key])
        for name in order
    }
    blocks = Blocks(shards.path, list(pieces.values()))
    places = dict(zip(order, blocks.offsets, strict=True))
    numbers = {id(file): number for number, file in enumerate(shards.files.values(), 1)}
    return {name: _tensor(pieces[name], places[name], numbers) for name in order}, blocks


def _readable(path: Path, name: str, value: object) -> PickledTensor:
    if not isinstance(value, PickledTensor):
        reason = value.reason if isinstance(value, UnreadableTensor) else "no tensor"
        raise FormatError(f"cannot be averaged: {reason}", path=path, tensor=name)
    return value


def _tensor(tensor: Pieces, offset: int, numbers: Mapping[int, int]) -> Tensor:
    """A tensor's description; `numbers` has which part a file is."""
    dtype, shape = tensor.dtype, tensor.shape
    if len(tensor.boxes) == 1 and tensor.boxes[0].strides is not None:
        # The loop reads such tensors whole; in chunks, each would read nearly all of it again.
        [box] = tensor.boxes
        return Tensor(dtype, shape, numbers[id(box.source)], box.offset, box.strides)
    if dtype.kind == "packed" and shape:
        shape = (*shape[:-1], shape[-1] * 8 // dtype.bits)  # torch counts bytes
    return Tensor(dtype, shape, 0, offset)


def _facts(shards: Shards, tree: Mapping[Any, object]) -> dict[str, int | float]:
    """What is recorded at the top, or in torchtitan's `train_state`, of the training."""
    found: dict[str, object] = {}
    for folder in (*(tree.get(name) for name in _FACT_FOLDERS), tree):
        if isinstance(folder, Mapping):
            for name in folder.keys() & set(STEP_FACTS):
                with contextlib.suppress(FormatError):
                    found[name] = shards.number(folder[name])
    return training_facts(found)


def _lightning(path: Path) -> tuple[dict[str, int | float], TrainingRecord]:
    """What Lightning records in a file beside the shards."""
    meta = path / _LIGHTNING_META
    if not meta.is_file():
        return {}, TrainingRecord()
    archive = Archive.read(open_source(meta))
    root = archive.unpickle(archive.content("data.pkl"))
    record = training_record(
        root,
        path.name,
        lambda wanted: scalars(archive.file, wanted, archive.storages),
        whole=False,
    )
    return training_facts(root), record
