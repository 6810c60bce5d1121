"""Lightning's data modules: which of their loaders is meant, and the hooks that change batches.

Nothing here imports Lightning: its classes are known by the names of their methods.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.model.batches import attribute_of, device_of
from ckptavg.model.factories import load_object, name_of, user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

    from ckptavg.model.factories import Loader

log = logging.getLogger("ckptavg")

Stage = Literal["fit", "validate", "test"]
"""What batches are for, in Lightning's words."""
METHODS: Mapping[Stage, str] = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
}
_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def is_data_module(value: object) -> bool:
    """Whether it has methods that return loaders, or is a class of such objects."""
    return any(callable(attribute_of(value, name)) for name in METHODS.values())


def defines(value: object, method: str) -> bool:
    """Whether it has a method that is not the empty one of Lightning's base class."""
    found = attribute_of(value, method)
    module = str(attribute_of(found, "__module__"))
    is_empty = module.startswith(("lightning.", "pytorch_lightning.")) and module.endswith(".hooks")
    return callable(found) and not is_empty


def data_module_of(spec: Loader, stage: Stage) -> tuple[Loader, Stage]:
    """Of a method such as `DM.test_dataloader`, the data module or its class, and the stage.

    Whatever else a spec names comes back with the stage that was given.
    """
    method = name_of(spec).rpartition(".")[2]
    for named, name in METHODS.items():
        if method == name:
            owner = attribute_of(spec, "__self__")
            if isinstance(spec, str):
                owner = spec.rpartition(".")[0]
            if owner is not None and is_data_module(load_object(owner)):
                return owner, named
    return spec, stage


def with_hooks(
    batches: Iterable[Any], data_module: object, model: torch.nn.Module
) -> Iterable[Any]:
    """The batches, changed by the hooks around their transfer to the model's device.

    As in Lightning, a hook of the data module's takes precedence over that of the model's.

    Args:
        batches: the loader.
        data_module: what it comes from; None if it comes from no data module.
        model: the model.
    """
    owners = [
        each
        for each in (data_module, model)
        if all(callable(attribute_of(each, name)) for name in _HOOKS)
    ]
    used = [next((each for each in owners if defines(each, name)), None) for name in _HOOKS]
    names = [
        f"{type(owner).__name__}.{name}()"
        for owner, name in zip(used, _HOOKS, strict=True)
        if owner is not None
    ]
    if not names:
        return batches
    log.info("each batch goes through %s, as in Lightning", " and ".join(names))
    hooks = [getattr(owner or owners[-1], name) for owner, name in zip(used, _HOOKS, strict=True)]
    return Transferred(batches, hooks, model)


def loader_of(batches: Iterable[Any]) -> Iterable[Any]:
    """The loader itself, whose batches go through no hooks."""
    return batches.batches if isinstance(batches, Transferred) else batches


class Transferred:
    """A loader whose batches go through hooks on their way to the model's device.

    Args:
        batches: the loader.
        hooks: called before the transfer, for the transfer, and after it.
        model: the model.

    Attributes:
        batches: the loader, whose batches are as they were.
    """

    def __init__(
        self, batches: Iterable[Any], hooks: Sequence[Callable[..., Any]], model: torch.nn.Module
    ) -> None:
        self.batches, self._hooks, self._model = batches, hooks, model

    def __len__(self) -> int:
        """The number of batches; TypeError where the loader has no length."""
        return len(self.batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the loader's own
        """What the loader has beside its batches."""
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator[Any]:
        return map(self.transfer, self.batches)

    def transfer(self, batch: Any) -> Any:  # noqa: ANN401 - what the user's loader yields
        """The batch on the model's device, as the hooks return it.

        Raises:
            UserCodeError: a hook raised.
        """
        devices = ((), (device_of(self._model),), ())
        for name, hook, device in zip(_HOOKS, self._hooks, devices, strict=True):
            with user_code(f"{name}()"):
                batch = hook(batch, *device, 0)
        return batch
