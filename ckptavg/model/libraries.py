"""Models that a library makes by name: `torchvision:resnet50`, `timm:resnet50`, without weights."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from ckptavg.errors import CkptAvgError, printable
from ckptavg.model.factories import user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

# What would fetch weights that the checkpoint brings anyway.
_WEIGHTS = {
    "torchvision": ("weights", "weights_backbone", "pretrained", "pretrained_backbone"),
    "timm": ("pretrained", "checkpoint_path"),
}


def maker(spec: str) -> Callable[..., Any] | None:
    """A function of keywords that makes the model; None if the spec names none of a library.

    Args:
        spec: `torchvision:NAME` or `timm:NAME`, as `torchvision.models.get_model` and
            `timm.create_model` know it.

    Raises:
        CkptAvgError: the library is not installed, or has no such model.
    """
    library, _, name = spec.partition(":")
    if library not in _WEIGHTS or name.startswith("models."):
        return None
    with user_code(f"importing {library}"):
        try:
            module = importlib.import_module(library)
        except ModuleNotFoundError as error:
            if error.name != library:
                raise
            raise CkptAvgError(
                f"--model {spec} needs {library}, which is not installed",
                remedy=f"pip install 'ckptavg[{library}]'",
            ) from error
    make = _from_torchvision if library == "torchvision" else _from_timm
    return make(module, name)


def _from_torchvision(torchvision: ModuleType, name: str) -> Callable[..., Any] | None:
    models = torchvision.models
    known = models.list_models()
    if name not in known:
        if hasattr(torchvision, name):
            return None  # an attribute like any other
        raise _unknown("torchvision", name, known)
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    without = {key: None for key in ("weights", "weights_backbone") if key in accepted}

    def make(**arguments: Any) -> Any:  # noqa: ANN401
        _refuse_weights("torchvision", arguments)
        return models.get_model(name, **without | arguments)

    return make


def _from_timm(timm: ModuleType, name: str) -> Callable[..., Any] | None:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        if hasattr(timm, name):
            return None
        raise _unknown("timm", name, timm.list_models())
    tagged = [one for one in timm.list_pretrained() if one.partition(".")[0] == base]
    if tag and name not in tagged:
        raise _unknown("timm", name, tagged)

    def make(**arguments: Any) -> Any:  # noqa: ANN401
        _refuse_weights("timm", arguments)
        return timm.create_model(name, **{"pretrained": False, **arguments})

    return make


def _unknown(library: str, name: str, known: Iterable[str]) -> CkptAvgError:
    near = difflib.get_close_matches(name, list(known))
    return CkptAvgError(
        f"{library} has no model {printable(repr(name))}",
        remedy=f"did you mean {' or '.join(near)}?" if near else None,
    )


def _refuse_weights(library: str, arguments: dict[str, Any]) -> None:
    given = next((key for key in _WEIGHTS[library] if arguments.get(key)), None)
    if given is not None:
        raise CkptAvgError(
            f"--model-arg {given} would fetch weights, and the checkpoint has them",
            remedy="leave it out",
        )
