"""What a directory needs beside its weights: configuration, tokenizer, folders without weights."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, listed, printable
from ckptavg.formats import huggingface
from ckptavg.formats.jsontext import read_json
from ckptavg.formats.modelfolders import model_folders
from ckptavg.formats.words import is_no_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

log = logging.getLogger("ckptavg")

# State of the training, other weights, and logs: what `from_pretrained` has no use for.
_LEFT_BEHIND = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|tar|pkl|msgpack|h5|onnx|gguf|distcp|lock|tmp)"
    r"|.*\.index\.(.*\.)?json|trainer_state\.json|zero_to_fp32\.py|latest|events\.out\..*"
)
_FOLDERS_ALONG = ("additional_chat_templates",)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_QUANTIZATION = ("quantization_config", "compression_config")
# SetFit's classifier: an object of scikit-learn.
_HEAD = "model_head.pkl"
# Files that say of which kind a model is.
_CONFIGURED_BY = {"config.json", "adapter_config.json", "modules.json", "model_index.json"}
# What libraries read beside the weights, by the names that they give to it.
_CONFIGURATION = re.compile(
    r"(.*_)?config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\..*|merges\.txt|.*\.model|chat_template\..*"
)


def files_along(last: Checkpoint) -> dict[str, Path]:
    """The files that come along from the last checkpoint, by their names below the directory.

    Raises:
        FormatError: it is no file.
    """
    if last.container != "huggingface":
        log.warning(
            "%s has no configuration to copy: the output has only weights",
            printable(last.path.name),
        )
        return {}
    along = _configuration_above(last.path)
    for folder in ("", *model_folders(last.path)):
        along |= _files_in(last.path, folder)
    if _HEAD in along:
        log.warning(
            "%s is a pickled classifier, which is copied from %s and not averaged; fit it again",
            _HEAD, printable(last.name),
        )  # fmt: skip
    return along


def _files_in(path: Path, folder: str) -> dict[str, Path]:
    """The files that come along from a folder of a checkpoint, by their names below that."""
    prefix = f"{folder}/" if folder else ""
    along: dict[str, Path] = {}
    for entry in _entries(path / folder if folder else path):
        name = entry.name
        if entry.is_dir():
            inside = _entries(entry) if name in _FOLDERS_ALONG else ()
            along |= {f"{prefix}{name}/{file.name}": file for file in inside if file.is_file()}
        elif name == _HEAD or not _LEFT_BEHIND.fullmatch(name):
            if not entry.is_file():
                raise FormatError("is not a regular file, or is a broken link", path=entry)
            along[prefix + name] = entry
    return along


def _configuration_above(path: Path) -> dict[str, Path]:
    """The configuration in the folder around a checkpoint that has none, by name."""
    above = path.parent
    if any((path / name).is_file() for name in _CONFIGURED_BY):
        return {}
    if not (above / "config.json").is_file():
        return {}
    along = {
        entry.name: entry
        for entry in _entries(above)
        if entry.is_file() and _CONFIGURATION.fullmatch(entry.name)
    }
    log.info(
        "%s has no config.json; copied from the directory above it: %s",
        printable(path.name), listed(along, 20),
    )  # fmt: skip
    return along


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda entry: entry.name)


def mention_weights_left_behind(last: Checkpoint) -> None:
    """Warn of weights in a directory that are not averaged: those of other models, and variants."""
    if last.container != "huggingface":
        return
    folders = model_folders(last.path)
    known = huggingface.weight_files(last.path)
    left = []
    for folder in ("", *folders):
        for entry in _entries(last.path / folder if folder else last.path):
            name = entry.relative_to(last.path).as_posix()
            is_known = name in known or name in folders or is_no_checkpoint(entry.name)
            if not is_known and _has_weights(entry):
                left.append(name)
    if left:
        names = listed(left, 20)
        log.warning("has weights, but is neither averaged nor copied: %s", names)


def _has_weights(entry: Path) -> bool:
    files = entry.iterdir() if entry.is_dir() else ()
    return any(file.suffix in _WEIGHTS for file in (entry, *files))


def configurations_with_dtype(along: Mapping[str, Path], dtype: str) -> dict[str, dict[str, Any]]:
    """The configurations with another dtype, in which libraries load the weights.

    Args:
        along: what comes along, by name.
        dtype: torch's name of it.

    Returns:
        The content of each `config.json` that has a dtype, by its name.
    """
    names = [name for name in along if name.rpartition("/")[2] == "config.json"]
    configurations = {name: read_json(along[name]) for name in names}
    changed = {name: _with_dtype(config, dtype) for name, config in configurations.items()}
    return {name: config for name, config in changed.items() if config != configurations[name]}


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Change the dtype in a configuration and in those nested in it, but for quantization."""
    changed = dict(config)
    for name, value in config.items():
        if name in ("dtype", "torch_dtype"):
            changed[name] = dtype
        elif isinstance(value, dict) and name not in _QUANTIZATION:
            changed[name] = _with_dtype(value, dtype)
    return changed
