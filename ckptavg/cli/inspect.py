"""`ckptavg inspect`."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.cli.command import RUNNING, Command, fields_of
from ckptavg.cli.console import Console, cell, plural, say_on_stderr, size, with_options
from ckptavg.cli.declarations import parse, path_text
from ckptavg.errors import CkptAvgError, SelectionError, listed, printable, without_notices

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.statedict import Key
    from ckptavg.formats.tensors import Tensor
    from ckptavg.select.rules import Verdict
    from ckptavg.select.run import Run
    from ckptavg.select.series import Candidate, Series


[_PLOT] = parse("""
--plot PICTURE  PNG, SVG or PDF file for a plot of the recorded learning rates. An existing file is
                replaced.
""")


@click.command(
    cls=Command,
    groups={
        "Which checkpoints": (*options.SELECTION, options.KEYS),
        RUNNING: (_PLOT, *options.COMMON),
    },
    no_effect=options.SELECTION_NO_EFFECT,
)
@click.argument("paths", nargs=-1, required=True, type=path_text, metavar="PATH...")
def inspect(
    console: Console,
    paths: tuple[str, ...],
    key: tuple[str, ...],
    plot: Path | None,
    **params: Any,  # noqa: ANN401 - the fields of `Selection`
) -> None:
    """Show what checkpoints hold; nothing in them is run.

    PATH is a checkpoint, or a directory of them. For a directory, a table shows which files
    `average` would use, and why not the others. Options such as --last or --lr-minima narrow the
    choice. Below the table, `inspect` says what learning rates and distances mean for an average.
    """
    from ckptavg.formats.paths import as_paths
    from ckptavg.formats.statedict import as_key
    from ckptavg.select.candidates import find_candidates

    inputs = as_paths(paths)
    with without_notices():
        [first, *others] = find_candidates(inputs).items()
    if others or first[1] is not None or any(params.values()) or plot is not None:
        _show_run(console, inputs, as_key(key), params, plot)
    else:
        _show_content(console, first[0], as_key(key))


def _show_run(
    console: Console,
    paths: Sequence[Path],
    key: Key,
    params: dict[str, Any],
    plot: Path | None,
) -> None:
    """Show the series of a run and its members, and which of them the rules take."""
    from ckptavg.select.advice import advice
    from ckptavg.select.rules import Selection, Verdict, select
    from ckptavg.select.run import find_run, log_averages

    rules = Selection(**fields_of(Selection, params))
    run = find_run(paths, key=key, exclusion_reason=rules.exclusion_reason)
    log_averages(run)
    if run.error is None:
        verdicts = select(run, rules)
    else:
        opened = [each.checkpoint for each in run.candidates if each.is_open]
        steps = [(each, each.step or ("step", None)) for each in opened if each]
        verdicts = [Verdict(each, unit, step, reason=_BESIDE_ERROR) for each, (unit, step) in steps]
    members = [_member(verdict) for verdict in verdicts]
    others = [_other(each) for each in run.candidates if each.reason]
    all_series = run.series
    series = [_series(each, all_series, run) for each in all_series]
    _say_series(console, series)
    unit, metric = verdicts[0].unit if verdicts else "step", rules.metric or "metric"
    if any(params.values()) and members:
        _say_choice(console, members, unit, metric)
    elif members:
        _say_members(console, members, unit)
    error = None if run.error is None else with_options(str(run.error))
    if error and not any(each.kind == "damaged" for each in run.candidates):
        console.say("none is selected: " + error.partition(":\n")[0])
    selected = [verdict.checkpoint for verdict in verdicts if verdict.is_chosen]
    sentences = advice(run.checkpoints, selected, rules.lr_recorded) if run.error is None else []
    for sentence in ("", *sentences) if sentences else ():
        console.say(with_options(sentence))
    if plot is not None:
        _plot(console, members, unit, plot)
    console.result(
        {
            "series": series,
            "checkpoints": [*members, *others],
            "advice": sentences,
            "error": error,
        }
    )
    _raise_damages([each.fault for each in run.candidates if each.fault and each.reason])


def _plot(console: Console, members: Sequence[dict[str, Any]], unit: str, path: Path) -> None:
    """Draw the learning rates of the checkpoints that record one.

    Raises:
        SelectionError: there are none.
    """
    known = [row for row in members if row["rate"] is not None and row["step"] is not None]
    if not known:
        raise SelectionError("no checkpoint records a step and a learning rate: nothing to plot")
    from ckptavg.evaluation.pictures import draw_schedule

    steps, rates, selected = ([row[name] for row in known] for name in ("step", "rate", "selected"))
    draw_schedule(steps, rates, selected, unit, path)
    console.say(f"  wrote {printable(path)}")


def _member(verdict: Verdict) -> dict[str, Any]:
    """What is shown of a checkpoint of the run."""
    recorded = verdict.checkpoint.training.learning_rate
    rate = recorded if verdict.rate is None else verdict.rate
    return _content(verdict.checkpoint) | {
        "step": verdict.step,
        "rate": rate,
        "metric": verdict.metric,
        "bytes": verdict.checkpoint.size,
        "selected": verdict.is_chosen and verdict.fault is None,
        "reason": verdict.reason or str(verdict.fault or ""),
    }


def _other(candidate: Candidate) -> dict[str, Any]:
    """What is shown of a file that is no checkpoint of the run."""
    from ckptavg.formats.paths import shown

    unknown = dict.fromkeys(("step", "rate", "metric", "bytes"))
    return {"path": shown(candidate.path), **unknown, "selected": False, "reason": candidate.reason}


_MOST_NAMES = 2  # of series in one row
_MOST_DAMAGES = 20  # that are shown
_BESIDE_ERROR = "the error below stops the average"
_PLURALS = {"checkpoint": "checkpoints", "copy": "copies", "piece": "pieces"}


def _series(series: Series, others: Sequence[Series], run: Run) -> dict[str, Any]:
    """What is shown of a series."""
    what, reason = _PLURALS.get(series.kind, series.kind), series.reasons
    if series.is_unclear:
        reason = with_options(series.arguments(each for each in others if each.is_unclear))
    elif series.is_of_members:
        what, reason = "members", "" if run.error is None else _BESIDE_ERROR
    return {
        "name": series.name,
        "count": len(series.candidates),
        "steps": series.steps,
        "what": what,
        "selected": series.is_of_members and run.error is None,
        "reason": reason,
    }


def _say_series(console: Console, series: Sequence[dict[str, Any]]) -> None:
    """Show the series; what is left out for the same reason is one line."""
    rows = [("series", "files", "steps", "what", "selected", "why not")]
    alike = defaultdict[tuple[str, str], list[dict[str, Any]]](list)
    for row in series:
        is_left_out = row["reason"] and row["what"] != "members"
        alike[row["what"], row["reason"] if is_left_out else row["name"]].append(row)
    for row in map(_joined, alike.values()):
        steps = "-" if row["steps"] is None else "{:,} to {:,}".format(*row["steps"])
        selected = "yes" if row["selected"] else "no"
        rows.append(
            (
                printable(row["name"]),
                cell(row["count"]),
                steps,
                row["what"],
                selected,
                row["reason"],
            )
        )
    console.say_table(rows)
    console.say("")


def _joined(series: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for several series that are left out for the same reason."""
    first, *others = series
    if not others:
        return first
    name = listed((row["name"] for row in series), _MOST_NAMES)
    return {**first, "name": name, "count": sum(row["count"] for row in series), "steps": None}


