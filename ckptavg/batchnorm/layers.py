"""Choose the norm layers to refresh, and say why the others keep their statistics."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ckptavg.errors import RefreshError, listed, printable
from ckptavg.merge.patterns import matching
from ckptavg.model.loading import place_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

log = logging.getLogger("ckptavg")

_STATISTIC = re.compile(r"running_(\w+_)?(mean|m2|var|covar|std|norm)s?")

NormLayer = _BatchNorm | _InstanceNorm
"""A layer of torch's, or of a class derived from it, that may track statistics."""


def norm_layers(model: torch.nn.Module) -> dict[str, NormLayer]:
    """The layers that track statistics which torch knows how to compute; shared ones once."""
    return {name: module for name, module in model.named_modules() if tracks(module)}


def tracks(module: torch.nn.Module) -> TypeGuard[NormLayer]:
    """Whether it is a norm layer that has running statistics and updates them in training."""
    return (
        isinstance(module, NormLayer)
        and module.track_running_stats
        and module.running_mean is not None
        and module.running_var is not None
    )


AS_ASKED = "as asked"
CHANGED = "the model's load_state_dict does not copy the checkpoint's statistics as they are"
IN_EVAL_MODE = "kept in eval mode by the model's own train()"
MIXING = "mixes its statistics with the old ones by a rule of its own"
NOT_CALLED = "not called"
NOT_IN_CHECKPOINT = "not in the checkpoint"
SAME_IN_ALL_MEMBERS = "frozen: the same in all members of the average"
UNCHANGED = "works with its old statistics in training mode too"

OVERRULED = (IN_EVAL_MODE, SAME_IN_ALL_MEMBERS)
"""Reasons that do not count for layers that the user names."""


@dataclass(frozen=True)
class KeptLayer:
    """A layer that keeps its running statistics.

    Attributes:
        name: its name in the model.
        reason: why it keeps them, such as `NOT_CALLED`.
        is_intended: whether it is meant to keep them: frozen, or not a part of the checkpoint.
    """

    name: str
    reason: str
    is_intended: bool


def layers_to_refresh(
    model: torch.nn.Module,
    *,
    layers: Sequence[str] = (),
    skip_layers: Sequence[str] = (),
    kept: Sequence[KeptLayer] = (),
) -> tuple[dict[str, NormLayer], tuple[KeptLayer, ...]]:
    """The layers to refresh by name, and those that keep their running statistics.

    Args:
        model: the model.
        layers: regular expressions; only layers with one of them somewhere in their names, even
            those that were frozen in the training.
        skip_layers: regular expressions; not the layers with one of them in their names.
        kept: layers that must keep their statistics.

    Raises:
        RefreshError: a layer cannot be refreshed.
        SelectionError: an expression is not valid, or matches no layer.
    """
    layers, skip_layers = ([one] if isinstance(one, str) else one for one in (layers, skip_layers))
    known = norm_layers(model)
    if not known:
        layers = skip_layers = ()
    wanted = matching("layers", layers, known, "norm layer")
    unwanted = matching("skip_layers", skip_layers, known, "norm layer")
    reasons = {each.name: each for each in _of_other_kinds(model, known)}
    reasons |= {each.name: each for each in kept}
    for name in wanted - unwanted:
        if name in reasons and reasons[name].reason in OVERRULED:
            del reasons[name]
    selectable = {name: layer for name, layer in known.items() if name not in reasons}
    for name in selectable:
        if name in unwanted or (layers and name not in wanted):
            reasons[name] = KeptLayer(name, AS_ASKED, is_intended=False)
    chosen = {name: layer for name, layer in selectable.items() if name not in reasons}
    _refuse_impossible(chosen)
    _refuse_shared(chosen, selectable)
    return chosen, tuple(reasons[name] for name, _ in model.named_modules() if name in reasons)


