"""LoRA adapters: the factors of each module, and the scale of their product B @ A."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats.lora_config import (
    CONFIG,
    NETWORK_ALPHA,
    config_of,
    configs_of,
    recorded_settings,
)
from ckptavg.formats.lora_names import has_lora, lora_modules
from ckptavg.formats.modelfolders import ADAPTERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.lora_config import Config
    from ckptavg.formats.lora_names import Factor, LoraTensor
    from ckptavg.formats.tensors import Tensor


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter, whose modules add a multiple of B @ A to weights.

    Attributes:
        checkpoint: the checkpoint that holds its tensors.
        modules: the factors of each module, by the module's name and the kind of factor.
        configs: its configurations.
        alphas: values of the alphas that are tensors, by name.
    """

    checkpoint: Checkpoint
    modules: Mapping[str, Mapping[Factor, LoraTensor]]
    configs: tuple[Config, ...]
    alphas: Mapping[str, float]

    @staticmethod
    def read(checkpoint: Checkpoint) -> Adapter:
        """The adapter of a checkpoint.

        Raises:
            FormatError: it is not a plain LoRA adapter.
            SelectionError: it has no factors.
        """
        configs = configs_of(checkpoint)
        for config in configs:
            config.check_kind()
        modules = {
            module: _by_factor(checkpoint, module, tensors)
            for module, tensors in lora_modules(checkpoint.tensors).items()
        }
        if not modules:
            what, remedy = "has no LoRA factors", "leave `lora` out"
            raise SelectionError(what, path=checkpoint.path, remedy=remedy)
        return Adapter(checkpoint, modules, configs, _alphas(checkpoint))

    def tensor(self, module: str, factor: Factor) -> Tensor:
        """A tensor of a module."""
        return self.checkpoint.tensors[self.modules[module][factor].name]

    def records_alpha(self, module: str) -> bool:
        """Whether an alpha of a module is recorded, as a tensor or in a configuration."""
        has_config = config_of(self.configs, module) is not None
        return "alpha" in self.modules[module] or has_config

    def scale(self, module: str, rank: int) -> float:
        """The number by which a module's product B @ A is multiplied.

        Raises:
            FormatError: the alpha is not valid, or is not recorded.
        """
        factors, path = self.modules[module], self.checkpoint.path
        config = config_of(self.configs, module)
        if "alpha" in factors:
            name = factors["alpha"].name
            alpha = self.alphas.get(name, math.nan)
            if not alpha or not math.isfinite(alpha):
                raise FormatError("is not a valid alpha: not finite, or 0", path=path, tensor=name)
            return alpha / rank
        if config is not None:
            return config.scale(module, rank)
        scheme = factors["A"].scheme
        if not scheme.implies_rank:
            raise FormatError(
                f"has no alpha, without which the scale in a file of {scheme.kind} is unknown",
                path=path,
                tensor=module,
                remedy="merge each adapter into its model, and average the models "
                f"(PEFT records alpha in {CONFIG})",
            )
        recorded = self.checkpoint.metadata.get(NETWORK_ALPHA)
        if recorded not in (None, *map(str, (rank, float(rank)))):
            raise FormatError(
                f"has no alpha; the metadata record {printable(recorded)} as alpha, but loaders "
                f"would use the rank, {rank}",
                path=path,
                tensor=module,
            )
        return 1.0


def _by_factor(
    checkpoint: Checkpoint, module: str, tensors: Sequence[LoraTensor]
) -> dict[Factor, LoraTensor]:
    """The tensors of a module in a plain LoRA adapter.

    Raises:
        FormatError: it is not a plain LoRA adapter.
    """
    path = checkpoint.path
    factors: dict[Factor, LoraTensor] = {}
    for tensor in tensors:
        if tensor.factor == "other":
            raise FormatError(
                f"is a factor of {tensor.scheme.kind}, not of a plain product B @ A: there is no "
                "exact average",
                path=path,
                tensor=tensor.name,
                remedy="merge each adapter into its model, and average the models",
            )
        if tensor.factor in factors:
            raise FormatError(
                "belongs to a second adapter in one model",
                path=path,
                tensor=tensor.name,
                remedy="save the adapters one by one, as PEFT's save_pretrained does",
            )
        factors[tensor.factor] = tensor
    for kind in ("A", "B"):
        if kind not in factors:
            raise FormatError(f"has no LoRA factor {kind}", path=path, tensor=module)
    return factors


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an adapter, by the names of its tensors or of its file."""
    files = {checkpoint.path.stem, *checkpoint.models.values()}
    return has_lora(checkpoint.tensors) or not files.isdisjoint(ADAPTERS)


def recorded_scales(adapter: Checkpoint) -> dict[str, str]:
    """What an adapter records about its scales, by the name of the tensor or the setting."""
    alphas = {name: repr(value) for name, value in _alphas(adapter).items()}
    return {**recorded_settings(adapter), **alphas}


def _alphas(adapter: Checkpoint) -> dict[str, float]:
    """The alphas of modules that are tensors of one real number, by name."""
    modules = lora_modules(adapter.tensors).values()
    names = [each.name for tensors in modules for each in tensors if each.factor == "alpha"]
    by_part: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for name in names:
        tensor = adapter.tensors[name]
        if tensor.count == 1 and tensor.dtype.kind != "complex":
            by_part[tensor.part][name] = tensor
    alphas = {}
    for part, tensors in by_part.items():
        places = [(tensor.offset, tensor.nbytes) for tensor in tensors.values()]
        pieces = adapter.parts[part].read_many(places)
        for (name, tensor), data in zip(tensors.items(), pieces, strict=True):
            alphas[name] = float(np.frombuffer(data, tensor.dtype.numpy)[0])
    return alphas
