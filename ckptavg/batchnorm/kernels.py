"""What torch's norm kernels are called with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A call of a kernel.

    Attributes:
        mean: the buffer of the running mean that it was given.
        input: what it has normalised.
        is_training: it has normalised by its input's statistics, and moved its buffers to them.
        momentum: how far.
    """

    mean: torch.Tensor | None
    input: torch.Tensor
    is_training: bool
    momentum: float | None


class KernelCalls(TorchFunctionMode):
    """Hears the calls of torch's norm kernels while it is entered.

    Attributes:
        is_on: it is entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False
        self._heard: list[KernelCall] = []
        # The buffer itself is among the values, or its `id` could become another's.
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = {}

    def listen_to(
        self, mean: torch.Tensor, instead: tuple[torch.Tensor | None, torch.Tensor | None]
    ) -> None:
        """Keep calls with a buffer of the running mean.

        Args:
            mean: the buffer.
            instead: running mean and variance for a kernel that works with what they hold.
        """
        self._known[id(mean)] = mean, *instead

    def forget(self) -> None:
        """Forget what was heard and nobody has taken: it holds layers' inputs."""
        self._heard.clear()

    def take(self, mean: torch.Tensor) -> list[KernelCall]:
        """The calls with this buffer, which are forgotten."""
        found = [one for one in self._heard if one.mean is mean]
        self._heard = [one for one in self._heard if one.mean is not mean]
        return found

    def __enter__(self) -> Self:
        self.is_on = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self.is_on = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        names = _KERNELS.get(func)
        if names is None:
            return func(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        is_training = bool(given.get("training") or given.get("use_input_stats"))
        mean = given.get("running_mean")
        known = self._known.get(id(mean))
        if known is None:
            return func(*args, **kwargs)
        self._heard.append(KernelCall(mean, given["input"], is_training, given.get("momentum")))
        if is_training:
            return func(*args, **kwargs)
        _, given["running_mean"], given["running_var"] = known
        rest = args[len(names) :]  # what a native kernel has beside the named ones
        return func(
            *(given[name] for name in names[: len(args)]), *rest, **_named(given, names, args)
        )


def _named(given: dict[str, Any], names: tuple[str, ...], args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments that did not come by their place."""
    return {name: value for name, value in given.items() if name not in names[: len(args)]}


def _names(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


_NATIVE = ("input", "weight", "bias", "running_mean", "running_var")
_KERNELS: dict[object, tuple[str, ...]] = {
    functional.batch_norm: _names(functional.batch_norm),
    functional.instance_norm: _names(functional.instance_norm),
    torch.batch_norm: (*_NATIVE, "training", "momentum"),
    torch.instance_norm: (*_NATIVE, "use_input_stats", "momentum"),
}
