"""Window and scheme chosen by `ckptavg sweep` on validation: `python docs/study/windows.py`.

The runs are those of `study.py`. For each seed the command is called twice: with the checkpoints at
the minima of the cyclical rate, and with all that the cyclical part left. The average with the
lowest validation NLL is chosen, and tested once, against the decayed run and against the plain
average of all minima, which needs no choice.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from report import write_windows
from study import HERE, SEEDS, Arms, batches, score
from tasks import TASKS, Task

import ckptavg
from ckptavg import RefreshOptions, Selection
from ckptavg.formats import open_checkpoint
from ckptavg.model.loading import load_weights

WINDOWS = (3, 5, 8, 16, None)
WEIGHTS = "uniform,linear,ema:0.9,decay:cosine"


def chosen(task: Task, arms: Arms, output: Path) -> dict[str, object]:
    """Sweep the minima and all iterates; the better of the two winners is written."""
    valid = [tuple(task.validation)]
    refresh = RefreshOptions(model=task.make_model, loader=lambda: list(batches(task, 0)))
    found = []
    for place, inputs in enumerate((arms.minima, arms.iterates)):
        path = output.with_name(f"{place}-{output.name}")
        swept = ckptavg.sweep(
            inputs, model=task.make_model, loader=lambda: valid, metric="loss", refresh=refresh,
            select=Selection(last=WINDOWS), weights=WEIGHTS, members=False, output=path,
        )  # fmt: skip
        found.append((swept.best.metrics["loss"], place, swept, path))
    nll, place, swept, path = min(found, key=lambda each: each[:2])
    path.replace(output)
    return {
        "from": ("minima", "all checkpoints")[place],
        "scheme": swept.best.scheme,
        "checkpoints": swept.best.count,
        "averages": sum(len(each[2].averages) for each in found),
        "validation NLL": nll,
    }


def study(names: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, object]]]:
    """Train, choose, and then test: a row for each seed of each task."""
    found: dict[str, list[dict[str, object]]] = {}
    for name in names:
        task = TASKS[name]()

        def tested(path: Path, *, refresh: bool = False, task: Task = task) -> list[float]:
            model = task.make_model()
            load_weights(model, open_checkpoint(path))
            if refresh:
                ckptavg.refresh_norm(model, list(batches(task, 0)))
            return [*score(model, task.test)]

        rows = found[name] = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                arms = Arms(task, Path(folder), seed)
                best, plain = Path(folder, "best.safetensors"), Path(folder, "all.safetensors")
                row = {"seed": seed, **chosen(task, arms, best)}
                ckptavg.average(arms.minima, plain)
                row["decayed"] = tested(Path(folder, "decayed.pt"))
                row["all minima, uniform"] = tested(plain, refresh=True)
                row["chosen by sweep"] = tested(best)
            rows.append(row)
            print(name, row, flush=True)
    return found


def main() -> None:
    """Do it, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="default: all of them")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("-o", "--output", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = study(options.tasks or [*TASKS], range(options.seeds))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "windows.json").write_text(json.dumps(found, indent=1) + "\n")
    write_windows(found, options.output)


if __name__ == "__main__":
    main()