def speak_of(kept: Sequence[KeptLayer]) -> None:
    """Log which layers keep their statistics, a line for each reason."""
    for reason, alike in _by_reason(kept).items():
        is_expected = alike[0].is_intended or reason == AS_ASKED
        log.log(
            logging.INFO if is_expected else logging.WARNING,
            "left %d norm layer%s alone (%s): %s",
            len(alike), "" if len(alike) == 1 else "s", reason, _names(alike),
        )  # fmt: skip


def nothing_refreshed(kept: Sequence[KeptLayer]) -> RefreshError:
    """The error that no layer was refreshed, with the reason of each, and how to choose them."""
    reasons = [f"{_names(alike)} ({reason})" for reason, alike in _by_reason(kept).items()]
    why = "; ".join(reasons) or "the model has no norm layers that track statistics"
    may_choose = any(each.reason in OVERRULED for each in kept)
    return RefreshError(
        f"no norm layer was refreshed: {why}",
        remedy="`layers` refreshes frozen layers by name" if may_choose else None,
    )


def _by_reason(kept: Sequence[KeptLayer]) -> dict[str, list[KeptLayer]]:
    reasons: dict[str, list[KeptLayer]] = {}
    for each in kept:
        reasons.setdefault(each.reason, []).append(each)
    return reasons


def _names(layers: Sequence[KeptLayer]) -> str:
    return listed(repr(each.name) for each in layers)


def _refuse_impossible(layers: Mapping[str, NormLayer]) -> None:
    for name, layer in layers.items():
        where = f"layer {printable(repr(name))}"
        assert layer.running_mean is not None  # noqa: S101 - only such layers are refreshed
        if is_lazy(layer.running_mean):
            raise RefreshError(
                f"{where} is lazy and has no shape yet",
                remedy="load weights into the model, or run it once",
            )
        if layer.running_mean.is_inference():
            raise RefreshError(f"the buffers of {where} were made in torch.inference_mode()")


def _refuse_shared(chosen: Mapping[str, NormLayer], selectable: Mapping[str, NormLayer]) -> None:
    """Refuse a layer whose running statistics are also those of another layer."""
    owners: dict[object, str] = {}
    for name, layer in selectable.items():
        assert layer.running_mean is not None  # noqa: S101 - see `tracks`
        other = owners.setdefault(place_of(layer.running_mean), name)
        if other != name and not chosen.keys().isdisjoint((name, other)):
            raise RefreshError(
                f"layers {printable(repr(name))} and {printable(repr(other))} share running "
                "statistics",
                remedy="use one layer twice, or leave out both with `skip_layers`",
            )


def _of_other_kinds(model: torch.nn.Module, known: Mapping[str, NormLayer]) -> Iterator[KeptLayer]:
    """What holds running statistics, and is frozen by its class or of a kind not refreshed.

    In eval mode such layers work with what they have, which belongs to other weights, unless they
    are frozen on purpose.
    """
    for name, module in model.named_modules():
        if name not in known and not holds_statistics(module):
            continue
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            kind = f"{module.original_name} in TorchScript"
        if "frozen" in kind.lower():
            yield KeptLayer(name, f"frozen, as {kind} says", is_intended=True)
        elif name not in known:
            yield KeptLayer(name, f"{kind} is of a kind that is not refreshed", is_intended=False)


def holds_statistics(module: torch.nn.Module) -> bool:
    """Whether a module has a buffer such as `running_mean`, `running_var` or `running_avg_std`."""
    return any(_STATISTIC.fullmatch(name) for name, _ in module.named_buffers(recurse=False))


def is_aggregating(module: torch.nn.Module) -> bool:
    """Whether it normalises parts of a batch in training, and joins their statistics for eval.

    As `SubBatchNorm3d` does in PySlowFast and PyTorchVideo.
    """
    return callable(getattr(module, "aggregate_stats", None))


def aggregating(
    model: torch.nn.Module, layers: Mapping[str, NormLayer]
) -> dict[str, torch.nn.Module]:
    """Modules that join the statistics of layers below them, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_aggregating(module)
        and any(layer is part for part in module.modules() for layer in layers.values())
    }
