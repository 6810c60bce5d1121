"""Make the user's model and loader out of what he named, always alike for the same seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckptavg.errors import RefreshError
from ckptavg.factories import load_object, user_code
from ckptavg.norm import libraries
from ckptavg.norm.ranks import own_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, which users' code draws from."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    torch.manual_seed(seed % (1 << 64))


def load_model(spec: str) -> Any:  # noqa: ANN401 - the user's own
    """What a model's spec names: a model, or a callable that returns one.

    Raises:
        CkptAvgError: there is no such thing.
    """
    return libraries.maker(spec) or load_object(spec)


def make_model(
    spec: str, arguments: Mapping[str, Any], device: torch.device | str | None
) -> torch.nn.Module:
    """The model that a spec names, or that the callable returns which it names.

    Args:
        spec: `package.module:attr`, `path/to/file.py:attr`, `torchvision:NAME` or `timm:NAME`.
        arguments: keywords for the callable.
        device: where it is put; None for a GPU if there is one.

    Raises:
        RefreshError: it is no model, or does not go there.
        UserCodeError: the callable raised.
    """
    made = load_model(spec)
    if isinstance(made, torch.nn.Module):
        _refuse_arguments(spec, arguments)
    elif callable(made):
        with user_code(spec):
            made = made(**arguments)
    if not isinstance(made, torch.nn.Module):
        raise RefreshError(f"{spec} is a {type(made).__name__}, not a torch.nn.Module")
    place = own_device(device)
    try:
        if torch.device(place).type == "meta":
            raise RefreshError("on device 'meta' nothing is computed")
        return made.to(place)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise RefreshError(f"cannot use device {str(place)!r}: {error}") from error


def make_batches(spec: str, arguments: Mapping[str, Any]) -> Iterable[Any]:
    """The iterable of batches that a spec names, or that the callable returns which it names.

    Args:
        spec: `package.module:attr` or `path/to/file.py:attr`.
        arguments: keywords for the callable.

    Raises:
        RefreshError: it is no iterable.
        UserCodeError: the callable raised.
    """
    made: Any = load_object(spec)
    if hasattr(made, "__iter__") and not isinstance(made, type):
        _refuse_arguments(spec, arguments)
    elif callable(made):
        with user_code(spec):
            made = made(**arguments)
    if not hasattr(made, "__iter__") or isinstance(made, type):
        raise RefreshError(
            f"{spec} is a {type(made).__name__}, which gives no batches",
            remedy="let it be an iterable of batches, such as a DataLoader, or return one",
        )
    batches: Iterable[Any] = made
    return batches


def _refuse_arguments(spec: str, arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise RefreshError(
            f"{spec} is no callable, so there is nothing to pass {', '.join(arguments)} to",
            remedy="name a function that takes it",
        )
