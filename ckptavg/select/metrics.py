"""Metrics of checkpoints: their values in names and files, and whether low or high is good."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Literal

from ckptavg.errors import FormatError, SelectionError, listed, printable
from ckptavg.formats.jsontext import from_text
from ckptavg.formats.parts import open_source
from ckptavg.formats.paths import absolute

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint

Mode = Literal["min", "max"]
Name = str | tuple[int | None, int | None]
"""A checkpoint's name in a file of metrics, or in a log its epoch and its step."""
_Row = tuple[Name, object, str]
"""A name, a value or a dict of metrics, and where that is in the file."""
_LOG_COLUMNS = ("epoch", "step")

_LOW_IS_GOOD = {
    "loss", "error", "err", "perplexity", "ppl", "wer", "cer", "mae", "mse", "rmse", "nll", "fid",
}  # fmt: skip
_HIGH_IS_GOOD = {
    "acc", "accuracy", "top1", "top5", "f1", "auc", "auroc", "map", "bleu", "rouge", "iou", "miou",
    "dice", "r2", "psnr", "ssim", "precision", "recall",
}  # fmt: skip
# With these words, a name may mean the opposite or another quantity: `neg_mse`, `loss_scale`.
_UNCERTAIN = {
    "neg", "negative", "minus", "inv", "inverse", "scale", "weight", "delta", "diff", "drop",
    "gain", "gap", "std", "stddev", "var", "variance", "threshold", "free", "improvement",
    "reduction", "increase", "decrease", "change", "ratio", "count", "1",
}  # fmt: skip
_CAMEL_CASE = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*")
# Atomic groups match a whole number or nothing, so that nothing matches in `0.93x`.
_NUMBER = r"[-+]?(?>\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
# A number without a separator. An integer may belong to the metric's name: `acc1_76.5`.
_ATTACHED_NUMBER = r"(?>\d+\.\d+(?:e[-+]?\d+)?|\d+(?![-_=]?\d))"
_END_OF_WORD = re.compile(r"[a-z][\W_]", re.IGNORECASE)
_LARGEST_FILE = 8 << 20
_MOST_CELLS = 500_000  # an empty one becomes some hundred bytes
_SHORTEN = "leave out the rows of other checkpoints, and the columns of other metrics"


def mode_of(name: str) -> Mode | None:
    """Whether a metric is good when low or when high, by the words of its name.

    None if the name has no such word, or words of both kinds.
    """
    words = {word.lower() for word in (*re.split(r"[\W_]+", name), *_CAMEL_CASE.findall(name))}
    words |= {word.rstrip("0123456789") for word in words}
    low, high = not words.isdisjoint(_LOW_IS_GOOD), not words.isdisjoint(_HIGH_IS_GOOD)
    if low == high or words & _UNCERTAIN:
        return None
    return "min" if low else "max"


def certain_mode(metric: str, mode: Mode | None) -> Mode:
    """Whether a metric is good when low or when high: as given, else by its name.

    Raises:
        SelectionError: neither is certain.
    """
    mode = mode or mode_of(metric)
    if mode is None:
        raise SelectionError(
            f"whether {printable(metric)} should be low or high is not certain from its name",
            remedy="set `mode` to min or to max",
        )
    return mode


def metric_in_name(file_name: str, metric: str) -> float | None:
    """The value of a metric in a file's name: `epoch=3-val_loss=0.12.ckpt`, `step_100_acc0.93.pt`.

    The metric's own name has precedence over longer names that end with it (`val_loss` for `loss`).
    None if the name has no value, or several.

    Args:
        file_name: the name with its suffix.
        metric: the metric's name. All characters but letters and digits count as equal.
    """
    wanted = r"[\W_]".join(re.escape(word) for word in re.split(r"[\W_]+", metric) if word)
    if not wanted:
        return None
    pattern = (
        rf"(?<![a-z]){wanted}"
        rf"(?:(?:=|[-_:](?=[-\d]|nan|inf))({_NUMBER})|({_ATTACHED_NUMBER}))(?![a-z0-9=])"
    )
    matches = list(re.finditer(pattern, file_name, re.IGNORECASE))
    exact = [
        match
        for match in matches
        if not _END_OF_WORD.fullmatch(file_name, max(match.start() - 2, 0), match.start())
    ]
    candidates = exact or matches
    return float(candidates[0][1] or candidates[0][2]) if len(candidates) == 1 else None


