"""Arguments of a model or a data module: the user's, and hyper-parameters of checkpoints."""

from __future__ import annotations

import copy
import inspect
import logging
import reprlib
from itertools import islice
from typing import TYPE_CHECKING, Any

from ckptavg.errors import CkptAvgError, RefreshError, UserCodeError, listed, printable
from ckptavg.formats.pickled import Placeholder
from ckptavg.model.factories import name_of, user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

log = logging.getLogger("ckptavg")

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_DIRECTORY = "pretrained_model_name_or_path"  # of Hugging Face's `from_pretrained`
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class HyperParameters(dict[str, Any]):
    """A dict whose values are attributes as well, as those of an `argparse.Namespace` are.

    One may be called `items` or `values`, and hides that method: `dict.items(it)` is certain.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.__dict__ = self

    def __deepcopy__(self, memo: dict[int, Any]) -> HyperParameters:
        return HyperParameters({key: copy.deepcopy(self[key], memo) for key in self})


def complete_arguments(
    function: Callable[..., object],
    given: Mapping[str, Any],
    checkpoints: Iterable[Checkpoint],
    option: str = "model_arg",
    *,
    of_data: bool = False,
) -> dict[str, Any]:
    """Add the hyper-parameters that a checkpoint records to the user's arguments.

    They are read as data: nothing that the checkpoint names is imported or called.

    Args:
        function: returns the model or the data module. It is given the hyper-parameters that are
            parameters of it; a class with `**kwargs` is given all of them. Of one argument that has
            them all, such as `args`, it is given what is in it if that is no parameter. A
            `from_pretrained` is given the first checkpoint's directory, whose configuration it
            reads.
        given: the user's arguments, which take precedence.
        checkpoints: the first one that records hyper-parameters is used.
        option: the option that gives the user's arguments.
        of_data: whether the hyper-parameters of a data module are meant, not those of a model.

    Raises:
        RefreshError: an argument without a default is missing.
    """
    checkpoints = tuple(checkpoints)
    folder = _directory(checkpoints)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return dict(given)
    kinds = {each.kind for each in parameters.values()}
    if (
        inspect.ismethod(function)
        and function.__name__ == "from_pretrained"
        and (_DIRECTORY in parameters or inspect.Parameter.VAR_POSITIONAL in kinds)
    ):
        if folder is None or _DIRECTORY in given:
            return dict(given)
        owner = getattr(function.__self__, "__name__", "")
        log.info("%s.from_pretrained is given %s", printable(owner), printable(folder.name))
        return {_DIRECTORY: str(folder), **given}
    takes_all = isinstance(function, type) and inspect.Parameter.VAR_KEYWORD in kinds
    field = "data_hyper_parameters" if of_data else "hyper_parameters"
    source = next((each for each in checkpoints if getattr(each.training, field)), None)
    values = getattr(source.training, field) if source else {}
    if len(values) == 1:
        [(name, inner)] = ((name, _contents(value)) for name, value in values.items())
        if isinstance(inner, dict):
            is_argument = name in parameters or takes_all
            values = {name: HyperParameters(inner)} if is_argument else inner
    recorded = {
        name: _contents(value)
        for name, value in values.items()
        if isinstance(name, str)
        and name not in given
        and (name in parameters or (takes_all and name != "self"))
    }
    objects = dict(item for name, value in recorded.items() for item in _objects_of(name, value))
    plain = {
        name: _without(objects, name, value)
        for name, value in recorded.items()
        if name not in objects
    }
    if source is not None and recorded:
        _log_arguments(name_of(function), source.name, plain, objects)
    # A misspelt name is what is wrong, and not that the right one is missing: the call says so.
    is_misspelt = inspect.Parameter.VAR_KEYWORD not in kinds and given.keys() - parameters.keys()
    if not is_misspelt and (missing := _missing(parameters, [*given, *plain])):
        raise _missing_arguments(function, missing, objects, source, folder, option=option)
    return {**plain, **{name: _without((), name, value) for name, value in given.items()}}


def _directory(checkpoints: Iterable[Checkpoint]) -> Path | None:
    """The directory of the first checkpoint that is one with a model's configuration."""
    paths = (checkpoint.path for checkpoint in checkpoints if not checkpoint.is_remote)
    return next((path for path in paths if (path / "config.json").is_file()), None)


