"""The documentation is true."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

from ckptavg.cli import cli

ROOT = Path(__file__).parent.parent


def test_the_command_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["reference"]()
    assert (ROOT / "docs" / "cli.md").read_text() == made, "run: python docs/make_cli.py"


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(f"ckptavg {name}" in readme for name in cli.commands)


def test_the_readme_names_no_extra_that_is_not_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    assert {"demo", "test", "dev"} == set(project["optional-dependencies"])
    assert ".[demo]" in readme
    assert ".[test]" in readme
