"""Get the user's objects: as they are, or by `package.module:attr` and `path/to/file.py:attr`.

This imports and runs the user's code, which the user asked for by naming it. Nothing in a
checkpoint, or beside one, can ever choose what is named here.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptavg.errors import CkptAvgError, UserCodeError, described, listed, message_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """Tell the user's own exceptions from ours. Code that exits has failed as well.

    Raises:
        UserCodeError: from whatever the user's code raised.
    """
    try:
        yield
    except CkptAvgError:
        raise
    except (Exception, SystemExit) as error:
        message = message_of(error)
        is_import = what.startswith("importing")
        is_known = is_import or not isinstance(error, SystemExit)
        raise UserCodeError(
            f"{what} raised {described(error)}",
            remedy=_remedy(error, message) if is_known else None,
        ) from error


# What a user's exception and its message tell about the mistake, and what to do.
_REMEDIES: tuple[tuple[type[BaseException], str, str], ...] = (
    (
        SystemExit,
        "^2$",
        "argparse has no arguments in an import: give required options a default, or parse in main",
    ),
    (
        SystemExit,
        "",
        'what ends the program, or runs a training, belongs under `if __name__ == "__main__":`',
    ),
    (
        ImportError,
        "attempted relative import",
        "name the module as package.module:attr, from the folder that holds the package",
    ),
    (
        TypeError,
        r"(forward|call)\w*\(\) (missing|takes|got)",
        "say how the model is called with a batch: `forward`, a function of model and batch",
    ),
    (
        ValueError,
        r"expected .* input \(got \dD input\)",
        "where the loader yields single examples, let it be a torch.utils.data.DataLoader",
    ),
    (
        Exception,
        r"[Tt]argets? .*not be none|[Tt]argets .*in training mode",
        "in training mode the model wants its targets: use `train_mode` norm, or a `forward`",
    ),
    (
        RuntimeError,
        "does not require grad",
        "no gradients are computed here: use torch.enable_grad() in a function given as `forward`",
    ),
    (
        RuntimeError,
        r"must have the same dtype|Input type .* should be the same|expected scalar type",
        "batch and model differ in dtype: convert the batch in a function given as `forward`",
    ),
    (
        Exception,
        r"not attached to a `Trainer`|'NoneType' .*'(world_size|global_rank|max_epochs|\w+ing)'",
        "there is no Trainer here: name functions that return model and loader without one",
    ),
)


def _remedy(error: BaseException, message: str) -> str | None:
    for kind, pattern, remedy in _REMEDIES:
        if isinstance(error, kind) and re.search(pattern, message):
            return remedy
    return None


Model: TypeAlias = "str | torch.nn.Module | Callable[..., torch.nn.Module]"
"""A model, a callable that returns it, or the spec of either."""
Loader: TypeAlias = "str | Iterable[Any] | Callable[..., Iterable[Any]]"
"""An iterable of batches, a callable that returns it, or the spec of either."""
Function: TypeAlias = "str | Callable[..., Any]"
"""A function, or its spec."""


def name_of(spec: object) -> str:
    """What messages call a spec or an object: a spec as it is, an object by its name or class."""
    name: str = spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)
    return name


def load_object(spec: object) -> Any:  # noqa: ANN401 - the user's own
    """Import what a spec names.

    Args:
        spec: `package.module:attr` or `path/to/file.py:attr`; `attr` may be dotted. Modules are
            looked for in the working directory too. What is no string is returned as it is.

    Raises:
        CkptAvgError: there is no such module, file or attribute.
        UserCodeError: it raised while it was imported.
    """
    if not isinstance(spec, str):
        return spec
    place, colon, attribute = spec.rpartition(":")
    is_file = place.endswith(".py")
    if not (colon and place and attribute) or (place.startswith(".") and not is_file):
        raise CkptAvgError(f"{spec!r} is not of the form package.module:attr or path/file.py:attr")
    found: Any = _load_file(Path(place)) if is_file else _load_module(place)
    with user_code(f"looking up {spec}"):
        for name in attribute.split("."):
            if not hasattr(found, name):
                others = _others(found, name)
                remedy = f"it has {listed(others)}" if others else None
                raise CkptAvgError(f"{place} has no {attribute!r}", remedy=remedy)
            found = getattr(found, name)
    return found


def load_function(spec: object) -> Callable[..., Any]:
    """Import the function that a spec names.

    Raises:
        CkptAvgError: it is no function, or there is none.
        UserCodeError: its module raised while it was imported.
    """
    function = load_object(spec)
    if not callable(function):
        raise CkptAvgError(f"{name_of(spec)} is a {type(function).__name__}, not a function")
    called: Callable[..., Any] = function
    return called


def _others(found: object, name: str) -> list[str]:
    """Names to propose for one that a module or a class does not have, the most alike first.

    A package collects what others define. A file's and a class's own are proposed alone.
    """
    names = [each for each in dir(found) if not each.startswith("_")]
    if hasattr(found, "__path__"):
        return difflib.get_close_matches(name, names, cutoff=0.4)
    place = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", "")
    own = [
        each
        for each, value in getattr(found, "__dict__", {}).items()
        if each in names and _may_be_meant(value, place)
    ]
    return [*dict.fromkeys((*difflib.get_close_matches(name, own, cutoff=0.4), *own))]


def _may_be_meant(value: object, module: str) -> bool:
    """Whether a value may be a model, a loader or a function, and is not imported."""
    if hasattr(value, "__name__"):
        return callable(value) and getattr(value, "__module__", None) == module
    return callable(value) or (hasattr(value, "__iter__") and not isinstance(value, str | Mapping))


def _load_module(name: str) -> ModuleType:
    _look_in(Path.cwd())
    with _importing(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise CkptAvgError(
                f"there is no module {error.name!r}", remedy="name a file as path/file.py:attr"
            ) from error


def _load_file(path: Path) -> ModuleType:
    """Import a file once: model and loader of one file come from one module."""
    path = path.resolve()
    if not path.is_file():
        raise CkptAvgError("there is no such file", path=path)
    known = _imported(path)
    if known is not None:
        return known
    # By its own name, which a loader's worker processes can import again, unless that is taken.
    name = path.stem
    if name in sys.modules:
        name = f"ckptavg_user_{zlib.crc32(bytes(path)):08x}_{name}"
    _look_in(path.parent)
    _look_in(Path.cwd(), behind=path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CkptAvgError("cannot be imported", path=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importing(str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _look_in(folder: Path, behind: Path | None = None) -> None:
    """Have modules looked for in a folder, before all others or behind another."""
    if str(folder) not in sys.path and not (folder == Path.cwd() and "" in sys.path):
        place = 0 if behind is None else sys.path.index(str(behind)) + 1
        sys.path.insert(place, str(folder))


@contextlib.contextmanager
def _importing(place: str) -> Iterator[None]:
    """What an import of the user's code happens in: his errors are told from ours."""
    with user_code(f"importing {place}"), _argv(place), _without_training(place):
        yield


@contextlib.contextmanager
def _argv(program: str) -> Iterator[None]:
    """Set `sys.argv` to the program's name: the arguments on the command line are ckptavg's."""
    before = sys.argv
    sys.argv = [program]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _without_training(place: str) -> Iterator[None]:
    """End an import that begins a training, before that writes over its checkpoints.

    Raises:
        UserCodeError: an optimizer was about to make a step.
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: PLC0415

    def refuse(*_: object) -> None:
        raise UserCodeError(
            f"importing {place} starts a training, which would overwrite its checkpoints",
            remedy='put the training under `if __name__ == "__main__":`',
        )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _imported(path: Path) -> ModuleType | None:
    """The module that a file was imported as, by us or by others."""
    # Looking into each of thousands of modules takes longer than a small model's evaluation.
    ends = (path.stem, path.parent.name)  # a package's `__init__.py` is imported by its folder
    for name in (path.stem, *sys.modules):
        if name == "__main__" or not name.endswith(ends):
            continue
        # Not by `getattr`: some modules import more when they are asked for an attribute.
        module = sys.modules.get(name)
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and Path(file).resolve() == path:
            return module
    return None
