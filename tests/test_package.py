"""What comes with the package."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import ckptavg

ROOT = Path(__file__).parent.parent


def test_the_version_stands_in_one_place():
    assert metadata.version("ckptavg") == ckptavg.__version__
    assert ckptavg.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {ckptavg.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_types_are_announced():
    assert resources.files("ckptavg").joinpath("py.typed").is_file()


def test_the_public_names_are_there():
    assert callable(ckptavg.average)
    assert callable(ckptavg.refresh_norm)
    assert issubclass(ckptavg.CkptAvgError, Exception)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ckptavg.nonsense


def test_without_torch_what_needs_it_says_so(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import ckptavg, pydoc\n"
        "print([name for name in ckptavg.__all__ if not hasattr(ckptavg, name)])\n"
        "assert 'Average the checkpoints' in pydoc.render_doc(ckptavg)\n"
        "try: ckptavg.refresh_norm\n"
        "except AttributeError as error: print(error)\n"
        "from ckptavg.cli import main\n"
        "sys.argv[1:] = ['bn-refresh', 'x.pt', '-o', 'y.pt', '--model', 'a:b', '--loader', 'a:b']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == (
        "ckptavg: error: this runs a model, and torch is not installed; pip install torch\n"
    )
    lacking, message = done.stdout.splitlines()
    assert lacking == "['evaluate', 'refresh_checkpoint', 'refresh_norm', 'soup', 'sweep']"
    assert message == (
        "ckptavg.refresh_norm runs a model, and torch is not installed: pip install torch"
    )


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {name.split(">=")[0].split("[")[0].strip().lower().replace("_", "-") for name in wanted}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for constraints in ("constraints.txt", "constraints-timm.txt")
        for line in (ROOT / constraints).read_text().splitlines()
        if "==" in line
    }
    assert names - {"ckptavg"} <= pinned
