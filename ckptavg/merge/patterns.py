"""Regular expressions that choose names of tensors and layers."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_MOST_ALTERNATIVES = 4


def is_found(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the regular expressions is found somewhere in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def matching(
    option: str, patterns: Iterable[str], names: Collection[str], kind: str = "tensor"
) -> set[str]:
    """The names in which one of the regular expressions is found.

    Args:
        option: what the expressions were given as, for messages.
        patterns: the expressions.
        names: the names.
        kind: what they are the names of, for messages.

    Raises:
        SelectionError: an expression is not valid, or is found in no name.
    """
    found: set[str] = set()
    for pattern in patterns:
        quoted = f"`{option}` '{printable(pattern)}'"
        try:
            matches = set(filter(re.compile(pattern).search, names))
        except re.error as error:
            raise SelectionError(f"{quoted} is no regular expression: {error}") from error
        if not matches:
            what = f"{quoted} matches no {kind}'s name"
            raise SelectionError(what, remedy=f"the names are {listed(sorted(names))}")
        found |= matches
    return found


def pattern_of(names: Sequence[str], others: Collection[str]) -> str | None:
    """A regular expression, quoted for a shell, that is found in these names and in no others.

    It is the end or the beginning of the names, or all of them but for numbers; the first of these
    that will do. None if there is no such expression of a few alternatives.
    """
    split = [name.split(".") for name in names]
    ends = (
        [re.escape(".".join(parts[-count:])) + "$" for parts in split]
        for count in range(1, max(map(len, split), default=0) + 1)
    )
    starts = ["^" + re.escape(f"{parts[0]}.") for parts in split]
    wholes = ["^" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "$" for name in names]
    for alternatives in (*ends, starts, wholes):
        distinct = list(dict.fromkeys(alternatives))
        pattern = "|".join(distinct)
        if len(distinct) <= _MOST_ALTERNATIVES and not any(map(re.compile(pattern).search, others)):
            return shlex.quote(printable(pattern))
    return None
