"""`ckptavg inspect`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command, fields_of, path_or_url
from ckptavg.cli.console import Console, cell, plural, say_on_stderr, size
from ckptavg.errors import CkptAvgError, SelectionError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint


@click.command(
    cls=Command,
    groups={
        "Which checkpoints": (*options.SELECTION, options.KEY),
        RUNNING: options.COMMON,
    },
    no_effect=options.SELECTION_NO_EFFECT,
)
@click.argument("paths", nargs=-1, required=True, type=path_or_url, metavar="PATH...")
def inspect(
    console: Console,
    paths: tuple[Path, ...],
    key: str | None,
    **params: Any,  # noqa: ANN401 - the fields of `Selection`
) -> None:
    """Show what checkpoints hold, from their headers alone; nothing in them is run.

    PATH is a checkpoint, or a directory of them. With rules such as --last or --lr-minima, show
    which checkpoints `average` would take, and why not the others.
    """
    if any(params.values()):
        _show_choice(console, paths, key, params)
    else:
        _show_content(console, paths, key)


def _show_choice(
    console: Console, paths: Sequence[Path], key: str | None, params: dict[str, Any]
) -> None:
    """Show which checkpoints the rules take, and why not the others."""
    from ckptavg.formats.parts import shown
    from ckptavg.select.rules import Selection, select
    from ckptavg.select.run import find_run

    rules = Selection(**fields_of(Selection, params))
    run = find_run(paths, key=key, exclusion_reason=rules.exclusion_reason)
    verdicts = select(run, rules)
    checkpoints: list[dict[str, Any]] = [
        {
            "path": shown(each.checkpoint.path),
            "step": each.step,
            "rate": each.checkpoint.training.learning_rate if each.rate is None else each.rate,
            "metric": each.metric,
            "bytes": each.checkpoint.size,
            "taken": each.is_chosen,
            "reason": each.reason,
        }
        for each in verdicts
    ]
    unknown = dict.fromkeys(("step", "rate", "metric", "bytes"))
    checkpoints += [
        {"path": shown(path), **unknown, "taken": False, "reason": reason}
        for path, reason in run.left_out.items()
    ]
    rows = [
        (
            printable(row["path"]),
            cell(row["step"]),
            *(cell(row["rate"], ".4g"), cell(row["metric"], ".4g"), size(row["bytes"])),
            *("yes" if row["taken"] else "no", printable(row["reason"])),
        )
        for row in checkpoints
    ]
    unit, metric = verdicts[0].unit, rules.metric or "metric"
    console.say_table([("path", unit, "rate", metric, "bytes", "taken", "why not"), *rows])
    count = sum(verdict.is_chosen for verdict in verdicts)
    console.say(f"{count} of {plural(len(rows), 'checkpoint')} taken")
    console.result({"checkpoints": checkpoints})


def _show_content(console: Console, paths: Sequence[Path], key: str | None) -> None:
    """Show what each checkpoint holds; one that cannot be read does not hide the others."""
    from ckptavg.select.run import find_candidates

    files = list(find_candidates(paths))
    contents: list[dict[str, Any]] = []
    failures: list[CkptAvgError] = []
    for path in files:
        try:
            contents += map(_content, _state_dicts(path, key))
        except CkptAvgError as error:
            if len(files) == 1:
                raise
            failures.append(error)
    if len(contents) == 1:
        _say_one(console, contents[0])
    elif contents:
        _say_several(console, contents)
    else:
        console.say("no checkpoints found")
    console.result({"checkpoints": contents})
    for failure in failures[:-1]:
        say_on_stderr(f"error: {failure}")
    if failures:
        raise failures[-1]


def _state_dicts(path: Path, key: str | None) -> list[Checkpoint]:
    """The state dict that `average` would take, or all of a file where that is unclear."""
    from ckptavg.formats import open_checkpoint

    try:
        return [open_checkpoint(path, key=key)]
    except SelectionError as error:
        if not error.choices:
            raise
        return [open_checkpoint(path, key=choice) for choice in error.choices]


def _content(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is shown of a state dict, and printed as JSON."""
    from ckptavg.formats.parts import shown
    from ckptavg.formats.tensors import is_norm_statistic

    names, tensors = checkpoint.tensors.keys(), checkpoint.tensors.values()
    return {
        "path": shown(checkpoint.path),
        "container": checkpoint.container,
        "file_bytes": checkpoint.size,
        "state_dict": checkpoint.key,
        "other_state_dicts": checkpoint.other_keys,
        "tensors": len(tensors),
        "elements": sum(tensor.count for tensor in tensors),
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype.name for tensor in tensors)),
        "facts": dict(checkpoint.facts),
        "norm_layers": sum(is_norm_statistic(name) and name.endswith("mean") for name in names),
        "provenance": checkpoint.provenance,
    }


def _say_one(console: Console, content: dict[str, Any]) -> None:
    others = ", ".join(map(printable, content["other_state_dicts"]))
    layers = content["norm_layers"]
    lines = {
        "container": f"{content['container']}, {size(content['file_bytes'])}",
        "state dict": printable(content["state_dict"]) or "the whole file",
        "others": f"{others} (take one with --key)" if others else "",
        "tensors": f"{content['tensors']:,}, with {content['elements']:,} elements, "
        f"{size(content['tensor_bytes'])}",
        "dtypes": ", ".join(f"{name} ({count:,})" for name, count in content["dtypes"].items()),
        "training": ", ".join(f"{name} {value}" for name, value in content["facts"].items()),
        "norm layers": f"{layers:,} with running statistics" if layers else "",
        "made by": _provenance(content["provenance"]),
    }
    console.say(printable(content["path"]))
    for label, text in lines.items():
        if text:
            console.say(f"  {label:<12} {text}")


def _say_several(console: Console, contents: Sequence[dict[str, Any]]) -> None:
    from ckptavg.formats.checkpoint import STEP_FACTS

    header = ("path", "state dict", "step", "rate", "tensors", "bytes", "dtypes", "norm layers")
    rows = [(*header, "made by")]
    for content in contents:
        facts = content["facts"]
        step = next((f"{name} {facts[name]}" for name in STEP_FACTS if name in facts), "-")
        row = (
            *(printable(content["path"]), printable(content["state_dict"]) or "-"),
            *(step, cell(facts.get("learning_rate"), "g")),
            *(cell(content["tensors"]), size(content["tensor_bytes"])),
            *(",".join(content["dtypes"]), cell(content["norm_layers"])),
            _provenance(content["provenance"]) or "-",
        )
        rows.append(row)
    console.say_table(rows)


def _provenance(made: dict[str, Any] | None) -> str:
    """What ckptavg wrote into a checkpoint about itself; empty if it did not make it."""
    if made is None:
        return ""
    sources, statistics = made.get("sources"), made.get("norm_stats")
    count = len(sources) if isinstance(sources, list) else 0
    statistics = statistics if isinstance(statistics, dict) else {"state": "unknown"}
    state = statistics.get("state")
    if isinstance(statistics.get("stale"), list):
        state = f"{state} (stale: {listed(statistics['stale'])})"
    scheme = made.get("scheme")
    average = f"{scheme} average of {plural(count, 'checkpoint')}, " if scheme != "none" else ""
    return printable(f"ckptavg {made.get('version')}: {average}norm statistics {state}")
