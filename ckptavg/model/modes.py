"""Training mode, and methods of the name `train` that are something else."""

from __future__ import annotations

import inspect

import torch

from ckptavg.model.factories import user_code


def start_training(model: torch.nn.Module) -> None:
    """Put a model into training mode, in which it undoes what its `eval()` may have done.

    Weights that it has merged would be taken for those of a checkpoint that is loaded.
    """
    if has_own_train(model):
        with user_code("the model's train()"):
            model.train()
    else:
        torch.nn.Module.train(model)


def has_own_train(module: torch.nn.Module) -> bool:
    """Whether it has a `train(mode)` of its own. Other methods of this name may run a training."""
    return _overrides_train(module) and _takes_mode(module)


def is_trainer(module: torch.nn.Module) -> bool:
    """Whether its `train` is something else than a change of mode, as in ultralytics' `YOLO`."""
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
    return bool(parameters) and (parameters[0].name == "mode" or parameters[0].default is True)
