"""What a checkpoint records of the training that made it, beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TrainingRecord:
    """Learning rate, schedule and metrics at the time of saving, as far as they are recorded.

    Attributes:
        epochs_from_zero: whether the trainer is known to count epochs from 0, so that a
            checkpoint with epoch e was saved when e + 1 epochs were done (Lightning, timm).
        learning_rate: that of the optimizer's first parameter group. It may be the rate of the
            next update already: see `select.learning_rates`.
        other_rates: those of its further parameter groups.
        scheduler: plain values of the first scheduler's state dict (`last_epoch`, `base_lrs`,
            `_last_lr`, `T_0`, ...).
        logged_rate: what the trainer logged at the checkpoint's own step (Hugging Face).
        logged_before: what it logged one step earlier.
        metrics: name to value; NaN and infinities as they are.
    """

    epochs_from_zero: bool = False
    learning_rate: float | None = None
    other_rates: tuple[float, ...] = ()
    scheduler: Mapping[str, Any] | None = None
    logged_rate: float | None = None
    logged_before: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
