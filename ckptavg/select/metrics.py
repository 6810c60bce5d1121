"""The metrics of checkpoints: which way they are good, and where they are written."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from typing import TYPE_CHECKING, Literal

from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats.jsontext import from_text
from ckptavg.formats.parts import open_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

Mode = Literal["min", "max"]

_LOW = frozenset(
    ("loss", "error", "err", "perplexity", "ppl", "wer", "cer", "mae", "mse", "rmse", "nll", "fid")
)
_HIGH = frozenset(
    (
        *("acc", "accuracy", "top1", "top5", "f1", "auc", "auroc", "map", "bleu", "rouge"),
        *("iou", "miou", "dice", "r2", "psnr", "ssim", "precision", "recall"),
    )
)
# Words that turn a metric round, or make something else of it: `neg_mean_squared_error`.
_TURNED = frozenset(
    (
        *("neg", "negative", "minus", "inv", "inverse", "scale", "weight", "delta", "diff"),
        *("drop", "gain", "gap", "std", "stddev", "var", "variance", "threshold", "free"),
        *("improvement", "reduction", "increase", "decrease", "change", "ratio", "count", "1"),
    )
)
_CAMEL = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*")
# Whole or not at all: of `0.93x` nothing is taken.
_NUMBER = r"[-+]?(?>\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
# Without a sign between, a whole number may belong to the metric's name: `acc1_76.5`.
_ATTACHED = r"(?>\d+\.\d+(?:e[-+]?\d+)?|\d+(?![-_=]?\d))"
_AFTER_WORD = re.compile(r"[a-z][\W_]", re.IGNORECASE)
_LARGEST_FILE = 64 << 20
_MOST_NAMED = 10


def mode_of(name: str) -> Mode | None:
    """Whether a metric is good when low or when high, by the words of its name.

    None where the name has no such word, or words of both kinds: nothing is guessed.
    """
    words = _words(name)
    low, high = bool(words & _LOW), bool(words & _HIGH)
    if low == high or words & _TURNED:
        return None
    return "min" if low else "max"


def _words(name: str) -> set[str]:
    """`valTop1_acc5` has `val`, `top1` and `top`, `acc5` and `acc`."""
    pieces = [*re.split(r"[\W_]+", name), *_CAMEL.findall(name)]
    words = {piece.lower() for piece in pieces}
    return words | {word.rstrip("0123456789") for word in words}


def from_name(file_name: str, metric: str) -> float | None:
    """A metric in a file's name: `epoch=3-val_loss=0.12.ckpt`, `step_100_acc0.93.pt`.

    A name that the metric stands in whole goes before one in which it is the end of another
    (`loss` of `val_loss`); of several of these none is taken.

    Args:
        file_name: the name, with its ending and what was put before that (`-v1`).
        metric: the metric's name; other signs than letters and digits are alike.
    """
    pieces = [re.escape(piece) for piece in re.split(r"[\W_]+", metric) if piece]
    if not pieces:
        return None
    wanted = r"[\W_]".join(pieces)
    pattern = (
        rf"(?<![a-z]){wanted}"
        rf"(?:(?:=|[-_:](?=[-\d]|nan|inf))({_NUMBER})|({_ATTACHED}))(?![a-z0-9=])"
    )
    found = list(re.finditer(pattern, file_name, re.IGNORECASE))
    whole = [
        one
        for one in found
        if not _AFTER_WORD.fullmatch(file_name, max(one.start() - 2, 0), one.start())
    ]
    taken = whole or found
    return float(taken[0][1] or taken[0][2]) if len(taken) == 1 else None


def best(values: Sequence[float | None], count: int, mode: str) -> list[int]:
    """The indices of the best values, in the order of the checkpoints.

    A value that is missing or not finite never wins; of equal ones the later wins.

    Args:
        values: one for each checkpoint; None where there is none.
        count: how many to take. There may be fewer.
        mode: `min` or `max`: whether low or high values are good.
    """
    sign = 1 if mode == "min" else -1
    able = [
        (sign * value, -index)
        for index, value in enumerate(values)
        if value is not None and math.isfinite(value)
    ]
    return sorted(-index for _, index in sorted(able)[: max(count, 0)])


def read_metrics(path: Path, metric: str) -> dict[str, float]:
    """A metric of checkpoints from a file: name of the checkpoint to value.

    CSV: the names in the first column, metrics in further ones with their names in a header; or
    two columns without a header. JSON: `{name: value}`, `{name: {metric: value}}`, or a list of
    objects with the key `checkpoint` and metrics beside it, be it under the key `evaluations`.
    Empty cells and null are missing values.

    Args:
        path: the file.
        metric: which metric; a file without names of metrics has but one.

    Raises:
        FormatError: it is neither, names a checkpoint twice, or has a value that is no number.
        SelectionError: it does not have that metric.
    """
    source = open_source(path)
    if source.size > _LARGEST_FILE:
        raise FormatError(f"is {source.size} bytes long: no file of metrics", path=path)
    try:
        text = source.read(0, source.size).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise FormatError("is neither CSV nor JSON: no text", path=path) from error
    rows = _of_json(path, text, metric) if text[:1] in ("{", "[") else _of_csv(path, text, metric)
    found: dict[str, float] = {}
    for name, value in rows:
        if name in found:
            raise FormatError(f"has {printable(name)} twice", path=path)
        number = _number(path, name, value)
        if number is not None:
            found[name] = number
    return found


def _number(path: Path, name: str, value: object) -> float | None:
    """A value as a number; None where it is missing."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise FormatError(f"of {printable(name)}, {printable(value)!r} is no number", path=path)


