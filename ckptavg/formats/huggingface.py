"""Read the directories that Hugging Face's libraries write: one file of weights, or shards.

transformers, PEFT and diffusers (`save_pretrained`), the Trainer (`checkpoint-500/`) and accelerate
(`save_state`). Shards are named in an index: https://huggingface.co/docs/transformers/big_models.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, printable
from ckptavg.formats import dcp, deepspeed
from ckptavg.formats.files import open_file
from ckptavg.formats.jsontext import read_json
from ckptavg.formats.parts import is_inside, open_source
from ckptavg.formats.recorded import trainer_record
from ckptavg.formats.torchzip import Archive

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from pathlib import Path
    from types import ModuleType

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import Tensor

log = logging.getLogger("ckptavg")

INDEX = ".index.json"
ADAPTERS = ("adapter_model", "pytorch_lora_weights")
"""What the names of adapters begin with that PEFT and diffusers write; neither reads shards."""

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "pytorch_model_fsdp")
_ENDINGS = (".safetensors", f".safetensors{INDEX}", ".bin", f".bin{INDEX}")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# Names of weights in the order in which transformers looks for them; PEFT writes adapters only.
_WEIGHTS = (*(stem + ending for ending in _ENDINGS for stem in _STEMS), *_ADAPTERS)
_SHARD = re.compile(rf"({'|'.join(_STEMS)})-\d+-of-\d+\.(safetensors|bin)")
# Folders of weights in a checkpoint: accelerate's sharded FSDP, and DeepSpeed's engine.
_FOLDERS = re.compile(r"pytorch_model_fsdp_\d+|global_step\d+")
# Beside these files a `global_step100/` belongs to a checkpoint; elsewhere it is one itself.
_TRAINER_FILES = {"trainer_state.json", "random_states_0.pkl"}


def matches(path: Path) -> bool:
    """Whether the directory has weights under a name that these libraries use."""
    return _weights(path) is not None


def _weights(path: Path) -> str | None:
    """Name of the weights: a file, an index or a folder; a shard where the index is missing."""
    names = {entry.name for entry in path.iterdir()}
    for name in _WEIGHTS:
        if name in names:
            return name
    if names & _TRAINER_FILES:
        folders = [name for name in sorted(names) if _FOLDERS.fullmatch(name)]
        if len(folders) == 1 and _folder_format(path / folders[0]) is not None:
            return folders[0]
    return next((name for name in sorted(names) if _SHARD.fullmatch(name)), None)


def _folder_format(path: Path) -> ModuleType | None:
    """The module that reads a folder of weights; None for files and for other folders."""
    if not path.is_dir():
        return None
    return next((module for module in (dcp, deepspeed) if module.matches(path)), None)


def has_trainer_state(path: Path) -> bool:
    """Whether the Trainer or accelerate wrote the state of a training into the directory."""
    return any((path / name).is_file() for name in _TRAINER_FILES)


def weight_files(path: Path) -> frozenset[str]:
    """The names of the files in the directory that the weights are read from, and of their index.

    Raises:
        FormatError: the index is damaged.
    """
    name = _weights(path)
    if name is None or (path / name).is_dir():
        return frozenset()
    shards = _weight_map(path / name).values() if name.endswith(INDEX) else ()
    return frozenset((name, *(shard for shard in shards if "/" not in shard)))


def stem(path: Path) -> str:
    """What the name of the weights begins with where a library writes them as safetensors.

    Args:
        path: a directory, or the file of an adapter that diffusers writes into a directory.
    """
    file = path.name if path.is_file() else _weights(path)
    name = (file or "").partition(".")[0]
    return name if name in (*ADAPTERS, "diffusion_pytorch_model") else "model"


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe the weights in the directory.

    Raises:
        FormatError: the index or a shard is damaged or missing, or they contradict each other.
    """
    name = _weights(path) or ""
    if _SHARD.fullmatch(name):
        raise FormatError(
            "has shards and no index of them: was the saving interrupted?", path=path / name
        )
    module = _folder_format(path / name)
    if name.endswith(INDEX):
        opened = _open_shards(path, name, key)
    elif module is not None:
        opened = module.open_checkpoint(path / name, key)
    else:
        opened = open_file(path / name, key)
    return _with_trainer_state(replace(opened, path=path, container="huggingface"))


def _open_shards(path: Path, index: str, key: str | None) -> Checkpoint:
    """One checkpoint of the shards that an index names."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    for tensor, shard in _weight_map(path / index).items():
        names[shard].add(tensor)
    shards: list[Checkpoint] = []
    tensors: dict[str, Tensor] = {}
    first_names: dict[object, str] = {}
    for part, shard in enumerate(sorted(names)):
        file = path / shard
        _check_is_file(file, index)
        opened = open_file(file, key)
        first_name = first_names.setdefault(opened.parts[0].identity, shard)
        if first_name != shard:
            raise FormatError(
                f"is the same file as {printable(first_name)}: a shard twice", path=file
            )
        _check_names(file, index, names[shard], opened.tensors.keys())
        tensors |= {name: replace(tensor, part=part) for name, tensor in opened.tensors.items()}
        shards.append(opened)
    return replace(
        shards[0],
        parts=tuple(shard.parts[0] for shard in shards),
        tensors=tensors,
        digest=hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest(),
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
        raise FormatError(f"is not in it, though {index} says so", path=file, tensor=tensor)
    for tensor in sorted(actual - expected):
        raise FormatError(
            f"is in it, and {index} does not say so: in two shards?", path=file, tensor=tensor
        )


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, as an index file says.

    Raises:
        FormatError: it is not an index, or names a file outside its directory.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("is no index: without a weight_map", path=index)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_inside(shard):
            raise FormatError(
                f"names {printable(shard)!r}, which is no file of its directory",
                path=index,
                tensor=tensor,
            )
    return weight_map


def _with_trainer_state(checkpoint: Checkpoint) -> Checkpoint:
    """Add what the Trainer records in files beside the weights."""
    file = checkpoint.path / "trainer_state.json"
    if not file.is_file():
        return checkpoint
    record = trainer_record(read_json(file), _scheduler(checkpoint.path))
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
