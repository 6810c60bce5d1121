"""Did the refresh help? The checkpoint is evaluated before and after it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptavg.batchnorm.report import Verdict
from ckptavg.evaluation.evaluate import EvaluationOptions, Evaluator
from ckptavg.evaluation.measures import chosen_value, metric_mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.select.metrics import Mode


class Judge:
    """Evaluates a checkpoint on held-out batches with its old statistics and with the new ones.

    Args:
        options: the model, the batches and the metric.
        keep_better: let the old statistics stay if they are better.
        mode: whether the metric should be low (`min`) or high; None where its name says it.

    Raises:
        SelectionError: which of two is better is not certain, and is needed.
    """

    def __init__(
        self, options: EvaluationOptions, *, keep_better: bool = False, mode: Mode | None = None
    ) -> None:
        self._metric, self._keep_better = options.metric_name, keep_better
        self._mode = metric_mode(options.metric, mode) if keep_better else None
        self._options = options
        self._evaluator: Evaluator | None = None

    def measure(self, checkpoint: Checkpoint) -> Mapping[str, float]:
        """The metrics of a checkpoint, by name."""
        if self._evaluator is None:
            self._evaluator = Evaluator(self._options, [checkpoint], "eval_loader")
        return self._evaluator(checkpoint)

    def verdict(self, before: Mapping[str, float], after: Mapping[str, float]) -> Verdict:
        """Which of the two is kept: the new one, unless the old one is better and may be.

        Raises:
            SelectionError: the metric in question is none of those that were returned.
        """
        if not self._keep_better:
            return Verdict(before, after, self._metric, "new")
        old, new = (chosen_value(each, self._options.metric) for each in (before, after))
        better = old < new if self._mode == "min" else old > new
        keeps_old = math.isfinite(old) and (better or not math.isfinite(new))
        return Verdict(before, after, self._metric, "old" if keeps_old else "new")
