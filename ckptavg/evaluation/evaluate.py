"""Evaluate checkpoints: one model, which becomes each of them in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from ckptavg.batchnorm.files import layers_to_keep
from ckptavg.batchnorm.refresh import refresh_norm
from ckptavg.errors import CkptAvgError, said_once
from ckptavg.evaluation.measures import (
    BUILT_IN,
    Batches,
    chosen_value,
    function_and_entry,
    measure_of,
    metric_name,
    units_of,
)
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import have_equal_headers
from ckptavg.formats.paths import as_paths
from ckptavg.formats.provenances import averaged_steps
from ckptavg.merge.roles import frozen_layers
from ckptavg.model.batches import default_forward, device_of
from ckptavg.model.datamodules import loader_of
from ckptavg.model.factories import load_function, name_of, user_code
from ckptavg.model.loading import check_ignore, load_weights
from ckptavg.model.making import (
    RandomState,
    import_all,
    make_batches,
    make_model,
    random_state_kept,
)
from ckptavg.model.modes import start_training
from ckptavg.options import Options, takes_fields_of
from ckptavg.select.members import log_left_out, warn_of_stale
from ckptavg.select.metrics import indices_of_best, mode_of
from ckptavg.select.order import timeline
from ckptavg.select.rules import Selection, chosen, select
from ckptavg.select.run import find_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptavg.batchnorm.options import RefreshOptions
    from ckptavg.batchnorm.refresh import Forward
    from ckptavg.evaluation.measures import Units
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
    from ckptavg.model.datamodules import Stage
    from ckptavg.model.factories import Function, Loader, Model
    from ckptavg.options import Progress
    from ckptavg.select.rules import Verdict
    from ckptavg.select.run import Run


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """How to evaluate checkpoints.

    Attributes:
        model: the model, a callable that returns it, or the spec of either.
        loader: an iterable of held-out batches, a callable that returns it, or the spec of either.
        metric: `loss`, `accuracy`, or a function (or its spec) that is called with the model and
            the batches and returns a number, or a dict of them; None for loss and accuracy. The
            spec `train.py:evaluate:mIoU` names an entry of the dict.
        model_args: keywords for the model.
        loader_args: keywords for the loader.
        forward: a function that is called with model and batch, or its spec.
        max_samples: stop with the batch that reaches so many examples.
        device: where it runs; None for a GPU if there is one.
        seed: of the random numbers that model and loader draw, the same for each checkpoint.
        ignore: regular expressions; tensors with one of them in their names are not loaded.
        refresh: how the norm statistics are refreshed beforehand; None to leave them alone.
    """

    model: Model
    loader: Loader
    metric: Function | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    loader_args: Mapping[str, Any] = field(default_factory=dict)
    forward: Function | None = None
    max_samples: int | None = None
    device: str | None = None
    seed: int = 0
    ignore: Sequence[str] = ()
    refresh: RefreshOptions | None = None

    @property
    def metric_name(self) -> str:
        """What the metric is called: an entry's or a function's own name, and `loss` for None."""
        return metric_name(self.metric)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvaluationOptions):
    """Which checkpoints to evaluate, and how: keywords of `evaluate`.

    Attributes:
        select: which of the checkpoints to take.
        key: which state dict to take where a file holds several.
        progress: called after each checkpoint.
    """

    select: Selection = field(default_factory=Selection)
    key: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Evaluation:
    """What came out for a checkpoint.

    Attributes:
        checkpoint: its path below the folder that all of them have in common.
        path: its path.
        step: its place in the training, where that is known; None for an average.
        metrics: name to value; NaN and infinities as they are.
        unit: unit of the step, or of those that an average is made of; empty if unknown.
        averaged: the first and the last step that an average of ckptavg is made of.
    """

    checkpoint: str
    path: str
    step: int | None
    metrics: Mapping[str, float]
    unit: str = ""
    averaged: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As `--metrics FILE` reads it, the metrics beside the name."""
        where = {"checkpoint": self.checkpoint, "path": self.path, "step": self.step}
        return where | dict(self.metrics)


