"""The tutorial and the README's plain run: their script, their commands, and what they print."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

from tests.console import ROOT, console_blocks, play

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```(python|python test|console)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the tutorial's script and the checkpoints that it saves."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "train.py").write_text(BLOCKS[0][1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path("train.py", run_name="__main__")
    return folder


@pytest.fixture
def here(trained, user_folder, no_fsync):
    """A copy of it as the working directory."""
    shutil.copytree(trained, user_folder, dirs_exist_ok=True)


def test_the_tutorial(here):
    metrics = []
    for language, block in BLOCKS[1:]:
        if language == "python test":
            exec(block, {})  # noqa: S102 - the page's own code
            continue
        for printed in play(block):
            metrics += re.findall(
                r"^swa\S+ +15 to 30 +([\d.]+)[ *]+([\d.]+)", printed, re.MULTILINE
            )
    stale, refreshed = ([float(value) for value in row] for row in metrics)
    assert refreshed[0] < stale[0]
    assert refreshed[1] > stale[1]


def test_the_plain_run_of_the_readme(here):
    plain = console_blocks("README.md")[0]
    assert len(list(play(plain))) == plain.count("$ ckptavg") == 3
    assert Path("swa.safetensors").is_file()
