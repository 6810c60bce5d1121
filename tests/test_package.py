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


def test_the_public_names_are_listed_before_they_are_used():
    code = "import ckptavg; print(*dir(ckptavg))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ckptavg.__all__


@pytest.mark.parametrize(
    ("torch", "error"),
    [
        (None, ""),
        (
            "raise ImportError('undefined symbol: \x1b[31m')",
            r"ImportError: undefined symbol: \x1b[31m",
        ),
        ("import absent", "ModuleNotFoundError: No module named 'absent'"),
        ("raise OSError('cannot open libcudart.so.12')", "OSError: cannot open libcudart.so.12"),
        ("torch.version", "NameError: name 'torch' is not defined"),
    ],
    ids=["none", "of another build", "without what it needs", "without a library", "cut off"],
)
def test_without_torch_what_needs_it_says_so(tmp_path, torch, error):
    problem = f"torch cannot be imported ({error}); install it again"
    if torch is None:
        problem = "torch is not installed; pip install torch"
    lines = [
        "import sys, ckptavg, pydoc",
        f"sys.path.insert(0, {str(tmp_path)!r})",
        "print([name for name in dir(ckptavg) if not hasattr(ckptavg, name)])",
        "assert 'Average the checkpoints' in pydoc.render_doc(ckptavg)",
        "try: ckptavg.refresh_norm",
        "except AttributeError as error: print(ascii(str(error)))",
        "from ckptavg.cli import main",
        f"sys.argv[1:] = ['bn-refresh', {str(tmp_path / 'x.pt')!r}, '-o', 'y.pt']",
        "sys.argv += ['--model', 'a:b', '--loader', 'a:b']",
        "main()",
    ]
    if torch is None:
        lines.insert(1, "sys.modules['torch'] = None")
    else:
        (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "x.pt").touch()
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == f"ckptavg: error: this runs a model, and {problem}\n"
    lacking, message = done.stdout.splitlines()
    assert lacking == "['evaluate', 'refresh_checkpoint', 'refresh_norm', 'soup', 'sweep']"
    assert f"ckptavg.refresh_norm runs a model, and {problem}" in message.replace("\\\\", "\\")


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
