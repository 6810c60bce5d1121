"""Read `torch.distributed.checkpoint` directories: `.metadata`, and `*.distcp` files.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html. Each rank writes what it holds of
the tensors into files of its own. The model's pieces are put together while they are read (see
`blocks`), and nothing else is read.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError
from ckptavg.formats.blocks import Pieces, join
from ckptavg.formats.checkpoint import PROVENANCE, STEP_NAMES, Checkpoint
from ckptavg.formats.dcpfiles import METADATA, Metadata, Shards, stored_name
from ckptavg.formats.parts import open_source
from ckptavg.formats.pickled import is_tensor
from ckptavg.formats.recorded import training_record
from ckptavg.formats.statedict import choose, find_state_dicts
from ckptavg.formats.torchpickle import readable, scalars
from ckptavg.formats.torchzip import Archive

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import TrainingRecord
    from ckptavg.formats.pickled import PickledTensor
    from ckptavg.formats.statedict import StateDicts

_LIGHTNING_META = "meta.pt"
_CHAINED = re.compile(r"chained_\d+\.")  # Megatron's optimizers, where they are several
# Exact words: a model may have a `scaler` or a `down_sampler`.
_STATE_OF_TRAINING = re.compile(
    r"(optim|optims|optimizer|optimizers|opt|lr_scheduler|lr_schedulers|scheduler|schedulers"
    r"|rng|rng_state|rng_states|random_states)(_\d+)?"
)

log = logging.getLogger("ckptavg")


def matches(path: Path) -> bool:
    """Whether the directory has DCP's metadata or its shards."""
    return any(entry.name == METADATA or entry.suffix == ".distcp" for entry in path.iterdir())


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe the model's part of the state dict that was saved."""
    [checkpoint] = open_each(path, (key,))
    return checkpoint


def open_each(path: Path, keys: Sequence[str | None]) -> list[Checkpoint]:
    """Describe several state dicts of a directory, of which the metadata are read once."""
    if not (path / METADATA).exists():
        raise FormatError(f"has shards and no {METADATA}: was the saving interrupted?", path=path)
    metadata = Metadata(path)
    return [_describe(path, metadata, key) for key in keys]


def _describe(path: Path, metadata: Metadata, key: str | None) -> Checkpoint:
    shards = Shards(path, metadata)
    state_dicts, key = _state_dicts(metadata, key)
    chosen = choose(path, state_dicts, key)
    entries = state_dicts[chosen]
    values = {name: readable(v, path, name) for name, v in entries.items() if is_tensor(v)}
    others = shards.objects({name: v for name, v in entries.items() if name not in values})
    boxes = shards.boxes({value.storage.key: value for value in values.values()})
    pieces = {
        name: Pieces(value.dtype, value.shape, boxes[value.storage.key])
        for name, value in values.items()
    }
    parts, tensors = join(path, pieces, shards.files.values())
    return Checkpoint(
        path=path,
        container="dcp",
        parts=(*parts, metadata.file),
        tensors=tensors,
        metadata={} if metadata.provenance is None else {PROVENANCE: metadata.provenance},
        digest=metadata.digest,
        training=_training(path, metadata, shards),
        key=chosen,
        other_keys=tuple(name for name in state_dicts if name != chosen),
        other_content=len(entries) < len(metadata.names),
        other_entries=others,
        places={
            name: _place(metadata, stored, chosen, name)
            for name, value in entries.items()
            if (stored := stored_name(value)) is not None
        },
    )


def _state_dicts(metadata: Metadata, key: str | None) -> tuple[StateDicts, str | None]:
    """The state dicts in a checkpoint, and the key as they have it.

    Where names are flat, a key is a prefix of them. Where the optimizer's stand flat beside the
    model's, and it is not recorded how they were nested, the key is `model` if all of the model's
    begin with it.
    """
    tree = _tree(metadata)
    kept = {name: value for name, value in tree.items() if not _is_state_of_training(name)}
    if metadata.provenance is not None:
        kept = tree  # it has weights alone, whatever their names
    left_out = [name for name in tree if name not in kept and is_tensor(tree[name])]
    if left_out and not any(map(is_tensor, kept.values())):
        kept, left_out = tree, []
    if left_out:
        example = left_out[0]
        log.info("left out %d tensors of the training state, such as %s", len(left_out), example)
    key = key.removesuffix(".") if key else key
    found = find_state_dicts(kept, metadata.file.path, key)
    names = [str(name) for name, value in kept.items() if is_tensor(value)]
    if left_out and not metadata.places.keys() & set(left_out) and key is None and "" in found:
        key = "model" if all(name.startswith("model.") for name in names) else None
    prefix = f"{key}."
    if key and key not in found and any(name.startswith(prefix) for name in names):
        below = {str(name): value for name, value in kept.items() if str(name).startswith(prefix)}
        found = {key: {name.removeprefix(prefix): v for name, v in below.items()}} | found
    return found, key


def _tree(metadata: Metadata) -> dict[Any, Any]:
    """The state dict as it was nested when it was saved."""
    tree: dict[Any, Any] = {}
    for name in metadata.names:
        *folders, last = metadata.place(name)
        node: Any = tree
        for folder in folders:
            node = node.setdefault(folder, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            message = "has the place of another entry in the state dict"
            raise FormatError(message, path=metadata.file.path, tensor=name)
        node[last] = metadata.leaf(name)
    return tree


def _place(metadata: Metadata, flat: str, key: str, name: str) -> tuple[str | int, ...]:
    """Keys of an entry in the nested state dict. Where the key is a prefix, it becomes a folder."""
    place = metadata.place(flat)
    return (key, name) if place == (f"{key}.{name}",) else place


def _is_state_of_training(name: object) -> bool:
    """Whether a name at the top, or its first word where names are flat, is the optimizer's."""
    first, _, _ = _CHAINED.sub("", str(name)).partition(".")
    return _STATE_OF_TRAINING.fullmatch(first.lower()) is not None


def _training(path: Path, metadata: Metadata, shards: Shards) -> TrainingRecord:
    """What Lightning records in a file beside the shards, and the steps in the state dict."""
    root: Mapping[Any, object] = {}
    archive = None
    if (path / _LIGHTNING_META).is_file():
        archive = Archive(open_source(path / _LIGHTNING_META))
        content = archive.load()
        root = content if isinstance(content, Mapping) else {}

    def read_scalars(wanted: Mapping[str, PickledTensor]) -> Mapping[str, float]:
        return scalars(archive, wanted) if archive is not None else {}

    root = {**root, **_steps(metadata, shards)}
    return training_record(root, path.name, read_scalars, whole=False)


def _steps(metadata: Metadata, shards: Shards) -> dict[str, object]:
    """The steps at the top of the state dict, or else in torchtitan's `train_state`."""
    names = {metadata.place(name): name for name in metadata.names}
    steps: dict[str, object] = {}
    for folder in (("train_state",), ()):
        for step in STEP_NAMES:
            if name := names.get((*folder, step)):
                with contextlib.suppress(FormatError):
                    steps[step] = shards.number(name)
    return {step: number for step, number in steps.items() if number is not None}