def recorded_metrics(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """The names of the metrics that checkpoints record, or have in their names before `=`."""
    names: set[str] = set()
    for each in checkpoints:
        names.update(each.training.metrics)
        for name in re.findall(r"([^\W\d][\w/]*)=", each.name):
            is_step = name.rpartition("/")[2] in {"epoch", "step", "global_step"}
            if not is_step and metric_in_name(each.name, name) is not None:
                names.add(name)
    return sorted(names)


def no_metric(
    checkpoints: Iterable[Checkpoint], file: Path | None, mode: Mode | None
) -> SelectionError:
    """The error about `best` without a metric: it names those that there are."""
    if file is None:
        names, where = recorded_metrics(checkpoints), "the checkpoints record"
    else:
        names, where = metric_names(file), f"{printable(file)} has"
    if not names:
        remedy = (
            "name a file that has one with `metrics`, such as `ckptavg evaluate --json` prints, "
            "and the metric with `metric`"
        )
        return SelectionError(f"`best` needs a metric, and {where} none", remedy=remedy)
    metric = next((name for name in names if mode_of(name)), names[0])
    which = "" if mode or mode_of(metric) else ", and `mode` min or `mode` max"
    return SelectionError(
        f"`best` needs a metric, and {where} {listed(names, 20)}",
        remedy=f"add `metric` {shlex.quote(printable(metric))}{which}",
    )


def indices_of_best(values: Sequence[float | None], count: int, mode: str) -> list[int]:
    """The indices of the best values, in ascending order.

    Values that are missing or not finite are left out. Of equal values the later one is better.

    Args:
        values: one for each checkpoint; None if it has none.
        count: the largest number of indices.
        mode: `min` if low values are good, `max` if high ones are.
    """
    sign = 1 if mode == "min" else -1
    ranked = sorted(
        (sign * value, -index)
        for index, value in enumerate(values)
        if value is not None and math.isfinite(value)
    )
    return sorted(-index for _, index in ranked[: max(count, 0)])


def read_metrics(path: Path, metric: str) -> dict[Name, float]:
    """A metric of checkpoints from a CSV or JSON file: values by the checkpoints' names.

    - CSV with a header: the checkpoints' names in the first column, a metric in each further one.
    - CSV of a logger, such as Lightning's `CSVLogger`: it has columns `epoch` or `step` instead of
      names. The values are by epoch and step, and also by epoch if each has only one.
    - CSV without a header: two columns, names and values.
    - JSON: `{name: value}`, `{name: {metric: value}}`, or a list of objects with the key
      `checkpoint` and metrics, which may be under the key `evaluations`.

    Empty cells and null are missing values.

    Raises:
        FormatError: the file is neither, has several values of a checkpoint, or a value is no
            number.
        SelectionError: the file does not have that metric.
    """
    table: dict[Name, float] = {}
    places: dict[Name, str] = {}
    several = set[Name]()
    for name, value, place in _column(path, _read_rows(path), metric):
        if value in (None, "") or name == (None, None):
            continue
        number = _number(value)
        if number is None:
            raise FormatError(f"of {_shown(name)}, {printable(value)!r} is no number", path=path)
        keys = {name}
        if isinstance(name, tuple) and name[0] is not None:
            keys.add((name[0], None))
        for key in keys:
            if repr(table.setdefault(key, number)) != repr(number):  # NaN is not equal to itself
                several.add(key)
            if key in several and key == name:
                raise FormatError(
                    f"has two values of {printable(metric)} for {_shown(name)}: "
                    f"{table[key]:g} in {places[key]}, and {number:g} in {place}",
                    path=path,
                )
            places.setdefault(key, place)
    return {key: number for key, number in table.items() if key not in several}


def _shown(name: Name) -> str:
    """What messages call a checkpoint, or an epoch and a step."""
    if isinstance(name, str):
        return printable(name)
    numbers = zip(_LOG_COLUMNS, name, strict=True)
    return ", ".join(f"{unit} {number}" for unit, number in numbers if number is not None)


def values_of(checkpoints: Sequence[Checkpoint], table: Mapping[Name, float]) -> list[float | None]:
    """Each checkpoint's value by its path, its name, a unique file name, or its epoch and step.

    Args:
        checkpoints: the checkpoints of a run.
        table: what `read_metrics` returns.
    """
    stems = Counter(each.path.stem for each in checkpoints)
    names = Counter(each.path.name for each in checkpoints)
    by_name, by_step, by_epoch = list[float | None](), list[float | None](), list[float | None]()
    for each in checkpoints:
        keys = [str(each.path), str(absolute(each.path)), each.name]
        keys += [each.path.name] if names[each.path.name] == 1 else []
        keys += [each.path.stem] if stems[each.path.stem] == 1 else []
        by_name.append(next((table[key] for key in keys if key in table), None))
        steps = each.training.steps
        epoch, step = steps.get("epoch"), steps.get("global_step", steps.get("step"))
        # After n updates, Lightning logs the step n - 1.
        step = None if step is None else step - each.training.epochs_from_zero
        by_step.append(table.get((epoch, step), table.get((None, step))))
        by_epoch.append(table.get((epoch, None)))
    columns = (by_name, by_step, by_epoch)
    return next((column for column in columns if set(column) != {None}), by_name)


def metric_names(path: Path) -> list[str]:
    """The names of the metrics in a CSV or JSON file.

    Raises:
        FormatError: it is neither.
    """
    return sorted({key for _, row, _ in _read_rows(path) if isinstance(row, dict) for key in row})


def _read_rows(path: Path) -> list[_Row]:
    """The name of each checkpoint in a file, and its value or a dict of its metrics."""
    file = open_source(path)
    if file.size > _LARGEST_FILE:
        raise FormatError(
            f"is {file.size / 1e6:,.0f} MB long, and a file of metrics is at most 8 MiB long",
            path=path,
            remedy=_SHORTEN,
        )
    try:
        text = file.read(0, file.size).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise FormatError("is neither CSV nor JSON: it is not text", path=path) from error
    return _read_json(path, text) if text[:1] in ("{", "[") else _read_csv(path, text)


def _column(path: Path, rows: list[_Row], metric: str) -> list[_Row]:
    """The name and the metric's value in each row. Rows without metrics' names stay as they are."""
    tables = [(name, row, place) for name, row, place in rows if isinstance(row, dict)]
    if not tables:
        return rows
    if len(tables) < len(rows):
        raise FormatError("mixes values with objects of metrics", path=path)
    known = sorted({key for _, table, _ in tables for key in table})
    if metric not in known:
        raise SelectionError(
            f"has no metric {printable(metric)}; there are: {listed(known, 20)}", path=path
        )
    return [(name, table.get(metric), place) for name, table, place in tables]


def _number(value: object) -> float | None:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    return None


def _read_csv(path: Path, text: str) -> list[_Row]:
    """The first cell of each row, and its value or a dict of its metrics."""
    if sum(map(text.count, ",\n\r")) > _MOST_CELLS:
        raise FormatError(f"has more than {_MOST_CELLS:,} cells", path=path, remedy=_SHORTEN)
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        lines = [(line, f"line {reader.line_num}") for line in reader if any(line)]
    except csv.Error as error:
        raise FormatError(f"is not valid CSV: {printable(error)}", path=path) from error
    rows = [([cell.strip() for cell in line], place) for line, place in lines]
    if not rows or not rows[0][0][1:]:
        raise FormatError("is not a CSV with names and values", path=path)
    (header, _), *below = rows
    tables = [(dict(zip(header, row, strict=False)), place) for row, place in below]
    if _is_log(header, tables):
        return [
            ((_integer(table.pop("epoch", "")), _integer(table.pop("step", ""))), table, place)
            for table, place in tables
        ]
    _, first, *others = header
    if others or (first and _number(first) is None):
        return [(table.pop(header[0]), table, place) for table, place in tables]
    return [(row[0], row[1] if row[1:] else None, place) for row, place in rows]


def _is_log(header: list[str], tables: list[tuple[dict[str, str], str]]) -> bool:
    """Whether a CSV has epochs and steps in place of names; loggers may sort their columns."""
    first, *_ = header
    if first in _LOG_COLUMNS:
        return all(_integer(table[first]) is not None for table, _ in tables)
    cells = (table[first] for table, _ in tables)
    return set(_LOG_COLUMNS) <= set(header) and all(not c or _number(c) is not None for c in cells)


def _integer(cell: str) -> int | None:
    number = _number(cell)
    return int(number) if number is not None and number.is_integer() else None


def _read_json(path: Path, text: str) -> list[_Row]:
    """The name of each checkpoint, and its value or a dict of its metrics."""
    try:
        root = from_text(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not valid JSON: {printable(error)}", path=path) from error
    if isinstance(root, dict) and isinstance(root.get("evaluations"), list):
        root = root["evaluations"]
    if isinstance(root, dict):
        return [(name, value, "this file") for name, value in root.items()]
    rows: list[_Row] = []
    for number, entry in enumerate(root, 1):
        where = f"entry {number}"
        match entry:
            case {"checkpoint": str() as name, **metrics}:
                place = metrics.pop("path", None)
                rows.append((name, metrics, where))
                if isinstance(place, str) and os.path.abspath(place) != name:  # noqa: PTH100
                    rows.append((os.path.abspath(place), metrics, where))  # noqa: PTH100
            case _:
                raise FormatError('has an entry without "checkpoint", its name', path=path)
    return rows
