"""The configuration of LoRA adapters, which gives the scales of their products B @ A."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, printable
from ckptavg.formats.jsontext import from_text, read_json
from ckptavg.formats.lora_names import is_alpha
from ckptavg.formats.lora_patterns import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""The configurations of all components, in the metadata of what diffusers saves."""
NETWORK_ALPHA = "ss_network_alpha"
"""The alpha that kohya-ss records in the metadata, beside the tensors of all modules' alphas."""

_LARGEST_ALPHA = 1e9
_WRAPPER = "base_model.model."
# Settings with which an adapter is not B @ A, or changes the base weights depending on the rank.
_OTHER_KINDS = (
    "use_dora", "use_qalora", "use_bdlora", "target_parameters", "kasa_config",
    "monteclora_config", "arrow_config",
)  # fmt: skip
_RANK_DEPENDENT = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Kinds of PEFT that add multiples of their tensors to weights or inputs: these can be averaged.
_LINEAR = {
    "IA3", "LN_TUNING", "BEFT", "MISS", "BONE", "SHIRA", "C3A", "FOURIERFT", "WAVEFT", "FROD",
    "TINYLORA", "TRAINABLE_TOKENS", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT",
    "CARTRIDGE",
}  # fmt: skip
_LORA_SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# Settings of other kinds that say nothing about what their tensors do.
_WITHOUT_EFFECT = re.compile(
    r"base_model_name_or_path|revision|auto_mapping|task_type|inference_mode|peft_version|bias"
    r"|(target|exclude)_modules|modules_to_save|.*dropout.*|tokenizer_.*|prompt_tuning_init.*"
)


@dataclass(frozen=True)
class Config:
    """The configuration of an adapter, or of its part for one component of a pipeline.

    Attributes:
        path: the file that has it.
        content: its settings.
        component: what the names of its modules begin with: `unet.` for a component of a pipeline,
            `ref/` for an adapter in a folder; empty for the whole adapter.
    """

    path: Path
    content: Mapping[str, Any]
    component: str = ""

    @property
    def kind(self) -> str:
        """The kind that PEFT gives it, such as LORA; as a text, whatever the file has."""
        return str(self.content.get("peft_type"))

    @property
    def is_linear(self) -> bool:
        """Whether the average of the adapter's tensors does what adapters do on average."""
        return self.kind in _LINEAR

    @property
    def settings(self) -> dict[str, str]:
        """The settings that decide what the adapter's tensors do, as texts."""
        names: Iterable[str] = _LORA_SETTINGS
        if self.kind != "LORA":
            names = (name for name in self.content if not _WITHOUT_EFFECT.fullmatch(name))
        values = {name: self.content.get(name) for name in names}
        return {  # lists that were sets come in any order; what is off may be missing
            self.component + name: repr(
                sorted(value, key=repr) if isinstance(value, list) else value
            )
            for name, value in values.items()
            if value or type(value) in (int, float)
        }

    def check_kind(self) -> None:
        """Refuse what is not plain LoRA, a sum of products B @ A.

        Raises:
            FormatError: the adapter is of another kind.
        """
        kind, start = self.kind, self.content.get("init_lora_weights")
        if self.is_linear:
            raise FormatError(
                f"is of type {kind}, whose tensors are averaged exactly one by one",
                path=self.path,
                remedy="leave `lora` out",
            )
        setting = next((name for name in _OTHER_KINDS if self.content.get(name)), None)
        if kind != "LORA" or setting is not None:
            what = f"has {setting}" if kind == "LORA" else f"is of type {printable(kind)}"
            raise FormatError(
                f"{what}: such an adapter is not a plain product B @ A, and has no exact average",
                path=self.path,
                remedy="merge each adapter into its model, and average the models",
            )
        if isinstance(start, str) and start.lower().startswith(_RANK_DEPENDENT):
            raise FormatError(
                f"was initialised with {printable(start)}, which changes the base weights",
                path=self.path,
                remedy="convert the adapters to plain LoRA when they are saved "
                "(path_initial_model_for_weight_conversion)",
            )

    def scale(self, module: str, rank: int) -> float:
        """The number by which a module's product B @ A is multiplied.

        Args:
            module: name of the module.
            rank: rank of its factors, which already follows the `rank_pattern`.

        Raises:
            FormatError: the configuration gives none.
        """
        name = module.removeprefix(self.component).removeprefix(_WRAPPER)
        alpha = self._alphas.first(name, self.content.get("lora_alpha"))
        if not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST_ALPHA:  # such as NaN
            raise FormatError(f"has no lora_alpha for {printable(name)}", path=self.path)
        return float(alpha) / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    @cached_property
    def _alphas(self) -> Patterns:
        patterns = self.content.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise FormatError("its alpha_pattern is not a mapping", path=self.path)
        return Patterns(patterns, self.path)


