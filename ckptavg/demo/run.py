"""Train, average and refresh for real, and tell what each result is worth on a test set."""

from __future__ import annotations

import logging
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ckptavg.average import average
from ckptavg.batchnorm.files import refresh_checkpoint
from ckptavg.batchnorm.options import RefreshOptions
from ckptavg.errors import CkptAvgError, OutputError, without_notices
from ckptavg.evaluation.evaluate import EvaluationOptions, Evaluator
from ckptavg.formats import open_checkpoint
from ckptavg.landscape.explore import ExploreOptions
from ckptavg.landscape.rays import Rise, rays, rises
from ckptavg.landscape.saving import save
from ckptavg.select.rules import Selection

if TYPE_CHECKING:
    from ckptavg.formats.paths import PathLike
    from ckptavg.options import Progress
    from ckptavg.write.provenance import Summary

try:
    from ckptavg.demo import train
except ImportError as error:
    raise CkptAvgError(
        f"the demo trains on the data of mnist1d, which cannot be imported: {error}",
        remedy="pip install 'ckptavg[demo]'",
    ) from error

log = logging.getLogger("ckptavg")

_STEPS = 6
"""Of the rays."""

# The directory's train.py is a copy of this module, and gives the same model and batches.
_MODEL, _TRAIN_LOADER, _TEST_LOADER = (
    f"{train.__name__}:{name}" for name in ("make_model", "train_loader", "test_loader")
)


@dataclass(frozen=True)
class Row:
    """What a model, or the mean of several, is worth on the clean test examples.

    Attributes:
        name: what it is.
        accuracy: in percent.
        nll: negative log-likelihood in nats.
        files: what it was read from, below the demo's directory.
    """

    name: str
    accuracy: float
    nll: float
    files: tuple[str, ...]


@dataclass(frozen=True)
class DemoReport:
    """What came out.

    Attributes:
        directory: where everything lies.
        seed: of the first weights and of the shuffles.
        train_examples: how many the models were trained on.
        label_noise: the share of them that has a wrong label.
        test_examples: how many the models were tested on; their labels are clean.
        epochs: of either run.
        rows: one for each model.
        commands: what makes the refreshed average again, for a shell.
        rise: how the test loss rises along random directions: from the last iterate, and from the
            refreshed average.
        pictures: of that, below the demo's directory.
    """

    directory: str
    seed: int
    train_examples: int
    label_noise: float
    test_examples: int
    epochs: int
    rows: tuple[Row, ...]
    commands: tuple[str, str]
    rise: Rise
    pictures: tuple[str, ...]


