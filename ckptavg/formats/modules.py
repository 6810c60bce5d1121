"""Whole models in a pickle: the state dict that such a `torch.nn.Module` would give.

Its class is not needed for that. What a class of its own makes of `state_dict()` cannot be known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

from ckptavg.errors import FormatError, printable
from ckptavg.formats.pickled import Placeholder, UnreadableTensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PARTS = ("_parameters", "_buffers", "_modules")
# Modules can hold each other many times over, or themselves: a bound on the names to be made, in
# characters, with something for each name.
_MOST_NAMES = 1 << 25
_EACH_NAME = 32


def is_module(value: object) -> TypeGuard[Placeholder]:
    """Whether it is a `torch.nn.Module`, by the three dicts that each has."""
    return (
        isinstance(value, Placeholder)
        and isinstance(value.state, dict)
        and all(isinstance(value.state.get(part), dict) for part in _PARTS)
    )


class ModuleReader:
    """Makes the state dicts of modules, each once, within one bound for all of a file.

    Args:
        path: the file, for messages.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._left = _MOST_NAMES
        self._made: dict[int, dict[str, object]] = {}

    def state_dict(self, module: Placeholder) -> dict[str, object]:
        """What `module.state_dict()` returns: parameters and persistent buffers by dotted name.

        Raises:
            FormatError: it holds what no module holds, or itself.
        """
        made = self._made.get(id(module))
        if made is None:
            made = self._made[id(module)] = dict(self._walk(module))
        return made

    def _walk(self, root: Placeholder) -> Iterator[tuple[str, object]]:
        """Names and values in torch's order: a module's own before those of its children."""
        waiting: list[tuple[str, Placeholder]] = [("", root)]
        while waiting:
            prefix, module = waiting.pop()
            state = cast("dict[str, Any]", module.state)  # as `is_module` found
            hidden = state.get("_non_persistent_buffers_set")
            for name, value in self._named(prefix, state["_parameters"]):
                yield name, _tensor(value)
            for name, value in self._named(prefix, state["_buffers"]):
                if not isinstance(hidden, set) or name[len(prefix) :] not in hidden:
                    yield name, _tensor(value)
            children = list(self._named(prefix, state["_modules"]))
            waiting += ((f"{name}.", self._module(name, child)) for name, child in children[::-1])

    def _named(self, prefix: str, entries: dict[Any, object]) -> Iterator[tuple[str, object]]:
        """Full names and values; an entry that is None is one that the module does without."""
        for name, value in entries.items():
            if not isinstance(name, str):
                raise FormatError("holds a module with a name that is no text", path=self._path)
            self._left -= len(prefix) + len(name) + _EACH_NAME
            if self._left < 0:
                raise FormatError(
                    "holds modules within each other without end",
                    path=self._path,
                    remedy="load it, and save the model's state_dict() instead",
                )
            if value is not None:
                yield prefix + name, value

    def _module(self, name: str, value: object) -> Placeholder:
        if is_module(value):
            return value
        kind = value.origin if isinstance(value, Placeholder) else type(value).__name__
        raise FormatError(
            f"its module {printable(name)} is no torch module but a {printable(kind)}",
            path=self._path,
            remedy="load it, and save the model's state_dict() instead",
        )


def _tensor(value: object) -> object:
    """A parameter or a buffer; where it is of an unknown class, a tensor that cannot be read."""
    if isinstance(value, Placeholder):
        return UnreadableTensor(f"a {printable(value.origin)}")
    return value
