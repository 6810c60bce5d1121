"""The page on which files are averaged is true: its table of words, and each of its messages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from ckptavg.formats.words import WORDS
from tests.helpers import run

PAGE = (Path(__file__).parents[2] / "docs" / "members.md").read_text()
EXAMPLES = re.findall(r"```console\n\$ ls run/\n(.*?)\n\$ (.*?)```", PAGE, re.DOTALL)


def test_every_word_is_in_the_table():
    rows = re.findall(r"^\| `(\S+)` \| (.*?) \| (.*?) \| `(\S+)` \|$", PAGE, re.MULTILINE)
    assert rows == [(each.word, each.kind, each.meaning, each.example) for each in WORDS]


def make(names: str) -> None:
    """The files of a directory; of a link stands where it leads."""
    Path("run").mkdir()
    for value, name in enumerate(names.split("  ")):
        link, _, target = name.partition(" -> ")
        if target:
            Path("run", link).symlink_to(target)
        elif "optim" in name:
            torch.save({"state": {}, "param_groups": []}, Path("run", name))
        else:
            torch.save({"w": torch.full((2,), float(value))}, Path("run", name))


@pytest.mark.parametrize(("names", "transcript"), EXAMPLES)
def test_every_message_is_what_the_command_prints(tmp_path, monkeypatch, names, transcript):
    monkeypatch.chdir(tmp_path)
    make(names)
    for part in transcript.split("\n$ "):
        command, _, expected = part.strip().partition("\n")
        arguments = shlex.split(command)[1:]
        code = 1 if "error: " in expected else 0
        result = run(*arguments, code=code)
        printed = result.output if code == 0 else f"ckptavg: error: {result.exception}"
        printed = re.sub(r"`([a-z]+)`", r"--\1", printed)
        for line in expected.splitlines():
            assert line.strip() in printed, printed


def test_there_is_one_of_each_rule():
    assert len(EXAMPLES) >= 6
