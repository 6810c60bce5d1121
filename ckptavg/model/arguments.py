"""The arguments of the user's model: his own, and the hyper-parameters that checkpoints record."""

from __future__ import annotations

import inspect
import logging
import reprlib
from typing import TYPE_CHECKING, Any

from ckptavg.errors import RefreshError, listed, printable
from ckptavg.formats.pickled import Placeholder
from ckptavg.model.factories import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ckptavg.formats.checkpoint import Checkpoint

log = logging.getLogger("ckptavg")

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class _Attributes(dict[str, Any]):
    """Values by name, which are attributes as well, as in `argparse.Namespace`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.__dict__ = self


def completed(
    function: Callable[..., object], given: Mapping[str, Any], checkpoints: Iterable[Checkpoint]
) -> dict[str, Any]:
    """The arguments with those that a checkpoint records as the model's hyper-parameters.

    They are read as data: nothing that the checkpoint names is imported or called.

    Args:
        function: makes the model; a class that takes any keyword is given all of them.
        given: the user's arguments, which count for more.
        checkpoints: the first of them that has hyper-parameters counts.

    Raises:
        RefreshError: the function needs an argument that there is not.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return dict(given)
    kinds = {each.kind for each in parameters.values()}
    takes_all = isinstance(function, type) and inspect.Parameter.VAR_KEYWORD in kinds
    source = next((each for each in checkpoints if each.training.hyper_parameters), None)
    recorded = {
        name: value
        for name, value in (source.training.hyper_parameters if source else {}).items()
        if isinstance(name, str) and name not in given and (takes_all or name in parameters)
    }
    objects = {
        name: kind for name, value in recorded.items() if (kind := next(_objects(value), None))
    }
    taken = {name: _usable(value) for name, value in recorded.items() if name not in objects}
    if source is not None and recorded:
        _say(name_of(function), source.name, taken, objects)
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in given
        and name not in taken
    ]
    if needed:
        raise _incomplete(function, needed, objects, source)
    return {**taken, **given}


def _usable(value: object) -> object:
    """A value as a model may take it."""
    value = _contents(value)
    return _Attributes(value) if isinstance(value, dict) else value


def _contents(value: object) -> object:
    """A value, or the values by name of an `argparse.Namespace`."""
    if isinstance(value, Placeholder) and value.origin == "argparse.Namespace":
        return value.state if isinstance(value.state, dict) else value
    return value


def _objects(value: object) -> Iterator[str]:
    """The kinds of the objects in a value that are no plain data."""
    waiting, seen = [_contents(value)], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list | tuple | set | frozenset):
            if id(each) not in seen:
                seen.add(id(each))
                waiting += [*each, *each.values()] if isinstance(each, dict) else each
        elif not isinstance(each, _PLAIN):
            yield each.origin if isinstance(each, Placeholder) else "torch.Tensor"


def _say(
    function: str, source: str, taken: Mapping[str, object], objects: Mapping[str, str]
) -> None:
    values = listed((f"{name}={reprlib.repr(value)}" for name, value in taken.items()), most=12)
    notice = f"{function} is given what {source} records: {values or 'nothing'}"
    if objects:
        kinds = (f"{name} ({kind})" for name, kind in objects.items())
        notice += f"; not given, since they are no plain data: {listed(kinds)}"
    log.info("%s", notice)


def _incomplete(
    function: Callable[..., object],
    needed: list[str],
    objects: Mapping[str, str],
    source: Checkpoint | None,
) -> RefreshError:
    """The error for arguments that are not there."""
    unread = [f"{name} (a {objects[name]})" for name in needed if name in objects]
    if unread and source is not None:
        why = f"{printable(source.name)} records {listed(unread)}, which is no plain data"
    elif source is not None:
        why = f"{printable(source.name)} does not record {'it' if len(needed) == 1 else 'them'}"
    else:
        why = "the checkpoint records no hyper-parameters"
    arguments = " ".join(f"--model-arg {name}=VALUE" for name in needed)
    remedy = f"say it with {arguments}, or name a function that needs no argument"
    if callable(getattr(function, "from_pretrained", None)):
        remedy = (
            f"name {name_of(function)}.from_pretrained, with "
            "--model-arg pretrained_model_name_or_path=DIRECTORY"
        )
    return RefreshError(f"{name_of(function)} needs {listed(needed)}, and {why}", remedy=remedy)
