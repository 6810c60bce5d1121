"""Evaluate points of the space of weights: what has been done is kept, processes share the rest."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import RefreshError, SelectionError, listed, printable, said_once
from ckptavg.evaluation.evaluate import EvaluationOptions, Evaluator
from ckptavg.evaluation.journal import Values, journal, task_of
from ckptavg.formats import open_checkpoint
from ckptavg.landscape.places import Place, Space
from ckptavg.landscape.result import Landscape
from ckptavg.model.factories import user_code
from ckptavg.model.loading import load_weights, unwrapped
from ckptavg.model.making import check_test_loader
from ckptavg.select.names import relative_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.options import Progress

log = logging.getLogger("ckptavg")


@dataclass(frozen=True, kw_only=True)
class ExploreOptions:
    """How points are evaluated.

    Attributes:
        evaluation: the model, the training batches, the metric, and how the norm statistics are
            refreshed at every point; None there for not at all.
        test_loader: spec of held-out batches; None to evaluate on the training batches alone.
        test_loader_args: keywords for it.
        key: which state dict to take where a file holds several.
        force: replace what another landscape has left in the directory.
        ranks: the processes that share the points, all of which make the landscape.
        progress: called after each point.
    """

    evaluation: EvaluationOptions
    test_loader: str | None = None
    test_loader_args: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    force: bool = False
    ranks: Ranks = ALONE
    progress: Progress | None = None


class Explorer:
    """Some checkpoints, the model, and the directory that the results go into.

    Args:
        paths: the checkpoints, of one model.
        folder: the directory.
        options: how points are evaluated.

    Attributes:
        names: what they are called: their paths below the folder that they have in common.
        space: the weights between them.

    Raises:
        SelectionError: they are not of one model.
        OutputError: the directory cannot be used.
    """

    def __init__(self, paths: Sequence[Path], folder: Path, options: ExploreOptions) -> None:
        self._options, self._folder = options, folder
        opened = [open_checkpoint(path, key=options.key) for path in paths]
        self._evaluator = Evaluator(options.evaluation, opened)
        if options.test_loader is not None:
            check_test_loader(
                (options.test_loader, options.test_loader_args),
                (options.evaluation.loader, options.evaluation.loader_args),
                "fit", opened,
            )  # fmt: skip
        self._model = unwrapped(self._evaluator.model)
        names = relative_names(paths)
        self.names = tuple(printable(names[path]) for path in paths)
        self._checkpoints = [self._loaded(checkpoint) for checkpoint in opened]
        first = self._checkpoints[0]
        for one in self._checkpoints[1:]:
            _check_alike(first, one)
        self._evaluator.compare(self._checkpoints)
        parameters, aliases = self._named_parameters(first)
        seed = options.evaluation.seed
        self.space = Space(self._checkpoints, parameters, aliases, seed=seed)

    def _loaded(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint with the names that the model has.

        Raises:
            MismatchError: it does not fit the model.
        """
        names = load_weights(self._model, checkpoint, self._options.evaluation.ignore).names
        # A tied tensor may be there under another of its names.
        tensors = {
            name: checkpoint.tensors[names[name][0]] for name in self._state() if name in names
        }
        return replace(checkpoint, tensors=tensors)

    def _state(self) -> dict[str, Any]:
        """The model's state dict, with the very parameters in it: tied ones are one object."""
        with user_code("the model's state_dict"):
            state: dict[str, Any] = self._model.state_dict(keep_vars=True)
        return state

    def _named_parameters(self, checkpoint: Checkpoint) -> tuple[list[str], dict[str, str]]:
        """The model's floating parameters, each storage once, and the other names of tied ones."""
        own = {id(value): name for name, value in self._model.named_parameters()}
        first_names: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for name, value in self._state().items():
            tensor = checkpoint.tensors.get(name)
            if id(value) not in own or tensor is None or not tensor.dtype.averaged:
                continue
            if first_names.setdefault(id(value), name) != name:
                aliases[name] = first_names[id(value)]
        if not first_names:
            raise SelectionError("has none of the model's parameters", path=checkpoint.path)
        left = [name for number, name in own.items() if number not in first_names]
        if left:
            log.warning(
                "these parameters do not move, since the checkpoint has no floating tensors of "
                "their names: %s",
                listed(left),
            )
        return list(first_names.values()), aliases

    def landscape(
        self,
        kind: str,
        axes: Mapping[str, Sequence[Any]],
        values: Mapping[str, Sequence[float]],
        corners: Sequence[Mapping[str, Any]] = (),
    ) -> Landscape:
        """The landscape that these values make, in the order of the axes' product."""
        shape = [len(axis) for axis in axes.values()]
        return Landscape(
            kind=kind,
            checkpoints=self.names,
            dimension=self.space.dimension,
            apart=self.space.apart,
            refreshed=self._options.evaluation.refresh is not None,
            axes=axes,
            values={metric: np.reshape(numbers, shape) for metric, numbers in values.items()},
            corners=corners,
        )

    def evaluate(self, kind: str, places: Sequence[Place]) -> dict[str, list[float]]:
        """Evaluate the places that have not been evaluated yet.

        Args:
            kind: the kind of landscape: points of another kind do not count.
            places: where to evaluate; the same place may occur several times.

        Returns:
            By metric, its values at the places.
        """
        task = task_of(
            kind, self._options.evaluation, inputs=self._digest(),
            test_loader=self._options.test_loader, test_loader_args=self._options.test_loader_args,
        )  # fmt: skip
        points = {repr(place): place for place in places}
        ranks, progress = self._options.ranks, self._options.progress
        force = self._options.force
        results = [f"{kind}.{ending}" for ending in ("json", "csv", "png", "svg")]
        with said_once(), journal(self._folder, task, ranks, force=force, results=results) as kept:
            left = [name for name in points if name not in kept.done]
            if progress is not None:
                progress(len(points) - len(left), len(points))
            for name in left[ranks.rank :: ranks.size]:
                if ranks.has_failed_peer():
                    break  # gathering says so
                known = next(iter(kept.done.values()), None)
                kept.add(name, self._evaluated(self.space.at(points[name]), known))
                if progress is not None:
                    progress(ranks.size, len(points))
            found: dict[str, Values] = {}
            for done in ranks.gather(kept.done):
                found |= done
        rows = [found[repr(place)] for place in places]
        return {metric: [row[metric] for row in rows] for metric in rows[0]}

    def _evaluated(self, checkpoint: Checkpoint, known: Values | None) -> Values:
        """The metrics at a point.

        Args:
            checkpoint: what the model is there.
            known: those of another point, whose names are the same.
        """
        options = self._options
        try:
            self._evaluator.become(checkpoint)
        except RefreshError as error:
            if known is None:
                raise
            log.warning("at a point the norm statistics cannot be refreshed: %s", error.message)
            return dict.fromkeys(known, math.nan)
        loaders = {"train": (options.evaluation.loader, options.evaluation.loader_args)}
        if options.test_loader is not None:
            loaders["test"] = (options.test_loader, options.test_loader_args)
        is_error = options.evaluation.metric in (None, "accuracy")
        found: Values = {}
        for data, (loader, arguments) in loaders.items():
            for name, value in self._evaluator.measured(
                loader, arguments, "fit" if data == "train" else "test"
            ).items():
                if name == "accuracy" and is_error:
                    found[f"{data} error"] = 1 - value
                else:
                    found[f"{data} {name}"] = value
        if not found or (known is not None and known.keys() != found.keys()):
            names = listed(found) or "none"
            raise SelectionError(f"{options.evaluation.metric} returned other metrics: {names}")
        return found

    def _digest(self) -> str:
        """What tells whether the checkpoints are the same, in every bit."""
        digest = hashlib.sha256()
        for path, opened in zip(self.names, self._checkpoints, strict=True):
            for name, tensor in sorted(opened.tensors.items()):
                facts = [path, name, tensor.dtype.name, tensor.shape]
                digest.update(json.dumps(facts).encode())
                for piece in opened.pieces(name):
                    digest.update(piece)
        return digest.hexdigest()


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse checkpoints of two models.

    Raises:
        SelectionError: the first tensor that one lacks or has in another shape.
    """
    for name, tensor in first.tensors.items():
        twin = other.tensors.get(name)
        alike = twin is not None and twin.dtype.averaged == tensor.dtype.averaged
        if twin is None or twin.shape != tensor.shape or not alike:
            what = (
                "is not in it" if twin is None else f"is {twin.dtype.name} {list(twin.shape)} in it"
            )
            raise SelectionError(
                f"is not of the model of {printable(first.path)}: {printable(name)} {what}",
                path=other.path,
            )
