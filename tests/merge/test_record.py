"""Averages with an altered provenance: each command says what they are, or what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptavg
from tests.helpers import outcome

pytestmark = pytest.mark.usefixtures("no_fsync")

NAN, INF = float("nan"), float("inf")
OF_ALL: dict[str, list[Any]] = {
    "version": ["\x1b[31m", [1], None],
    "scheme": [[1], {"a": 1}, "\u202e", None],
    "divisor": [NAN, INF, "2", 0, True, None],
    "sources": [{}, [1], "x", [], None],
    "options": [[1], {"skip": 5}, {"skip": [5]}, {"dtype": [1]}, {"take_last": {}}, {"x": 1}],
    "norm_stats": ["x", {"state": "\x1b[31m"}, {"state": 5}, {"state": "stale", "frozen": 3}],
    "roles": [5, {"averaged": "\x1b[31m"}],
    "selection": [5],
}
OF_A_MEMBER: dict[str, list[Any]] = {
    "step": [[], ["epoch"], ["epoch", None], ["epoch", NAN], ["epoch", INF], ["epoch", [1]], "x"],
    "bytes": [INF, -1, True, "1", None],
    "weight": [INF, "1", 0, None],
    "content": [5],
    "sha256": [5, {"\x1b[31m": "x"}],
    "key": [5, "\x1b[31m"],
    "name": [5, "\x1b[31m"],
    "header_sha256": [5],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("altered")
    (folder / "run").mkdir()
    for step in range(2):
        save_file({"w": torch.randn(3)}, folder / "run" / f"step_{step}.safetensors")
    save_file({"w": torch.randn(3)}, folder / "new.safetensors")
    ckptavg.average(folder / "run", folder / "swa.safetensors", fsync=False)
    return folder


@pytest.mark.parametrize(
    ("place", "name"),
    [*(("all", name) for name in OF_ALL), *(("member", name) for name in OF_A_MEMBER)],
)
def test_is_no_bug_of_ours_and_prints_no_control_codes(folder, place, name):
    with safe_open(folder / "swa.safetensors", "pt") as opened:
        text = opened.metadata()["ckptavg"]
    altered = folder / "altered.safetensors"
    for value in OF_ALL[name] if place == "all" else OF_A_MEMBER[name]:
        entry = json.loads(text)
        (entry if place == "all" else entry["sources"][0])[name] = value
        save_file(load_file(folder / "swa.safetensors"), altered, {"ckptavg": json.dumps(entry)})
        average = ["average", altered, folder / "new.safetensors", "-o", folder / "o.pt", "-f"]
        verify = ["verify", altered, folder / "run"]
        for words in (["inspect", altered], verify, average, [*average, "--update"]):
            code, out, error = outcome(*words)
            assert code in (0, 1), (value, words)
            assert not {"\x1b", "\u202e"} & set(out + error), (value, words)
            assert "Traceback" not in error


def test_nor_does_an_error_of_the_user_s_code(folder):
    (folder / "red.py").write_text("raise ValueError('\\x1b[31mred\\u202e\\nand more')\n")
    model = f"{folder}/red.py:Net"
    code, out, error = outcome(
        "bn-refresh", folder / "swa.safetensors", "--model", model, "--loader", model
    )
    assert code == 1
    assert "ValueError: \\x1b[31mred\\u202e\nand more\n" in error
    assert not {"\x1b", "\u202e"} & set(out + error)
