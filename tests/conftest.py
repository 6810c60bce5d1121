"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Modules and tests are here to stay: the garbage collector would go through them again and again.
gc.disable()


def pytest_collection_finish() -> None:
    """Have the garbage collector look after what comes from now on."""
    gc.freeze()
    gc.enable()


# Torch's threads wait for each other by spinning, which takes longer than the tests' small work.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test draws the same random numbers, whatever ran before it."""
    import torch  # not before the number of its threads is set

    # `torch.manual_seed` would note a traceback for each kind of device that is not there.
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_of_a_library() -> Iterator[None]:
    """The package's log as a library has it, whatever a command has made of it before."""
    log = logging.getLogger("ckptavg")
    log.propagate, log.handlers = True, []
    log.setLevel(logging.NOTSET)
    yield
    log.propagate, log.handlers = True, []
    log.setLevel(logging.NOTSET)


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The notices and warnings of the package."""
    caplog.set_level(logging.INFO, logger="ckptavg")
    return caplog


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the disk."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each call of `os.preadv` returns."""
    counts, original = [], os.preadv

    def preadv(*arguments: Any) -> int:
        counts.append(original(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    return counts


@pytest.fixture(autouse=True)
def _user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what a test has imported from temporary folders: another `train` may follow."""
    before = set(sys.modules)
    yield
    root = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(root):
            del sys.modules[name]


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory on the import path."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # tests compare what is in it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def train(user_folder: Path, notices: object, no_fsync: None) -> Any:
    """A user's module, `train.py` in the working directory: models, batches and metrics."""
    from tests.held_out import TRAIN

    (user_folder / "train.py").write_text(TRAIN)
    return importlib.import_module("train")


@pytest.fixture
def recipe(user_folder: Path) -> Callable[[str], tuple[Any, Any]]:
    """Runs a recipe of the documentation; returns its module and the metrics that it printed."""
    from tests.recipes import run_recipe

    def play(name: str) -> tuple[Any, Any]:
        printed = run_recipe(name, user_folder)
        return importlib.import_module(name), printed

    return play


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package of one module, which reads the formats of its entry points."""
    from ckptavg.formats import plugins

    def install(package: str, code: str, entry_points: dict[str, str]) -> None:
        folder, module = tmp_path / "installed", package.replace("-", "_")
        record = folder / f"{module}-0.1.dist-info"
        record.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        lines = [f"{name} = {place}\n" for name, place in entry_points.items()]
        (record / "entry_points.txt").write_text("".join(["[ckptavg.formats]\n", *lines]))
        monkeypatch.syspath_prepend(folder)
        plugins._all_entry_points.cache_clear()

    yield install
    plugins._all_entry_points.cache_clear()
