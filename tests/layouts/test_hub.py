"""Repositories of the Hugging Face hub, read by huggingface_hub from a server on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfFileSystem, constants
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.errors import CkptAvgError
from tests.layouts.hub import Hub
from tests.oracle import StateDict, assert_mean


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    server = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    HfFileSystem.clear_instance_cache()
    yield server
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def push(hub: Hub, revision: str, state: StateDict) -> None:
    folder = hub.root / "org" / f"repo@{revision}" / "model"
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")


def test_revisions_are_averaged_with_few_requests(hub, tmp_path):
    states = [{f"w{number}": torch.randn(250, 1000) for number in range(10)} for _ in range(2)]
    for step, state in enumerate(states, 1):
        push(hub, f"step{step}", state)
    out = tmp_path / "out"
    ckptavg.average("hf://org/repo@{step1,step2}/model", out)
    assert_mean(load_file(out / "model.safetensors"), states)
    assert (out / "config.json").read_text() == "{}"
    asked = [path for path, _ in hub.requests if path.startswith("/api/")]
    # The revision, its folder and `model`; once more at the end, to see that nothing has changed.
    assert len(asked) <= 2 * 3 + 2 * 2
    for step in (1, 2):
        file = f"/org/repo/resolve/step{step}/model/model.safetensors"
        ranges = [
            span.removeprefix("bytes=").split("-") for path, span in hub.requests if path == file
        ]
        sizes = [int(last) - int(first) + 1 for first, last in ranges]
        *samples, _, _, _ = sorted(sizes[1:])
        assert sizes[0] == 1 << 16
        assert samples == [512] * 11
        assert sum(sizes[1:]) - sum(samples) < 10 * 250 * 1000 * 4 + 1
    assert ckptavg.verify(out, ["hf://org/repo@step{1,2}/model"]).compared == 10


def test_pull_requests_and_torch_files(hub, tmp_path):
    state = {"w": torch.randn(3, 4), "v": torch.randn(5)}
    push(hub, "refs--pr--1", state)
    torch.save(state, hub.root / "org" / "repo@refs--pr--1" / "pytorch_model.bin")
    for revision in ("refs/pr/1", "refs%2Fpr%2F1"):
        for name in ("model", "pytorch_model.bin"):
            output = tmp_path / f"{len(revision)}-{name}.pt"
            ckptavg.convert(f"hf://org/repo@{revision}/{name}", output)
            assert_mean(torch.load(output), [state])


def test_what_is_not_there_is_one_line(hub, tmp_path):
    push(hub, "step1", {"w": torch.ones(2)})
    for url, reason in (
        ("hf://org/repo@step2/model", r"does not exist: .*\(revision not found\)"),
        ("hf://org/other@step1", r"does not exist: .*\(repository not found\)"),
        ("hf://org/repo@step1/x.pt", "does not exist$"),
        ("hf://gpt2", "cannot read it: "),
    ):
        with pytest.raises(CkptAvgError, match=f"{url}: {reason}") as caught:
            ckptavg.average(url, tmp_path / "o.safetensors")
        assert "\n" not in str(caught.value)
