"""The `adapter_config.json` of LoRA adapters: the scales of their products B @ A."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats.jsontext import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "adapter_config.json"

_LARGEST_ALPHA = 1e9
_LONGEST_PATTERN, _LONGEST_NAME = 500, 300
# What lets a match take exponential time, or nearly: repeated groups, or many repetitions (the `?`
# of `(?:` is none) or choices.
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_REPETITION = re.compile(r"[*+}]|(?<!\()\?")
_MOST_REPETITIONS = _MOST_CHOICES = 3

_WRAPPER = "base_model.model."
# Settings with which an adapter is not B @ A, or changes the base weights depending on the rank.
_OTHER_KINDS = (
    "use_dora", "use_qalora", "use_bdlora", "target_parameters", "kasa_config",
    "monteclora_config", "arrow_config",
)  # fmt: skip
_RANK_DEPENDENT = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SCALE_SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Config:
    """The configuration of an adapter.

    Attributes:
        path: its file.
        content: the JSON object in it.
    """

    path: Path
    content: Mapping[str, Any]

    @staticmethod
    def read(folder: Path) -> Config:
        """Read the configuration in the directory of an adapter.

        Raises:
            FormatError: the adapter is not plain LoRA, a sum of products B @ A.
            SelectionError: there is no configuration.
        """
        path = folder / CONFIG
        if not folder.is_dir() or not path.is_file():
            raise SelectionError(
                f"no directory with {CONFIG}, which has the scales of its LoRA factors",
                path=folder,
                remedy="name the directories that PEFT wrote",
            )
        config = Config(path, read_json(path))
        config._check_kind()
        return config

    def _check_kind(self) -> None:
        kind, start = self.content.get("peft_type"), self.content.get("init_lora_weights")
        setting = next((name for name in _OTHER_KINDS if self.content.get(name)), None)
        if kind != "LORA" or setting is not None:
            what = f"has {setting}" if kind == "LORA" else f"is of type {printable(kind)}"
            raise FormatError(
                f"{what}: such an adapter is no plain product B @ A, and its average none either",
                path=self.path,
                remedy="merge each adapter into its model, and average the models",
            )
        if isinstance(start, str) and start.lower().startswith(_RANK_DEPENDENT):
            raise FormatError(
                f"was begun with {printable(start)}, which changes the base weights by the rank",
                path=self.path,
                remedy="convert the adapters to plain LoRA when they are saved "
                "(path_initial_model_for_weight_conversion)",
            )

    @property
    def scales(self) -> tuple[object, ...]:
        """Equal for two adapters whose factors are multiplied by the same scales."""
        return tuple(repr(self.content.get(name)) for name in _SCALE_SETTINGS)

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's product B @ A.

        Args:
            module: name of the module.
            rank: rank of its factors, which already follows the `rank_pattern`.

        Raises:
            FormatError: the configuration gives none.
        """
        name = module.removeprefix(_WRAPPER)
        alpha = self.content.get("lora_alpha")
        patterns = self.content.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise FormatError("its alpha_pattern is no mapping", path=self.path)
        for pattern, value in patterns.items():
            if self._matches(pattern, name):
                alpha = value
                break
        if not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST_ALPHA:  # such as NaN
            raise FormatError(f"has no lora_alpha for {printable(name)}", path=self.path)
        return float(alpha) / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    def _matches(self, pattern: str, name: str) -> bool:
        """Whether PEFT applies a pattern to a module; those that could take forever are refused."""
        if (
            len(name) > _LONGEST_NAME
            or len(pattern) > _LONGEST_PATTERN
            or _REPEATED_GROUP.search(pattern) is not None
            or len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS
            or min(pattern.count("("), pattern.count("|")) > _MOST_CHOICES
        ):
            raise FormatError(
                f"its alpha_pattern {printable(pattern)!r} is too intricate", path=self.path
            )
        try:
            with warnings.catch_warnings(action="ignore"):  # about syntax that may change
                return re.match(rf"(.*\.)?({pattern})$", name) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(
                f"its alpha_pattern {printable(pattern)!r} is no pattern", path=self.path
            ) from error


def joined_config(last: Mapping[str, Any], ranks: Mapping[str, int]) -> bytes:
    """The configuration of an average of adapters, whose scale is 1.

    Args:
        last: the configuration of the last adapter.
        ranks: rank of each module in the average, by the module's name.
    """
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    pattern: dict[str, int] = {}
    if len(set(ranks.values())) > 1:
        by_name = {module.removeprefix(_WRAPPER): rank for module, rank in ranks.items()}
        # PEFT takes the first pattern that matches the end of a module's name: long ones first.
        names = sorted(by_name, key=lambda name: (-len(name), name))
        pattern = {name: by_name[name] for name in names}
    changed = {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    return (json.dumps({**last, **changed}, indent=2) + "\n").encode()


def scales_beside(path: Path) -> tuple[object, ...]:
    """What the configuration in an adapter's directory says of its scales; empty without one.

    Raises:
        FormatError: it is no valid JSON.
    """
    file = path / CONFIG
    if not path.is_dir() or not file.is_file():
        return ()
    return Config(file, read_json(file)).scales
