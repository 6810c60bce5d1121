"""The names of the tensors of low-rank adapters, by the library that writes them.

An adapter adds `scale * B @ A` to the weight of a module, with `scale = alpha / rank`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

Factor = Literal["A", "B", "bias", "alpha", "other"]
"""A tensor of an adapter: the down-projection A, the up-projection B and its bias, their alpha, or
`other`, which belongs to an adapter that is not a plain product B @ A."""


@dataclass(frozen=True)
class Scheme:
    """How the tensors of one kind of adapter are named.

    Attributes:
        kind: the name of the kind, for messages.
        factors: for each factor, a regular expression for what follows the module's name.
        module: a regular expression for a dot and the module's name.
        implies_rank: whether loaders use the rank as alpha if no alpha is recorded.
    """

    kind: str
    factors: Mapping[Factor, str]
    module: str = ".*"
    implies_rank: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The regular expression that a dot and a name match. The last group is the factor.

        A dot matches line breaks too: where `.+` can fail, long names take quadratic time.
        """
        factors = "|".join(f"(?P<{factor}>{text})" for factor, text in self.factors.items())
        return re.compile(f"(?P<module>{self.module})(?:{factors})", re.DOTALL)


# In a model, PEFT adds the adapter's name after the factor's: `lora_A.default.weight`.
_ADAPTER = r"(?:\.[^.]+)?"
# Parts of a pipeline, which precede the names that PEFT gives.
_COMPONENT = r"\.(?:unet|transformer|text_encoder|prior|diffusion_model)(?:_\d+)?\..+"
_ALPHA = ".alpha"  # behind the module's name, in all schemes
_SCHEMES = (
    Scheme(
        "diffusers",
        {"A": r"\.lora_A\.weight", "B": r"\.lora_B\.weight", "bias": r"\.lora_B\.bias"},
        module=_COMPONENT,
        implies_rank=True,
    ),
    Scheme(
        "diffusers before PEFT",
        {
            "A": r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight",
            "B": r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight",
        },
        implies_rank=True,
    ),
    Scheme(
        "kohya-ss",
        {"A": r"\.lora_down\.weight", "B": r"\.lora_up\.weight"},
        implies_rank=True,
    ),
    Scheme(
        "PEFT",
        {
            "A": rf"\.lora_A{_ADAPTER}\.weight|\.lora_embedding_A{_ADAPTER}",
            "B": rf"\.lora_B{_ADAPTER}\.weight|\.lora_embedding_B{_ADAPTER}",
            "bias": rf"\.lora_B{_ADAPTER}\.bias",
        },
    ),
    Scheme("loralib", {"A": r"\.lora_A", "B": r"\.lora_B"}),
    Scheme("DoRA", {"other": r"\.(?:dora_scale|lora_magnitude_vector(?:\..+)?)"}),
    Scheme("LoKr", {"other": r"\.lokr_.+"}),
    Scheme("LoHa", {"other": r"\.hada_.+"}),
    Scheme("AdaLoRA", {"other": r"\.(?:lora_[ABE]\.[^.]+|lora_E|ranknum(?:\.[^.]+)?)"}),
    Scheme("Tucker", {"other": r"\.lora_mid\.weight"}),
    Scheme("GLoRA", {"other": r"\.[ab][12]\.weight"}, module=r"\.(?:lora|lycoris)_[^.]+"),
    Scheme(
        "T-LoRA",
        {"other": r"\.(?:[pq]_layer\.weight|lambda_layer)"},
        module=r"\.(?:lora|lycoris)_[^.]+",
    ),
    Scheme("VeRA", {"other": r"\.vera_lambda_.+"}),
    Scheme("RandLoRA", {"other": r"\.randlora_.+"}),
    Scheme("VB-LoRA", {"other": r"\.vblora_.+"}),
    Scheme("OFT", {"other": r"\.b?oft_.+"}),
    Scheme(
        "another kind of PEFT",
        {
            "other": r"\.(?:hra_u|road_(?:alpha|theta)|delora_(?:[AB]|lambda)|gralora_[AB]"
            r"|hira_[AB]|glora_[A-E]|pvera_lambda_[bd]|adamss_[AB]|unilora_theta_d|osf_svd_params"
            r"|lily_[AB]|psoft_R|peanut_[AB]|deft_[PR]|supertuning_lora_[AB])(?:\..+)?"
        },
    ),
    # Not at the beginning of a name, where kohya-ss has modules such as `lora_unet_mid_block`.
    Scheme("LoRA-like", {"other": r"\.lora_[A-Za-z_]+(?:\..+)?"}, module=r"\..+"),
)
# Most names contain none of these, and so match no scheme.
_MARKS = re.compile(
    "lora|dora|lokr|hada|lycoris|vera|oft_|ranknum|hra_u|road_|hira_|adamss|osf_|lily_|peanut_|deft_"
)


@dataclass(frozen=True)
class LoraTensor:
    """A tensor of a low-rank adapter.

    Attributes:
        name: its name.
        module: the module whose weight the adapter changes.
        factor: its factor in that module.
        scheme: the naming scheme.
    """

    name: str
    module: str
    factor: Factor
    scheme: Scheme


def lora_tensor(name: str) -> LoraTensor | None:
    """Parse the name of a tensor of a low-rank adapter; None for other names, and for alphas."""
    if _MARKS.search(name) is None:
        return None
    for scheme in _SCHEMES:
        match = scheme.pattern.fullmatch(f".{name}")
        if match is not None:
            factor: Any = match.lastgroup
            return LoraTensor(name, match["module"].removeprefix("."), factor, scheme)
    return None


def lora_modules(names: Collection[str]) -> dict[str, list[LoraTensor]]:
    """The tensors of low-rank adapters, alphas included, by the module that they belong to."""
    modules: dict[str, list[LoraTensor]] = {}
    for tensor in filter(None, map(lora_tensor, names)):
        modules.setdefault(tensor.module, []).append(tensor)
    for module, tensors in modules.items():
        alpha = module + _ALPHA
        if alpha in names:
            tensors.append(LoraTensor(alpha, module, "alpha", tensors[0].scheme))
    return modules


def is_alpha(name: str) -> bool:
    """Whether a tensor beside the factors of a LoRA module is its alpha."""
    return name.endswith(_ALPHA)


def has_rank(name: str) -> bool:
    """Whether the shape of a tensor depends on the rank of a LoRA adapter."""
    tensor = lora_tensor(name)
    return tensor is not None and tensor.factor in ("A", "B")


def has_lora(names: Iterable[str]) -> bool:
    """Whether some of the tensors belong to low-rank adapters."""
    return any(map(lora_tensor, names))