@takes_fields_of(EvaluateOptions)
@random_state_kept()
def evaluate(inputs: PathLike | Iterable[PathLike], options: EvaluateOptions) -> list[Evaluation]:
    """Evaluate checkpoints on all of the loader's batches.

    They come in the order of training, or as they were named if their steps do not tell it. A
    checkpoint that does not fit the model is an error before the first evaluation.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        options: the fields of `EvaluateOptions`, as keywords: `model`, `loader` and so on.

    Raises:
        CkptAvgError: a checkpoint does not fit the model, or there is nothing to evaluate.
        UserCodeError: the model, the loader or a function of the user's raised.
    """
    rules, key = options.select, options.key
    with said_once():
        run = find_run(as_paths(inputs), key=key, exclusion_reason=rules.exclusion_reason)
        log_left_out(run.candidates)
        verdicts = chosen(select(run, rules))
        has_averages = any(verdict.checkpoint.is_average for verdict in verdicts)
        if has_averages or not run.order_is_known or verdicts[0].step is None:
            _sort_as_named(run, verdicts)
        checkpoints = [verdict.checkpoint for verdict in verdicts]
        evaluator = Evaluator(options, checkpoints)
        evaluator.compare(checkpoints)
        for checkpoint in _of_each_kind(checkpoints)[1:]:  # the first is loaded next
            evaluator.become(open_checkpoint(checkpoint.path, key=key), as_it_is=True)
        evaluations = []
        for verdict in verdicts:
            metrics = evaluator(open_checkpoint(verdict.checkpoint.path, key=key))
            evaluations.append(_evaluation(verdict, metrics))
            if options.progress is not None:
                options.progress(1, len(verdicts))
        if options.refresh is None:
            warn_of_stale(checkpoints)
    return evaluations


def _sort_as_named(run: Run, verdicts: list[Verdict]) -> None:
    """Sort verdicts in the order of the inputs, and give steps to those that are no averages.

    What is in one directory is in the order of training.
    """
    inputs = {each.path: each.folder or each.path for each in run.candidates}
    places = {path: number for number, path in enumerate(dict.fromkeys(inputs.values()))}
    trained = [verdict for verdict in verdicts if not verdict.checkpoint.is_average]
    times = timeline([verdict.checkpoint for verdict in trained])
    for verdict in verdicts:
        verdict.step = None
    for verdict, step in zip(trained, times.steps, strict=False):
        verdict.step, verdict.unit = step, times.unit
    verdicts.sort(key=lambda each: (places[inputs[each.checkpoint.path]], each.step or 0))


