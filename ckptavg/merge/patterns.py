"""Regular expressions that choose names of tensors and layers."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_MOST_ALTERNATIVES = 4


def any_matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the regular expressions matches a part of a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def matching(
    option: str, patterns: Iterable[str], names: Collection[str], kind: str = "tensor"
) -> set[str]:
    """The names of which one of the regular expressions matches a part.

    Args:
        option: the argument that has the expressions, for messages.
        patterns: the expressions.
        names: the names.
        kind: what has these names, `tensor` or `layer`, for messages.

    Raises:
        SelectionError: an expression is not valid, or matches no name.
    """
    matched: set[str] = set()
    for pattern in patterns:
        quoted = f"`{option}` '{printable(pattern)}'"
        try:
            matches = set(filter(re.compile(pattern).search, names))
        except re.error as error:
            raise SelectionError(f"{quoted} is not a regular expression: {error}") from error
        if not matches:
            what = f"{quoted} matches no {kind}'s name"
            raise SelectionError(what, remedy=f"the names are {listed(sorted(names))}")
        matched |= matches
    return matched


def pattern_of(names: Sequence[str], others: Collection[str]) -> str | None:
    """A regular expression, quoted for a shell, that matches these names and none of the others.

    It has the ends of the names, or else their beginnings, or else all but the numbers in them.
    None if such an expression would need more than a few alternatives.
    """
    split = [name.split(".") for name in names]
    ends = (
        [re.escape(".".join(parts[-count:])) + "$" for parts in split]
        for count in range(1, max(map(len, split), default=0) + 1)
    )
    starts = ["^" + re.escape(f"{parts[0]}.") for parts in split]
    complete = ["^" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "$" for name in names]
    for alternatives in (*ends, starts, complete):
        distinct = list(dict.fromkeys(alternatives))
        pattern = "|".join(distinct)
        if len(distinct) <= _MOST_ALTERNATIVES and not any(map(re.compile(pattern).search, others)):
            return shlex.quote(printable(pattern))
    return None
