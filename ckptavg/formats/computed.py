"""Something like a checkpoint, whose tensors are computed as they are read, or are in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptavg.formats.tensors import AnyArray


@dataclass(frozen=True, eq=False)
class ComputedCheckpoint(Checkpoint):
    """The description of a checkpoint, with other values in its tensors.

    Attributes:
        make: returns a tensor by its name.
    """

    make: Callable[[str], AnyArray] = field(kw_only=True)

    def read(self, name: str) -> AnyArray:
        """A tensor as an array of its shape."""
        return self.make(name)