def _of_each_kind(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The first of the checkpoints that have the same names, shapes and dtypes."""
    kinds: list[Checkpoint] = []
    for checkpoint in checkpoints:
        if not any(have_equal_headers(kind, checkpoint) for kind in kinds):
            kinds.append(checkpoint)
    return kinds


def _evaluation(verdict: Verdict, metrics: Mapping[str, float]) -> Evaluation:
    checkpoint = verdict.checkpoint
    unit, averaged = verdict.unit, None
    if checkpoint.is_average:
        unit, averaged = averaged_steps(checkpoint.provenance or {}) or ("", None)
    return Evaluation(checkpoint.name, str(checkpoint.path), verdict.step, metrics, unit, averaged)


def winners(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """The best for each metric of which it is certain whether it should be low or high."""
    best = {}
    for name in dict.fromkeys(name for each in evaluations for name in each.metrics):
        mode = mode_of(name)
        values = [each.metrics.get(name) for each in evaluations]
        if mode is not None and (indices := indices_of_best(values, 1, mode)):
            best[name] = evaluations[indices[0]]
    return best


class Evaluator:
    """One model, which becomes each checkpoint in turn; what comes out does not depend on the last.

    Weights and buffers come from the checkpoint each time, buffers that no checkpoint has are put
    back, the loader is made anew, and the random numbers start again.

    Args:
        options: the model, the loader and the metric.
        checkpoints: what the model is going to be, as far as that is known.
        loader_option: the option that names the options' loader.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        checkpoints: Sequence[Checkpoint] = (),
        loader_option: str = "loader",
    ) -> None:
        self._options, self._loader_option = options, loader_option
        self._checkpoints = checkpoints
        metric = None if options.metric in BUILT_IN else function_and_entry(options.metric)[0]
        refresh = None if options.refresh is None else options.refresh.loader
        import_all(options.seed, options.model, options.loader, metric, options.forward, refresh)
        self._model = make_model(options.model, options.model_args, options.device, checkpoints)
        check_ignore(options.ignore, self._model, checkpoints)
        self._random = RandomState()
        self._passing = _passing_buffers(self._model)
        self._forward: Forward | None = load_function(options.forward) if options.forward else None
        forward = self._forward or default_forward
        self._measure = measure_of(options.metric, forward)
        self._measure_units = units_of(options.metric, forward)
        self._used: list[object] = []  # loaders that can be gone through only once
        self._frozen: list[str] = []

    @property
    def model(self) -> torch.nn.Module:
        """The model, as what it became last."""
        return self._model

    def __call__(self, checkpoint: Checkpoint) -> dict[str, float]:
        """The metrics of a checkpoint, by name.

        Raises:
            MismatchError: it does not fit the model.
            CkptAvgError: there is nothing to evaluate, or no metric comes out.
            UserCodeError: the user's code raised.
        """
        self.become(checkpoint)
        return self.measured(self._options.loader, self._options.loader_args)

    def compare(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Find out which norm layers were frozen: those that are the same in all checkpoints.

        A refresh leaves them alone.
        """
        if self._options.refresh is not None:
            self._frozen = frozen_layers(checkpoints)

    def become(self, checkpoint: Checkpoint, *, as_it_is: bool = False) -> None:
        """Let the model be a checkpoint, its norm statistics refreshed if that is asked for.

        Args:
            checkpoint: the checkpoint.
            as_it_is: leave its norm statistics alone all the same.

        Raises:
            MismatchError: it does not fit the model.
            UserCodeError: the user's code raised.
        """
        refresh = None if as_it_is else self._options.refresh
        start_training(self._model)
        for module, name, values in self._passing:
            module._buffers[name] = values.clone()  # noqa: SLF001
        loaded = load_weights(self._model, checkpoint, self._options.ignore)
        if refresh is not None:
            kept = layers_to_keep(self._model, loaded, checkpoint, self._frozen)
            batches = self._batches(refresh.loader, refresh.loader_args, "fit")
            refresh_norm(self._model, batches, forward=self._forward, kept=kept, **refresh.keywords)
        with user_code("the model's eval()"):
            self._model.eval()

    def measured(
        self, loader: Loader, arguments: Mapping[str, Any], stage: Stage = "validate"
    ) -> dict[str, float]:
        """The metrics of what the model is, on the batches of a loader.

        Args:
            loader: the loader.
            arguments: keywords for it.
            stage: which batches of a data module are meant.

        Raises:
            CkptAvgError: there is nothing to evaluate, or no metric comes out.
            UserCodeError: the user's code raised.
        """
        # Not inference mode: what a model makes in it cannot be loaded into again.
        with torch.no_grad():
            return self._measure(self._model, self._held_out(loader, arguments, stage))

    def measured_units(
        self, loader: Loader, arguments: Mapping[str, Any], stage: Stage
    ) -> dict[str, Units]:
        """The metrics of what the model is, as by `measured`, in each example or batch.

        Raises:
            CkptAvgError: there is nothing to evaluate.
            UserCodeError: the user's code raised.
        """
        with torch.no_grad():
            return self._measure_units(self._model, self._held_out(loader, arguments, stage))

    def _held_out(self, loader: Loader, arguments: Mapping[str, Any], stage: Stage) -> Batches:
        batches = self._batches(loader, arguments, stage)
        most = self._options.max_samples
        return Batches(batches, device_of(self._model), max_samples=most)

    def one(self, checkpoint: Checkpoint) -> float:
        """The metric of a checkpoint.

        Raises:
            SelectionError: it is none of those that were returned; or what else a call raises.
        """
        return chosen_value(self(checkpoint), self._options.metric)

    def _batches(self, spec: Loader, arguments: Mapping[str, Any], stage: Stage) -> Iterable[Any]:
        """The loader, made anew with the same random numbers.

        Raises:
            CkptAvgError: it is what the last checkpoint has used up.
        """
        self._random.restore()
        option = self._option_of(spec)
        batches = make_batches(
            spec, arguments, stage, self._model, self._checkpoints, option=option
        )
        loader = loader_of(batches)
        if isinstance(loader, Iterator) and any(loader is used for used in self._used):
            raise CkptAvgError(
                f"{name_of(spec)} can be iterated only once, but each checkpoint needs it",
                remedy="name a callable that returns a new one",
            )
        self._used.append(loader)
        return batches

    def _option_of(self, loader: Loader) -> str:
        """The option that names a loader."""
        refresh = self._options.refresh
        if loader is self._options.loader:
            return self._loader_option
        is_of_refresh = refresh is not None and loader is refresh.loader
        return "refresh_loader" if is_of_refresh else "test_loader"


def _passing_buffers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Copies of the buffers that are in no state dict: a forward pass may change them."""
    return [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()  # noqa: SLF001
        if name in module._non_persistent_buffers_set  # noqa: SLF001
        and buffer is not None
        and not is_lazy(buffer)
    ]
