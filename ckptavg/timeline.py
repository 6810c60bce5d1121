"""Where in the training each checkpoint was saved."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.checkpoint import STEP_FACTS
from ckptavg.errors import SelectionError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.sources import Source

# What numbers in names are called: `epoch=3-step=400`, `checkpoint-500`, `iter_0001000`.
_LABELLED = re.compile(
    r"(?:global_step|step|iter(?:ation)?|it|update|checkpoint|ckpt|epoch|ep)[=_-]?(\d+)",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Timeline:
    """The checkpoints' places in the training.

    Attributes:
        unit: what is counted: `global_step`, `step`, `epoch`, or `number` (in the names).
        numbers: as the checkpoints themselves count; None where some have none.
        done: how much of the training was done at each: the number, or one more where epochs are
            counted from 0, as Lightning and timm do.
        from_zero: whether they are.
        missing: why there are no numbers.
    """

    unit: str
    numbers: tuple[int, ...] | None
    done: tuple[int, ...]
    from_zero: bool
    missing: str = ""

    @property
    def checked(self) -> tuple[int, ...]:
        """The numbers, which are there."""
        return self.numbers or ()

    def done_at(self, number: int) -> int:
        """How much is done at a number of theirs."""
        return number + self.from_zero

    @staticmethod
    def of(sources: Sequence[Source], names: Sequence[str], unit: str | None) -> Timeline:
        """Find out what the checkpoints record, or what their names say.

        Raises:
            SelectionError: not all of them record the unit that is asked for.
        """
        for fact in STEP_FACTS if unit is None else (unit,):
            recorded = [source.checkpoint.facts.get(fact) for source in sources]
            if all(number is not None for number in recorded):
                numbers = tuple(int(number) for number in recorded if number is not None)
                return Timeline._counted(fact, numbers, sources)
        if unit is not None:
            without = next(
                n for n, s in zip(names, sources, strict=True) if unit not in s.checkpoint.facts
            )
            raise SelectionError(f"{printable(without)} records no {unit}")
        found = numbers_in(names)
        if found is None:
            missing = "not all record one, and their names do not tell"
            return Timeline("number", None, (), from_zero=False, missing=missing)
        return Timeline._counted("number", found, sources)

    @staticmethod
    def _counted(unit: str, numbers: tuple[int, ...], sources: Sequence[Source]) -> Timeline:
        from_zero = unit == "epoch" and any(
            source.checkpoint.training.epochs_from_zero for source in sources
        )
        return Timeline(unit, numbers, tuple(number + from_zero for number in numbers), from_zero)


def numbers_in(names: Sequence[str]) -> tuple[int, ...] | None:
    """The step that each name tells: a labelled number that differs, else the first that does."""
    for pattern in (_LABELLED, _DIGITS):
        rows = [
            [int(found[found.lastindex or 0]) for found in pattern.finditer(name)] for name in names
        ]
        width = min((len(row) for row in rows), default=0)
        columns = list(zip(*(row[:width] for row in rows), strict=True))
        differing = [column for column in columns if len(set(column)) > 1 or len(names) == 1]
        if differing:
            # Of several (an epoch and a step) the last that grows in steps of its own.
            return differing[-1] if pattern is _LABELLED else differing[0]
    return None
