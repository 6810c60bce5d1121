"""How much of the training was done at each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, printable
from ckptavg.formats.checkpoint import STEP_FACTS
from ckptavg.select.order import numbers_in, restarts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Timeline:
    """The checkpoints' places in the training.

    Attributes:
        unit: what is counted: `global_step`, `step`, `epoch`, or `number` (in the names).
        numbers: as the checkpoints themselves count; None where some have none.
        done: how much of the training was done at each: the number, or one more where epochs are
            counted from 0, as Lightning and timm do, and loops whose first epoch is 0.
        others: further units that all of them record.
    """

    unit: str
    numbers: tuple[int, ...] | None
    done: tuple[int, ...]
    others: tuple[str, ...] = ()

    @property
    def from_zero(self) -> bool:
        """Whether the numbers are counted from 0."""
        return bool(self.numbers) and self.done != self.numbers

    @property
    def checked(self) -> tuple[int, ...]:
        """The numbers, which are there."""
        return self.numbers or ()

    def done_at(self, number: int) -> int:
        """How much is done at a number of theirs."""
        return number + self.from_zero

    @staticmethod
    def of(checkpoints: Sequence[Checkpoint], names: Sequence[str], unit: str | None) -> Timeline:
        """Find out what the checkpoints record, or what their names say.

        Raises:
            SelectionError: not all of them have the unit that is asked for.
        """
        recorded = {
            fact: numbers
            for fact in STEP_FACTS
            if (numbers := _recorded(checkpoints, fact)) is not None
            and not (fact == "step" and restarts(checkpoints))
        }
        if unit is not None and unit not in recorded:
            anew = unit == "step" and restarts(checkpoints)
            named = None if anew else numbers_in(names, "epoch" if unit == "epoch" else "step")
            if named is None:
                raise SelectionError(
                    f"not all checkpoints record the {unit}: {_lacking(checkpoints, names, unit)}"
                )
            return _counted(unit, named, checkpoints, ())
        taken = unit or next(iter(recorded), None)
        if taken is not None:
            others = tuple(fact for fact in recorded if fact != taken)
            return _counted(taken, recorded[taken], checkpoints, others)
        numbers = numbers_in(names)
        return (
            Timeline("number", None, ())
            if numbers is None
            else _counted("number", numbers, checkpoints, ())
        )


def _recorded(checkpoints: Sequence[Checkpoint], fact: str) -> tuple[int, ...] | None:
    numbers = [checkpoint.facts.get(fact) for checkpoint in checkpoints]
    known = tuple(int(number) for number in numbers if number is not None)
    return known if len(known) == len(numbers) else None


def _lacking(checkpoints: Sequence[Checkpoint], names: Sequence[str], unit: str) -> str:
    """The first that does not record it, or what is the matter with those that do."""
    pairs = zip(names, checkpoints, strict=True)
    name = next((name for name, checkpoint in pairs if unit not in checkpoint.facts), None)
    return "it begins anew in each epoch" if name is None else f"{printable(name)} does not"


def _counted(
    unit: str, numbers: tuple[int, ...], checkpoints: Sequence[Checkpoint], others: tuple[str, ...]
) -> Timeline:
    from_zero = unit == "epoch" and (
        0 in numbers or any(checkpoint.training.epochs_from_zero for checkpoint in checkpoints)
    )
    return Timeline(unit, numbers, tuple(number + from_zero for number in numbers), others)
