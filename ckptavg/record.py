"""What an average says of itself: its provenance, read back and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg import __version__
from ckptavg.errors import VerificationError, printable
from ckptavg.tensors import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.checkpoint import Checkpoint


@dataclass(frozen=True)
class Record:
    """What an average says of itself.

    Attributes:
        path: the average.
        scheme: of its weights.
        members: the entries of its checkpoints.
        divisor: of the weighted sum.
        options: those of `average` that its values depend on.
        key: which of the checkpoints' state dicts was averaged.
        version: of ckptavg.
        sha256: of its tensors, if it was recorded.
        is_refreshed: whether its norm statistics come from data.
    """

    path: Path
    scheme: str
    members: tuple[dict[str, Any], ...]
    divisor: float
    options: dict[str, Any]
    key: str | None
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
            or not members
            or not all(map(_is_member, members))
            or not _is_number(divisor)
            or not divisor
            or not isinstance(options, dict)
            or not isinstance(state, dict)
            or not isinstance(entry.get("key"), str | None)
            or not isinstance(entry.get("sha256"), str | None)
            or options.get("dtype") not in (None, *BY_NAME)
        ):
            raise VerificationError("has a damaged provenance", path=opened.path)
        return Record(
            opened.path, str(entry.get("scheme")), tuple(members), float(divisor), options,
            entry.get("key"), str(entry.get("version")), entry.get("sha256"),
            state.get("state") == "refreshed",
        )  # fmt: skip

    @property
    def is_exact(self) -> bool:
        """Whether products of LoRA factors were averaged."""
        return self.options.get("lora") == "exact"

    def unwanted(self, name: str) -> str | None:
        """Why a checkpoint of that name is not opened; None if it may be one of its own."""
        last = {PurePosixPath(entry["name"]).name for entry in self.members}
        return None if PurePosixPath(name).name in last else "none of its own"

    @property
    def remedy(self) -> str | None:
        """What to say where it differs."""
        if self.version == __version__:
            return None
        return f"it was made by ckptavg {printable(self.version)}, and this is {__version__}"


def _is_member(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("header_sha256"), str)
        and isinstance(entry.get("sha256"), str | dict | None)
        and _is_number(entry.get("weight"))
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
