"""Names of checkpoints: the numbers in them, and which of these is the step."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

from ckptavg.formats import SUFFIXES, is_suffix
from ckptavg.formats.paths import absolute, is_remote
from ckptavg.formats.words import KINDS, words_in

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

Step = int | float
"""A step, an epoch, a number of tokens: whole numbers are int."""

# `20240517`, `2024-05-17_10-30-00`: when something was saved.
_DATE = (
    r"(?<!\d)(?:19|20)\d\d(?P<dash>[-_.]?)(?:0[1-9]|1[0-2])(?P=dash)(?:0[1-9]|[12]\d|3[01])"
    r"(?:[-_T +]{0,2}(?:[01]\d|2[0-3])(?P<colon>[-_:.h]?)[0-5]\d(?:(?P=colon)[0-5]\d)?"
    r"(?:\+\d\d)?)?(?!\d)"
)
# `0.5`, `5e3`, `1e-05`, `10k`; `-0.5` behind `=` and `_`; `nan` behind `=`. In `checkpoint.3.500`
# and `1.2.3` dots part whole numbers.
_NUMBER = (
    r"(?<==)[-+]?(?:nan|inf|NaN|Inf)(?![A-Za-z])|(?:(?<==)[-+]|(?<=_)-)?(?P<digits>"
    r"(?:(?<![.\d])\d+\.\d+(?!\.?\d)|\d+)(?:[eE][-+]?\d{1,2}(?![A-Za-z\d]))?)"
    r"(?P<unit>[kKMBT](?![A-Za-z]))?"
)
_PARTS = re.compile(rf"(?P<date>{_DATE})|{_NUMBER}", re.ASCII)
_LONGEST = 300  # characters of a number
_UNITS = {"k": 3, "K": 3, "M": 6, "B": 9, "T": 12}
# Words before the step in names: `epoch=3-step=400`, `checkpoint-500`, `iter_0001000`, `ba2000`.
_LABELS = {
    "step": r"(?:global_?step|steps?|iter(?:ation)?s?|it|updates?|ba|batch)",
    "checkpoint": r"(?:checkpoint|ckpt)",
    "epoch": r"(?:epochs?|ep)",
}
_LABEL_ENDS = {
    label: re.compile(rf"(?<![a-z]){pattern}[=_.-]?\Z", re.IGNORECASE)
    for label, pattern in _LABELS.items()
}
_LABELLED = re.compile(rf"(?<![a-z])({'|'.join(_LABELS.values())})[=_.-]?\d", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """A number in a name.

    Attributes:
        text: as it stands in the name.
        value: with its unit, 1.25B is 1250000000; None for dates, NaN and Inf.
        role: `date`, `run` or `piece` for what counts no steps; else empty.
        label: the word for a step before it: `step`, `checkpoint`, `epoch`; else empty.
    """

    text: str
    value: Step | None
    role: str = ""
    label: str = ""


@dataclass(frozen=True)
class Name:
    """A name taken apart.

    Attributes:
        texts: what stands before, between and behind the numbers, without the suffix.
        numbers: one fewer than the texts.
        suffix: `.pth.tar`, or empty.
    """

    texts: tuple[str, ...]
    numbers: tuple[Number, ...]
    suffix: str

    def joined(self, numbers: Sequence[str]) -> str:
        """The name with other texts in the place of its numbers."""
        pairs = zip(self.texts, [*numbers, self.suffix], strict=True)
        return "".join(part for pair in pairs for part in pair)

    @property
    def pattern(self) -> tuple[str, ...]:
        """What names of one series have in common: all but steps and dates."""
        fixed = [each.text if each.role in ("run", "piece") else "#" for each in self.numbers]
        return (*self.texts, *fixed)


@lru_cache(maxsize=1 << 14)
def parse_name(name: str) -> Name:
    """Take a name apart."""
    stem = without_suffix(name)
    texts, numbers, end = [], list[Number](), 0
    for match in _PARTS.finditer(stem):
        before = stem[end : match.start()]
        texts.append(before)
        numbers.append(_number(match, before, stem))
        end = match.end()
    return Name((*texts, stem[end:]), tuple(numbers), name[len(stem) :])


def _number(match: re.Match[str], before: str, stem: str) -> Number:
    label = next((name for name, end in _LABEL_ENDS.items() if end.search(before)), "")
    is_of_run = _is_of_run(match, stem)
    if match["date"] and not (label in ("step", "epoch") and match[0].isdecimal()):
        return Number(match[0], None, "run" if is_of_run else "date")
    word = [*words_in(before)][-1:] if before[-1:].isalpha() or before[-1:] in "-_=." else []
    kind = KINDS.get(word[0]) if word else None
    behind = stem[match.end() :]
    if word == ["v"] and behind:
        kind = None  # only at the end
    if word != ["of"] and re.match(r"-of-\d", behind):
        kind = "piece"
    role = kind if kind in ("run", "piece") else "run" if is_of_run else ""
    return Number(match[0], _value(match), role or "", label)


def _is_of_run(match: re.Match[str], stem: str) -> bool:
    """Whether a number in the name of a folder counts trainings: `exp2/epoch_3`, `model_1/best`.

    No step is in the folder's name, but one or a word such as `last` is in what the folder has.
    """
    before, (behind, is_folder, below) = stem[: match.start()], stem[match.start() :].partition("/")
    return (
        bool(is_folder)
        and not _LABELLED.search(before.rpartition("/")[2] + behind)
        and (
            _LABELLED.search(below) is not None
            or any(KINDS.get(word) == "pointer" for word in words_in(below))
        )
    )


def _value(match: re.Match[str]) -> Step | None:
    if match["date"]:
        return int(match[0])
    if not match["digits"] or len(match[0]) > _LONGEST:
        return None
    unit = _UNITS[match["unit"]] if match["unit"] else 0
    sign = -1 if match[0].startswith("-") else 1
    value = sign * Fraction(match["digits"]) * 10**unit
    return int(value) if value.denominator == 1 else float(value)


def without_suffix(name: str) -> str:
    """A name without the suffix of its format."""
    _, suffix = os.path.splitext(name)  # noqa: PTH122 - a thousand names
    if is_suffix(suffix):
        name = name.removesuffix(suffix)
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def is_one_series(names: Collection[str]) -> bool:
    """Whether names differ in numbers only, and in their suffixes."""
    return len({parse_name(name).pattern for name in names}) <= 1


def common_name(names: Sequence[str]) -> str:
    """The name that alike names have in common, with `#` for the numbers that differ."""
    parsed = [parse_name(name) for name in names]
    first = parsed[0]
    columns = zip(*([number.text for number in each.numbers] for each in parsed), strict=True)
    numbers = [column[0] if len(set(column)) == 1 else "#" for column in columns]
    is_of_one_format = len({each.suffix for each in parsed}) == 1
    return first.joined(numbers) + ("" if is_of_one_format else "*")


def steps_in_names(names: Sequence[str], label: str | None = None) -> tuple[Step, ...] | None:
    """The step in each name; None if not all names have one.

    It is the number behind `step` in all names, else behind `checkpoint`, else behind `epoch`. If
    the names differ in numbers only, it is else the first whole number that differs, since a metric
    may stand before it: `net_0.91_3`. Where such a number is the same in some names and a later one
    is not, it is the later one: `checkpoint_1_500`, `checkpoint_1_1000`.

    Args:
        names: the checkpoints' names.
        label: `step` or `epoch`, to look for numbers behind this word only.
    """
    parsed = [parse_name(name) for name in names]
    constant: tuple[Step, ...] = ()
    for wanted in _LABELS if label is None else (label,):
        columns = [[n for n in each.numbers if n.label == wanted and not n.role] for each in parsed]
        if all(columns):
            steps = _as_steps([column[-1] for column in columns])
            if steps and (len(set(steps)) > 1 or len(names) == 1 or label is not None):
                return steps if label else _finer(parsed, steps) or steps
            constant = constant or steps
    if label is not None or not is_one_series(names):
        return None
    if constant:
        return _finer(parsed, constant) or constant
    numbers = zip(*(each.numbers for each in parsed), strict=True)
    differing = [
        steps
        for steps in map(_as_steps, numbers)
        if len(set(steps)) > 1 or (steps and len(names) == 1)
    ]
    chosen = next(filter(whole_steps, differing), next(iter(differing), None))
    return chosen and (_finer(parsed, chosen) or chosen)


def order_in_names(names: Sequence[str]) -> tuple[tuple[Step, ...], ...]:
    """The place of each name in the training; empty if not all names have one.

    It is the step, or the epoch and the step where steps begin anew in each epoch.
    """
    steps = steps_in_names(names) or ()
    epochs = steps_in_names(names, "epoch")
    if epochs is not None and len(set(steps)) < len(steps):
        places = tuple(zip(epochs, steps, strict=True))
        if len(set(places)) == len(places):
            return places
    return tuple((step,) for step in steps)


def _as_steps(numbers: Sequence[Number]) -> tuple[Step, ...]:
    """The values of numbers that may be steps; empty if one may not, such as -1."""
    values = (each.value for each in numbers if not each.role)
    steps = tuple(value for value in values if value is not None and value >= 0)
    return steps if len(steps) == len(numbers) else ()


def _finer(parsed: Sequence[Name], steps: tuple[Step, ...]) -> tuple[Step, ...] | None:
    """The number that tells names apart where the step is the same in some of them.

    It stands right behind another number and grows with the step, as updates do within epochs.
    """
    if len(set(steps)) == len(steps) or len({each.pattern for each in parsed}) != 1:
        return None
    columns = zip(*(each.numbers for each in parsed), strict=True)
    for before, column in zip(parsed[0].texts, columns, strict=False):
        finer = _as_steps(column) if not any(map(str.isalpha, before)) else ()
        values = [value for _, value in sorted(zip(steps, finer, strict=False))]
        is_growing = len(set(values)) == len(steps) and values == sorted(values)
        if is_growing and whole_steps(finer):
            return finer
    return None


def whole_steps(steps: Sequence[Step]) -> tuple[int, ...]:
    """Steps that are whole numbers; empty if some are fractions, which only tell an order."""
    whole = tuple(step for step in steps if isinstance(step, int))
    return whole if len(whole) == len(steps) else ()


def natural_key(text: str) -> tuple[tuple[int, Step | str], ...]:
    """A sort key with `step_100` before `step_1000` and after `step_20`, 1.25 before 1.5."""
    name = parse_name(text)
    key: list[tuple[int, Step | str]] = []
    for before, number in zip(name.texts, name.numbers, strict=False):
        key.append((1, before))
        key.append((0, number.value) if number.value is not None else (1, number.text))
    return (*key, (1, name.texts[-1]), (1, name.suffix))


def relative_names(paths: Collection[Path], *, revisions: bool = False) -> dict[Path, str]:
    """For each path the one relative to the deepest folder that all have in common.

    URLs have a common folder of their own, apart from that of the paths on this machine.

    Args:
        paths: the paths.
        revisions: keep the repository and its revision, `repo@step1000`, also if all have the same.
    """
    names: dict[Path, str] = {}
    for remote in (False, True):
        group = {path: absolute(path) for path in paths if is_remote(path) is remote}
        parents = [path.parent for path in group.values()]
        folder = os.path.commonpath(parents) if parents else ""
        if remote and revisions and "@" in folder:
            folder = folder.partition("@")[0].rpartition("/")[0]
        names |= {path: full.relative_to(folder).as_posix() for path, full in group.items()}
    return names
