"""Read the directories that Hugging Face's libraries write: one file of weights, or shards.

transformers, PEFT and diffusers (`save_pretrained`), the Trainer (`checkpoint-500/`) and accelerate
(`save_state`). Shards are named in an index: https://huggingface.co/docs/transformers/big_models.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, printable
from ckptavg.formats import dcp, deepspeed
from ckptavg.formats.files import open_file
from ckptavg.formats.jsontext import from_text
from ckptavg.formats.recorded import trainer_record
from ckptavg.formats.remote import open_source
from ckptavg.formats.torchzip import Archive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import ModuleType

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import Tensor
    from ckptavg.formats.training import TrainingRecord

log = logging.getLogger("ckptavg")

INDEX = ".index.json"

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "pytorch_model_fsdp")
# In the order in which transformers looks for them; adapters last, as PEFT writes nothing else.
_WEIGHTS = (
    *(
        stem + ending
        for ending in (".safetensors", f".safetensors{INDEX}", ".bin", f".bin{INDEX}")
        for stem in _STEMS
    ),
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# Weights in a directory of their own: accelerate's sharded FSDP, DeepSpeed's engine.
_FOLDERS = re.compile(r"pytorch_model_fsdp_\d+|global_step\d+")
_SHARD = re.compile(rf"({'|'.join(_STEMS)})-\d+-of-\d+\.(safetensors|bin)")
# Beside a folder's own checkpoint stand these: a bare `global_step100/` among others is a
# checkpoint itself, and what holds it is but a directory of checkpoints.
_BESIDE_FOLDERS = {"trainer_state.json", "random_states_0.pkl"}
_LARGEST_JSON = 64 << 20
_LARGEST_STEP = 1 << 63


def matches(path: Path) -> bool:
    """Whether it is a directory with weights by the names of these libraries."""
    return _weights(path) is not None


def _weights(path: Path) -> str | None:
    """The file or folder of its weights, or a shard of those that have no index."""
    names = {entry.name for entry in path.iterdir()}
    for name in _WEIGHTS:
        if name in names:
            return name
    if names & _BESIDE_FOLDERS:
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
    """Whether Trainer or Accelerate wrote its own state into this directory."""
    return any((path / name).is_file() for name in _BESIDE_FOLDERS)


def weight_files(path: Path) -> frozenset[str]:
    """The names of the files that its weights are read from, all of them in the directory itself.

    Raises:
        FormatError: the index is damaged.
    """
    name = _weights(path)
    if name is None or (path / name).is_dir():
        return frozenset()
    shards = _weight_map(path / name).values() if name.endswith(INDEX) else ()
    return frozenset((name, *(shard for shard in shards if "/" not in shard)))


def stem(path: Path) -> str:
    """How the files of weights in such a directory are called when they are safetensors."""
    name = (_weights(path) or "").partition(".")[0]
    return name if name in ("adapter_model", "diffusion_pytorch_model") else "model"


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe the weights in it.

    Raises:
        FormatError: the index or a shard is damaged, missing, or does not fit the other.
    """
    name = _weights(path) or ""
    if _SHARD.fullmatch(name):
        raise FormatError(
            "has shards and no index of them: was the saving interrupted?", path=path / name
        )
    if name.endswith(INDEX):
        opened = _join(path, _open_shards(path, name, key))
    else:
        module = _folder_format(path / name)
        opened = module.open_checkpoint(path / name, key) if module else open_file(path / name, key)
    facts, training = _trainer(path)
    return replace(
        opened,
        path=path,
        container="huggingface",
        facts={**opened.facts, **facts},
        training=training or opened.training,
    )


def _open_shards(path: Path, index: str, key: str | None) -> Iterator[Checkpoint]:
    """The shards that an index names, each with all the tensors that it should have."""
    weight_map = _weight_map(path / index)
    wanted: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        wanted.setdefault(shard, set()).add(tensor)
    seen: dict[object, str] = {}
    for shard in sorted(wanted):
        file = path / shard
        if not _is_file(file, index):
            raise FormatError(f"is missing: {index} names it", path=file)
        opened = open_file(file, key)
        twin = seen.setdefault(opened.parts[0].identity, shard)
        if twin != shard:
            raise FormatError(f"is the same file as {printable(twin)}: a shard twice", path=file)
        _check_names(file, index, wanted[shard], opened.tensors)
        yield opened


def _is_file(file: Path, index: str) -> bool:
    try:
        return file.is_file()
    except OSError as error:  # of a name that is too long, say
        raise FormatError(
            f"cannot be read: {error.strerror}; {index} names it", path=file
        ) from error


def _check_names(file: Path, index: str, wanted: set[str], found: Mapping[str, Tensor]) -> None:
    for tensor in sorted(wanted - found.keys()):
        raise FormatError(f"is not in it, though {index} says so", path=file, tensor=tensor)
    for tensor in sorted(found.keys() - wanted):
        raise FormatError(
            f"is in it, and {index} does not say so: in two shards?", path=file, tensor=tensor
        )


def _join(path: Path, shards: Iterator[Checkpoint]) -> Checkpoint:
    """One checkpoint out of its shards."""
    opened = list(shards)
    tensors: dict[str, Tensor] = {}
    for number, shard in enumerate(opened):
        if len(shard.parts) != 1:
            raise FormatError("is no single file", path=shard.path)
        tensors |= {name: replace(tensor, part=number) for name, tensor in shard.tensors.items()}
    digest = hashlib.sha256("".join(shard.digest for shard in opened).encode()).hexdigest()
    first = opened[0]
    return replace(
        first,
        path=path,
        parts=tuple(shard.parts[0] for shard in opened),
        tensors=tensors,
        digest=digest,
        other_entries={name: v for shard in opened for name, v in shard.other_entries.items()},
        inner_tensors={},
        module_versions=None,
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to shard, as an index has them.

    Raises:
        FormatError: it is no such index, or names a file outside its directory.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("is no index: without a weight_map", path=index)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise FormatError(
                f"names {printable(shard)!r}, which is no file of its directory",
                path=index,
                tensor=tensor,
            )
    return {tensor: str(PurePosixPath(shard)) for tensor, shard in weight_map.items()}


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        bool(path.name) and not path.is_absolute() and not {"..", "\\", "\0"} & {*path.parts, *name}
    )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        FormatError: it is none, or has a key twice.
    """
    source = open_source(path)
    if source.size > _LARGEST_JSON:
        raise FormatError(f"is {source.size} bytes long", path=path)
    try:
        found = from_text(source.read(0, source.size).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is no valid JSON: {printable(error)}", path=path) from error
    if not isinstance(found, dict):
        raise FormatError("is no JSON object", path=path)
    return found


def _trainer(path: Path) -> tuple[dict[str, int | float], TrainingRecord | None]:
    """What the Trainer records beside the weights; the scheduler file has the rate."""
    state = path / "trainer_state.json"
    if not state.is_file():
        return {}, None
    said = read_json(state)
    record = trainer_record(said, _scheduler(path))
    facts: dict[str, int | float] = {}
    step = said.get("global_step")
    if type(step) is int and 0 <= step < _LARGEST_STEP:
        facts["global_step"] = step
    if record.learning_rate is not None:
        facts["learning_rate"] = record.learning_rate
    return facts, record


def _scheduler(path: Path) -> object:
    """What the scheduler's file describes; None where there is none that can be read."""
    file = path / "scheduler.pt"
    if not file.is_file():
        return None
    try:
        return Archive.read(open_source(file)).load()
    except FormatError as error:
        log.info("%s: its learning rate is not known", error)
        return None
