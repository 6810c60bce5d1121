"""What the pickle of a torch file becomes: descriptions of tensors, plain data, placeholders.

The state dict of a whole `torch.nn.Module` is made of these too, without its class. A class that
overrides `state_dict()` may name its tensors differently; that cannot be known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ckptavg.formats.tensors import DType, Place

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
"""Names of torch's typed storages, and of their dtypes."""

# Modules can hold each other many times over, or themselves. So the names of all tensors of a file
# have at most so many characters, where each name counts as these many more than it has.
_MOST_CHARACTERS = 1 << 25
_EACH_NAME = 32


@dataclass(frozen=True, slots=True)
class Storage:
    """A record of the file, by its key, which several tensors may share; None for untyped bytes."""

    key: str
    dtype: DType | None


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A strided tensor; offset in its storage and strides are in elements, of any size."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PickledShard:
    """What a rank holds of a DTensor or a ShardedTensor, if it is not the whole.

    Attributes:
        local: the rank's piece; None where the rank has none.
        place: where the piece is in the tensor.
    """

    local: PickledTensor | None
    place: Place


@dataclass(frozen=True, slots=True)
class UnreadableTensor:
    """A tensor without plain strided bytes (sparse, quantised, ...), and what it is instead."""

    reason: str


def is_tensor(value: object) -> TypeGuard[PickledTensor | PickledShard | UnreadableTensor]:
    """Whether a pickled value is a tensor, readable or not."""
    return isinstance(value, PickledTensor | PickledShard | UnreadableTensor)


class StateOrderedDict(dict[Any, Any]):
    """An `OrderedDict` that keeps a state dict's `_metadata` and takes no other attribute."""

    __slots__ = ("module_versions",)

    module_versions: object


class Placeholder:
    """What stands for a global, or for the object that a call of it would have made.

    Attributes:
        origin: full name of the class or function.
        arguments: what the pickle calls it with; empty for the global itself.
        state: what the pickle gives the object as its state.
    """

    __slots__ = ("arguments", "origin", "state")

    def __init__(self, origin: str, arguments: tuple[object, ...] = ()) -> None:
        self.origin = origin
        self.arguments = arguments
        self.state: object = None

    def append(self, item: object) -> None:
        """Drop an item, or an iterable of items, of a list-like object."""

    extend = append


def is_module(value: object) -> TypeGuard[Placeholder]:
    """Whether a pickled object is a `torch.nn.Module`, by the three dicts that each has."""
    if not isinstance(value, Placeholder) or not isinstance(value.state, dict):
        return False
    parts = map(value.state.get, ("_parameters", "_buffers", "_modules"))
    return all(isinstance(part, dict) for part in parts)


class ModuleReader:
    """Makes the state dicts of the modules in one file, each once, within one bound for all."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._characters_left = _MOST_CHARACTERS
        self._state_dicts: dict[int, dict[str, object]] = {}

    def state_dict(self, module: Placeholder) -> dict[str, object]:
        """What `module.state_dict()` returns: parameters and persistent buffers by dotted name."""
        if id(module) not in self._state_dicts:
            self._state_dicts[id(module)] = {
                name: UnreadableTensor(f"a {printable(value.origin)}")
                if isinstance(value, Placeholder)
                else value
                for name, value in self._walk(module)
            }
        return self._state_dicts[id(module)]

    def _walk(self, root: Placeholder) -> Iterator[tuple[str, object]]:
        """Names and values in torch's order: a module's own before those of its children."""
        waiting: list[tuple[str, object]] = [("", root)]
        while waiting:
            prefix, module = waiting.pop()
            if not is_module(module):
                name = printable(prefix.removesuffix("."))
                kind = module.origin if isinstance(module, Placeholder) else type(module).__name__
                raise self._fault(f"its module {name} is no torch module but a {printable(kind)}")
            state: Any = module.state
            hidden = state.get("_non_persistent_buffers_set")
            hidden = hidden if isinstance(hidden, set) else ()
            yield from self._named(prefix, state["_parameters"])
            for name, value in self._named(prefix, state["_buffers"]):
                if name[len(prefix) :] not in hidden:
                    yield name, value
            children = [*self._named(prefix, state["_modules"])]
            waiting += [(f"{name}.", child) for name, child in children[::-1]]

    def _named(self, prefix: str, entries: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
        """Full names and values of entries; those that are None are left out, as torch does."""
        for name, value in entries.items():
            if not isinstance(name, str):
                raise self._fault("holds a module with a name that is not a string")
            self._characters_left -= len(prefix) + len(name) + _EACH_NAME
            if self._characters_left < 0:
                raise self._fault("holds modules that contain each other without end")
            if value is not None:
                yield prefix + name, value

    def _fault(self, message: str) -> FormatError:
        remedy = "load it, and save the model's state_dict() instead"
        return FormatError(message, path=self._path, remedy=remedy)
