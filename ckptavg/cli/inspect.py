"""`ckptavg inspect`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.common import Console, PathType, common_options, plural, size
from ckptavg.cli.selection_options import selection_options, take_selection
from ckptavg.errors import CkptAvgError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.formats.description import Description


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PathType(), metavar="PATH...")
@click.option("--key", help="State dict to look at where a file holds several.")
@selection_options
@common_options
def inspect(
    paths: tuple[Path, ...],
    *,
    key: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,  # noqa: ANN401 - the rules, which the library checks
) -> None:
    """Say what checkpoints hold: from headers alone, running nothing.

    PATH is a checkpoint, or a directory of them. With rules such as --last or --lr-minima it says
    which ones `average` would take, and why the others not.
    """
    console = Console(as_json=as_json, quiet=quiet)
    if any(options.values()):
        _say_choice(console, paths, key, options)
        return
    from ckptavg.formats.description import describe
    from ckptavg.select.discover import find

    files = [path for path, _ in find(paths)]
    found, failures = [], []
    for path in files:
        try:
            found += describe(path, key=key)
        except CkptAvgError as error:
            if len(files) == 1:
                raise
            failures.append(error)
    if len(found) == 1:
        _say_one(console, found[0])
    elif found:
        _say_table(console, found)
    else:
        console.say("no checkpoints found")
    console.result({"checkpoints": [description.as_dict() for description in found]})
    for failure in failures[:-1]:
        click.echo(f"ckptavg: error: {failure}", err=True)
    if failures:
        raise failures[-1]


def _say_choice(
    console: Console, paths: Sequence[Path], key: str | None, options: dict[str, Any]
) -> None:
    """Which checkpoints the rules take, and why the others not."""
    from ckptavg.formats.paths import shown
    from ckptavg.select.collect import survey
    from ckptavg.select.selection import select

    rules, last = take_selection(options)
    found = survey(paths, key=key, wanted=rules.unwanted)
    verdicts = select(found, replace(rules, last=last or None))
    rows = [
        {
            "path": shown(verdict.checkpoint.path),
            "step": verdict.step,
            "rate": verdict.checkpoint.training.learning_rate
            if verdict.rate is None
            else verdict.rate,
            "metric": verdict.metric,
            "bytes": verdict.checkpoint.size,
            "taken": verdict.taken,
            "reason": verdict.reason,
        }
        for verdict in verdicts
    ]
    rows += [
        {
            "path": shown(one.path),
            "step": None,
            "rate": None,
            "metric": None,
            "bytes": None,
            "taken": False,
            "reason": one.reason,
        }
        for one in found.left_out
    ]
    unit = verdicts[0].unit
    header = ("path", unit, "rate", rules.metric or "metric", "bytes", "taken", "why not")
    console.say_table([header, *(_choice_row(row) for row in rows)])
    taken = sum(verdict.taken for verdict in verdicts)
    console.say(f"{taken} of {plural(len(rows), 'checkpoint')} taken")
    console.result({"checkpoints": rows})


def _choice_row(row: dict[str, Any]) -> tuple[str, ...]:
    from ckptavg.errors import printable

    return (
        printable(row["path"]),
        "-" if row["step"] is None else f"{row['step']:,}",
        "-" if row["rate"] is None else f"{row['rate']:.4g}",
        "-" if row["metric"] is None else f"{row['metric']:.4g}",
        "-" if row["bytes"] is None else size(row["bytes"]),
        "yes" if row["taken"] else "no",
        printable(row["reason"]),
    )


def _say_one(console: Console, one: Description) -> None:
    from ckptavg.errors import printable

    lines = {
        "container": f"{one.container}, {size(one.file_bytes)}",
        "state dict": printable(one.state_dict) or "the whole file",
        "others": ", ".join(printable(name) for name in one.other_state_dicts)
        + (" (take one with --key)" if one.other_state_dicts else ""),
        "tensors": f"{one.tensors:,}, with {one.elements:,} elements, {size(one.tensor_bytes)}",
        "dtypes": ", ".join(f"{name} ({count:,})" for name, count in one.dtypes.items()),
        "training": ", ".join(f"{name} {value}" for name, value in one.facts.items()),
        "norm layers": f"{one.norm_layers:,} with running statistics" if one.norm_layers else "",
        "made by": _provenance(one),
    }
    console.say(printable(one.path))
    for label, text in lines.items():
        if text:
            console.say(f"  {label:<12} {text}")


def _provenance(one: Description) -> str:
    made = one.provenance
    if made is None:
        return ""
    sources = made.get("sources")
    count = len(sources) if isinstance(sources, list) else 0
    statistics = made.get("norm_stats")
    state = statistics.get("state") if isinstance(statistics, dict) else "unknown"
    scheme, version = made.get("scheme"), made.get("version")
    return (
        f"ckptavg {version}: {scheme} average of {plural(count, 'checkpoint')}, "
        f"norm statistics {state}"
    )


def _say_table(console: Console, found: Sequence[Description]) -> None:
    from ckptavg.errors import printable
    from ckptavg.formats.checkpoint import STEP_FACTS

    header = (
        "path",
        "state dict",
        "step",
        "rate",
        "tensors",
        "bytes",
        "dtypes",
        "norm layers",
        "made by",
    )
    rows = [
        (
            printable(one.path),
            printable(one.state_dict) or "-",
            next(
                (f"{name} {one.facts[name]}" for name in STEP_FACTS if name in one.facts),
                "-",
            ),
            f"{one.facts['learning_rate']:g}" if "learning_rate" in one.facts else "-",
            f"{one.tensors:,}",
            size(one.tensor_bytes),
            ",".join(one.dtypes),
            f"{one.norm_layers:,}",
            _provenance(one) or "-",
        )
        for one in found
    ]
    console.say_table([header, *rows])
