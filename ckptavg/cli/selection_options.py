"""The options that choose among checkpoints, for every command that takes some."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ckptavg.select.selection import Selection

Command = TypeVar("Command", bound=Callable[..., Any])

_NAMES = (
    "include", "exclude", "start", "steps", "cycle", "lr_minima", "lr_recorded", "best", "metric",
    "mode", "metrics", "every", "unit",
)  # fmt: skip


class CountsType(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between: `3,5,10`."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Read the numbers."""
        if isinstance(value, tuple):
            return value
        listed = value if isinstance(value, list) else str(value).replace(" ", "").split(",")
        parts = [str(part) for part in listed]
        if not all(re.fullmatch(r"0*[1-9][0-9]{0,17}", part) for part in parts):
            self.fail(f"{value!r} is no number of checkpoints, nor several as 3,5,10", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


def selection_options(command: Command) -> Command:
    """The rules, in the order in which they apply."""
    options = (
        click.option(
            "--include", multiple=True, metavar="GLOB", help="Take only names that fit; repeatable."
        ),
        click.option(
            "--exclude", multiple=True, metavar="GLOB", help="Leave out names that fit; repeatable."
        ),
        click.option(
            "--start",
            metavar="STEP|PERCENT",
            help="Begin at this step, or at this share of the training, such as 75%.",
        ),
        click.option(
            "--steps", metavar="LIST|RANGE", help="Take these steps: 100,200,300 or 100:1000:100."
        ),
        click.option(
            "--cycle",
            type=click.IntRange(1),
            metavar="C",
            help="Take the ends of cycles of this length, counted from the start.",
        ),
        click.option(
            "--lr-minima",
            is_flag=True,
            help="Take those saved at a local minimum of the learning rate.",
        ),
        click.option(
            "--lr-recorded",
            type=click.Choice(["used", "next"]),
            help="Whether checkpoints record the rate that was used, or the next one, as trainers "
            "do that save after scheduler.step().  [default: as it can be told]",
        ),
        click.option(
            "--best",
            type=click.IntRange(1),
            metavar="N",
            help="Take the N with the best --metric.",
        ),
        click.option(
            "--metric",
            metavar="NAME",
            help="What the best are the best by: as recorded, as in the names, or in --metrics.",
        ),
        click.option(
            "--mode",
            type=click.Choice(["min", "max"]),
            help="Whether the metric should be low or high.  [default: by its name]",
        ),
        click.option(
            "--metrics",
            type=click.Path(dir_okay=False, exists=True, path_type=Path),
            metavar="FILE",
            help="CSV or JSON with the metric of each checkpoint.",
        ),
        click.option(
            "--last",
            type=CountsType(),
            metavar="N",
            help="Take the last N.",
        ),
        click.option(
            "--every",
            type=click.IntRange(1),
            metavar="K",
            help="Take every K-th, counted back from the last.",
        ),
        click.option(
            "--unit",
            type=click.Choice(["global_step", "step", "epoch"]),
            help="What steps are.  [default: the first of these that all checkpoints record]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def take_selection(options: dict[str, Any]) -> tuple[Selection, tuple[int, ...]]:
    """Take the rules out of a command's options: those but `--last`, and the values of that."""
    from ckptavg.select.selection import Selection

    rules = {name: options.pop(name) for name in _NAMES}
    return Selection(**rules), options.pop("last") or ()
