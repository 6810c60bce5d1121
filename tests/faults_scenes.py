"""The runs to which faults happen: a command, its inputs, and what its output may be afterwards."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.faults import CHANGES, Fault, Outcome, Run, Server, build, tree
from tests.helpers import all_but_slow

Tree = dict[str, bytes | None]

LITTER = re.compile(r"\.ckptavg-[0-9a-f]{8}\.(tmp|old)")


def every_or_one_of(some: int) -> pytest.MarkDecorator:
    """Try every instant, which takes minutes, or by default only one of so many."""
    slow = pytest.param(1, id="every", marks=pytest.mark.slow)
    return pytest.mark.parametrize("every", [slow, pytest.param(some, id="some")])


EVERY_OR_SOME = every_or_one_of(29)

TRAIN = """
import torch
from torch import nn


def make_model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def train_loader():
    made = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, generator=made) for _ in range(2)]
"""
REFRESH = ("--model", "train.py:make_model", "--loader", "train.py:train_loader")


@functools.cache
def library() -> Path:
    """What is preloaded."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return build(folder)


def server(*, torch: bool = False, number: int = 0) -> Server:
    """A warm process, started when it is first needed."""
    return _server(torch, number)


@functools.cache
def _server(torch: bool, number: int) -> Server:  # noqa: FBT001 - the cache's key
    made = Server(library(), torch=torch)
    atexit.register(made.close)
    return made


def state(step: int) -> dict[str, torch.Tensor]:
    """Weights of the model in `TRAIN`."""
    value = float(step)
    return {
        "0.weight": torch.full((4, 3), value) + torch.arange(3),
        "0.bias": torch.full((4,), value),
        "1.weight": torch.ones(4),
        "1.bias": torch.zeros(4),
        "1.running_mean": torch.full((4,), value),
        "1.running_var": torch.ones(4),
        "1.num_batches_tracked": torch.tensor(step),
    }


def files(root: Path) -> None:
    """Three checkpoints, a file each, and the user's code."""
    (root / "run").mkdir(parents=True)
    (root / "train.py").write_text(TRAIN)
    for step in range(3):
        save_file(state(step), root / "run" / f"step_{step}.safetensors", {"format": "pt"})


