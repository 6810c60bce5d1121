"""Lay out a directory as Hugging Face's `save_pretrained` does: weights, index, configuration.

https://huggingface.co/docs/transformers/big_models. The weights are safetensors, in one file or in
shards with an index; what else the last checkpoint has for `from_pretrained` comes along.
"""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, OutputError, printable
from ckptavg.formats import huggingface
from ckptavg.formats.jsontext import read_json
from ckptavg.formats.parts import open_source
from ckptavg.formats.words import is_no_checkpoint
from ckptavg.merge.jobs import FileLayout, Layout, StoredTensor
from ckptavg.write.safetensors import lay_out_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.jobs import OutputTensor

log = logging.getLogger("ckptavg")

# State of the training, other weights, and logs: what `from_pretrained` has no use for.
_LEFT_BEHIND = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|tar|pkl|msgpack|h5|onnx|gguf|distcp|lock|tmp)"
    r"|.*\.index\.json|trainer_state\.json|zero_to_fp32\.py|latest|events\.out\..*"
)
_FOLDERS_ALONG = ("additional_chat_templates",)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_QUANTIZATION = ("quantization_config", "compression_config")


def lay_out_directory(
    path: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    last: Checkpoint,
    *,
    max_shard_size: int | None,
    replaced: Mapping[str, bytes],
) -> Layout:
    """Lay out the directory.

    Args:
        path: the output.
        tensors: in the order of their bytes in the output.
        metadata: strings for the header of each file of weights.
        last: the checkpoint whose configuration comes along.
        max_shard_size: bytes of tensors in a file; None for what the last checkpoint has.
        replaced: files that are not as the last checkpoint has them, by name.

    Raises:
        OutputError: the format has no such dtype or name.
    """
    has_name = last.container in ("huggingface", "safetensors")
    stem = huggingface.stem(last.path) if has_name else "model"
    shards = _by_name(in_shards(tensors, max_shard_size or _largest_shard(last)), stem)
    if len(shards) > 1 and stem in huggingface.ADAPTERS:
        raise OutputError("no library reads an adapter in shards", path=path)
    files: dict[str, FileLayout] = {}
    targets: list[tuple[int, ...]] = []
    size = 0
    for name, shard in shards.items():
        layout = lay_out_safetensors(path / name, shard, metadata)
        files[name] = layout.files[""]
        targets += [tuple(size + start for start in starts) for starts in layout.targets]
        size += layout.size
    texts = dict(replaced)
    if len(shards) > 1:
        texts = {f"{stem}.safetensors{huggingface.INDEX}": _index(shards), **texts}
    for name, text in texts.items():
        files[name] = FileLayout(len(text), ((0, text),))
        size += len(text)
    along = {name: file for name, file in _files_along(last) if name not in files}
    _mention_weights_left_behind(last, {*files, *along})
    copies = []
    for name, file in along.items():
        source = open_source(file)
        files[name] = FileLayout(source.size)
        copies.append((StoredTensor.of_bytes(source, 0, source.size), size))
        size += source.size
    return Layout(path, files, tuple(targets), tuple(copies))


def _largest_shard(last: Checkpoint) -> int | None:
    """Bytes of the largest of the last checkpoint's shards, if it has several."""
    sizes = [part.size for part in last.parts if part.identity is not None]
    return max(sizes) if last.container == "huggingface" and len(sizes) > 1 else None


def in_shards(tensors: Sequence[OutputTensor], max_size: int | None) -> list[list[OutputTensor]]:
    """The tensors of each file of weights. A tensor larger than a shard fills one alone.

    Args:
        tensors: in the order of their bytes in the output.
        max_size: bytes of tensors in a file; None for one file.
    """
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = tensor.nbytes * len(tensor.names)
        if shards[-1] and max_size is not None and size + nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _by_name(shards: Sequence[list[OutputTensor]], stem: str) -> dict[str, list[OutputTensor]]:
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def _index(shards: Mapping[str, Sequence[OutputTensor]]) -> bytes:
    weight_map = {
        name: file for file, shard in shards.items() for tensor in shard for name in tensor.names
    }
    total = sum(
        tensor.nbytes * len(tensor.names) for shard in shards.values() for tensor in shard
    )  # fmt: skip
    return _to_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _to_json(value: Mapping[str, Any]) -> bytes:
    """A configuration file as Hugging Face's libraries write it."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _files_along(last: Checkpoint) -> Iterator[tuple[str, Path]]:
    """What comes along from the last checkpoint: configuration, tokenizer, code."""
    if last.container != "huggingface":
        return
    for entry in _entries(last.path):
        if entry.is_dir():
            inside = _entries(entry) if entry.name in _FOLDERS_ALONG else ()
            yield from ((f"{entry.name}/{file.name}", file) for file in inside if file.is_file())
        elif entry.is_file() and not _LEFT_BEHIND.fullmatch(entry.name):
            yield entry.name, entry
        elif not _LEFT_BEHIND.fullmatch(entry.name):
            raise FormatError("is no regular file, or a link to nothing", path=entry)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda entry: entry.name)


def _mention_weights_left_behind(last: Checkpoint, brought: set[str]) -> None:
    """Warn of weights beside those that were averaged, which the output will lack."""
    if last.container != "huggingface":
        log.warning(
            "%s has no configuration that could come along: the directory has weights alone",
            printable(last.path.name),
        )
        return
    known = huggingface.weight_files(last.path) | brought
    left = [
        printable(entry.name)
        for entry in _entries(last.path)
        if entry.name not in known and _has_weights(entry) and not is_no_checkpoint(entry.name)
    ]
    if left:
        log.warning(
            "not averaged and not brought along, though it has weights: %s", ", ".join(left)
        )


def _has_weights(entry: Path) -> bool:
    files = entry.iterdir() if entry.is_dir() else ()
    return any(file.suffix in _WEIGHTS for file in (entry, *files))


def with_dtype(folder: Path, dtype: str) -> dict[str, bytes]:
    """The `config.json` of a directory with another dtype, in which libraries load the weights.

    Args:
        folder: the checkpoint's directory.
        dtype: torch's name of it.

    Returns:
        The file's content by its name; nothing where it has no dtype.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    changed = _with_dtype(config, dtype)
    return {path.name: _to_json(changed)} if changed != config else {}


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Change the dtype in a configuration and in those nested in it, but for quantization."""
    changed = dict(config)
    for name, value in config.items():
        if name in ("dtype", "torch_dtype"):
            changed[name] = dtype
        elif isinstance(value, dict) and name not in _QUANTIZATION:
            changed[name] = _with_dtype(value, dtype)
    return changed
