"""Draw the pictures of the site: `python docs/make_pictures.py`, in about three minutes of a core.

They show the run of `docs/tutorial.md`, which is trained for this, and the table of `ckptavg demo`
in `docs/study/README.md`.
"""

from __future__ import annotations

import copy
import os
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import nn

import ckptavg
from ckptavg.batchnorm.options import RefreshOptions
from ckptavg.evaluation.evaluate import EvaluationOptions
from ckptavg.landscape.explore import ExploreOptions
from ckptavg.landscape.plane import plane
from ckptavg.landscape.rays import rays
from ckptavg.landscape.saving import save

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
BLUE, ORANGE, GREY, GREEN = "#3f51b5", "#e65100", "#9e9e9e", "#2e7d32"
START = 15
LAYER = 10


def main() -> None:
    """Train, average, refresh, and draw."""
    mpl.rcParams.update(
        {"svg.hashsalt": "ckptavg", "font.size": 10, "axes.spines.top": False}
        | {"axes.spines.right": False, "legend.frameon": False}
    )
    torch.set_num_threads(1)
    draw_demo()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
        [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        Path("train.py").write_text(code, encoding="utf-8")
        train = runpy.run_path("train.py", run_name="__main__")
        rules = ckptavg.Selection(start="50%", lr_minima=True)
        ckptavg.average("ckpts", "averaged.pt", select=rules)
        model, loader = train["make_model"], train["train_loader"]
        ckptavg.refresh_checkpoint("averaged.pt", "refreshed.pt", model=model, loader=loader)
        draw_schedule(train)
        draw_series()
        draw_refresh(train)
        draw_landscapes()


def finish(figure: Figure, name: str) -> None:
    """Write a picture."""
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None}, facecolor="white")


def draw_demo() -> None:
    """Accuracies of the table that `ckptavg demo` prints."""
    page = (DOCS / "study" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(\S.*?) {2,}([\d.]+) % +[\d.]+$", page, re.MULTILINE)
    names, values = [name for name, _ in rows], [float(value) for _, value in rows]
    colours = [GREEN if name.endswith("refreshed BN statistics") else GREY for name in names]
    figure = Figure((7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.barh(names, values, color=colours), fmt="%.1f %%", padding=4)
    axes.set(xlim=(50, 100), xlabel="test accuracy in %")
    axes.invert_yaxis()
    finish(figure, "demo")


def draw_schedule(train: dict[str, Any]) -> None:
    """The learning rate of each epoch, with the members of the average."""
    cycle, high, low = (train[name] for name in ("CYCLE", "HIGH", "LOW"))
    epochs = list(range(1, train["EPOCHS"] + 1))
    rates = [high + (epoch - 1) % cycle / (cycle - 1) * (low - high) for epoch in epochs]
    members = [epoch for epoch in epochs if epoch >= START and epoch % cycle == 0]
    figure = Figure((7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.step(epochs, rates, where="mid", color=GREY)
    axes.plot(epochs, rates, "o", color=GREY, markersize=4, label="saved")
    axes.plot(members, [low] * len(members), "o", color=ORANGE, markersize=8, label="averaged")
    axes.axvline(START - 0.5, color=BLUE, linestyle=":")
    axes.text(START - 0.3, 1.04 * high, "--start 50%", color=BLUE)
    axes.set(xlabel="epoch", ylabel="learning rate", ylim=(0, 1.18 * high))
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    finish(figure, "schedule")


def draw_series() -> None:
    """The files of a directory, and what becomes of each."""
    groups = (
        ("series epoch_#.pt", ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt"], "averaged", ORANGE),
        ("copy", ["last.pt"], "the same as epoch_3.pt: counts once", GREY),
        ("pointer", ["best.pt"], "left out beside a series", GREY),
        ("average", ["swa.pt"], "left out beside a series", GREY),
        ("no weights", ["optim.pth"], "left out", GREY),
    )
    figure = Figure((7, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    row = 0
    for kind, files, verdict, colour in groups:
        middle = row + (len(files) - 1) / 2
        for name in files:
            axes.text(0.02, row, name, family="monospace", va="center")
            row += 1
        axes.plot([0.24, 0.24], [row - len(files) - 0.35, row - 0.65], color=colour, linewidth=4)
        axes.text(0.27, middle, kind, va="center", color=colour, weight="bold")
        axes.text(0.55, middle, verdict, va="center")
    axes.set(xlim=(0, 1), ylim=(row - 0.4, -0.6))
    finish(figure, "series")


def draw_refresh(train: dict[str, Any]) -> None:
    """The statistics in the files beside those of the data, and what the model is worth."""
    figure = Figure((8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    kinds = (("averaged.pt", "averaged", ORANGE), ("refreshed.pt", "refreshed", GREEN))
    for path, name, colour in kinds:
        model = train["make_model"]()
        model.load_state_dict(torch.load(path))
        stored = model[LAYER].running_var.sqrt()
        left.plot(true_deviations(model, train), stored, ".", color=colour, label=name)
    end = left.get_xlim()[1]
    left.plot([0, end], [0, end], color=GREY, linewidth=1, zorder=0)
    left.set(xlabel="standard deviation of the data", ylabel="in the file: running_var")
    left.set_title(f"the 64 channels of layer {LAYER}", fontsize=10)
    left.legend()
    rows = ckptavg.evaluate(
        ["ckpts/epoch_30.pt", "averaged.pt", "refreshed.pt"],
        model=train["make_model"],
        loader=train["test_loader"],
    )
    names = ["last epoch", "average", "average,\nrefreshed"]
    found = {Path(row.path).stem: 100 * row.metrics["accuracy"] for row in rows}
    values = [found[name] for name in ("epoch_30", "averaged", "refreshed")]
    right.bar_label(right.bar(names, values, color=[GREY, ORANGE, GREEN]), fmt="%.1f %%")
    right.set(ylim=(85, 100), ylabel="test accuracy in %")
    finish(figure, "refresh")


def true_deviations(model: nn.Module, train: dict[str, Any]) -> torch.Tensor:
    """The standard deviations of what a layer is given, by a plain pass in which layers normalise.

    Returns:
        float32 `[64]`.
    """
    model, seen = copy.deepcopy(model), []
    model.get_submodule(str(LAYER)).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].var(0))
    )
    model.train()
    with torch.no_grad():
        for points, _ in train["train_loader"]():
            model(points)
    return torch.stack(seen).mean(0).sqrt()


def draw_landscapes() -> None:
    """Rays and a plane, as the commands draw them."""
    places = {"model": "train.py:make_model", "loader": "train.py:train_loader"}
    evaluation = EvaluationOptions(**places, max_samples=800, refresh=RefreshOptions(**places))
    options = ExploreOptions(evaluation=evaluation, test_loader="train.py:test_loader")
    last, average = Path("ckpts/epoch_30.pt"), Path("refreshed.pt")
    save(rays([last, average], Path("rays"), options), Path("rays"), plots=True)
    shutil.copy("rays/rays.svg", PICTURES / "rays.svg")
    corners = [Path("ckpts/epoch_15.pt"), last, average]
    save(plane(corners, Path("plane"), options, size=11), Path("plane"), plots=True)
    shutil.copy("plane/plane.png", PICTURES / "plane.png")


if __name__ == "__main__":
    main()
