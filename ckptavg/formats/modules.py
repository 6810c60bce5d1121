"""The state dict of a whole `torch.nn.Module` in a pickle, made without its class.

A class that overrides `state_dict()` may name its tensors differently; that cannot be known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg.errors import FormatError, printable
from ckptavg.formats.pickled import Placeholder, UnreadableTensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PARTS = ("_parameters", "_buffers", "_modules")
# Modules can hold each other many times over, or themselves. So the names of all tensors of a file
# have at most so many characters, where each name counts as these many more than it has.
_MOST_CHARACTERS = 1 << 25
_EACH_NAME = 32
_REMEDY = "load it, and save the model's state_dict() instead"


def is_module(value: object) -> TypeGuard[Placeholder]:
    """Whether a pickled object is a `torch.nn.Module`, by the three dicts that each has."""
    return (
        isinstance(value, Placeholder)
        and isinstance(value.state, dict)
        and all(isinstance(value.state.get(part), dict) for part in _PARTS)
    )


class ModuleReader:
    """Makes the state dicts of the modules in one file, each once, within one bound for all.

    Args:
        path: the file, for messages.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._characters_left = _MOST_CHARACTERS
        self._state_dicts: dict[int, dict[str, object]] = {}

    def state_dict(self, module: Placeholder) -> dict[str, object]:
        """What `module.state_dict()` returns: parameters and persistent buffers by dotted name.

        Raises:
            FormatError: an entry is not what a module holds, or the module holds itself.
        """
        if id(module) not in self._state_dicts:
            self._state_dicts[id(module)] = dict(self._walk(module))
        return self._state_dicts[id(module)]

    def _walk(self, root: Placeholder) -> Iterator[tuple[str, object]]:
        """Names and values in torch's order: a module's own before those of its children."""
        waiting = [("", root)]
        while waiting:
            prefix, module = waiting.pop()
            state: Any = module.state
            hidden = state.get("_non_persistent_buffers_set")
            for name, value in self._named(prefix, state["_parameters"]):
                yield name, _tensor(value)
            for name, value in self._named(prefix, state["_buffers"]):
                if not isinstance(hidden, set) or name[len(prefix) :] not in hidden:
                    yield name, _tensor(value)
            children = [*self._named(prefix, state["_modules"])]
            waiting += [(f"{name}.", self._module(name, child)) for name, child in children[::-1]]

    def _named(self, prefix: str, entries: dict[Any, object]) -> Iterator[tuple[str, object]]:
        """Full names and values of entries; those that are None are left out, as torch does."""
        for name, value in entries.items():
            if not isinstance(name, str):
                raise FormatError("holds a module with a name that is no text", path=self._path)
            self._characters_left -= len(prefix) + len(name) + _EACH_NAME
            if self._characters_left < 0:
                raise FormatError(
                    "holds modules within each other without end", path=self._path, remedy=_REMEDY
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
            remedy=_REMEDY,
        )


def _tensor(value: object) -> object:
    """A parameter or a buffer; an object of an unknown class is a tensor that cannot be read."""
    return (
        UnreadableTensor(f"a {printable(value.origin)}")
        if isinstance(value, Placeholder)
        else value
    )
