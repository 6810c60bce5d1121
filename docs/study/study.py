"""Does averaging with refreshed statistics pay, on the same budget? `python docs/study/study.py`.

For each task and seed one run is trained for three quarters of the budget, and from there to two
ends: with the decayed rate, and with a cyclical one whose minima are averaged by ckptavg. All that
is chosen is chosen on validation examples. The test examples are looked at once, when that is done.
`README.md` beside this file is written from the figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from report import write_report
from tasks import TASKS, Examples, Task
from torch.nn.functional import cross_entropy

import ckptavg
from ckptavg.formats import open_checkpoint
from ckptavg.model.loading import load_weights

HERE = Path(__file__).resolve().parent
SEEDS = range(10)
COMMON = 0.75  # of the budget, before the two ends part
CYCLE = 2  # epochs
WINDOWS = (3, 5, 8)  # how many of the last minima an average may have
MOMENTUM = 0.9


class Score(NamedTuple):
    """What a model is worth: accuracy in percent, and negative log-likelihood in nats."""

    accuracy: float
    nll: float


class Run:
    """A training run of one task with one seed."""

    def __init__(self, task: Task, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.seed, self.step = task, seed, 0
        self.model = task.make_model()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=task.rate, momentum=MOMENTUM, weight_decay=task.weight_decay
        )

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.task.train.labels) // self.task.batch

    def epoch(self, rate: Callable[[int], float]) -> None:
        """Train for one epoch, with a rate for each step, counted from 1."""
        self.model.train()
        for inputs, labels in batches(self.task, 1_000 * self.seed + self.step // self.per_epoch):
            self.step += 1
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.step)
            self.optimizer.zero_grad()
            cross_entropy(self.model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    def state(self) -> dict[str, object]:
        """All that is needed to go on."""
        return {
            "state_dict": {name: value.clone() for name, value in self.model.state_dict().items()},
            "optimizer": cloned(self.optimizer.state_dict()),
            "global_step": self.step,
        }

    def resume(self, state: dict[str, object]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["state_dict"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.step = state["global_step"]  # type: ignore[assignment]


def cloned(state: object) -> object:
    """A copy with tensors of its own."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: cloned(value) for key, value in state.items()}
    return [cloned(value) for value in state] if isinstance(state, list) else state


