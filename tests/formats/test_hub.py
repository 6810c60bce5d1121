"""Repositories of the Hugging Face hub: `hf://org/repo@revision`, in a stand-in's file system."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest
import torch
from fsspec.registry import _registry
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.errors import CkptAvgError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.paths import as_path, as_paths
from tests.helpers import outcome, run
from tests.oracle import StateDict, assert_mean, random_state_dicts, save_run

pytestmark = pytest.mark.usefixtures("no_fsync")


class HubFiles(AbstractFileSystem):  # type: ignore[misc]
    """Repositories in folders `org/repo@revision`, with the paths of huggingface_hub's own class.

    Attributes:
        root: where the folders are; the `/` of a revision is `-` there.
        requests: the ranges that were asked for: path, first byte, end.
    """

    protocol = "hf"
    root_marker = ""
    root: ClassVar[Path]
    requests: ClassVar[list[tuple[str, int, int]]]

    def _resolve(self, path: str) -> Path:
        path = self._strip_protocol(path)
        match = re.fullmatch(r"([^/]+/[^/@]+)(@(?:refs/\w+/\d+|[^/]+))?(?:/(.+))?", path)
        if match is None:
            raise ValueError(f"Repository id must be 'namespace/name', got '{path}'")
        repo, revision, below = match.groups("")
        folder = self.root / f"{repo}@{unquote(revision)[1:].replace('/', '-') or 'main'}"
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} (revision not found)")
        return folder / below

    def _facts(self, name: str, path: Path) -> dict[str, Any]:
        if path.is_dir():
            return {"name": name, "size": 0, "type": "directory"}
        content = path.read_bytes()
        return {"name": name, "size": len(content), "type": "file", "blob_id": hash(content)}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        place = self._resolve(path)
        if not place.exists():
            raise FileNotFoundError(path)
        return self._facts(str(self._strip_protocol(path)), place)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: FBT001, FBT002
        place = self._resolve(path)
        base = self._strip_protocol(path)
        entries = [self._facts(f"{base}/{each.name}", each) for each in place.iterdir()]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> HubFile:
        return HubFile(self, path, mode, **options)


class HubFile(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.requests.append((self.path, start, end))
        content: bytes = self.fs._resolve(self.path).read_bytes()
        return content[start:end]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    HubFiles.root, HubFiles.requests = tmp_path / "hub", []
    monkeypatch.setitem(_registry, "hf", HubFiles)
    yield HubFiles
    HubFiles.clear_instance_cache()


def push(revision: str, state: StateDict, repo: str = "org/repo") -> Path:
    """Save a model as a revision of a repository."""
    folder = HubFiles.root / f"{repo}@{revision}"
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"a": 1}')
    return folder


def push_steps(*steps: int) -> list[StateDict]:
    states = random_state_dicts(len(steps))
    for step, state in zip(steps, states, strict=True):
        push(f"step{step}", state)
    return states


def sources(path: Path) -> list[str]:
    provenance = open_checkpoint(path).provenance or {}
    return [source["name"] for source in provenance["sources"]]


@pytest.mark.usefixtures("hub")
class TestRevisions:
    def test_are_members_in_the_order_of_their_steps(self, tmp_path):
        states = push_steps(1000, 2000, 10_000)
        out = f"{tmp_path}/out/"
        said = run("average", "hf://org/repo@{step10000,step1000,step2000}", "-o", out).output
        assert "averaged 3 checkpoints: repo@step1000 to repo@step10000" in said
        assert_mean(load_file(f"{out}model.safetensors"), states)
        assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
        names = [f"repo@step{step}" for step in (1000, 2000, 10_000)]
        assert sources(tmp_path / "out") == names
        urls = [f"hf://org/{name}" for name in names]
        ckptavg.average(urls, tmp_path / "again")
        again = (tmp_path / "again" / "model.safetensors").read_bytes()
        assert again == (tmp_path / "out" / "model.safetensors").read_bytes()
        assert ckptavg.verify(out, ["hf://org/repo@step{1000,2000,10000}"]).sources == 3
        summary = ckptavg.average(urls, out, force=True, dry_run=True, weights="ema:0.5")
        assert [round(each.weight, 2) for each in summary.sources] == [0.25, 0.25, 0.5]

    def test_are_told_apart_where_files_have_one_name(self, tmp_path):
        states = push_steps(1000, 2000)
        ckptavg.average("hf://org/repo@step{1000,2000}/model.safetensors", tmp_path / "o.pt")
        names = ["repo@step1000/model.safetensors", "repo@step2000/model.safetensors"]
        assert sources(tmp_path / "o.pt") == names
        assert_mean(torch.load(tmp_path / "o.pt"), states)

    def test_are_recorded_if_there_is_but_one(self, tmp_path):
        folder = push("v1.0", random_state_dicts(1)[0])
        save_run(folder / "run", random_state_dicts(2))
        ckptavg.convert("hf://org/repo@v1.0/model.safetensors", tmp_path / "a.pt")
        assert sources(tmp_path / "a.pt") == ["repo@v1.0/model.safetensors"]
        ckptavg.average("hf://org/repo@v1.0/run", tmp_path / "b.pt")
        assert sources(tmp_path / "b.pt") == [
            f"repo@v1.0/run/step_{step}.safetensors" for step in (0, 1)
        ]

    def test_of_the_same_weights_count_once(self, tmp_path):
        states = push_steps(1000, 2000)
        push("final", states[1])
        urls = "hf://org/repo@{step1000,step2000,final}"
        code, said, notices = outcome("average", urls, "-o", tmp_path / "o.safetensors")
        assert code == 0
        assert "averaged 2 checkpoints" in said
        assert "counted once: repo@final is the same checkpoint as repo@step2000" in notices
        assert_mean(load_file(tmp_path / "o.safetensors"), states)

    @pytest.mark.parametrize("revision", ["refs%2Fpr%2F1", "refs/pr/1"])
    def test_of_pull_requests_and_folders(self, tmp_path, revision):
        states = random_state_dicts(2)
        for number, state in enumerate(states, 1):
            folder = push(f"refs-pr-{number}", {"other": torch.ones(1)})
            (folder / "unet").mkdir()
            torch.save(state, folder / "unet" / "pytorch_model.bin")
        other = revision.replace("1", "2")
        urls = [f"hf://org/repo@{each}/unet" for each in (revision, other)]
        ckptavg.average(urls, tmp_path / "o.safetensors")
        assert_mean(load_file(tmp_path / "o.safetensors"), states)
        assert sources(tmp_path / "o.safetensors") == [
            f"repo@{revision}/unet",
            f"repo@{other}/unet",
        ]

    def test_without_a_revision_are_those_of_main(self, tmp_path):
        push("main", {"w": torch.ones(2)}, "org/a")
        push("main", {"w": torch.zeros(2)}, "org/b")
        ckptavg.average("hf://org/{a,b}", tmp_path / "o.safetensors")
        assert sources(tmp_path / "o.safetensors") == ["a", "b"]
        assert load_file(tmp_path / "o.safetensors")["w"].tolist() == [0.5, 0.5]


class TestRequests:
    def test_are_one_for_a_header_and_few_for_the_bytes(self, hub, tmp_path):
        for step in (1, 2):
            push(f"step{step}", {f"w{number}": torch.randn(250, 1000) for number in range(10)})
        size = (hub.root / "org/repo@step1/model.safetensors").stat().st_size
        ckptavg.average("hf://org/repo@step{1,2}", tmp_path / "out")
        for step in (1, 2):
            name = f"org/repo@step{step}/model.safetensors"
            sizes = [end - start for path, start, end in hub.requests if path == name]
            assert sizes[0] == 1 << 16  # the header
            *samples, _, _, _ = sorted(sizes[1:])
            assert samples == [512] * 11  # of each tensor, and of one to find copies
            assert sum(sizes[1:]) - sum(samples) < size
        assert len(hub.requests) == 2 * (1 + 11 + 3) + 1  # config.json
        before = len(hub.requests)
        run("inspect", "hf://org/repo@step{1,2}")
        # The header, what finds copies, and the beginning of each tensor for the distances.
        assert len(hub.requests) == before + 2 * (1 + 1 + 10)

    def test_of_a_torch_file_do_not_reach_beyond_what_is_needed(self, hub, tmp_path):
        folder = push("step1", {"w": torch.ones(1)})
        state = {f"w{number}": torch.randn(500, 100) for number in range(20)}
        optimizer = {"m": torch.randn(20, 500, 100)}
        torch.save({"model": state, "optimizer": optimizer}, folder / "last.pt")
        ckptavg.convert("hf://org/repo@step1/last.pt", tmp_path / "o.pt")
        assert torch.load(tmp_path / "o.pt").keys() == state.keys()
        asked = sum(end - start for _, start, end in hub.requests)
        assert asked < 1.1 * sum(value.nbytes for value in state.values())


@pytest.mark.usefixtures("hub")
class TestErrors:
    def test_of_a_revision_that_is_not_there(self, tmp_path):
        push_steps(1000)
        message = r"hf://org/repo@step2: does not exist: .*\(revision not found\)"
        with pytest.raises(CkptAvgError, match=message):
            ckptavg.average("hf://org/repo@{step1000,step2}", tmp_path / "o.safetensors")
        with pytest.raises(CkptAvgError, match=r"hf://org: .*must be 'namespace/name'"):
            ckptavg.average("hf://org", tmp_path / "o.safetensors")
        with pytest.raises(CkptAvgError, match=r"hf://org/repo@step1000/x\.pt: does not exist$"):
            ckptavg.average("hf://org/repo@step1000/x.pt", tmp_path / "o.safetensors")
        assert not (tmp_path / "o.safetensors").exists()

    def test_of_a_revision_that_moves_meanwhile(self, hub, tmp_path, monkeypatch):
        push_steps(1, 2)
        original = HubFile._fetch_range

        def move(file: Any, start: int, end: int) -> bytes:
            content = original(file, start, end)
            if start:
                folder = hub.root / "org" / "repo@step2"
                other = random_state_dicts(3)[2]
                save_file(other, folder / "model.safetensors", {"format": "pt"})
            return content

        monkeypatch.setattr(HubFile, "_fetch_range", move)
        with pytest.raises(CkptAvgError, match=r"repo@step2/model\.safetensors: changed while"):
            ckptavg.average("hf://org/repo@step{1,2}", tmp_path / "o.safetensors")
        assert not (tmp_path / "o.safetensors").exists()

    def test_of_a_missing_package_names_the_extra(self, monkeypatch):
        def absent(*_: object, **__: object) -> None:
            raise ImportError("Install huggingface_hub to access HfFileSystem")

        monkeypatch.setattr("fsspec.filesystem", absent)
        monkeypatch.setattr("fsspec.get_filesystem_class", absent)
        monkeypatch.setattr("upath.core.get_upath_class", absent)
        with pytest.raises(CkptAvgError, match=r"huggingface_hub.*pip install 'ckptavg\[hf\]'"):
            as_path("hf://org/repo@step1")


@pytest.mark.parametrize(
    ("url", "expanded"),
    [
        ("hf://o/r@{a,b}", ["o/r@a", "o/r@b"]),
        ("hf://o/r@step{1,2}/x.pt", ["o/r@step1/x.pt", "o/r@step2/x.pt"]),
        ("hf://o/{r,s}@{a,b}", ["o/r@a", "o/r@b", "o/s@a", "o/s@b"]),
        ("hf://o/r@{a}", ["o/r@{a}"]),
        ("hf://o/r", ["o/r"]),
    ],
)
def test_braces_are_expanded_as_a_shell_does(hub, url, expanded):
    assert [str(path) for path in as_paths(url)] == [f"hf://{each}" for each in expanded]


def test_braces_of_other_names_are_names(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "{a,b}.safetensors")
    shutil.copy(tmp_path / "{a,b}.safetensors", tmp_path / "c.safetensors")
    assert as_paths([f"{tmp_path}/{{a,b}}.safetensors"]) == [tmp_path / "{a,b}.safetensors"]
    assert "{a,b}.safetensors" in run("inspect", tmp_path / "{a,b}.safetensors").stdout
