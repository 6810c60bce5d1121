"""What an average says of itself: its provenance, read back and checked."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg import __version__
from ckptavg.errors import VerificationError, printable
from ckptavg.formats.tensors import BY_NAME
from ckptavg.merge.weights import Weights

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import DType


@dataclass(frozen=True)
class Record:
    """What an average says of itself.

    Attributes:
        path: the average.
        scheme: of its weights; `none` of a copy with refreshed norm statistics.
        members: the entries of its checkpoints.
        divisor: of the weighted sum.
        options: those of `average` that its values depend on.
        version: of ckptavg.
        sha256: of its tensors, if it was recorded.
        is_refreshed: whether its norm statistics come from data.
    """

    path: Path
    scheme: str
    members: tuple[dict[str, Any], ...]
    divisor: float
    options: dict[str, Any]
    version: str
    sha256: str | None
    is_refreshed: bool

    @staticmethod
    def of(opened: Checkpoint) -> Record:
        """Read it from an average's metadata.

        Raises:
            VerificationError: there is none, or it is damaged.
        """
        entry = opened.provenance
        if entry is None:
            raise VerificationError("was not made by ckptavg", path=opened.path)
        members, options = entry.get("sources"), entry.get("options", {})
        state, divisor = entry.get("norm_stats", {}), entry.get("divisor")
        if (
            not isinstance(members, list)
            or not all(map(_is_member, members))
            or not any(member["weight"] for member in members)
            or not _is_number(divisor)
            or not divisor
            or not isinstance(state, dict)
            or not isinstance(options, dict)
            or not all(options.get(name) in known for name, known in _KNOWN.items())
            or not isinstance(entry.get("sha256"), str | None)
        ):
            raise VerificationError("has a damaged provenance", path=opened.path)
        return Record(
            opened.path, str(entry.get("scheme")), tuple(members), float(divisor), options,
            str(entry.get("version")), entry.get("sha256"), state.get("state") == "refreshed",
        )  # fmt: skip

    @property
    def weights(self) -> Weights:
        """Those of its checkpoints."""
        return Weights(self.scheme, tuple(one["weight"] for one in self.members), self.divisor)

    @property
    def key(self) -> str:
        """Which of the last checkpoint's state dicts it was made of; empty for the whole file."""
        weighty = [member for member in self.members if member["weight"]]
        key: str = weighty[-1].get("key") or ""
        return key

    @property
    def is_copy(self) -> bool:
        """Whether it is a checkpoint with refreshed norm statistics, and no average."""
        return self.scheme == "none"

    @property
    def is_container(self) -> bool:
        """Whether it is the last checkpoint's file with other weights."""
        return self.options.get("container") == "last"

    @property
    def is_exact(self) -> bool:
        """Whether products of LoRA factors were averaged."""
        return self.options.get("lora") == "exact"

    @property
    def is_updated(self) -> bool:
        """Whether it came out of an earlier average."""
        return bool(self.options.get("update"))

    @property
    def keeps_prefix(self) -> bool:
        """Whether a wrapper's prefix was left on the names."""
        return bool(self.options.get("keep_prefix"))

    @property
    def ints(self) -> str:
        """What became of integer tensors."""
        return str(self.options.get("ints") or "equal")

    @property
    def norm_stats(self) -> str:
        """What became of running statistics."""
        return str(self.options.get("norm_stats") or "average")

    @property
    def dtype(self) -> DType | None:
        """What floats were rounded to; None for their own."""
        name = self.options.get("dtype")
        return BY_NAME[name] if name else None

    @property
    def remedy(self) -> str | None:
        """What to say where it differs."""
        if self.version == __version__:
            return None
        return f"it was made by ckptavg {printable(self.version)}, and this is {__version__}"


_KNOWN: dict[str, tuple[object, ...]] = {
    "dtype": (None, *(name for name, dtype in BY_NAME.items() if dtype.kind == "float")),
    "ints": (None, "last"),
    "norm_stats": (None, "last"),
    "lora": (None, "exact"),
    "container": (None, "last"),
    "keep_prefix": (None, True),
    "update": (None, True),
}


def _is_member(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("header_sha256"), str)
        and isinstance(entry.get("content"), str | None)
        and isinstance(entry.get("key"), str | None)
        and isinstance(entry.get("sha256"), str | dict | None)
        and _is_number(entry.get("weight"))
    )


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, float | int):
        return False
    return abs(value) <= sys.float_info.max