def batches(task: Task, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The training examples, shuffled: in the same way for the same seed."""
    inputs, labels = task.train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(labels) - task.batch + 1, task.batch):
        chosen = order[start : start + task.batch]
        yield inputs[chosen], labels[chosen]


def decayed(task: Task, step: int, steps: int) -> float:
    """The first rate for half of the run, then linearly down to a hundredth of it at 90 %."""
    return task.rate * max(0.01, 1 - 0.99 * max(0.0, step / steps - 0.5) / 0.4)


def cyclical(task: Task, step: int, cycle: int) -> float:
    """From the first rate to a tenth of it in each cycle; least where `cycle` divides `step`."""
    t = ((step - 1) % cycle + 1) / cycle
    return (1 - t) * task.rate + t * task.rate / 10


@torch.no_grad()
def score(model: torch.nn.Module, examples: Examples) -> Score:
    """Evaluate a model."""
    model.eval()
    outputs = torch.cat([model(part) for part in torch.split(examples.inputs, 1_000)]).double()
    right = (outputs.argmax(1) == examples.labels).double().mean()
    return Score(100 * float(right), float(cross_entropy(outputs, examples.labels)))


class Arms:
    """The models of one run that are compared."""

    def __init__(self, task: Task, folder: Path, seed: int) -> None:
        self.task, self.folder, self.seed = task, folder, seed
        run = Run(task, seed)
        steps = task.epochs * run.per_epoch
        common = int(COMMON * task.epochs)
        for _ in range(common):
            run.epoch(lambda step: decayed(task, step, steps))
        parting, start = run.state(), run.step
        while run.step < steps:
            run.epoch(lambda step: decayed(task, step, steps))
        torch.save(run.state(), folder / "decayed.pt")
        run.resume(parting)
        self.minima: list[Path] = []
        self.iterates: list[Path] = []
        (folder / "run").mkdir()
        while run.step < steps:
            run.epoch(lambda step: cyclical(task, step - start, CYCLE * run.per_epoch))
            path = folder / "run" / f"step_{run.step}.pt"
            torch.save(run.state(), path)
            self.iterates.append(path)
            if (run.step - start) % (CYCLE * run.per_epoch) == 0:
                self.minima.append(path)

    def _model(self, path: Path, *, refresh: bool = False) -> torch.nn.Module:
        model = self.task.make_model()
        load_weights(model, open_checkpoint(path))
        if refresh:
            ckptavg.refresh_norm(model, list(batches(self.task, 0)))
        return model

    def _average(self, count: int) -> Path:
        path = self.folder / f"last{count}.safetensors"
        if not path.exists():
            ckptavg.average(self.minima[-count:], path)
        return path

    def chosen(self) -> tuple[dict[str, torch.nn.Module], int]:
        """The arms by name, and how many checkpoints are averaged: all by validation."""
        valid = self.task.validation
        best = min(self.iterates, key=lambda path: score(self._model(path), valid).nll)
        windows = {
            count: score(self._model(self._average(count), refresh=True), valid).nll
            for count in WINDOWS
            if count <= len(self.minima)
        }
        count = min(windows, key=windows.__getitem__)
        swa, end = self._average(count), self.folder / "decayed.pt"
        return {
            "last iterate": self._model(self.iterates[-1]),
            "best by validation": self._model(best),
            "decayed": self._model(end),
            "decayed, refreshed": self._model(end, refresh=True),
            "SWA, not refreshed": self._model(swa),
            "SWA, refreshed": self._model(swa, refresh=True),
        }, count


def study(names: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, object]]]:
    """Train, choose, and then test: a row for each seed of each task."""
    found: dict[str, list[dict[str, object]]] = {}
    for name in names:
        task = TASKS[name]()
        rows = found[name] = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                arms, window = Arms(task, Path(folder), seed).chosen()
                scores = {arm: score(model, task.test) for arm, model in arms.items()}
            rows.append(
                {"seed": seed, "window": window, **{arm: [*one] for arm, one in scores.items()}}
            )
            shown = ", ".join(
                f"{arm} {one.accuracy:.2f} % {one.nll:.3f}" for arm, one in scores.items()
            )
            print(f"{task.name}, seed {seed}, {window} averaged: {shown}", flush=True)
    return found


def tune(name: str) -> None:
    """Validation scores of the decayed run for rates and weight decays, with seeds of their own."""
    import dataclasses  # noqa: PLC0415

    task = TASKS[name]()
    for rate in (0.1, 0.2, 0.4):
        for weight_decay in (5e-3, 1e-2, 2e-2):
            scores = []
            for seed in (100, 101, 102):
                tried = dataclasses.replace(task, rate=rate, weight_decay=weight_decay)
                run = Run(tried, seed)
                steps = tried.epochs * run.per_epoch
                while run.step < steps:
                    run.epoch(lambda step, t=tried, s=steps: decayed(t, step, s))  # type: ignore[misc]
                scores.append(score(run.model, tried.validation))
            nll, accuracy = fmean(one.nll for one in scores), fmean(one.accuracy for one in scores)
            print(
                f"{name}: rate {rate:g}, weight decay {weight_decay:g}: {accuracy:.2f} % {nll:.4f}"
            )


def main() -> None:
    """Do it, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="default: all of them")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--tune", action="store_true", help="only show what rates are worth")
    parser.add_argument("-o", "--output", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.tasks or [*TASKS]
    if options.tune:
        for name in names:
            tune(name)
        return
    found = study(names, range(options.seeds))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    write_report(found, options.output)


if __name__ == "__main__":
    main()
