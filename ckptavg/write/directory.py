"""Lay out a directory as Hugging Face's `save_pretrained` does: weights, index, configuration.

https://huggingface.co/docs/transformers/big_models. The weights are safetensors, in one file or in
shards with an index; what else the last checkpoint has for `from_pretrained` comes along.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, OutputError, printable
from ckptavg.formats import huggingface
from ckptavg.formats.jsontext import read_json
from ckptavg.formats.remote import open_source
from ckptavg.merge.layout import Copy, FileLayout, Layout
from ckptavg.select.candidates import is_no_checkpoint
from ckptavg.write.safetensors import lay_out_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.layout import OutputTensor

log = logging.getLogger("ckptavg")

# State of the training, other weights, and logs: what `from_pretrained` has no use for.
_NOT_ALONG = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|tar|pkl|msgpack|h5|onnx|gguf|distcp|lock|tmp)"
    r"|.*\.index\.json|trainer_state\.json|zero_to_fp32\.py|latest|events\.out\..*"
)
_FOLDERS_ALONG = ("additional_chat_templates",)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_ADAPTER = "adapter_model"


def lay_out_directory(
    path: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    last: Checkpoint,
    *,
    max_shard_size: int | None = None,
    replaced: Mapping[str, bytes] | None = None,
) -> Layout:
    """Lay out the directory.

    Args:
        path: the output, for messages.
        tensors: in the order in which they are to stand.
        metadata: strings for the header of each file of weights.
        last: the checkpoint whose configuration comes along.
        max_shard_size: bytes of tensors in a file; None for what the last checkpoint has.
        replaced: files that are not to be as the last checkpoint has them.

    Raises:
        OutputError: the format has no such dtype or name.
    """
    stem = huggingface.stem(last.path) if last.container == "huggingface" else "model"
    shards = list(_shards(tensors, max_shard_size or _own_shard_size(last)))
    if len(shards) > 1 and stem == _ADAPTER:
        raise OutputError("PEFT reads no adapter in shards", path=path)
    files: dict[str, FileLayout] = {}
    targets: list[tuple[int, ...]] = []
    base = 0
    names = _shard_names(stem, len(shards))
    for name, shard in zip(names, shards, strict=True):
        laid_out = lay_out_safetensors(path / name, shard, metadata)
        files |= {name: laid_out.files[""]}
        targets += [tuple(base + start for start in starts) for starts in laid_out.targets]
        base += laid_out.size
    if len(shards) > 1:
        index = _index(dict(zip(names, shards, strict=True)))
        files[f"{stem}.safetensors{huggingface.INDEX}"] = _of_bytes(index)
    files |= {name: _of_bytes(data) for name, data in (replaced or {}).items()}
    along = {name: file for name, file in _companions(last) if name not in files}
    _mention_what_stays(last, {*files, *along})
    copies = []
    base = sum(file.size for file in files.values())
    for name, file in along.items():
        source = open_source(file)
        files[name] = FileLayout(source.size)
        copies.append(Copy(source, 0, source.size, base))
        base += source.size
    return Layout(files, tuple(targets), tuple(copies))


def _mention_what_stays(last: Checkpoint, brought: set[str]) -> None:
    """Warn of weights beside those that were averaged, which the output will lack."""
    if last.container != "huggingface":
        log.warning(
            "%s has no configuration that could come along: the directory has weights alone",
            printable(last.path.name),
        )
        return
    own = huggingface.weight_files(last.path)
    left = [
        entry.name
        for entry in sorted(last.path.iterdir(), key=lambda entry: entry.name)
        if entry.name not in own | brought
        and (entry.suffix in _WEIGHTS or (entry.is_dir() and _holds_weights(entry)))
        and not is_no_checkpoint(entry.name)
    ]
    if left:
        shown = ", ".join(map(printable, left))
        log.warning("not averaged and not brought along, though it has weights: %s", shown)


def _holds_weights(folder: Path) -> bool:
    return any(entry.suffix in _WEIGHTS for entry in folder.iterdir())


def _own_shard_size(last: Checkpoint) -> int | None:
    """The size of the largest of the last checkpoint's shards, if it has several."""
    sizes = [part.size for part in last.parts if part.identity is not None]
    return max(sizes) if last.container == "huggingface" and len(sizes) > 1 else None


def _shards(
    tensors: Sequence[OutputTensor], max_shard_size: int | None
) -> Iterator[list[OutputTensor]]:
    """Fill one after the other; a tensor that is larger than a shard has one of its own."""
    shard: list[OutputTensor] = []
    filled = 0
    for tensor in tensors:
        nbytes = tensor.nbytes * len(tensor.names)
        if shard and max_shard_size is not None and filled + nbytes > max_shard_size:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += nbytes
    yield shard


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _index(shards: Mapping[str, Sequence[OutputTensor]]) -> bytes:
    tensors = list(itertools.chain(*shards.values()))
    weight_map = {
        name: file for file, shard in shards.items() for tensor in shard for name in tensor.names
    }
    total = sum(tensor.nbytes * len(tensor.names) for tensor in tensors)
    return to_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def to_json(value: Mapping[str, Any]) -> bytes:
    """A configuration file as these libraries write it."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _of_bytes(data: bytes) -> FileLayout:
    return FileLayout(len(data), ((0, data),))


def _companions(last: Checkpoint) -> Iterator[tuple[str, Path]]:
    """What comes along from the last checkpoint: configuration, tokenizer, code."""
    if last.container != "huggingface":
        return
    for entry in sorted(last.path.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name in _FOLDERS_ALONG:
            for inner in sorted(entry.iterdir(), key=lambda inner: inner.name):
                if inner.is_file():
                    yield f"{entry.name}/{inner.name}", inner
        elif _NOT_ALONG.fullmatch(entry.name):
            continue
        elif entry.is_file():
            yield entry.name, entry
        elif not entry.is_dir():
            raise FormatError("is no regular file, or a link to nothing", path=entry)


def with_dtype(folder: Path, dtype: str) -> dict[str, bytes]:
    """The configuration of a directory with another dtype, in which `from_pretrained` loads it."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    stale = {name: dtype for name in config if name in ("dtype", "torch_dtype")}
    return {path.name: to_json({**config, **stale})} if stale else {}
