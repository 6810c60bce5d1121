"""Series: candidates whose names differ in numbers only, and what each of them is."""

from __future__ import annotations

import fnmatch
import glob
import re
import shlex
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ckptavg.errors import SelectionError, listed, printable
from ckptavg.formats.words import Kind
from ckptavg.select.names import Step, common_name, natural_key, parse_name
from ckptavg.select.order import timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptavg.errors import CkptAvgError
    from ckptavg.formats.checkpoint import Checkpoint

CandidateKind = Kind | Literal["checkpoint", "copy", "excluded", "damaged"]
UNCLEAR = "in one of several series"

_MOST_SERIES = 8


@dataclass(eq=False)
class Candidate:
    """A file or folder that may be a checkpoint of the run.

    Attributes:
        path: the file or directory.
        name: its path below the folder that all candidates have in common.
        folder: the directory among the inputs that contains it; None if the user named it.
        checkpoint: None if it is not opened.
        kind: its kind, by its name and by what it records.
        reason: why it is not a member; empty for members.
        fault: the error to raise if it is chosen.
    """

    path: Path
    name: str
    folder: Path | None
    checkpoint: Checkpoint | None = None
    kind: CandidateKind = "checkpoint"
    reason: str = ""
    fault: CkptAvgError | None = None

    def leave_out(self, kind: CandidateKind, reason: str) -> None:
        """Set why it is not a member."""
        self.kind, self.reason = kind, reason

    @property
    def is_open(self) -> bool:
        """Whether it is opened and may still be a member."""
        return self.checkpoint is not None and not self.reason


@dataclass(frozen=True)
class Series:
    """Candidates of one directory whose names differ in numbers only.

    Attributes:
        candidates: in natural order; all of them are of one kind.
    """

    candidates: tuple[Candidate, ...]

    @cached_property
    def name(self) -> str:
        """The name that they have in common, with `#` for the numbers that differ."""
        return common_name([each.name for each in self.candidates])

    @property
    def kind(self) -> CandidateKind:
        """The kind of its candidates."""
        return self.candidates[0].kind

    @property
    def is_of_members(self) -> bool:
        """Whether its candidates are members, unless an error keeps the run from having any."""
        return not self.candidates[0].reason

    @property
    def is_unclear(self) -> bool:
        """Whether the user has to choose between it and others."""
        return self.candidates[0].reason == UNCLEAR

    @property
    def reasons(self) -> str:
        """Why its candidates are not members."""
        return listed(dict.fromkeys(each.reason for each in self.candidates if each.reason), 2)

    @property
    def is_numbered(self) -> bool:
        """Whether its names differ in numbers, or have one behind a word such as `epoch`."""
        numbers = parse_name(self.candidates[0].name).numbers
        counts = [each for each in numbers if each.role in ("", "date")]
        return bool(counts) and (len(self.candidates) > 1 or any(each.label for each in counts))

    @property
    def is_of_run(self) -> bool:
        """Whether its names have a number of a run, a seed or a fold."""
        return any(each.role == "run" for each in parse_name(self.candidates[0].name).numbers)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that are opened."""
        return [each.checkpoint for each in self.candidates if each.checkpoint is not None]

    @property
    def steps(self) -> tuple[Step, Step] | None:
        """The first and the last step, as recorded or in the names; None if unknown."""
        steps = timeline(self.checkpoints).steps if self.checkpoints else ()
        return (min(steps), max(steps)) if steps else None

    @property
    def glob(self) -> str:
        """A pattern that matches the names of its candidates."""
        return "*".join(map(glob.escape, self.name.split("#")))

    def arguments(self, others: Iterable[Series]) -> str:
        """The arguments that choose it among other series."""
        wrong = [each for each in others if each is not self and each.is_matched_by(self.glob)]
        excludes = [each.glob for each in wrong if not self.is_matched_by(each.glob)]
        return " ".join(
            [
                f"`include` {_quoted(self.glob)}",
                *(f"`exclude` {_quoted(each)}" for each in excludes),
            ]
        )

    def is_matched_by(self, pattern: str) -> bool:
        """Whether a pattern matches one of the names."""
        return any(matches(each.name, pattern) for each in self.candidates)

    def described(self, others: Iterable[Series]) -> str:
        """A line of an error that lists several series."""
        count = len(self.candidates)
        first, last = self.steps or (None, None)
        steps = f", step {first}" if first == last else f", steps {first} to {last}"
        steps = "" if first is None else steps
        noun = f"{self.kind}{'s' if count > 1 else ''}"
        return f"{printable(self.name)}: {count} {noun}{steps}: {self.arguments(others)}"


def _quoted(pattern: str) -> str:
    """A pattern in quotes for a shell, without control codes."""
    text = printable(pattern)
    return shlex.quote(text) if "'" in text else f"'{text}'"


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of `include` or `exclude` matches a name or its last part."""
    return any(fnmatch.fnmatchcase(each, pattern) for each in (name, name.rpartition("/")[2]))


def group(candidates: Iterable[Candidate]) -> list[Series]:
    """The series among candidates, in natural order of their names."""
    groups: defaultdict[tuple[object, ...], list[Candidate]] = defaultdict(list)
    for each in sorted(candidates, key=lambda each: natural_key(each.name)):
        name = parse_name(each.name)
        pattern = name.texts if each.kind == "piece" else name.pattern
        groups[each.folder, each.kind, each.reason == "", pattern].append(each)
    return [Series(tuple(part)) for alike in groups.values() for part in _by_run(alike)]


def _by_run(members: list[Candidate]) -> list[list[Candidate]]:
    """Members by folder and by date, unless these are the same for all or different for each."""
    for origin in (_folder, _dates):
        values = Counter(map(origin, members))
        if 1 < len(values) < len(members):
            parts = [[each for each in members if origin(each) == value] for value in values]
            return [inner for part in parts for inner in _by_run(part)]
    return [members]


def _folder(candidate: Candidate) -> str:
    return candidate.name.rpartition("/")[0]


def _dates(candidate: Candidate) -> str:
    return " ".join(n.text for n in parse_name(candidate.name).numbers if n.role == "date")


def is_last_save(series: Series, numbered: Series) -> bool:
    """Whether it is the last save of a numbered series: named like it, without a number.

    Examples: `lora.safetensors` beside `lora-000004.safetensors`, `model.pt` beside `model_5.pt`.
    """
    has_number = bool(parse_name(series.candidates[0].name).numbers)
    return not has_number and _letters(series) == _letters(numbered)


def _letters(series: Series) -> str:
    texts = parse_name(series.name.replace("#", "0")).texts
    return re.sub(r"[\W\d_]+", "", "".join(texts))


def several_series(series: Sequence[Series]) -> SelectionError:
    """The error that lists several series, each with the arguments that select it."""
    series = sorted(series, key=lambda each: each.kind != "checkpoint")
    lines = [each.described(series) for each in series[:_MOST_SERIES]]
    if len(series) > _MOST_SERIES:
        lines.append(f"and {len(series) - _MOST_SERIES} more")
    same = len({each.steps for each in series}) == 1 and series[0].steps is not None
    text = f"{len(series)} series of checkpoints{', of the same steps' if same else ''}"
    lines = [f"{text}:", *lines, "choose one of them, or name the files to average"]
    return SelectionError("\n  ".join(lines), path=series[0].candidates[0].folder)