@train.one_thread()
def run(
    directory: PathLike,
    *,
    budget: train.Budget | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    point_progress: Progress | None = None,
) -> DemoReport:
    """Train a small Conv-BN network, average its checkpoints, refresh the average, and compare.

    Izmailov et al. 2018 (arXiv 1803.05407) in small; `ckptavg/demo/train.py` says what is trained.

    Args:
        directory: where everything is left; there must be nothing in it.
        budget: how long to train; None for the demo's own.
        seed: of the first weights and of the shuffles. The same seed gives the same figures on
            one machine.
        progress: hears of each epoch.
        point_progress: hears of each point of the rays.

    Raises:
        OutputError: there is something in the directory.
        CkptAvgError: the average or the refresh failed.
    """
    directory, budget = Path(directory), budget or train.Budget()
    refuse_used(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(train.__file__, directory / "train.py")
    epochs = 2 * budget.epochs - budget.common

    def after_epoch() -> None:
        if progress is not None:
            progress(1, epochs)

    log.info("training for %d epochs, in one thread", epochs)
    train.train(directory, seed=seed, budget=budget, after_epoch=after_epoch)
    log.info("averaging the checkpoints, and refreshing the average")
    summary = make_averages(directory)
    members = [Path(source.path) for source in summary.sources]
    log.info("evaluating around the last iterate and around the average, in random directions")
    rise, pictures = look_around(directory, members[-1], point_progress)
    return DemoReport(
        directory=str(directory),
        seed=seed,
        train_examples=train.TRAIN_EXAMPLES,
        label_noise=train.LABEL_NOISE,
        test_examples=train.TEST_EXAMPLES,
        epochs=budget.epochs,
        rows=compare(directory, members),
        commands=commands(directory),
        rise=rise,
        pictures=pictures,
    )


def refuse_used(directory: Path) -> None:
    """The demo does not write beside what somebody else has left.

    Raises:
        OutputError: there is something in the directory, or it is none.
    """
    if not directory.exists():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        what = "is not empty" if directory.is_dir() else "is not a directory"
        raise OutputError(what, path=directory, remedy="choose another directory")


def make_averages(directory: Path) -> Summary:
    """Average the checkpoints in three ways, which differ in their BatchNorm statistics."""
    checkpoints, averaged = directory / "checkpoints", directory / "averaged-bn.safetensors"
    # As in the paper: from 75 % of the budget on, at the minima of the rate.
    rules = Selection(start="75%", lr_minima=True)
    with without_notices():  # the guess about learning rates is right here
        summary = average(checkpoints, averaged, select=rules)
        average(checkpoints, directory / "last-bn.safetensors", select=rules, norm_stats="last")
    refreshed = directory / "refreshed-bn.safetensors"
    refresh_checkpoint(averaged, refreshed, model=_MODEL, loader=_TRAIN_LOADER)
    return summary


def look_around(
    directory: Path, last: Path, progress: Progress | None = None
) -> tuple[Rise, tuple[str, ...]]:
    """Go along random directions from the last iterate and from the refreshed average.

    Args:
        directory: the demo's.
        last: the last iterate.
        progress: hears of each point.

    Returns:
        How the test loss rises, and the pictures.
    """
    evaluation = EvaluationOptions(
        model=_MODEL,
        loader=_TRAIN_LOADER,
        max_samples=train.TRAIN_EXAMPLES,
        refresh=RefreshOptions(model=_MODEL, loader=_TRAIN_LOADER),
        device="cpu",
    )
    options = ExploreOptions(evaluation=evaluation, test_loader=_TEST_LOADER, progress=progress)
    folder = directory / "landscape"
    paths = [last, directory / "refreshed-bn.safetensors"]
    found = rays(paths, folder, options, steps=_STEPS)
    files = save(found, folder, plots=True)
    [rise] = [one for one in rises(found) if one.metric == "test loss"]
    pictures = [file for file in files if file.suffix in (".png", ".svg")]
    return rise, tuple(file.relative_to(directory).as_posix() for file in pictures)


def compare(directory: Path, members: list[Path]) -> tuple[Row, ...]:
    """Test what the directory holds.

    Args:
        directory: the demo's.
        members: the checkpoints of the averages, in order of training.
    """
    options = EvaluationOptions(model=_MODEL, loader=_TEST_LOADER, device="cpu")
    evaluator = Evaluator(options)

    def row(name: str, *paths: Path) -> Row:
        metrics = [evaluator(open_checkpoint(path)) for path in paths]
        accuracy, nll = (fmean(each[name] for each in metrics) for name in ("accuracy", "loss"))
        files = tuple(path.relative_to(directory).as_posix() for path in paths)
        return Row(name, 100 * accuracy, nll, files)

    return (
        row("last iterate", members[-1]),
        row(f"mean of the {len(members)} members", *members),
        row("decayed rate, same budget", directory / "decayed.pt"),
        row("average, averaged BN statistics", directory / "averaged-bn.safetensors"),
        row("average, last model's BN statistics", directory / "last-bn.safetensors"),
        row("average, refreshed BN statistics", directory / "refreshed-bn.safetensors"),
    )


def commands(directory: Path) -> tuple[str, str]:
    """What makes the refreshed average again, under a name that is free."""
    script, output = directory / "train.py", str(directory / "swa.safetensors")
    model, loader = f"{script}:make_model", f"{script}:train_loader"
    return (
        shlex.join(
            [
                *("ckptavg", "average", str(directory / "checkpoints"), "-o", output),
                *("--start", "75%", "--lr-minima"),
            ]
        ),
        shlex.join(["ckptavg", "bn-refresh", output, "--model", model, "--loader", loader]),
    )
