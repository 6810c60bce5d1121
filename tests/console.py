"""Run the console blocks of the documentation, and compare what the commands print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import run

ROOT = Path(__file__).parents[1]
_DECIMAL = re.compile(r"\d+\.\d+|(?<=factor of )\d+")  # a factor may be printed as 2


def console_blocks(page: str) -> list[str]:
    """The console blocks of a page, by its path from the root of the repository."""
    text = (ROOT / page).read_text()
    return re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def play(block: str) -> Iterator[str]:
    """Run the commands of a block, and give what each prints, stderr included."""
    for part in block.replace("\\\n", " ").split("$ ckptavg ")[1:]:
        command, _, expected = part.strip().partition("\n")
        printed = run(*shlex.split(command)).output
        assert_alike(printed, expected)
        yield printed


def assert_alike(printed: str, expected: str) -> None:
    """The expected lines are printed in their order; without `...` among them, no others are.

    Figures that depend on the processor may differ a little, and may come from another layer.
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
    """A line without what depends on the processor, or on the length of a path in a checkpoint."""
    line = re.sub(r"\bin [\w.]*\d[\w.]*(?=, |$)", "in LAYER", line)
    line = re.sub(r"factor of [\d.]+", "factor of F", line)
    line = re.sub(r"\([\d.]+ kB\)", "(SIZE)", line)
    line = re.sub(r"(?<=[ 0])0\.\d{3,}(?= |$)|0\.0\d+", "FIGURE", line)
    line = " ".join(line.replace("*", "").split())
    return re.sub(r"(?:[\d.]+|FIGURE) (?:[\d.]+|FIGURE)$", "LOSS ACCURACY", line)
