"""Averages with an altered provenance: each command says what they are, or what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.formats import open_checkpoint
from tests.helpers import outcome, save_dcp

pytestmark = pytest.mark.usefixtures("no_fsync")

NAN, INF = float("nan"), float("inf")
RED = "\x1b[31m\u202e\0"
DEEP: list[Any] = []
for _ in range(400):
    DEEP = [DEEP]
OF_ALL: dict[str, list[Any]] = {
    "version": [RED, [1], None],
    "scheme": [[1], {"a": 1}, RED, None],
    "divisor": [NAN, INF, "2", 0, True, None, 10**400, 5e-324],
    "sources": [{}, [1], "x", [], None, [[]] * 1000, DEEP],
    "options": [[1], {"skip": 5}, {"skip": [5]}, {"dtype": [1]}, {"take_last": {}}, {"x": 1}],
    "norm_stats": [
        *("x", [], NAN, {"state": RED}, {"state": 5}, {"state": []}, {"state": None}),
        *({"state": "stale", "frozen": 3}, {"stale": [[]]}),
    ],
    "roles": [5, {"averaged": RED}, DEEP],
    "selection": [5],
    "key": [[[]], {}, "x" * 100_000, 5, [RED], []],
    "sweep": [5, {"metric": RED, "rows": [{"kind": "average"}]}],
}
OF_A_MEMBER: dict[str, list[Any]] = {
    "step": [[], ["epoch"], ["epoch", None], ["epoch", NAN], ["epoch", INF], ["epoch", [1]], "x"],
    "bytes": [INF, -1, True, "1", None, 10**400],
    "weight": [INF, "1", 0, None, 1.7e308, -1.7e308, 10**300],
    "content": [5],
    "sha256": [{str(n): "x" for n in range(2_000)}, 5, {RED: "x"}],
    "key": [5, RED, [{}], 10**400],
    "name": [5, RED, "../../etc/passwd", "", "/", "x/" * 10_000],
    "header_sha256": [5],
}
OF_THE_TEXT = {
    "nothing": "",
    "no end": "{",
    "100,000 levels": "[" * 100_000,
    "5,000 digits": '{"version":%s}' % ("9" * 5_000),
    "too large a number": '{"sources":[{"step":["epoch",1e400]}]}',
    "a key twice": '{"version":1,"version":2}',
    "a million members": '{"sources":[%s{}]}' % ("{}," * 999_999),
    "10 MB": '{"version":"%s"}' % ("x" * 10_000_000),
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "safetensors": ("swa.safetensors", {}),
    "torch": ("swa.pt", {}),
    "container": ("last.pt", {"container": "last", "hash": True}),
    "dcp": ("swa_dcp/", {"format": "dcp"}),
    "huggingface": ("swa/", {"max_shard_size": 100}),
}
USER = """
import torch
model = torch.nn.Sequential()
model.bn = torch.nn.BatchNorm1d(4)
loader = [torch.randn(3, 4)]
"""
SPECS = ("--model", "user.py:model", "--loader", "user.py:loader")
COMMANDS = {
    "inspect": ("inspect", "SWA"),
    "inspect --json": ("inspect", "SWA", "--json"),
    "verify": ("verify", "SWA", "run"),
    "average": ("average", "SWA", "new.pt", "-o", "o.pt", "-f"),
    "average --update": ("average", "SWA", "new.pt", "-o", "o.pt", "-f", "--update"),
    "convert": ("convert", "SWA", "-o", "o.pt", "-f"),
    "bn-refresh": ("bn-refresh", "SWA", "-o", "OUT", "-f", *SPECS),
}
Alter = Callable[[Callable[[str], str]], str]


def in_safetensors(path: Path, change: Callable[[str], str]) -> None:
    metadata = dict(open_checkpoint(path).metadata)
    metadata["ckptavg"] = change(metadata["ckptavg"])
    save_file(load_file(path), path, metadata)


def in_zip(path: Path, change: Callable[[str], str]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in records if name.endswith("/ckptavg")]
    records[name] = change(records[name].decode()).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in records.items():
            archive.writestr(each, content)


def in_directory(path: Path, change: Callable[[str], str]) -> None:
    if (path / ".metadata").exists():
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.ckptavg = change(metadata.ckptavg)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    for shard in path.glob("*.safetensors"):
        in_safetensors(shard, change)


@pytest.fixture(scope="module")
def averages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, an average of it in each layout, and a checkpoint to add."""
    folder = tmp_path_factory.mktemp("altered")
    (folder / "user.py").write_text(USER)
    norm = torch.nn.Sequential()
    norm.bn = torch.nn.BatchNorm1d(4)
    for name in ("run", "run_of_directories"):
        (folder / name).mkdir()
    for epoch in range(3):
        norm(torch.randn(3, 4))
        torch.save({"model": norm.state_dict(), "epoch": epoch}, folder / "run" / f"{epoch}.pt")
        save_dcp(norm.state_dict(), folder / "run_of_directories" / f"epoch_{epoch}")
    torch.save(norm.state_dict(), folder / "new.pt")
    for name, options in LAYOUTS.values():
        run = "run_of_directories" if name.endswith("/") else "run"
        ckptavg.average(folder / run, f"{folder}/{name}", fsync=False, **options)
    return folder


@pytest.fixture
def alter(averages: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> Alter:
    """Makes a copy of an average whose provenance is another text, and returns its name."""
    monkeypatch.chdir(averages)
    source = Path(LAYOUTS[layout][0])

    def alter(change: Callable[[str], str]) -> str:
        copy = source.with_stem("altered")
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
            in_directory(copy, change)
        else:
            shutil.copy(source, copy)
            (in_safetensors if layout == "safetensors" else in_zip)(copy, change)
        return str(copy)

    return alter


def try_all(altered: str, commands: Any = COMMANDS) -> None:
    """Each command ends in a result or in an error of printable lines."""
    out = "o" + Path(altered).suffix
    for name in commands:
        words = [{"SWA": altered, "OUT": out}.get(word, word) for word in COMMANDS[name]]
        if Path(altered).is_dir():
            words = [{"run": "run_of_directories"}.get(word, word) for word in words]
        code, told, said = outcome(*words)
        assert code in (0, 1), (name, said)
        assert "Traceback" not in said, (name, said)
        assert all(line.isprintable() for line in [*told.split("\n"), *said.split("\n")]), name
        assert len(said) < 5_000, name
        if name == "inspect --json" and not code:
            json.loads(told, parse_constant=pytest.fail)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("place", "name"),
    [*(("all", name) for name in OF_ALL), *(("member", name) for name in OF_A_MEMBER)],
)
def test_is_no_bug_of_ours_and_prints_no_control_codes(alter, layout, place, name):
    """Every value in one layout with every command; some of both in the others."""
    values = OF_ALL[name] if place == "all" else OF_A_MEMBER[name]
    for number, value in enumerate(values):

        def change(text: str, value: object = value) -> str:
            entry = json.loads(text)
            for each in [entry] if place == "all" else entry["sources"]:
                each[name] = value
            return json.dumps(entry)

        if layout == "safetensors":
            try_all(alter(change))
        elif number % len(LAYOUTS) == [*LAYOUTS].index(layout) % len(values):
            try_all(alter(change), list(COMMANDS)[number % 2 :: 2])


@pytest.mark.parametrize("layout", ["safetensors", "dcp"])
@pytest.mark.parametrize("kind", OF_THE_TEXT)
def test_nor_does_another_text(alter, layout, kind):
    try_all(alter(lambda _: OF_THE_TEXT[kind]))
