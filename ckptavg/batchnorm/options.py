"""The options of a pass over data and of a refresh."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.batchnorm.images import MemoryFormat
    from ckptavg.batchnorm.moments import EstimatorName
    from ckptavg.batchnorm.refresh import Precision
    from ckptavg.batchnorm.setting import TrainMode
    from ckptavg.model.factories import Function, Loader, Model


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How the pass over the training data is done: keywords of `refresh_norm`, described there."""

    estimator: EstimatorName = "paper"
    layers: Sequence[str] = ()
    skip_layers: Sequence[str] = ()
    memory_format: MemoryFormat = "auto"
    amp: Precision | None = None
    train_mode: TrainMode = "norm"
    max_samples: int | None = None
    tol: float | None = None
    strict: bool = False

    @property
    def keywords(self) -> dict[str, Any]:
        """The values by name."""
        return {each.name: getattr(self, each.name) for each in fields(PassOptions)}


@dataclass(frozen=True, kw_only=True)
class RefreshOptions(PassOptions):
    """How to refresh a checkpoint.

    Attributes:
        model: the model, a callable that returns it, or the spec of either. A model holds the
            checkpoint's weights afterwards.
        loader: an iterable of batches, a callable that returns it, or the spec of either.
        model_args: keywords for the model.
        loader_args: keywords for the loader.
        forward: a function that is called with model and batch, or its spec.
        device: where the model runs; None for a GPU if there is one.
        seed: of Python's, numpy's and torch's random numbers, set before model and loader are made.
    """

    model: Model
    loader: Loader
    model_args: Mapping[str, Any] = field(default_factory=dict)
    loader_args: Mapping[str, Any] = field(default_factory=dict)
    forward: Function | None = None
    device: str | None = None
    seed: int = 0
