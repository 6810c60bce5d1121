"""Which of a model's layers are refreshed, and which only hold statistics."""

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
from ckptavg.model.factories import user_code

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

log = logging.getLogger("ckptavg")

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


@dataclass(frozen=True)
class LeftLayer:
    """A layer that keeps its running statistics.

    Attributes:
        name: its name in the model.
        reason: why it keeps them, such as `not called`.
        is_frozen: whether it is meant to keep them.
    """

    name: str
    reason: str
    is_frozen: bool


def layers_to_refresh(
    model: torch.nn.Module,
    *,
    layers: Sequence[str] = (),
    skip_layers: Sequence[str] = (),
    left: Sequence[LeftLayer] = (),
) -> tuple[dict[str, NormLayer], tuple[LeftLayer, ...]]:
    """The layers to refresh by name, and those that keep their running statistics.

    Args:
        model: the model.
        layers: regular expressions; only layers with one of them somewhere in their names, even
            if the model's own `train` keeps them in eval mode.
        skip_layers: likewise, of layers that are left alone.
        left: further layers that are left alone.

    Raises:
        RefreshError: an expression is none, or matches no layer; or a layer cannot be refreshed.
    """
    layers, skip_layers = ([one] if isinstance(one, str) else one for one in (layers, skip_layers))
    known = norm_layers(model)
    if not known:
        layers = skip_layers = ()
    reasons = {each.name: each for each in (*_other_layers(model, known), *left)}
    able = {name: layer for name, layer in known.items() if name not in reasons}
    wanted, unwanted = _matching(known, layers), _matching(known, skip_layers)
    in_eval = set() if layers else kept_in_eval(model, able)
    for name in able:
        if name in unwanted or (layers and name not in wanted):
            reasons[name] = LeftLayer(name, "as asked", is_frozen=False)
        elif name in in_eval:
            reason = "kept in eval mode by the model's own train()"
            reasons[name] = LeftLayer(name, reason, is_frozen=True)
    chosen = {name: layer for name, layer in able.items() if name not in reasons}
    _refuse_impossible(chosen)
    return chosen, tuple(reasons[name] for name, _ in model.named_modules() if name in reasons)


def speak_of(left: Sequence[LeftLayer]) -> None:
    """Log which layers keep their statistics, a line for each reason."""
    for reason in dict.fromkeys(each.reason for each in left):
        alike = [each for each in left if each.reason == reason]
        is_asked = alike[0].is_frozen or reason == "as asked"
        names = listed(repr(each.name) for each in alike)
        log.log(
            logging.INFO if is_asked else logging.WARNING,
            "left %d norm layer%s alone (%s): %s",
            len(alike), "" if len(alike) == 1 else "s", reason, names,
        )  # fmt: skip


def explained(left: Sequence[LeftLayer]) -> str:
    """The reasons and the names of layers that keep their statistics, as a part of a sentence."""
    reasons = dict.fromkeys(each.reason for each in left)
    return "; ".join(
        f"{listed(repr(each.name) for each in left if each.reason == reason)} ({reason})"
        for reason in reasons
    )


def kept_in_eval(model: torch.nn.Module, layers: Mapping[str, NormLayer]) -> set[str]:
    """The names of the layers that the model's own `train` keeps in eval mode.

    The model is asked only if a class or an object above a norm layer has a `train` of its own:
    that may do more, such as to undo the merge of weights.
    """
    parts = {id(layer) for layer in layers.values()}
    if not any(
        _has_own_train(module) and any(id(part) in parts for part in module.modules())
        for module in model.modules()
    ):
        return set()
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    with user_code("the model's train()"):
        model.train()
        in_eval = {name for name, layer in layers.items() if not layer.training}
        model.train(modes[0][1])
    for module, mode in modes:
        module.training = mode
    return in_eval


def _has_own_train(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return "train" in vars(module) or type(module).train is not torch.nn.Module.train


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model without `DataParallel` and `DistributedDataParallel`.

    Those copy modules to other devices, and send buffers to other processes in each forward pass.
    """
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def _matching(names: Iterable[str], expressions: Sequence[str]) -> set[str]:
    """The names in which one of the expressions is found.

    Raises:
        RefreshError: an expression is none, or is found nowhere.
    """
    names, found = list(names), set()
    for expression in expressions:
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise RefreshError(f"{expression!r} is no regular expression: {error}") from error
        matches = [name for name in names if pattern.search(name)]
        if not matches:
            raise RefreshError(
                f"no norm layer matches {expression!r}; they are {listed(map(repr, names))}"
            )
        found.update(matches)
    return found


def _refuse_impossible(layers: Mapping[str, NormLayer]) -> None:
    owners: dict[int, str] = {}
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
        other = owners.setdefault(id(layer.running_mean), name)
        if other != name:
            raise RefreshError(
                f"{where} has its running statistics in common with {printable(repr(other))}",
                remedy="use one layer twice, or leave out both with `skip_layers`",
            )


def _other_layers(model: torch.nn.Module, known: Mapping[str, NormLayer]) -> Iterator[LeftLayer]:
    """What holds running statistics, and is frozen or of a kind that is not refreshed.

    In eval mode such layers work with what they have, which belongs to other weights, unless they
    are frozen on purpose.
    """
    for name, module in model.named_modules():
        if name not in known and not _holds_statistics(module):
            continue
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            kind = f"{module.original_name} in TorchScript"
        if "frozen" in kind.lower():
            yield LeftLayer(name, f"frozen, as {kind} says", is_frozen=True)
        elif name not in known:
            reason = f"{kind} is of a kind that is not refreshed"
            yield LeftLayer(name, reason, is_frozen=False)


def _holds_statistics(module: torch.nn.Module) -> bool:
    return any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))


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
