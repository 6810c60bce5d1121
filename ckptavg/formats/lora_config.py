"""The `adapter_config.json` of LoRA adapters: what their products are multiplied by."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats.huggingface import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "adapter_config.json"

_LARGEST_ALPHA = 1e9
_LONGEST_PATTERN = 500
# What makes a match take exponential time, or nearly so: repeated groups, many repetitions (of a
# `(?:` that is none), many choices.
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_REPETITION = re.compile(r"[*+}]|(?<!\()\?")
_MOST_REPETITIONS = _MOST_CHOICES = 3
_LONGEST_NAME = 300

_WRAPPER = "base_model.model."
# What makes an adapter something else than B @ A, or its base weights depend on the rank.
_OTHER_KINDS = (
    "use_dora", "use_qalora", "use_bdlora", "target_parameters", "kasa_config",
    "monteclora_config", "arrow_config",
)  # fmt: skip
_RANK_DEPENDENT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Config:
    """What an `adapter_config.json` says of ranks and scales."""

    path: Path
    content: Mapping[str, Any]

    @staticmethod
    def read(folder: Path) -> Config:
        """Read and check it.

        Raises:
            FormatError: it is no LoRA of the plain kind.
            SelectionError: there is none.
        """
        path = folder / CONFIG
        if not folder.is_dir() or not path.is_file():
            raise SelectionError(
                f"no directory with {CONFIG}, which has the scales of its LoRA factors",
                path=folder,
                remedy="name the directories that PEFT wrote",
            )
        config = Config(path, read_json(path))
        config.check()
        return config

    def check(self) -> None:
        """Refuse what is not a sum of products B @ A."""
        kind = self.content.get("peft_type")
        other = next((name for name in _OTHER_KINDS if self.content.get(name)), None)
        start = self.content.get("init_lora_weights")
        if kind != "LORA" or other is not None:
            what = f"has {other}" if kind == "LORA" else f"is of type {printable(kind)}"
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
        """What decides how the factors of this adapter multiply."""
        return tuple(
            repr(self.content.get(name))
            for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        )

    def scale(self, module: str, rank: int) -> float:
        """What a module's product is multiplied by.

        Args:
            module: its name.
            rank: of its factors, which `rank_pattern` has already decided.
        """
        name = module.removeprefix(_WRAPPER)
        alpha = self.content.get("lora_alpha")
        patterns = self.content.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise FormatError("its alpha_pattern is no mapping", path=self.path)
        for pattern, value in patterns.items():
            if self._fits(pattern, name):
                alpha = value
                break
        number = float("nan")
        if isinstance(alpha, int | float) and abs(alpha) <= _LARGEST_ALPHA:
            number = float(alpha)
        if not math.isfinite(number):
            raise FormatError(f"has no lora_alpha for {printable(name)}", path=self.path)
        return number / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    def _fits(self, pattern: str, name: str) -> bool:
        """Whether a pattern is meant for a module, as PEFT matches it.

        It comes from a file: one that could take for ever is not tried.
        """
        if len(name) > _LONGEST_NAME or _is_endless(pattern):
            raise FormatError(
                f"its alpha_pattern {printable(pattern)!r} is too intricate", path=self.path
            )
        try:
            with warnings.catch_warnings(action="ignore"):  # of what may mean another thing one day
                return re.match(rf"(.*\.)?({pattern})$", name) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(
                f"its alpha_pattern {printable(pattern)!r} is no pattern", path=self.path
            ) from error


def _is_endless(pattern: str) -> bool:
    return (
        len(pattern) > _LONGEST_PATTERN
        or _REPEATED_GROUP.search(pattern) is not None
        or len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS
        or min(pattern.count("("), pattern.count("|")) > _MOST_CHOICES
    )


def joined_config(last: Mapping[str, Any], ranks: Mapping[str, int]) -> bytes:
    """The last adapter's configuration with the ranks of the average, and with a scale of 1."""
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    # PEFT takes the first pattern that fits the end of a module's name: longer ones come first.
    names = sorted((module.removeprefix(_WRAPPER) for module in ranks), key=lambda n: (-len(n), n))
    uneven = len(set(ranks.values())) > 1
    own = {module.removeprefix(_WRAPPER): value for module, value in ranks.items()}
    pattern = {name: own[name] for name in names} if uneven else {}
    changed = {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    return (json.dumps({**last, **changed}, indent=2) + "\n").encode()


def scales_beside(path: Path) -> tuple[object, ...]:
    """What the configuration in an adapter's directory says of its scales; nothing without one.

    Raises:
        FormatError: it is no valid JSON.
    """
    file = path / CONFIG
    if not path.is_dir() or not file.is_file():
        return ()
    return Config(file, read_json(file)).scales