def configs_of(checkpoint: Checkpoint) -> tuple[Config, ...]:
    """The configurations of adapters: PEFT's files beside them, or diffusers' metadata in one.

    Raises:
        FormatError: one is not valid JSON.
    """
    path = checkpoint.path
    files = {"": path.parent / CONFIG}
    if path.is_dir():
        longest_first = sorted(checkpoint.models, key=len, reverse=True)
        files = {prefix: path / f"{prefix}{CONFIG}" for prefix in longest_first}
    existing = {prefix: file for prefix, file in files.items() if file.is_file()}
    if existing:
        return tuple(Config(file, read_json(file), prefix) for prefix, file in existing.items())
    text = checkpoint.metadata.get(METADATA)
    if text is None:
        return ()
    try:
        settings = from_text(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its {METADATA} is not valid JSON", path=path) from error
    if not isinstance(settings, dict):
        raise FormatError(f"its {METADATA} is not a JSON object", path=path)
    components: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        component, dot, setting = name.partition(".")
        components.setdefault(component + dot, {})[setting] = value
    return tuple(Config(path, content, name) for name, content in components.items())


def recorded_settings(checkpoint: Checkpoint) -> dict[str, str]:
    """What an adapter records about its scales, apart from tensors, by the name of the setting."""
    settings: dict[str, str] = {}
    for config in configs_of(checkpoint):
        settings |= config.settings
    if NETWORK_ALPHA in checkpoint.metadata and not any(map(is_alpha, checkpoint.tensors)):
        settings[NETWORK_ALPHA] = checkpoint.metadata[NETWORK_ALPHA]
    return settings


def config_of(configs: Sequence[Config], module: str) -> Config | None:
    """The configuration of a module; None where it has none."""
    return next((each for each in configs if module.startswith(each.component)), None)


def joined_settings(
    last: Checkpoint, configs: Sequence[Config], ranks: Mapping[str, int]
) -> tuple[dict[str, bytes], dict[str, str]]:
    """The files and metadata of an average of adapters, in which each alpha is the rank.

    Args:
        last: the last adapter.
        configs: its configurations.
        ranks: rank of each module in the average, by the module's name.

    Returns:
        The files beside the weights by name, and the metadata in their header.
    """
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    metadata = dict(last.metadata)
    # kohya-ss records the arguments of the network that was trained.
    metadata.pop("ss_network_args", None)
    metadata |= {name: str(rank) for name in ("ss_network_dim", NETWORK_ALPHA) if name in metadata}
    files: dict[str, bytes] = {}
    settings: dict[str, Any] = {}
    for config in configs:
        in_component = {
            module.removeprefix(config.component).removeprefix(_WRAPPER): rank
            for module, rank in ranks.items()
            if config_of(configs, module) is config
        }
        content = (
            {**config.content, **_joined_ranks(in_component)} if in_component else config.content
        )
        if config.path.name != CONFIG:
            settings |= {config.component + name: value for name, value in content.items()}
        else:
            files[config.component + CONFIG] = (json.dumps(content, indent=2) + "\n").encode()
    if settings:
        metadata[METADATA] = json.dumps(settings, indent=2, sort_keys=True)
    return files, metadata


def _joined_ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The settings of PEFT with which the scale of each module is 1."""
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    pattern: dict[str, int] = {}
    if len(set(ranks.values())) > 1:
        # PEFT takes the first pattern that matches the end of a module's name: long ones first.
        pattern = {name: ranks[name] for name in sorted(ranks, key=lambda name: (-len(name), name))}
    return {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
