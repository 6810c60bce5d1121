"""Which of a model's layers are refreshed, and which only hold statistics."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ckptavg.errors import RefreshError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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


def chosen_layers(
    model: torch.nn.Module,
    *,
    layers: Sequence[str] = (),
    skip_layers: Sequence[str] = (),
) -> dict[str, NormLayer]:
    """The layers to refresh, by name. Others that hold running statistics are spoken of.

    Args:
        model: the model.
        layers: regular expressions; only layers with one of them somewhere in their names.
        skip_layers: likewise, of layers that are left alone.

    Raises:
        RefreshError: an expression is none, or matches no layer; or none are left.
    """
    found = {
        name: layer for name, layer in norm_layers(model).items() if not _is_named_frozen(layer)
    }
    _speak_of_others(model, found)
    if not found:
        return {}
    layers, skip_layers = ([one] if isinstance(one, str) else one for one in (layers, skip_layers))
    wanted, unwanted = _matching(found, layers), _matching(found, skip_layers)
    taken = {
        name: layer
        for name, layer in found.items()
        if (not layers or name in wanted) and name not in unwanted
    }
    if not taken:
        raise RefreshError(f"not one of the model's {len(found)} norm layers is left to refresh")
    if len(taken) < len(found):
        left = [name for name in found if name not in taken]
        log.info(
            "%d norm layers keep their statistics, as asked: %s", len(left), listed(map(repr, left))
        )
    _refuse_impossible(taken)
    return taken


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model without `DataParallel` and `DistributedDataParallel`.

    Those copy modules to other devices, and send buffers to other processes in each forward pass.
    """
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def _is_named_frozen(module: torch.nn.Module) -> bool:
    return "frozen" in type(module).__name__.lower()


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
                remedy="use one layer twice, or leave out both with --skip-layers",
            )


def _speak_of_others(model: torch.nn.Module, known: Mapping[str, NormLayer]) -> None:
    """Name what holds running statistics that nobody here knows how to compute.

    In eval mode such layers work with what they have, which belongs to other weights, unless they
    are frozen on purpose.
    """
    ours = {id(layer) for layer in known.values()}
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        if id(module) not in ours and _holds_statistics(module):
            others[name] = type(module).__name__
    unknown = {name: kind for name, kind in others.items() if "frozen" not in kind.lower()}
    for kinds, say, which in (
        (unknown, log.warning, "of a kind that is not refreshed"),
        ({name: others[name] for name in others if name not in unknown}, log.info, "frozen"),
    ):
        if kinds:
            named = [f"{name!r} ({kind})" for name, kind in kinds.items()]
            say("%d layers keep their running statistics, %s: %s", len(kinds), which, listed(named))


def _holds_statistics(module: torch.nn.Module) -> bool:
    buffers = dict(module.named_buffers(recurse=False))
    return any(name in buffers for name in ("running_mean", "running_var"))


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
