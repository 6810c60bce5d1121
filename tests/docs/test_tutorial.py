"""The tutorial is run: its script, its commands, and what they print."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from tests.helpers import run

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```(python|python test|console)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
_DECIMAL = re.compile(r"\d+\.\d+|(?<=factor of )\d+")  # a factor may be printed as 2


def test_the_tutorial(user_folder, no_fsync):
    first, *others = BLOCKS
    assert first[0] == "python"
    Path("train.py").write_text(first[1])
    runpy.run_path("train.py", run_name="__main__")
    metrics = []
    for language, block in others:
        if language == "python test":
            exec(block, {})  # noqa: S102 - the page's own code
            continue
        for part in block.replace("\\\n", " ").split("$ ckptavg ")[1:]:
            command, _, expected = part.strip().partition("\n")
            printed = run(*shlex.split(command)).stdout
            assert_alike(printed, expected)
            metrics += re.findall(r"^swa\S+ +- +([\d.]+)[ *]+([\d.]+)", printed, re.MULTILINE)
    stale, refreshed = ([float(value) for value in row] for row in metrics)
    assert refreshed[0] < stale[0]
    assert refreshed[1] > stale[1]


def assert_alike(printed: str, expected: str) -> None:
    """The lines of the page are printed, in their order, all of them where none is `...`.

    Figures that depend on the processor may be a little different ones, in another layer.
    """
    lines = [line for line in map(_words, printed.splitlines()) if line]
    wanted = [line for line in expected.splitlines() if line.strip()]
    if "..." not in wanted:
        assert len(lines) == len(wanted), printed
    place = 0
    for line in wanted:
        if line == "...":
            continue
        assert _words(line) in lines[place:], f"{line}\nis not in\n{printed}"
        place = lines.index(_words(line), place) + 1
    figures, others = (list(map(float, _DECIMAL.findall(text))) for text in (expected, printed))
    if "..." not in wanted:
        assert figures == pytest.approx(others, rel=0.5, abs=0.06)


def _words(line: str) -> str:
    """A line without what depends on the processor."""
    line = re.sub(r"\bin \d+(?=, |$)", "in LAYER", line)
    line = re.sub(r"factor of [\d.]+", "factor of F", line)
    line = re.sub(r"(?<=[ 0])0\.\d{3,}(?= |$)|0\.0\d+", "FIGURE", line)
    return " ".join(line.replace("*", "").split())
