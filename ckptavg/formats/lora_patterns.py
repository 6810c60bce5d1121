"""The patterns of PEFT's configurations: regular expressions for the ends of modules' names."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ckptavg.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LONGEST_PATTERN, _LONGEST_NAME = 500, 300
_MOST_EXPRESSIONS = _MOST_SHAPES = 1000
# What lets a match take exponential time, or nearly: repeated groups, or many repetitions (the `?`
# of `(?:` is none) or choices.
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_REPETITION = re.compile(r"[*+}]|(?<!\()\?")
_MOST_REPETITIONS = _MOST_CHOICES = 3
_NAME = re.compile(r"[\w.-]+")


class Patterns:
    """The values of patterns, of which the first that matches a name counts, as in PEFT.

    Most patterns are names, in which only the dots are special: they match any character. These are
    looked up by the ends of a name, so that neither modules nor patterns need be few.

    Args:
        values: the value of each pattern, in order.
        path: the file that has them, for messages.

    Raises:
        FormatError: a pattern is not valid, or slow, or there are too many that are not names.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self._path = path
        # By the length of a name and the places of its dots: number and value of each pattern.
        self._names: defaultdict[int, dict[tuple[int, ...], dict[str, tuple[int, Any]]]]
        self._names = defaultdict(dict)
        self._expressions: list[tuple[int, re.Pattern[str], Any]] = []
        for number, (pattern, value) in enumerate(values.items()):
            if len(pattern) <= _LONGEST_PATTERN and _NAME.fullmatch(pattern):
                dots = tuple(match.start() for match in re.finditer(r"\.", pattern))
                alike = self._names[len(pattern)].setdefault(dots, {})
                alike.setdefault(pattern, (number, value))
            else:
                self._expressions.append((number, self._compiled(pattern), value))
        many = max(map(len, self._names.values()), default=0) > _MOST_SHAPES
        if many or len(self._expressions) > _MOST_EXPRESSIONS:
            raise FormatError(
                f"its alpha_pattern has {len(values):,} patterns: too many", path=path
            )

    def first(self, name: str, default: Any) -> Any:  # noqa: ANN401 - of JSON
        """The value of the first pattern that matches a name, or its end behind a dot."""
        if not self._names and not self._expressions:
            return default
        if len(name) > _LONGEST_NAME or "\n" in name:
            raise FormatError(
                f"has patterns, and a module's name is too long for them: {printable(name)}",
                path=self._path,
            )
        matches = ((n, value) for n, pattern, value in self._expressions if pattern.match(name))
        found = [*itertools.islice(matches, 1)]
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            end = name[start:]
            for dots, patterns in self._names.get(len(end), {}).items():
                characters = list(end)
                for place in dots:
                    characters[place] = "."
                found += filter(None, [patterns.get("".join(characters))])
        return min(found, key=lambda pair: pair[0])[1] if found else default

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        if (
            len(pattern) > _LONGEST_PATTERN
            or _REPEATED_GROUP.search(pattern) is not None
            or len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS
            or min(pattern.count("("), pattern.count("|")) > _MOST_CHOICES
        ):
            raise FormatError(
                f"its alpha_pattern {printable(pattern)!r} is too complex", path=self._path
            )
        try:
            with warnings.catch_warnings(action="ignore"):  # about syntax that may change
                return re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(
                f"its alpha_pattern {printable(pattern)!r} is not a regular expression",
                path=self._path,
            ) from error
