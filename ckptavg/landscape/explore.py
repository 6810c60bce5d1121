"""Evaluate points of the space of weights: what has been done is kept, processes share the rest."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptavg import __version__
from ckptavg.collect import survey
from ckptavg.compare import fingerprints
from ckptavg.errors import OutputError, SelectionError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.landscape.journal import Journal, Values
from ckptavg.landscape.places import Place, Space
from ckptavg.norm.evaluate import EvaluationOptions, Evaluator, said_once
from ckptavg.norm.loading import match_names
from ckptavg.sources import Collection

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.checkpoint import Checkpoint
    from ckptavg.norm.ranks import Ranks

Progress = Callable[[int, int | None], None]
"""Called with the points evaluated since the last call, and with how many there will be."""


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
    """

    evaluation: EvaluationOptions
    test_loader: str | None = None
    test_loader_args: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    force: bool = False


class Explorer:
    """Some checkpoints, the model, and the directory that the results go into.

    Args:
        paths: the checkpoints, of one model.
        folder: the directory.
        options: how points are evaluated.
        ranks: the processes that share the points, all of which make one.

    Attributes:
        space: the weights between them.
        names: what they are called.

    Raises:
        SelectionError: they are not of one model.
        OutputError: the directory cannot be used.
    """

    def __init__(
        self, paths: Sequence[Path], folder: Path, options: ExploreOptions, ranks: Ranks
    ) -> None:
        self._options, self._folder, self._ranks = options, folder, ranks
        self._checkpoints = [open_checkpoint(path, key=options.key) for path in paths]
        self._evaluator = Evaluator(options.evaluation)
        parameters = self._parameters(self._checkpoints[0])
        for one in self._checkpoints[1:]:
            _check_alike(self._checkpoints[0], one)
        self._found_names = parameters
        self.names = tuple(printable(path.name) for path in paths)

    def space(self, *, seed: int = 0, filter_normalize: bool = False) -> Space:
        """The weights between the checkpoints."""
        return Space(
            self._checkpoints, self._found_names, seed=seed, filter_normalize=filter_normalize
        )

    def others(self, inputs: Sequence[Path]) -> list[Checkpoint]:
        """Further checkpoints of the same model, in the order of training."""
        found = survey(inputs, key=self._options.key)
        opened = [open_checkpoint(source.path, key=self._options.key) for source in found.sources]
        for one in opened:
            _check_alike(self._checkpoints[0], one)
        return opened

    def _parameters(self, checkpoint: Checkpoint) -> list[str]:
        """The names of the model's floating parameters in the checkpoints, tied ones once."""
        model = self._evaluator.model
        names, _ = match_names(model.state_dict().keys(), checkpoint.tensors.keys())
        found = [
            names[name]
            for name, value in model.named_parameters()
            if name in names and value.is_floating_point()
        ]
        if not found:
            raise SelectionError("has none of the model's parameters", path=checkpoint.path)
        return found

    def run(
        self,
        task: dict[str, Any],
        space: Space,
        places: Mapping[str, Place],
        progress: Progress | None,
    ) -> dict[str, Values]:
        """Evaluate places that have not been yet; all of them, by their names.

        Args:
            task: what tells this landscape from others.
            space: where they are.
            places: by name.
            progress: hears of each point.
        """
        task = {"ckptavg": __version__, "inputs": self._digest(), **task, **self._facts()}
        ranks = self._ranks
        with said_once(), self._journal(task) as journal:
            left = [name for name in places if name not in journal.done]
            ranks.gather(None)  # all have read the files before one writes
            journal.open()
            if progress is not None:
                progress(len(places) - len(left), len(places))
            for name in left[ranks.rank :: ranks.size]:
                journal.add(name, self._evaluated(space.at(places[name])))
                if progress is not None:
                    progress(ranks.size, len(places))
            found: dict[str, Values] = {}
            for done in ranks.gather(journal.done):
                found |= done
        return {name: found[name] for name in places}

    @contextlib.contextmanager
    def _journal(self, task: dict[str, Any]) -> Iterator[Journal]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot be made: {error.strerror}", path=self._folder) from error
        journal = Journal(self._folder, task, rank=self._ranks.rank, force=self._options.force)
        try:
            yield journal
        finally:
            journal.close()

    def _evaluated(self, checkpoint: Checkpoint) -> Values:
        options = self._options
        self._evaluator.become(checkpoint)
        loaders = {"train": (options.evaluation.loader, options.evaluation.loader_args)}
        if options.test_loader is not None:
            loaders["test"] = (options.test_loader, options.test_loader_args)
        found: Values = {}
        for data, (loader, arguments) in loaders.items():
            for name, value in self._evaluator.measured(loader, arguments).items():
                shown, number = ("error", 1 - value) if name == "accuracy" else (name, value)
                found[f"{data} {shown}"] = number
        return found

    def _digest(self) -> str:
        """What tells whether the checkpoints are the same: their headers, and samples of them."""
        digest = hashlib.sha256()
        for path, opened in zip(self.names, self._checkpoints, strict=True):
            own = fingerprints(Collection.of_one(opened))
            digest.update(json.dumps([path, opened.size, opened.digest, *own.values()]).encode())
        return digest.hexdigest()

    def _facts(self) -> dict[str, Any]:
        """What the values depend on, of the options."""
        evaluation, refresh = self._options.evaluation, self._options.evaluation.refresh
        return {
            "model": evaluation.model,
            "loader": evaluation.loader,
            "test_loader": self._options.test_loader,
            "arguments": repr(
                [
                    sorted(evaluation.model_args.items()),
                    sorted(evaluation.loader_args.items()),
                    sorted(self._options.test_loader_args.items()),
                ]
            ),
            "metric": evaluation.metric,
            "forward": evaluation.forward,
            "max_samples": evaluation.max_samples,
            "max_batches": evaluation.max_batches,
            "seed": evaluation.seed,
            "refresh": None if refresh is None else repr(sorted(refresh.others.items())),
        }


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse checkpoints of two models.

    Raises:
        SelectionError: the first tensor that one lacks or has in another shape.
    """
    for name, tensor in first.tensors.items():
        twin = other.tensors.get(name)
        if twin is None or twin.shape != tensor.shape:
            what = "is not in it" if twin is None else f"has shape {twin.shape} in it"
            raise SelectionError(
                f"is not of the model of {printable(first.path)}: {printable(name)} {what}",
                path=other.path,
            )


def spaced(first: float, last: float, count: int) -> tuple[float, ...]:
    """So many numbers at equal distances, both ends among them."""
    if count == 1:
        return (first,)
    step = (last - first) / (count - 1)
    return tuple(first + step * number for number in range(count))