def wrong_arguments(
    function: Callable[..., object], name: str, arguments: Mapping[str, Any], option: str
) -> RefreshError | None:
    """The error about keywords that a function does not accept; None if it accepts them.

    Args:
        function: the function.
        name: what messages call it.
        arguments: the keywords.
        option: the option that gives them.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    accepted = [each.name for each in parameters.values() if each.kind in _BY_NAME]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    unknown = [each for each in arguments if each not in accepted]
    if unknown and not takes_all:
        remedy = f"it takes {listed(accepted)}" if accepted else "it takes no arguments"
        return RefreshError(f"{name} does not take {listed(unknown)} (`{option}`)", remedy=remedy)
    if missing := _missing(parameters, arguments):
        return RefreshError(
            f"{name} needs {listed(missing)}",
            remedy=f"give {_as_options(option, missing)}, or name a function that needs no "
            "arguments",
        )
    return None


def called(function: Callable[..., Any], what: str, **given: object) -> Any:  # noqa: ANN401
    """What a function of the user's returns.

    Args:
        function: the function.
        what: what messages call it.
        given: its arguments, in their order; a function may give them other names.

    Raises:
        CkptAvgError: it takes more or fewer.
        UserCodeError: it raised.
    """
    try:
        with user_code(what):
            return function(*given.values())
    except UserCodeError as error:
        # Not before the call: a decorator may change the arguments of which the signature tells.
        takes = _refused(function, given) if isinstance(error.__cause__, TypeError) else None
        if takes is None:
            raise
        raise CkptAvgError(
            f"{name_of(function)} is called with {' and '.join(given)}, and takes {takes}",
            remedy=f"define it as {name_of(function)}({', '.join(given)})",
        ) from error


def _refused(function: Callable[..., object], given: Mapping[str, object]) -> str | None:
    """The names of a function's parameters, if they cannot be those arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*given.values())
    except TypeError:
        return listed(signature.parameters) or "nothing"
    return None


def _missing(parameters: Mapping[str, inspect.Parameter], given: Collection[str]) -> list[str]:
    """The parameters without a default that are not given."""
    return [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in _BY_NAME
        and name not in given
    ]


def _as_options(option: str, names: Iterable[str]) -> str:
    """How a message names the options that give arguments."""
    return " ".join(f"`{option}` {name}=VALUE" for name in names)


def _contents(value: object) -> object:
    """A value; of an `argparse.Namespace` the dict of its attributes."""
    match value:
        case Placeholder(origin="argparse.Namespace", state=dict(attributes)):
            return HyperParameters(attributes)
    return value


def _objects_of(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The names of values that are no plain data, or have some in them, and a class of each.

    A namespace is given without those of its attributes. Any other value is given as it is, or not.
    """
    if isinstance(value, HyperParameters):
        for key, each in dict.items(value):
            yield from ((f"{name}.{key}", kind) for kind in islice(_objects(each), 1))
    else:
        yield from ((name, kind) for kind in islice(_objects(value), 1))


def _without(objects: Collection[str], name: str, value: object) -> object:
    """A recorded value as a model expects it: dicts have attributes, none of which is an object."""
    if not isinstance(value, dict):
        return value
    plain = {key: each for key, each in dict.items(value) if f"{name}.{key}" not in objects}
    return HyperParameters(plain)


def _objects(value: object) -> Iterator[str]:
    """The class of each object in a value that is not plain data."""
    waiting, visited = [_contents(value)], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list | tuple | set | frozenset):
            if id(each) not in visited:
                visited.add(id(each))
                waiting += [*each, *dict.values(each)] if isinstance(each, dict) else each
        elif not isinstance(each, _PLAIN):
            yield each.origin if isinstance(each, Placeholder) else "torch.Tensor"


def _log_arguments(
    function: str, source: str, plain: Mapping[str, object], objects: Mapping[str, str]
) -> None:
    """Log which hyper-parameters the model is given, and which it is not."""
    values = listed((f"{name}={reprlib.repr(value)}" for name, value in plain.items()), most=12)
    notice = f"{function} is given what {source} records: {values or 'nothing'}"
    if objects:
        kinds = (f"{name} ({kind})" for name, kind in objects.items())
        notice += f"; it is not given objects, which are not read: {listed(kinds)}"
    log.info("%s", notice)


def _missing_arguments(
    function: Callable[..., object],
    missing: list[str],
    objects: Mapping[str, str],
    source: Checkpoint | None,
    folder: Path | None,
    *,
    option: str,
) -> RefreshError:
    """The error about arguments that neither the user nor a checkpoint gives."""
    unread = [f"{name} (a {objects[name]})" for name in missing if name in objects]
    if unread and source is not None:
        why = f"{printable(source.name)} records {listed(unread)}, an object, which is not read"
    elif source is not None:
        why = f"{printable(source.name)} does not record {'it' if len(missing) == 1 else 'them'}"
    else:
        why = "the checkpoint records no hyper-parameters"
    remedy = f"give {_as_options(option, missing)}, or name a function that needs no arguments"
    if callable(getattr(function, "from_pretrained", None)):
        remedy = f"name {name_of(function)}.from_pretrained"
        if folder is None:
            remedy += f", with `model_arg` {_DIRECTORY}=DIRECTORY"
    return RefreshError(f"{name_of(function)} needs {listed(missing)}, and {why}", remedy=remedy)