def _say_choice(
    console: Console, members: Sequence[dict[str, Any]], unit: str, metric: str
) -> None:
    """Show which members the rules take, and why not the others."""
    rows = [("path", unit, "rate", metric, "bytes", "selected", "why not")]
    rows += [
        (
            printable(row["path"]),
            cell(row["step"]),
            *(cell(row["rate"], ".4g"), cell(row["metric"], ".4g"), size(row["bytes"])),
            *("yes" if row["selected"] else "no", printable(row["reason"])),
        )
        for row in members
    ]
    console.say_table(rows)
    count = sum(row["selected"] for row in members)
    console.say(f"{count} of {plural(len(members), 'checkpoint')} selected")


def _say_members(console: Console, members: Sequence[dict[str, Any]], unit: str) -> None:
    """Show what the members hold."""
    header = ("path", unit, "rate", "state dict", "tensors", "bytes", "dtypes", "norm layers")
    rows = [header]
    rows += [
        (
            *(printable(row["path"]), cell(row["step"]), cell(row["rate"], "g")),
            *(printable(row["state_dict"]) or "-", cell(row["tensors"]), size(row["tensor_bytes"])),
            *(",".join(row["dtypes"]), cell(row["norm_layers"])),
        )
        for row in members
    ]
    console.say_table(rows)


def _show_content(console: Console, path: Path, key: Key) -> None:
    """Show what a checkpoint holds."""
    contents = [*map(_content, _state_dicts(path, key))]
    for content in contents:
        _say_one(console, content)
    console.result({"checkpoints": contents})


def _raise_damages(failures: Sequence[CkptAvgError]) -> None:
    """Say what is wrong with each file, of many with the first; raise the last of these errors."""
    for failure in failures[:-1][:_MOST_DAMAGES]:
        say_on_stderr(f"error: {failure}")
    if (more := len(failures) - 1 - _MOST_DAMAGES) > 0:
        say_on_stderr(f"error: {plural(more, 'more file')} cannot be read")
    if failures:
        raise failures[-1]