def _of_csv(path: Path, text: str, metric: str) -> list[tuple[str, object]]:
    try:
        table = [row for row in csv.reader(io.StringIO(text, newline="")) if any(row)]
    except csv.Error as error:
        raise FormatError(f"is no valid CSV: {printable(error)}", path=path) from error
    table = [[cell.strip() for cell in row] for row in table]
    if not table or len(table[0]) < 2:  # noqa: PLR2004 - a name and a value
        raise FormatError("is no CSV with names and values", path=path)
    column = 1
    if not _is_number(table[0][1]) or len(table[0]) > 2:  # noqa: PLR2004
        header = table.pop(0)
        column = _position(path, metric, header[1:]) + 1
    # A row that ends early has no value.
    return [(row[0], row[column] if column < len(row) else None) for row in table]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == ""
    return True


def _position(path: Path, metric: str, there: Sequence[str]) -> int:
    if metric not in there:
        raise _absent(path, metric, there)
    return there.index(metric)


def _absent(path: Path, metric: str, there: Iterable[str]) -> SelectionError:
    names = ", ".join(map(printable, sorted(set(there))[:_MOST_NAMED]))
    return SelectionError(f"has no metric {printable(metric)}; there are: {names}", path=path)


def _of_json(path: Path, text: str, metric: str) -> list[tuple[str, object]]:
    try:
        root = from_text(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is no valid JSON: {printable(error)}", path=path) from error
    if isinstance(root, dict) and isinstance(root.get("evaluations"), list):
        root = root["evaluations"]
    if isinstance(root, list):
        root = dict(_listed(path, root))
    if not any(isinstance(value, dict) for value in root.values()):
        return list(root.items())
    if not all(isinstance(value, dict) for value in root.values()):
        raise FormatError("has values beside objects with metrics", path=path)
    there = {name for value in root.values() for name in value}
    if metric not in there:
        raise _absent(path, metric, there)
    return [(name, value.get(metric)) for name, value in root.items()]


def _listed(path: Path, entries: Sequence[object]) -> Iterable[tuple[str, Mapping[str, object]]]:
    """Name and metrics of each object in a list."""
    seen: set[str] = set()
    for entry in entries:
        name = entry.get("checkpoint") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(name, str):
            raise FormatError('has an entry without "checkpoint": its name', path=path)
        if name in seen:
            raise FormatError(f"has {printable(name)} twice", path=path)
        seen.add(name)
        metrics = {key: value for key, value in entry.items() if key not in ("checkpoint", "path")}
        yield name, metrics
        if isinstance(entry.get("path"), str) and (place := os.path.abspath(entry["path"])) != name:  # noqa: PTH100
            yield place, metrics
