"""The documentation is true."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import ckptavg
from ckptavg import formats
from ckptavg.cli import cli
from ckptavg.errors import FormatError
from ckptavg.formats import files, safetensors, torchlegacy, torchzip
from ckptavg.select import candidates, names

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
    developers = {"layouts", "timm", "dev"}
    # docs/reliability.md, docs/study/README.md, docs/recipes/huggingface-hub.md
    others = {"fuzz", "study", "hf"}
    assert set(project["optional-dependencies"]) == users | developers | others
    assert all(f"[{extra}]" in readme for extra in users)
    assert all(f"[{extra}]" in contributing for extra in developers)


@pytest.fixture
def npz(tmp_path, monkeypatch):
    """The format of `docs/adding-a-format.md`, added as it says there."""
    page = (ROOT / "docs" / "adding-a-format.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) < 60
    path = tmp_path / "npz.py"
    path.write_text(code)
    spec = util.spec_from_file_location("npz", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "npz", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(files, "FILES", (safetensors, module, torchzip, torchlegacy))
    for each in (candidates, names):
        monkeypatch.setattr(each, "SUFFIXES", (*formats.SUFFIXES, *module.SUFFIXES))
    return module


def test_the_format_that_the_documentation_adds_works(tmp_path, npz):
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


def test_and_refuses_what_it_cannot_read(tmp_path, npz):
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