def folders(root: Path) -> None:
    """Three checkpoints, a directory each, and the user's code."""
    (root / "run").mkdir(parents=True)
    (root / "train.py").write_text(TRAIN)
    for step in range(3):
        folder = root / "run" / f"checkpoint-{step}"
        folder.mkdir()
        save_file(state(step), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")


def torch_files(root: Path) -> None:
    """Three training checkpoints."""
    (root / "run").mkdir(parents=True)
    for step in range(3):
        content = {"state_dict": state(step), "optimizer": {"lr": 0.5}, "global_step": step}
        torch.save(content, root / "run" / f"step_{step}.ckpt")


def with_output(make: Callable[[Path], None], *arguments: str) -> Callable[[Path], None]:
    """Inputs, and beside them what an earlier run has made."""

    def prepare(root: Path) -> None:
        make(root)
        done = server().run(root, ("average", "run", *arguments, "-q"))
        assert done.code == 0, done.err

    return prepare


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A run.

    Attributes:
        prepare: fills its directory.
        arguments: the command.
        output: what it makes, by its name in the directory.
        torch: it runs a model.
        refused: what the file system cannot do.
        several: the output is a directory of outputs, each of which is whole or not there.
    """

    prepare: Callable[[Path], None]
    arguments: Sequence[str]
    output: str
    torch: bool = False
    refused: Sequence[str] = ()
    several: bool = False


def _average(*arguments: str) -> tuple[str, ...]:
    # One thread: the n-th call is then the same one every time.
    return ("average", "run", "-q", "-j", "1", *arguments)


_SHARDS = ("-o", "out/", "--max-shard-size", "70")
_DCP = (*_SHARDS, "--format", "dcp")
_BASE = {
    "a new file": Scene(
        prepare=files, arguments=_average("-o", "out.safetensors"), output="out.safetensors"
    ),
    "a file over an old one": Scene(
        prepare=with_output(files, "-o", "out.safetensors", "--last", "2"),
        arguments=_average("-o", "out.safetensors", "--force"),
        output="out.safetensors",
    ),
    "a training checkpoint": Scene(
        prepare=torch_files,
        arguments=_average("-o", "out.ckpt", "--container", "last"),
        output="out.ckpt",
    ),
    "a new file with digests": Scene(
        prepare=files,
        arguments=_average("-o", "out.safetensors", "--hash"),
        output="out.safetensors",
    ),
    "several new files": Scene(
        prepare=files, arguments=_average("-o", "out", "--last", "2,3"), output="out", several=True
    ),
    "a new directory": Scene(prepare=folders, arguments=_average(*_SHARDS), output="out"),
    "a directory over an old one": Scene(
        prepare=with_output(folders, *_SHARDS, "--last", "2"),
        arguments=_average(*_SHARDS, "--force"),
        output="out",
    ),
    "a sharded checkpoint over an old one": Scene(
        prepare=with_output(folders, *_DCP, "--last", "2"),
        arguments=_average(*_DCP, "--force"),
        output="out",
    ),
    "a file refreshed in place": Scene(
        prepare=with_output(files, "-o", "out.safetensors"),
        arguments=("bn-refresh", "out.safetensors", "-q", *REFRESH),
        output="out.safetensors",
        torch=True,
    ),
    "a directory refreshed in place": Scene(
        prepare=with_output(folders, "-o", "out/"),
        arguments=("bn-refresh", "out", "-q", *REFRESH),
        output="out",
        torch=True,
    ),
    "an average with a refresh": Scene(
        prepare=with_output(files, "-o", "out.safetensors", "--last", "2"),
        arguments=_average("-o", "out.safetensors", "--force", *REFRESH),
        output="out.safetensors",
        torch=True,
    ),
}


def _on(kind: str, scene: Scene) -> Scene:
    return dataclasses.replace(scene, refused=(kind,))


SCENES = _BASE | {
    f"{name}, no {kind}": _on(kind, _BASE[name])
    for name, kind in (
        ("a new file", "link"),
        ("a training checkpoint", "link"),
        ("a directory over an old one", "exchange"),
        ("a directory refreshed in place", "exchange"),
    )
}
ALIKE = (
    "a new file with digests",
    "a training checkpoint, no link",
    "a directory refreshed in place",
    "a sharded checkpoint over an old one",
    "a directory refreshed in place, no exchange",
)
"""Scenes that write and publish as others do together."""


class Stage:
    """A scene, ready to be played any number of times.

    Attributes:
        scene: the scene.
        old: the output before the run.
        new: the output of a good run.
        calls: the calls that a good run makes.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.scene = scene = SCENES[name]
        self._folder, self._template, self._runs = folder, folder / "template", 0
        scene.prepare(self._template)
        self.old = self.output(self._template)
        self._others = self._all_but_output(self._template)
        root, done = self.play(Fault())
        assert done.code == 0, done.err
        assert self.left_in(root) == []
        self.new, self.calls = self.output(root), done.calls
        assert self.new not in (None, self.old)
        self.clear(root)

    def set(self) -> Path:
        """A directory in which the scene has yet to be played."""
        self._runs += 1
        root = self._folder / str(self._runs)
        shutil.copytree(self._template, root, symlinks=True)
        return root

    def play(
        self, fault: Fault, root: Path | None = None, more: Sequence[str] = ()
    ) -> tuple[Path, Outcome]:
        """Run the command with a fault, and more arguments; returns where, and how it ended."""
        root = root or self.set()
        return root, self.begin(fault, root, more=more).to_end()

    def begin(self, fault: Fault, root: Path, *, more: Sequence[str] = (), number: int = 0) -> Run:
        """A run that is about to start, and may be held; those of two numbers can be at once."""
        fault = dataclasses.replace(fault, refused=self.scene.refused)
        warm = server(torch=self.scene.torch, number=number)
        return Run(warm, root, (*self.scene.arguments, *more), fault)

    def count(self, kinds: Sequence[str] = CHANGES) -> int:
        """How many calls of these kinds a good run makes."""
        return sum(call.kind in kinds for call in self.calls)

    def instants(self, every: int, kinds: Sequence[str] = CHANGES) -> list[int]:
        """Numbers of calls, each so-manieth: those that give names are always among them."""
        calls = [call for call in self.calls if call.kind in kinds]
        if every > 1 and self.scene.torch:
            every *= 3  # these take five times as long
        return [
            number
            for number, call in enumerate(calls, 1)
            if number % every == 1 % every
            or (call.kind in ("link", "rename") and not LITTER.match(Path(call.path).parent.name))
        ]

    def output(self, root: Path) -> Tree | None:
        """What is where the output goes."""
        found = tree(root / self.scene.output)
        if found is None or not self.scene.several:
            return found
        return {name: data for name, data in found.items() if not LITTER.fullmatch(name)} or None

    def is_whole(self, found: Tree | None) -> bool:
        """Whether an output is the old one or the new one, and all of it."""
        if self.scene.several:
            assert self.new is not None
            return (found or {}).items() <= self.new.items()
        return found in (self.old, self.new)

    def check_inputs(self, root: Path) -> None:
        """See that all that is not the output is as it was."""
        assert self._all_but_output(root) == self._others, "an input is not as it was"

    def left_in(self, root: Path) -> list[str]:
        """The temporary names that a run has left, and whatever else was not there."""
        known = {*os.listdir(self._template), self.scene.output}
        beside = [name for name in os.listdir(root) if name not in known]
        within = [name for name in tree(root / self.scene.output) or () if LITTER.match(name)]
        return beside + within

    def clear(self, root: Path) -> None:
        """Take a directory away that was played in."""
        shutil.rmtree(root)

    def _all_but_output(self, root: Path) -> Tree:
        return {
            name: content
            for name, content in (tree(root) or {}).items()
            if not LITTER.match(name.split("/")[0]) and name.split("/")[0] != self.scene.output
        }


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A directory of which thousands of copies are soon made and taken away again."""
    memory = Path("/dev/shm")  # noqa: S108 - a directory within it
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def stages() -> Any:
    """A fixture: each scene in turn, made once for all tests of a module."""

    @pytest.fixture(params=all_but_slow(SCENES, ALIKE), scope="module", name="stage")
    def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
        with folder_in_memory() as folder:
            yield Stage(request.param, folder)

    return stage
