"""The options of a pass over data and of a refresh."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import RefreshError
from ckptavg.options import Options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.batchnorm.images import MemoryFormat
    from ckptavg.batchnorm.moments import EstimatorName
    from ckptavg.batchnorm.refresh import Precision
    from ckptavg.batchnorm.report import Verdict
    from ckptavg.batchnorm.setting import TrainMode
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.model.factories import Function, Loader, Model
    from ckptavg.options import Progress


@dataclass(frozen=True, kw_only=True)
class PassOptions(Options):
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
    """How to refresh the weights of a checkpoint.

    Attributes:
        model: the model, a callable that returns it, or the spec of either. A model holds the
            checkpoint's weights afterwards.
        loader: an iterable of batches, a callable that returns it, or the spec of either.
        model_args: keywords for the model.
        loader_args: keywords for the loader.
        forward: a function that is called with model and batch, or its spec.
        device: where the model runs; None for a GPU if there is one.
        seed: of Python's, numpy's and torch's random numbers, set before model and loader are made.
        ignore: regular expressions; tensors with one of them in their names are not loaded.
    """

    model: Model
    loader: Loader
    model_args: Mapping[str, Any] = field(default_factory=dict)
    loader_args: Mapping[str, Any] = field(default_factory=dict)
    forward: Function | None = None
    device: str | None = None
    seed: int = 0
    ignore: Sequence[str] = ()


class Judge(Protocol):
    """Evaluates a checkpoint before and after its refresh."""

    def measure(self, checkpoint: Checkpoint) -> Mapping[str, float]:
        """The metrics of a checkpoint, by name."""

    def verdict(self, before: Mapping[str, float], after: Mapping[str, float]) -> Verdict:
        """Which of the two is kept."""


@dataclass(frozen=True, kw_only=True)
class RefreshCheckpointOptions(RefreshOptions):
    """How to refresh a checkpoint file: keywords of `refresh_checkpoint`.

    Attributes:
        key: which state dict to take where the file holds several.
        in_place: let a file that is not ours be replaced.
        container: `last` writes the whole torch file with the new statistics in it, `weights` the
            state dict alone; None as in `average`. In place it is always the whole.
        format: of an output that is a directory, as in `average`. In place it is what it was.
        max_shard_size: bytes of tensors in a file of a directory; None for the checkpoint's own.
        is_optional: write an unchanged copy if the model has no norm layer to refresh, instead of
            raising an error.
        dry_run: try one batch, and write nothing.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        members: what the checkpoint is an average of, which may record hyper-parameters.
        judge: evaluates the checkpoint before and after, and may keep the old statistics.
        ranks: the processes that share the pass, all of which call this; the first one writes.
        progress: called after each batch.
    """

    key: str | None = None
    in_place: bool = False
    container: Literal["weights", "last"] | None = None
    format: Literal["huggingface", "dcp"] = "huggingface"
    max_shard_size: int | None = None
    is_optional: bool = False
    dry_run: bool = False
    force: bool = False
    fsync: bool = True
    members: Sequence[Checkpoint] = ()
    judge: Judge | None = None
    ranks: Ranks = ALONE
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown choice.

        Raises:
            RefreshError: there is one.
        """
        super().__post_init__()
        if self.container not in (None, "weights", "last"):
            raise RefreshError(f"`container` must be weights or last, not {self.container!r}")
