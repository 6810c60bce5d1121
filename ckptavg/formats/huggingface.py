"""Read the directories that Hugging Face's libraries write: one file of weights, or shards.

transformers, PEFT and diffusers (`save_pretrained`), the Trainer (`checkpoint-500/`) and accelerate
(`save_state`). Shards are named in an index: https://huggingface.co/docs/transformers/big_models.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ckptavg import formats
from ckptavg.errors import FormatError, printable
from ckptavg.parts import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.checkpoint import Checkpoint
    from ckptavg.tensors import Tensor

log = logging.getLogger("ckptavg")

SUFFIXES = ()
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
_OWN = re.compile(
    rf"({'|'.join(_STEMS)}|adapter_model)(_\d+)?(-\d+-of-\d+)?\.(safetensors|bin)({INDEX})?"
)
_LARGEST_JSON = 256 << 20


def matches(path: Path, head: bytes) -> bool:
    """Whether it is a directory with weights by the names of these libraries."""
    return not head and path.is_dir() and _weights(path) is not None


def is_own(name: str) -> bool:
    """Whether an entry of such a directory belongs to its own weights, by its name."""
    return bool(_OWN.fullmatch(name) or _FOLDERS.fullmatch(name))


def _weights(path: Path) -> str | None:
    """The file or folder of its weights."""
    names = {entry.name for entry in path.iterdir()}
    for name in _WEIGHTS:
        if name in names:
            return name
    folders = (name for name in sorted(names) if _FOLDERS.fullmatch(name))
    # Beside a folder's own checkpoint stand the Trainer's files: a bare `global_step100/` among
    # others is a checkpoint itself, and what holds it is but a directory of checkpoints.
    if not names & {"trainer_state.json", "random_states_0.pkl", "config.json"}:
        return None
    return next((name for name in folders if formats.is_checkpoint_directory(path / name)), None)


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
    if name.endswith(INDEX):
        opened = _join(path, _open_shards(path, name, key))
    else:
        opened = formats.open_checkpoint(path / name, key=key)
    return replace(
        opened,
        path=path,
        container="huggingface",
        facts={**opened.facts, **_trainer_facts(path)},
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
        if not file.is_file():
            raise FormatError(f"is missing: {index} names it", path=file)
        opened = formats.open_checkpoint(file, key=key)
        twin = seen.setdefault(opened.parts[0].identity, shard)
        if twin != shard:
            raise FormatError(f"is the same file as {printable(twin)}: a shard twice", path=file)
        _check_names(file, index, wanted[shard], opened.tensors)
        yield opened


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
        found = json.loads(source.read(0, source.size), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is no valid JSON: {printable(error)}", path=path) from error
    if not isinstance(found, dict):
        raise FormatError("is no JSON object", path=path)
    return found


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} twice")
        found[key] = value
    return found


def _trainer_facts(path: Path) -> dict[str, int | float]:
    """What the Trainer records beside the weights."""
    file = path / "trainer_state.json"
    if not file.is_file():
        return {}
    step = read_json(file).get("global_step")
    return {"global_step": step} if type(step) is int and step >= 0 else {}
