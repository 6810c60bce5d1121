"""Training mode; methods that are called `train` but run a training."""

from __future__ import annotations

import inspect

import torch

from ckptavg.model.factories import user_code


def start_training(model: torch.nn.Module) -> None:
    """Put a model into training mode before a checkpoint is loaded.

    A model may merge weights in `eval()` (LoRA, re-parameterised convolutions), and `train()`
    separates them again. Else a checkpoint would be loaded over merged weights.
    """
    if has_own_train(model):
        with user_code("the model's train()"):
            model.train()
    else:
        torch.nn.Module.train(model)


def has_own_train(module: torch.nn.Module) -> bool:
    """Whether the class overrides `train(mode)`; a `train` without a mode may run a training."""
    return _overrides_train(module) and _takes_mode(module)


def is_trainer(module: torch.nn.Module) -> bool:
    """Whether its `train` does not take a mode but runs a training, as in ultralytics' `YOLO`."""
    return _overrides_train(module) and not _takes_mode(module)


def _overrides_train(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return "train" in vars(module) or type(module).train is not torch.nn.Module.train


def _takes_mode(module: torch.nn.Module) -> bool:
    try:
        parameters = list(inspect.signature(module.train).parameters.values())
    except (TypeError, ValueError):
        return False
    if not parameters:
        return False
    first = parameters[0]
    # A function that has taken the place of the method is given the mode as its `self`.
    return (
        first.name in ("mode", "self")
        or first.default is True
        or first.kind is inspect.Parameter.VAR_POSITIONAL
    )
