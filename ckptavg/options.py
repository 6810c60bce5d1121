"""Options: a dataclass for each subject, whose fields public functions take as keywords."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from ckptavg.errors import SelectionError

Progress = Callable[[int, int | None], None]
"""Called with the bytes, batches or points since the last call, and with how many there are in all,
None if that is not known."""

SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of dtypes that an option accepts beside those of torch."""

_Fields = ParamSpec("_Fields")
_Options_co = TypeVar("_Options_co", covariant=True)
_First = TypeVar("_First")
_Second = TypeVar("_Second")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Options:
    """The base of options: where several strings are expected, a single one may be given."""

    def __post_init__(self) -> None:
        """Make tuples of strings.

        Raises:
            SelectionError: there is something else.
        """
        for name in (each.name for each in fields(self) if each.type == "Sequence[str]"):
            value = getattr(self, name)
            texts = (value,) if isinstance(value, str) else value
            if not isinstance(texts, tuple | list) or not all(isinstance(t, str) for t in texts):
                raise SelectionError(
                    f"`{name}` must be a string or a list of strings, not {value!r}"
                )
            object.__setattr__(self, name, tuple(texts))


class _Decorator(Protocol[_Fields, _Options_co]):
    @overload
    def __call__(
        self, function: Callable[[_First, _Options_co], _Result]
    ) -> Callable[Concatenate[_First, _Fields], _Result]: ...

    @overload
    def __call__(
        self, function: Callable[[_First, _Second, _Options_co], _Result]
    ) -> Callable[Concatenate[_First, _Second, _Fields], _Result]: ...


def takes_fields_of(options: Callable[_Fields, _Options_co]) -> _Decorator[_Fields, _Options_co]:
    """Decorate `f(..., options)`, so that callers pass the fields of the options as keywords.

    Args:
        options: the dataclass.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        *leading, _ = inspect.signature(function).parameters.values()
        signature = inspect.Signature([*leading, *inspect.signature(options).parameters.values()])

        @functools.wraps(function)
        def with_fields(*args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - see `_Decorator`
            try:
                given = signature.bind(*args, **keywords).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            first = [given.pop(parameter.name) for parameter in leading]
            return function(*first, options(**given))  # type: ignore[call-arg]

        with_fields.__signature__ = signature  # type: ignore[attr-defined]
        return with_fields

    return decorate
