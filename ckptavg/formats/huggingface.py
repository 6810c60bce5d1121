"""Read the directories that Hugging Face's libraries write: one file of weights, or shards.

transformers, PEFT and diffusers (`save_pretrained`), the Trainer (`checkpoint-500/`) and accelerate
(`save_state`). Shards are named in an index: https://huggingface.co/docs/transformers/big_models.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats.files import open_file
from ckptavg.formats.jsontext import read_json
from ckptavg.formats.modelfolders import (
    check_weights,
    find_weights,
    folder_format,
    is_index,
    output_stem,
)
from ckptavg.formats.parts import open_source
from ckptavg.formats.paths import is_inside
from ckptavg.formats.recorded import trainer_record
from ckptavg.formats.torchzip import Archive

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.parts import Part
    from ckptavg.formats.tensors import Tensor

log = logging.getLogger("ckptavg")


def matches(path: Path) -> bool:
    """Whether the directory has weights under a name that these libraries use."""
    return bool(find_weights(path))


def weight_files(path: Path) -> frozenset[str]:
    """The names below the directory of what the weights are read from, and of their indexes.

    Raises:
        FormatError: an index is damaged.
    """
    files = set()
    for name in find_weights(path).values():
        files.add(name)
        if is_index(name):
            folder = name.rpartition("/")[0]
            shards = _weight_map(path / name).values()
            files |= {f"{folder}/{shard}" if folder else shard for shard in shards}
    return frozenset(files)


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe the weights in the directory.

    Raises:
        FormatError: an index or a shard is damaged or missing, or they contradict each other.
        SelectionError: it is unclear which weights are wanted.
    """
    weights = find_weights(path)
    opened = {prefix: _open_weights(path / name, key) for prefix, name in weights.items()}
    return replace(
        _with_trainer_state(_joined(opened), path),
        path=path,
        container="huggingface",
        models={prefix: output_stem(name, prefix) for prefix, name in weights.items()},
    )


def architecture(path: Path) -> str | None:
    """The class of transformers that a directory's configuration names; None if there is none.

    It is for messages alone: nothing that a checkpoint names is imported.
    """
    try:
        config = read_json(path / "config.json")
    except (CkptAvgError, OSError):
        return None
    match config:
        case {"architectures": [str() as name, *_]} if "auto_map" not in config:
            return name if name.isidentifier() else None
    return None


def _open_weights(path: Path, key: str | None) -> Checkpoint:
    """The weights of one model: in a file, in the shards of an index, or in a folder."""
    check_weights(path)
    if is_index(path.name):
        return _open_shards(path, key)
    module = folder_format(path)
    if module is None:
        return open_file(path, key)
    checkpoint: Checkpoint = module.open_checkpoint(path, key)
    return checkpoint


def _joined(opened: Mapping[str, Checkpoint]) -> Checkpoint:
    """One checkpoint of several models, by what the names of their tensors begin with."""
    if list(opened) == [""]:
        return opened[""]
    parts: list[Part] = []
    tensors: dict[str, Tensor] = {}
    entries: dict[str, object] = {}
    for prefix, model in opened.items():
        for name, tensor in model.tensors.items():
            tensors[prefix + name] = replace(tensor, part=len(parts) + tensor.part)
        entries |= {prefix + name: entry for name, entry in model.other_entries.items()}
        parts += model.parts
    first = next(iter(opened.values()))
    return replace(
        first,
        parts=tuple(parts),
        tensors=tensors,
        digest=_digest_of(opened.values()),
        names=(),
        other_entries=entries,
        inner_tensors={},
        module_versions=None,
    )


def _digest_of(checkpoints: Iterable[Checkpoint]) -> str:
    return hashlib.sha256("".join(each.digest for each in checkpoints).encode()).hexdigest()


def _open_shards(index: Path, key: str | None) -> Checkpoint:
    """One checkpoint of the shards that an index names."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    for tensor, shard in _weight_map(index).items():
        names[shard].add(tensor)
    shards: list[Checkpoint] = []
    tensors: dict[str, Tensor] = {}
    first_names: dict[object, str] = {}
    for part, shard in enumerate(sorted(names)):
        file = index.parent / shard
        _check_is_file(file, index.name)
        opened = open_file(file, key)
        first_name = first_names.setdefault(opened.parts[0].identity, shard)
        if first_name != shard:
            raise FormatError(
                f"is the same file as {printable(first_name)}: the same shard twice", path=file
            )
        _check_names(file, index.name, names[shard], opened.tensors.keys())
        tensors |= {name: replace(tensor, part=part) for name, tensor in opened.tensors.items()}
        shards.append(opened)
    return replace(
        shards[0],
        parts=tuple(shard.parts[0] for shard in shards),
        tensors=tensors,
        digest=_digest_of(shards),
        other_entries={
            name: entry for shard in shards for name, entry in shard.other_entries.items()
        },
        inner_tensors={},
        module_versions=None,
    )


def _check_is_file(file: Path, index: str) -> None:
    try:
        is_file = file.is_file()
    except OSError as error:  # such as a name that is too long
        what = f"cannot be read: {error.strerror}; {index} names it"
        raise FormatError(what, path=file) from error
    if not is_file:
        raise FormatError(f"is missing: {index} names it", path=file)


def _check_names(
    file: Path, index: str, expected: AbstractSet[str], actual: AbstractSet[str]
) -> None:
    """Raise a FormatError if a shard has other tensors than the index says."""
    for tensor in sorted(expected - actual):
        raise FormatError(
            f"is missing from it, although {index} lists it", path=file, tensor=tensor
        )
    for tensor in sorted(actual - expected):
        raise FormatError(
            f"is in it, but {index} lists it elsewhere: is it in two shards?",
            path=file,
            tensor=tensor,
        )


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, as an index file says.

    Raises:
        FormatError: it is not an index, or names a file outside its directory.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("is not an index: it has no weight_map", path=index)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_inside(shard):
            raise FormatError(
                f"names {printable(shard)!r}, which is not a file in its directory",
                path=index,
                tensor=tensor,
            )
    return weight_map


def _with_trainer_state(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Add what the Trainer records in files of a directory."""
    file = path / "trainer_state.json"
    if not file.is_file():
        return checkpoint
    record = trainer_record(read_json(file), _scheduler(path))
    steps = {**checkpoint.training.steps, **record.steps}
    return replace(checkpoint, training=replace(record, steps=steps))


def _scheduler(path: Path) -> object:
    """The content of the scheduler's file; None if it is missing or damaged."""
    file = path / "scheduler.pt"
    if not file.is_file():
        return None
    try:
        return Archive(open_source(file)).load()
    except FormatError as error:
        log.info("%s: its learning rate is not known", error)
        return None
