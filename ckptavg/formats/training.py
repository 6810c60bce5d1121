"""What a checkpoint records of the training that wrote it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TrainingRecord:
    """Learning rate, schedule and metrics at the time of saving, where they are recorded.

    Attributes:
        epochs_from_zero: whether the trainer counts epochs from 0, so that the checkpoint of epoch
            e was saved after e + 1 epochs (Lightning, timm).
        learning_rate: rate of the optimizer's first parameter group. It may already be that of the
            next update: see `select.rates`.
        other_rates: rates of the other parameter groups.
        scheduler: plain values of the first scheduler's state dict (`last_epoch`, `base_lrs`,
            `_last_lr`, `T_0`, ...).
        logged_rate: rate that the trainer logged at the checkpoint's step (Hugging Face).
        logged_before: rate that it logged one step earlier.
        metrics: name to value, NaN and Inf included.
    """

    epochs_from_zero: bool = False
    learning_rate: float | None = None
    other_rates: tuple[float, ...] = ()
    scheduler: Mapping[str, Any] | None = None
    logged_rate: float | None = None
    logged_before: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