def _state_dicts(path: Path, key: Key) -> list[Checkpoint]:
    """The state dict that `average` would take, or all of a file where that is unclear."""
    from ckptavg.formats import dcp, open_checkpoint
    from ckptavg.formats.statedict import ALL

    try:
        return [open_checkpoint(path, key=key)]
    except SelectionError as error:
        if not error.choices:
            raise
        # There can be a hundred, and opening each would read all of them.
        if path.is_dir() and dcp.matches(path):
            return dcp.open_each(path, error.choices)
        if path.is_dir():
            return [open_checkpoint(path, key=choice) for choice in error.choices]
    return _each_state_dict(open_checkpoint(path, key=(ALL,)))


def _each_state_dict(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The state dicts of a checkpoint that has all of a file, as if each had been opened alone."""
    tensors: dict[str, dict[str, Tensor]] = {place: {} for place in checkpoint.models}
    for name, tensor in checkpoint.tensors.items():
        place = checkpoint.model_of(name)
        tensors[place][name.removeprefix(place)] = tensor
    keys = tuple(checkpoint.models.values())
    return [
        replace(
            checkpoint,
            tensors=tensors[place],
            key=key,
            other_keys=tuple(other for other in keys if other != key),
            models={"": "model"},
        )
        for place, key in checkpoint.models.items()
    ]


def _content(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is shown of a state dict, and printed as JSON."""
    from ckptavg.formats.paths import shown
    from ckptavg.formats.tensors import is_norm_statistic

    key, names, tensors = checkpoint.key, checkpoint.tensors.keys(), checkpoint.tensors.values()
    rate = checkpoint.training.learning_rate
    return {
        "path": shown(checkpoint.path),
        "container": checkpoint.container,
        "file_bytes": checkpoint.size,
        "state_dict": key if isinstance(key, str) else ", ".join(key),
        "other_state_dicts": checkpoint.other_keys,
        "models": [*checkpoint.models.values()] if checkpoint.has_several_models else [],
        "tensors": len(tensors),
        "elements": sum(tensor.count for tensor in tensors),
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype.name for tensor in tensors)),
        "facts": {**checkpoint.training.steps, **({} if rate is None else {"learning_rate": rate})},
        "norm_layers": sum(is_norm_statistic(name) and name.endswith("mean") for name in names),
        "provenance": checkpoint.provenance,
    }


def _say_one(console: Console, content: dict[str, Any]) -> None:
    others = ", ".join(map(printable, content["other_state_dicts"]))
    layers = content["norm_layers"]
    lines = {
        "container": f"{content['container']}, {size(content['file_bytes'])}",
        "state dict": printable(content["state_dict"]) or "the whole file",
        "others": f"{others} (choose one with --key)" if others else "",
        "models": ", ".join(map(printable, content["models"])),
        "tensors": f"{content['tensors']:,}, with {content['elements']:,} elements, "
        f"{size(content['tensor_bytes'])}",
        "dtypes": ", ".join(f"{name} ({count:,})" for name, count in content["dtypes"].items()),
        "training": ", ".join(f"{name} {value}" for name, value in content["facts"].items()),
        "norm layers": f"{layers:,} with running statistics" if layers else "",
        "made by": _provenance(content["provenance"]),
        "chosen": _sweep(content["provenance"]),
    }
    console.say(printable(content["path"]))
    for label, text in lines.items():
        if text:
            console.say(f"  {label:<12} {text}")


def _sweep(made: dict[str, Any] | None) -> str:
    """How `sweep` chose an average; empty if it did not."""
    match (made or {}).get("sweep"):
        case {"metric": str() as metric, "rows": [*rows]}:
            count = sum(isinstance(row, dict) and row.get("kind") == "average" for row in rows)
            return printable(f"best of {plural(count, 'average')} by {metric}, with ckptavg sweep")
    return ""


def _provenance(made: dict[str, Any] | None) -> str:
    """What ckptavg wrote into a checkpoint about itself; empty if it did not make it."""
    if made is None:
        return ""
    sources, statistics = made.get("sources"), made.get("norm_stats", {})
    count = len(sources) if isinstance(sources, list) else 0
    state = statistics.get("state", "unknown")
    if "stale" in statistics:
        state = f"{state} (stale: {listed(statistics['stale'])})"
    scheme = made.get("scheme")
    average = f"{scheme} average of {plural(count, 'checkpoint')}, " if scheme != "none" else ""
    return printable(f"ckptavg {made.get('version')}: {average}norm statistics {state}")
