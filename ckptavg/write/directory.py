"""Lay out a directory as Hugging Face's `save_pretrained` does: weights, index, configuration.

https://huggingface.co/docs/transformers/big_models. The weights of each model are safetensors, in
one file or in shards with an index; what else the last checkpoint has for `from_pretrained` comes
along.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptavg.errors import OutputError
from ckptavg.formats.modelfolders import ADAPTERS, output_stem
from ckptavg.formats.parts import open_source
from ckptavg.merge.jobs import FileLayout, Layout, StoredTensor
from ckptavg.write.companions import configurations_with_dtype, files_along
from ckptavg.write.safetensors import lay_out_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.jobs import OutputTensor


def lay_out_directory(
    path: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    last: Checkpoint,
    *,
    dtype: str | None,
    max_shard_size: int | None,
    replaced: Mapping[str, bytes],
) -> Layout:
    """Lay out the directory.

    Args:
        path: the output.
        tensors: in the order of their bytes in the output.
        metadata: strings for the header of each file of weights.
        last: the checkpoint whose configuration comes along.
        dtype: torch's name of the dtype in which libraries are to load the weights; None for that
            of the last checkpoint.
        max_shard_size: bytes of tensors in a file; None for what the last checkpoint has.
        replaced: files that are not as the last checkpoint has them, by name.

    Raises:
        OutputError: the format has no such dtype or name.
    """
    files: dict[str, FileLayout] = {}
    targets: list[tuple[int, ...]] = [()] * len(tensors)
    size = 0
    models = last.models
    if last.container == "safetensors":
        models = {"": output_stem(last.path.name)}
    for prefix, numbers in _by_model(tensors, models).items():
        model = [tensors[number] for number in numbers]
        layout = _lay_out_model(
            path / models[prefix], [_without_prefix(tensor, prefix) for tensor in model],
            metadata, max_shard_size or _largest_shard(last, model),
        )  # fmt: skip
        folder = models[prefix].rpartition("/")[0]
        files |= {
            f"{folder}/{name}" if folder else name: file for name, file in layout.files.items()
        }
        for number, starts in zip(numbers, layout.targets, strict=True):
            targets[number] = tuple(size + start for start in starts)
        size += layout.size
    along = files_along(last)
    texts = dict(replaced)
    if dtype is not None:
        configurations = configurations_with_dtype(along, dtype)
        texts = {name: _to_json(config) for name, config in configurations.items()} | texts
    for name, text in texts.items():
        files[name] = FileLayout(len(text), ((0, text),))
        size += len(text)
    copies = []
    for name, file in along.items():
        if name not in files:
            source = open_source(file)
            files[name] = FileLayout(source.size)
            copies.append((StoredTensor.of_bytes(source, 0, source.size), size))
            size += source.size
    return Layout(path, files, tuple(targets), tuple(copies))


def _lay_out_model(
    stem: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    max_shard_size: int | None,
) -> Layout:
    """The files of a model's weights, in one folder, and the index of them if they are several.

    Raises:
        OutputError: the format has no such dtype or name, or the model cannot be in several files.
    """
    shards = _by_name(in_shards(tensors, max_shard_size), stem.name)
    files: dict[str, FileLayout] = {}
    targets: list[tuple[int, ...]] = []
    size = 0
    for name, shard in shards.items():
        layout = lay_out_safetensors(stem.parent / name, shard, metadata)
        files[name] = layout.files[""]
        targets += [tuple(size + start for start in starts) for starts in layout.targets]
        size += layout.size
    if len(shards) > 1:
        if stem.name in ADAPTERS:
            raise OutputError("no library reads an adapter in shards", path=stem.parent)
        text = _index(shards)
        files[_index_name(stem.name)] = FileLayout(len(text), ((0, text),))
    return Layout(stem.parent, files, tuple(targets))


def _by_model(tensors: Sequence[OutputTensor], prefixes: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of each model's tensors, by what their names begin with."""
    numbers: dict[str, list[int]] = {}
    longest_first = sorted(prefixes, key=len, reverse=True)
    for number, tensor in enumerate(tensors):
        prefix = next(prefix for prefix in longest_first if tensor.names[0].startswith(prefix))
        numbers.setdefault(prefix, []).append(number)
    return numbers


def _without_prefix(tensor: OutputTensor, prefix: str) -> OutputTensor:
    return replace(tensor, names=tuple(name.removeprefix(prefix) for name in tensor.names))


def _largest_shard(last: Checkpoint, tensors: Sequence[OutputTensor]) -> int | None:
    """Bytes of the largest of the last checkpoint's shards of a model, if it has several."""
    if last.container != "huggingface":
        return None
    parts = {last.tensors[tensor.names[0]].part for tensor in tensors}
    sizes = [last.parts[part].size for part in parts if last.parts[part].identity is not None]
    return max(sizes) if len(sizes) > 1 else None


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


def _index_name(stem: str) -> str:
    """`model.safetensors.index.fp16.json` for `model.fp16`."""
    base, dot, variant = stem.partition(".")
    return f"{base}.safetensors.index{dot}{variant}.json"


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
