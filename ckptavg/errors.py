"""What can go wrong. Each error is one line that says what, where, and what to do."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# User and password, and the query, in an address: what may be secret.
_USER = re.compile(r"(://)[^/\s]*@")
# It matches with no query as well: else a name full of `://` would take quadratic time.
_QUERY = re.compile(r"(://[^?\n]*)(?:\?\S*)?")
_LONGEST_NAME = 300


def printable(name: object) -> str:
    """A name, made safe for one line of a terminal: no control codes, no passwords, not endless."""
    text = _QUERY.sub(r"\1", _USER.sub(r"\1", str(name)))
    text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}... ({len(text)} long)"


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Log errors only: the notices have been logged already, or will be."""
    log = logging.getLogger("ckptavg")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class CkptAvgError(Exception):
    """Whatever a user has to hear of: the data, the model or the surroundings are at fault.

    Attributes:
        path: the file it speaks of, if one.
        tensor: the tensor it speaks of, if one.
        remedy: what to do about it, if something can be done.
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
    """A file is damaged, of an unknown kind, or holds what cannot be averaged."""


class SelectionError(CkptAvgError):
    """The checkpoints, or the state dict within one, are none, too many, or unclear.

    Attributes:
        choices: what there is to choose from, where that is the trouble.
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


class MismatchError(CkptAvgError):
    """Checkpoints that are no snapshots of one model: names, shapes or dtypes differ.

    Attributes:
        differences: one line for each difference.
    """

    def __init__(self, message: str, differences: Sequence[str]) -> None:
        super().__init__(message)
        self.differences = tuple(differences)

    def __str__(self) -> str:
        return "\n  ".join([self.message, *self.differences])


class ValueRangeError(CkptAvgError):
    """A tensor holds, or its average would hold, values that make no model: NaN, Inf, overflow."""


class OutputError(CkptAvgError):
    """The output cannot be written."""


class VerificationError(CkptAvgError):
    """An average is not what it says of itself, or not what its checkpoints give."""


class RefreshError(CkptAvgError):
    """The norm statistics cannot be refreshed with this model and this loader."""


class UserCodeError(CkptAvgError):
    """The user's own model, loader or function raised: `__cause__` is what it raised."""


class PeerError(CkptAvgError):
    """Another of the processes that work together has failed, and says why itself."""
