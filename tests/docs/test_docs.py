"""The documentation is true."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import ckptavg
from ckptavg import formats
from ckptavg.cli import cli
from ckptavg.errors import FormatError

ROOT = Path(__file__).parents[2]


def test_the_command_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["reference"]()
    assert (ROOT / "docs" / "cli.md").read_text() == made, "run: python docs/make_cli.py"


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(f"ckptavg {name}" in readme for name in cli.commands)


def test_every_option_of_a_layout_is_in_the_page_on_formats():
    page = (ROOT / "docs" / "formats.md").read_text()
    for option in ("--container last", "--max-shard-size", "--lora exact", "--key"):
        assert option in page


def test_the_extras_are_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme, contributing = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    users = {"demo", "plots", "s3", "gcs", "test"}
    developers = {"layouts", "timm", "dev", "docs"}
    # docs/reliability.md, docs/study/README.md, docs/recipes/huggingface-hub.md
    others = {"fuzz", "study", "hf"}
    assert set(project["optional-dependencies"]) == users | developers | others
    assert all(f"[{extra}]" in readme for extra in users)
    assert all(f"[{extra}]" in contributing for extra in developers)


@pytest.fixture
def npz(install):
    """The package of `docs/adding-a-format.md`, installed."""
    page = (ROOT / "docs" / "adding-a-format.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [project] = map(tomllib.loads, re.findall(r"```toml\n(.*?)```", page, re.DOTALL))
    assert len(code.splitlines()) < 60
    project = project["project"]
    install(project["name"], code, project["entry-points"]["ckptavg.formats"])


def test_the_format_that_the_documentation_adds_works(npz, tmp_path):
    made = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"w": (300, 40), "b": (3,), "s": (), "e": (0, 2)}
    states = [
        {name: made.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    (tmp_path / "run").mkdir()
    for step, state in enumerate(states):
        np.savez(tmp_path / "run" / f"step_{step}.npz", **state)  # type: ignore[arg-type]
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for name in shapes:
        first, second, third = (state[name].astype(np.float64) for state in states)
        expected = ((first + second + third) / 3).astype(np.float32)
        np.testing.assert_array_equal(found[name], expected)


def test_and_refuses_what_it_cannot_read(npz, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", w=np.ones(3))
    with pytest.raises(FormatError, match=r"x\.npz: w: is compressed"):
        formats.open_checkpoint(tmp_path / "x.npz")


def test_every_file_that_a_page_names_is_there():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/*.md")]
    files = [str(path) for folder in ("ckptavg", "tests") for path in (ROOT / folder).rglob("*.py")]
    for page in pages:
        for path in re.findall(r"`((?:[\w/]+/|test_)\w+\.py)`", page.read_text()):
            assert any(file.endswith(f"/{path}") for file in files), f"{page.name}: {path}"


def test_the_page_on_the_architecture_names_what_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for folder in re.findall(r"`(\w+/)`", page):
        assert (ROOT / "ckptavg" / folder).is_dir(), folder
    functions = re.findall(r"`([\w/]+\.py)`\*{0,2}: `(?:\w+\.)?(\w+)`", page)
    classes = re.findall(r"^\| `(\w+)` \| `([\w/]+\.py)` \|", page, re.MULTILINE)
    for path, name in [*functions, *(reversed(each) for each in classes)]:
        code = (ROOT / "ckptavg" / path).read_text()
        assert re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE), f"{path}: {name}"
    assert min(len(functions), len(classes)) > 10


def test_bash_completes_by_the_documented_line():
    page = (ROOT / "docs" / "cli.md").read_text()
    [line] = re.findall(r"^(eval .*bash_source .*?\)\") ", page, re.MULTILINE)
    ask = "COMP_WORDS=(ckptavg bn-refresh --est); COMP_CWORD=2; _ckptavg_completion ckptavg"
    script = f"{line}\n{ask}\necho ${{COMPREPLY[@]}}"
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": scripts},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "--estimator\n"


def test_every_link_leads_to_a_file():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")]:
        targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
        missing = [target for target in targets if not (page.parent / target).exists()]
        assert missing == [], page.name
