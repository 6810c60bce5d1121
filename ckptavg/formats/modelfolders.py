"""Where the weights are in a directory that Hugging Face's libraries wrote, by names alone.

A directory may hold several models: the modules of sentence-transformers, the components of a
pipeline of diffusers, the models that accelerate saved together, the adapters of PEFT. They are one
checkpoint, in which the names of the tensors begin with the place of the model:
`2_Dense/linear.weight`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, SelectionError, listed
from ckptavg.formats import dcp, deepspeed
from ckptavg.formats.files import open_file
from ckptavg.formats.jsontext import read_any_json
from ckptavg.formats.paths import is_inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet
    from pathlib import Path
    from types import ModuleType

ADAPTERS = ("adapter_model", "pytorch_lora_weights")
"""Prefixes of the files of adapters that PEFT and diffusers write; neither reads shards."""

NUMBERED = re.compile(
    r"(global_step|step|iter|iteration|epoch|checkpoint|ckpt)[-_=]?\d.*", re.IGNORECASE
)
"""Names of checkpoints in a folder that holds weights itself."""

_INDEX = ".index.json"

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "pytorch_model_fsdp")
_ENDINGS = (".safetensors", f".safetensors{_INDEX}", ".bin", f".bin{_INDEX}")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# Names of weights in the order in which transformers looks for them; PEFT writes adapters only.
_WEIGHTS = (*(stem + ending for ending in _ENDINGS for stem in _STEMS), *_ADAPTERS)
# The argument `variant` of `save_pretrained` is a part of all names: `model.fp16.safetensors`.
_VARIANT = r"(fp8|fp16|bf16|fp32|ema|non_ema)"
_OF_VARIANT = re.compile(
    rf"({'|'.join(_STEMS)})\.({_VARIANT}\.(safetensors|bin)"
    rf"|(safetensors|bin)\.index\.{_VARIANT}\.json)"
)
_IS_INDEX = re.compile(rf".*\.index(\.{_VARIANT})?\.json")
_SHARD = re.compile(rf"({'|'.join(_STEMS)})(\.{_VARIANT})?-\d+-of-\d+\.(safetensors|bin)")
# Folders of weights in a checkpoint: accelerate's sharded FSDP, and DeepSpeed's engine.
_FOLDERS = re.compile(r"pytorch_model_fsdp_0|global_step\d+")
# The second model that accelerate saved in one checkpoint, and so on.
_FURTHER = re.compile(
    r"(pytorch_)?model(_fsdp)?_(?P<number>[1-9]\d*)\.(safetensors|bin)"
    r"|pytorch_model_fsdp_(?P<of_folder>[1-9]\d*)"
)
_ACCELERATE = "random_states_0.pkl"
# Beside these files a `global_step100/` belongs to a checkpoint; elsewhere it is one itself.
_TRAINER_FILES = {"trainer_state.json", _ACCELERATE}
# What names the folders of a model of sentence-transformers, and of a pipeline of diffusers.
_MODULES, _PIPELINE = "modules.json", "model_index.json"
# PEFT writes further adapters of a model into folders with their names.
_ADAPTER = "adapter_config.json"


def find_weights(path: Path) -> dict[str, str]:
    """The weights of each model in a directory.

    Returns:
        The name of a file, an index or a folder below the directory, by what the names of the
        tensors begin with: `{"": "model.safetensors", "2_Dense/": "2_Dense/model.safetensors"}`.

    Raises:
        FormatError: the file that names the models' folders is damaged.
    """
    names = _names_in(path)
    weights = {}
    if name := _weights_among(names, path):
        weights = {"": name, **_further_models(path / name, names)}
    for folder in model_folders(path):
        if name := _weights_among(_names_in(path / folder), path / folder):
            weights[f"{folder}/"] = f"{folder}/{name}"
    return weights


def _names_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def _weights_among(names: AbstractSet[str], path: Path) -> str | None:
    """The weights of one model: a file, an index or a folder; a shard where the index is missing.

    Of weights that are saved in several ways, these are what `from_pretrained` takes by default.
    """
    for name in _WEIGHTS:
        if name in names:
            return name
    if names & _TRAINER_FILES:
        folders = [name for name in sorted(names) if _FOLDERS.fullmatch(name)]
        if len(folders) == 1 and folder_format(path / folders[0]) is not None:
            return folders[0]
    if "config.json" in names:
        variants = sorted(filter(_OF_VARIANT.fullmatch, names), key=lambda name: ".bin" in name)
        if variants:
            return variants[0]
    return next((name for name in sorted(names) if _SHARD.fullmatch(name)), None)


def _further_models(first: Path, names: AbstractSet[str]) -> dict[str, str]:
    """The second model of accelerate's `save_state`, or of an average of those, and so on.

    Elsewhere files with such names are checkpoints of a series.
    """
    matches = filter(None, map(_FURTHER.fullmatch, sorted(names, reverse=True)))
    further = {f"model_{match['number'] or match['of_folder']}/": match[0] for match in matches}
    if not further or _ACCELERATE in names:
        return further
    is_average = first.suffix == ".safetensors" and open_file(first, None).is_average
    return further if is_average else {}


def model_folders(path: Path) -> list[str]:
    """The folders below a directory that its model needs, as a file in it says.

    Raises:
        FormatError: the file is damaged.
    """
    named: list[object] = []
    if (path / _MODULES).is_file():
        modules = read_any_json(path / _MODULES)
        if isinstance(modules, list):
            named += [module.get("path") for module in modules if isinstance(module, dict)]
    if (path / _PIPELINE).is_file():
        components = read_any_json(path / _PIPELINE)
        if isinstance(components, dict):
            named += [name for name, classes in components.items() if isinstance(classes, list)]
    if (path / _ADAPTER).is_file():
        names = sorted(_names_in(path))
        named += [n for n in names if (path / n / _ADAPTER).is_file() and not NUMBERED.fullmatch(n)]
    folders = [name for name in named if isinstance(name, str) and is_inside(name)]
    return [*dict.fromkeys(below for name in folders for below in _folder_and_below(path, name))]


def _folder_and_below(path: Path, name: str) -> Iterator[str]:
    """A folder and all folders in it, by their names below a path; empty if it is not a folder."""
    if (path / name).is_dir():
        yield name
        for inner in sorted((path / name).iterdir(), key=lambda inner: inner.name):
            # A link may lead back to where it is.
            if not inner.name.startswith(".") and not inner.is_symlink():
                yield from _folder_and_below(path, f"{name}/{inner.name}")


def folder_format(path: Path) -> ModuleType | None:
    """The module that reads a folder of weights; None for files and for other folders."""
    if not path.is_dir():
        return None
    return next((module for module in (dcp, deepspeed) if module.matches(path)), None)


def has_trainer_state(path: Path) -> bool:
    """Whether the Trainer or accelerate wrote the state of a training into the directory."""
    return any((path / name).is_file() for name in _TRAINER_FILES)


def is_index(name: str) -> bool:
    """Whether a file with this name is an index of shards."""
    return _IS_INDEX.fullmatch(name) is not None


def check_weights(file: Path) -> None:
    """Check by its name that a file has all of a model's weights, and that no other has.

    Raises:
        FormatError: it is a shard, and there is no index.
        SelectionError: there are several variants of the weights, and nothing else.
    """
    if _SHARD.fullmatch(file.name):
        problem = "has shards and no index of them, as if the saving was interrupted"
        raise FormatError(problem, path=file)
    if not _OF_VARIANT.fullmatch(file.name):
        return
    variants = {_variant(name) for name in _names_in(file.parent) if _OF_VARIANT.fullmatch(name)}
    if len(variants) > 1:
        raise SelectionError(
            f"has several variants of the weights: {listed(sorted(variants))}",
            path=file.parent,
            remedy="name the files to average",
        )


def _variant(name: str) -> str:
    match = re.search(rf"\.{_VARIANT}\.", name)
    return match[1] if match else ""


def output_stem(name: str, prefix: str = "") -> str:
    """Where a library writes the weights of a model as safetensors, without the ending.

    Args:
        name: that of the weights: `unet/diffusion_pytorch_model.fp16.bin`.
        prefix: what the names of the tensors begin with, for a further model of accelerate.
    """
    folder, slash, file = name.rpartition("/")
    stem, variant = file.partition(".")[0], _variant(file)
    if stem not in (*ADAPTERS, "diffusion_pytorch_model"):
        stem = "model"
    if prefix and not folder:
        stem = prefix.removesuffix("/")
    return f"{folder}{slash}{stem}{'.' if variant else ''}{variant}"
