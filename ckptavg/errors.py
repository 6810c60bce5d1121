"""The errors that ckptavg reports: each message says what is wrong, where, and what to do."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

# Control codes, line separators, marks that turn the direction of text, and halves of characters.
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# URLs may have secrets in two places: user and password, and the query.
_USER = re.compile(r"(://)[^/\s]*@")
# The query is optional here. If it were required, a name full of `://` would take quadratic time.
_QUERY = re.compile(r"(://[^?\n]*)(?:\?\S*)?")
_LONGEST_NAME = 300
_LONGEST_MESSAGE = 2_000
_MOST_DIFFERENCES = 16


def printable(name: object) -> str:
    """A name for one line of a terminal: without control codes and passwords, and cut if long."""
    text = _QUERY.sub(r"\1", _USER.sub(r"\1", str(name)))
    text = escaped(text)
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}... ({len(text)} long)"


def escaped(text: str) -> str:
    """A line with escapes for control characters, which a terminal would obey and not show."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first of several names for a message, and how many more there are."""
    every = list(map(printable, names))
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def described(error: BaseException) -> str:
    """The class of an exception and its message."""
    message = message_of(error).replace("`", "'")  # backquotes would make an option of a name
    return f"{type(error).__name__}: {message}"


def message_of(error: BaseException) -> str:
    """What an exception says, without the traceback of a loader's worker that it may quote."""
    try:
        text = str(error)
    except (Exception, SystemExit):  # noqa: BLE001 - its `__str__` may be the user's own
        return "(its message cannot be shown)"
    if "Original Traceback" in text:
        lines = text.rstrip().splitlines()
        frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
        message = "\n".join(lines[max(frames, default=0) + 1 :])
        text = f"{message} (in a worker process)"
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


def problem_of_torch(error: BaseException) -> str | None:
    """What is wrong with torch, if its import raised the exception; None for others."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "torch is not installed; pip install torch"
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    modules = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames}
    if sys.modules.get("torch") is None and "torch" in modules:
        return f"torch cannot be imported ({described(error)}); install it again"
    return None


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Log errors only in this block, whose notices are logged elsewhere."""
    log = logging.getLogger("ckptavg")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Of notices that come with every checkpoint or trial, let the first through."""
    log = logging.getLogger("ckptavg")
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in said
        said.add(text)
        return new

    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


class CkptAvgError(Exception):
    """The base of all errors that are not bugs: the data, the model or the system is at fault.

    Attributes:
        message: what is wrong.
        path: the file or directory that it is about, if any.
        tensor: the tensor that it is about, if any.
        remedy: what the user can do about it, if anything.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        tensor: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.path, self.tensor, self.remedy = message, path, tensor, remedy

    def __str__(self) -> str:
        where = [printable(part) for part in (self.path, self.tensor) if part is not None]
        text = ": ".join([*where, self.message])
        return f"{text}; {self.remedy}" if self.remedy else text


class FormatError(CkptAvgError):
    """A file is damaged, has an unknown format, or holds something that cannot be averaged."""


class SelectionError(CkptAvgError):
    """The arguments select no checkpoint or state dict, too many, or contradict each other.

    Attributes:
        choices: the names to choose from, where one has to be chosen.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        remedy: str | None = None,
        choices: Sequence[str] = (),
    ) -> None:
        super().__init__(message, path=path, remedy=remedy)
        self.choices = tuple(choices)


class NoStateDictError(SelectionError):
    """A file holds no state dict: that of an optimizer, for example."""


class MismatchError(CkptAvgError):
    """The checkpoints are not of one model: names, shapes or dtypes of their tensors differ.

    Attributes:
        differences: one line for each difference.
    """

    def __init__(self, message: str, differences: Sequence[str]) -> None:
        super().__init__(message)
        self.differences = tuple(differences)

    def __str__(self) -> str:
        lines, more = self.differences[:_MOST_DIFFERENCES], self.differences[_MOST_DIFFERENCES:]
        rest = [f"and {len(more)} more differences"] if more else []
        return "\n  ".join([self.message, *lines, *rest])


class ValueRangeError(CkptAvgError):
    """A tensor, or its average, has values that a model must not have: NaN, Inf, overflow."""


class OutputError(CkptAvgError):
    """The output cannot be written."""


class VerificationError(CkptAvgError):
    """An average differs from its provenance, or from the average of its checkpoints."""


class RefreshError(CkptAvgError):
    """The norm statistics cannot be refreshed with this model and this loader."""


class UserCodeError(CkptAvgError):
    """The user's own model, loader or function raised an exception, which is the `__cause__`."""


class PeerError(CkptAvgError):
    """Another process of this command has failed, and reports the reason itself."""
