"""Files behind URLs: ranges of the needed bytes, several at once, and errors in one line."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file
from upath import UPath

import ckptavg
from ckptavg.errors import CkptAvgError, MismatchError, OutputError, SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.parts import open_source
from ckptavg.formats.paths import as_path
from tests.helpers import run
from tests.oracle import naive_mean, random_state_dicts, same_bits, save_run


class Store:
    """What is in the memory file system, and what is asked of it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.ranges: list[tuple[str, int]] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()

    def upload(self, folder: Path) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                target = UPath(f"{self.root}/{path.relative_to(folder.parent).as_posix()}")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return f"{self.root}/{folder.name}"

    @property
    def bytes_read(self) -> int:
        return sum(size for _, size in self.ranges)

    def watch(self, monkeypatch, delay: float = 0.0) -> None:
        original = MemoryFileSystem.cat_file

        def cat_file(files, path, start=None, end=None, **options):
            with self._lock:
                self._in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self._in_flight)
            time.sleep(delay)
            try:
                found = original(files, path, start=start, end=end, **options)
            finally:
                with self._lock:
                    self._in_flight -= 1
                    self.ranges.append((path, (end or 0) - (start or 0)))
            assert start is not None
            assert end is not None
            return found

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


@pytest.fixture
def store(request):
    # The memory file system is one for the whole process.
    root = f"memory://{request.node.name.replace('[', '-').replace(']', '')}"
    yield Store(root)
    files = fsspec.filesystem("memory")
    if files.exists(root):
        files.rm(root, recursive=True)


def mean_of(states):
    return {name: naive_mean([state[name] for state in states]) for name in states[0]}


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_an_average_of_what_is_behind_a_url(tmp_path, store, kind):
    states = random_state_dicts(3)
    save_run(tmp_path / "run", states, kind)
    url = store.upload(tmp_path / "run")
    summary = ckptavg.average(url, tmp_path / "remote.safetensors")
    local = ckptavg.average(tmp_path / "run", tmp_path / "local.safetensors")
    assert (tmp_path / "remote.safetensors").read_bytes() == (
        tmp_path / "local.safetensors"
    ).read_bytes()
    assert [source.name for source in summary.sources] == [source.name for source in local.sources]
    assert summary.sources[0].path == f"{url}/step_0.{kind}"
    found = load_file(tmp_path / "remote.safetensors")
    assert same_bits(found["embed.weight"], mean_of(states)["embed.weight"])


def test_named_checkpoints_here_and_there(tmp_path, store):
    # Without a counter, which would be the last one's: nothing tells the order across folders.
    states = [{"embed.weight": state["embed.weight"]} for state in random_state_dicts(3)]
    paths = save_run(tmp_path / "run", states)
    url = store.upload(tmp_path / "run")
    inputs = [paths[0], f"{url}/step_1.safetensors", UPath(f"{url}/step_2.safetensors")]
    ckptavg.average(inputs, tmp_path / "out.safetensors")  # type: ignore[arg-type]
    found = load_file(tmp_path / "out.safetensors")
    assert same_bits(found["embed.weight"], mean_of(states)["embed.weight"])


def test_a_directory_of_several_models_comes_along(tmp_path, store):
    for step in range(2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        (folder / "1_Pooling").mkdir(parents=True)
        (folder / "2_Dense").mkdir()
        for name in ("model.safetensors", "2_Dense/model.safetensors"):
            save_file({"w": torch.full((2,), 1.0 * step)}, folder / name)
        (folder / "modules.json").write_text('[{"path": "1_Pooling"}, {"path": "2_Dense"}]')
        (folder / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text("{}")  # modules.json says what the model is
    ckptavg.average(store.upload(tmp_path / "run"), f"{tmp_path}/remote/")
    ckptavg.average(tmp_path / "run", f"{tmp_path}/local/")
    names = {"modules.json", "1_Pooling/config.json"}
    names |= {"model.safetensors", "2_Dense/model.safetensors"}
    for folder in (tmp_path / "remote", tmp_path / "local"):
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
        assert files == names
        assert load_file(folder / "2_Dense" / "model.safetensors")["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["shards", "zero3"])
def test_files_of_ranks_are_joined(tmp_path, store, kind):
    run = tmp_path / "run"
    for step in (2, 3):
        folder = run / f"global_step{step}"
        if kind == "zero3":
            shutil.copytree(Path(__file__).parent / "zero3" / folder.name, folder)
            continue
        folder.mkdir(parents=True)
        for rank in range(step):
            width = 12 // step
            places = json.dumps({"w": {"saved_offsets": [0, width * rank]}})
            file = folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
            save_file({"w": torch.rand(3, width)}, file, {"DCP_SHARDING_INFO": places})
    ckptavg.average(store.upload(run), tmp_path / "remote.safetensors")
    ckptavg.average(run, tmp_path / "local.safetensors")
    found = (tmp_path / "remote.safetensors").read_bytes()
    assert found == (tmp_path / "local.safetensors").read_bytes()


def test_a_hugging_face_directory_comes_along(tmp_path, store):
    for step, state in enumerate(random_state_dicts(2)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"a": 1}')
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    url = store.upload(tmp_path / "run")
    summary = ckptavg.average(url, tmp_path / "out")
    assert [source.step for source in summary.sources] == [("global_step", 0), ("global_step", 1)]
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    ckptavg.average(tmp_path / "run", tmp_path / "local")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_only_the_needed_bytes_are_read(tmp_path, store, monkeypatch):
    states = [{"w": torch.randn(2000, 500)} for _ in range(3)]
    for step, state in enumerate(states):
        optimizer = {"state": {0: {name: torch.randn(2000, 500) for name in ("m", "v")}}}
        (tmp_path / "run").mkdir(exist_ok=True)
        torch.save(
            {"model": state, "optimizer": optimizer, "step": step}, tmp_path / "run" / f"{step}.pt"
        )
    url = store.upload(tmp_path / "run")
    store.watch(monkeypatch)
    ckptavg.average(url, tmp_path / "out.safetensors")
    model = sum(state["w"].nbytes for state in states)
    assert model <= store.bytes_read <= 1.05 * model
    assert max(size for _, size in store.ranges) <= 4 << 20


def test_several_ranges_are_in_flight(tmp_path, store, monkeypatch):
    save_run(tmp_path / "run", [{"w": torch.randn(9000, 1000)} for _ in range(2)])
    url = store.upload(tmp_path / "run")
    store.watch(monkeypatch, delay=0.02)
    ckptavg.average(url, tmp_path / "out.safetensors", threads=16)
    assert store.most_in_flight > 8
    assert max(size for _, size in store.ranges) == 4 << 20


def test_threads_bound_what_is_in_flight(tmp_path, store, monkeypatch):
    save_run(tmp_path / "run", [{"w": torch.randn(3000, 1000)} for _ in range(2)])
    url = store.upload(tmp_path / "run")
    store.watch(monkeypatch, delay=0.005)
    ckptavg.average(url, tmp_path / "out.safetensors", threads=3)
    assert store.most_in_flight == 3


def test_copies_count_once(tmp_path, store):
    states = random_state_dicts(2)
    save_run(tmp_path / "run", states)
    save_file(states[-1], tmp_path / "run" / "last.safetensors")
    summary = ckptavg.average(store.upload(tmp_path / "run"), tmp_path / "out.safetensors")
    assert [source.name for source in summary.sources] == [
        "step_0.safetensors",
        "step_1.safetensors",
    ]


def test_a_truncated_file_is_named(tmp_path, store):
    save_run(tmp_path / "run", random_state_dicts(2))
    url = store.upload(tmp_path / "run")
    path = UPath(f"{url}/step_1.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CkptAvgError, match=r"memory://.*step_1\.safetensors: .*truncated"):
        ckptavg.average(url, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_is_rewritten_meanwhile_is_named(tmp_path, store, monkeypatch):
    save_run(tmp_path / "run", random_state_dicts(2))
    url = store.upload(tmp_path / "run")
    original = MemoryFileSystem.cat_file

    def rewrite(files, path, start=None, end=None, **options):
        if end - start > 100_000:
            target = UPath(f"{url}/step_1.safetensors")
            content = original(files, target.path)
            target.write_bytes(content)
        return original(files, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", rewrite)
    with pytest.raises(CkptAvgError, match=r"step_1\.safetensors: changed while it was being read"):
        ckptavg.average(url, tmp_path / "out.safetensors", threads=1)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_failure_of_the_network_is_one_line(tmp_path, store, monkeypatch):
    save_run(tmp_path / "run", random_state_dicts(2))
    url = store.upload(tmp_path / "run")
    source = open_source(as_path(f"{url}/step_0.safetensors"))

    def fail(*_, **__):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(CkptAvgError, match=r"step_0\.safetensors: cannot read it: reset by peer"):
        source.read(0, 8)


def test_what_is_not_there(tmp_path, store):
    (UPath(store.root) / "empty").mkdir(parents=True)
    (UPath(store.root) / "empty" / "readme.txt").write_text("x")
    with pytest.raises(CkptAvgError, match=r"memory://.*absent: does not exist$"):
        ckptavg.average(f"{store.root}/absent", tmp_path / "out.safetensors")
    with pytest.raises(SelectionError, match="no checkpoint found in memory://"):
        ckptavg.average(f"{store.root}/empty", tmp_path / "out.safetensors")


def test_an_output_behind_a_url_is_refused(tmp_path, store):
    save_run(tmp_path / "run", random_state_dicts(2))
    with pytest.raises(OutputError, match="on this machine only"):
        ckptavg.average(tmp_path / "run", f"{store.root}/out.safetensors")


@pytest.mark.parametrize("url", ["nonsense://bucket/run", "zzz://x"])
def test_an_unknown_scheme_is_one_line(tmp_path, url):
    with pytest.raises(CkptAvgError, match=url):
        ckptavg.average(url, tmp_path / "out.safetensors")


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    def absent(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.filesystem", absent)
    monkeypatch.setattr("fsspec.get_filesystem_class", absent)
    monkeypatch.setattr("upath.registry.get_upath_class", absent)
    monkeypatch.setattr("upath.core.get_upath_class", absent)
    with pytest.raises(CkptAvgError, match=r"gcsfs.*pip install 'ckptavg\[gcs\]'"):
        ckptavg.average("gs://bucket/run", tmp_path / "out.safetensors")


def test_a_file_url_is_a_path(tmp_path):
    states = random_state_dicts(2)
    save_run(tmp_path / "run", states)
    assert as_path(f"file://{tmp_path}/run") == tmp_path / "run"


def test_pieces_of_a_file(store):
    path = UPath(f"{store.root}/x")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(range(100)))
    source = open_source(as_path(str(path)))
    assert source.read_many([(0, 2), (98, 2), (5, 0)]) == [b"\0\1", b"bc", b""]
    assert source.read_many([]) == []
    out = np.zeros(3, np.uint8)
    source.read_into(11, out.data)
    assert out.tolist() == [11, 12, 13]
    with pytest.raises(CkptAvgError, match="ends at byte 100, 5 bytes too early"):
        source.read(95, 10)
    with pytest.raises(CkptAvgError, match="too early"):
        source.read_many([(95, 10)])


def test_a_checkpoint_behind_a_url_is_described(tmp_path, store):
    save_run(tmp_path / "run", random_state_dicts(1))
    opened = open_checkpoint(as_path(store.upload(tmp_path / "run") + "/step_0.safetensors"))
    assert opened.read("layer.bias").shape == (7,)


def test_a_remote_header_leaves_no_temporary_file_and_is_read_like_a_local_one(
    tmp_path, store, monkeypatch
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    [path] = save_run(tmp_path / "run", random_state_dicts(1))
    url = store.upload(tmp_path / "run") + "/step_0.safetensors"
    local, remote = open_checkpoint(path), open_checkpoint(as_path(url))
    assert remote.tensors == local.tensors
    assert list(remote.tensors) == list(local.tensors)
    assert (remote.metadata, remote.digest) == (local.metadata, local.digest)
    UPath(url).write_bytes(path.read_bytes().replace(b"F32", b"F33"))
    with pytest.raises(CkptAvgError, match=r"step_0\.safetensors: damaged header: unknown .*F33"):
        open_checkpoint(as_path(url))
    assert list(temporary.iterdir()) == []


def upload_as(url: str, content: bytes) -> str:
    """Put a file there by that very address, password and all."""
    path = UPath(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return url


class TestSecrets:
    def addresses(self, tmp_path, store):
        """Two checkpoints behind addresses with a password and a token."""
        name = store.root.removeprefix("memory://")
        store.root = f"memory://user:secret@{name}"
        return [
            upload_as(f"{store.root}/run/{path.name}?token=secret", path.read_bytes())
            for path in save_run(tmp_path / "run", random_state_dicts(2))
        ]

    def test_are_not_in_the_output_nor_in_what_is_said(self, tmp_path, store):
        urls = self.addresses(tmp_path, store)
        out = tmp_path / "out.safetensors"
        result = run("average", *urls, "-o", out)
        assert "averaged 2 checkpoints" in result.stdout
        assert "secret" not in result.output
        provenance = open_checkpoint(out).metadata["ckptavg"]
        assert "secret" not in provenance
        names = [source["name"] for source in json.loads(provenance)["sources"]]
        assert names == ["step_0.safetensors", "step_1.safetensors"]
        assert b"secret" not in out.read_bytes()

    def test_are_not_in_the_summary_s_names(self, tmp_path, store):
        urls = self.addresses(tmp_path, store)
        summary = ckptavg.average(urls, tmp_path / "out.safetensors")
        assert [source.name for source in summary.sources] == [
            "step_0.safetensors",
            "step_1.safetensors",
        ]

    @pytest.mark.parametrize(
        "damage", [b"", b"x" * 100, b"\x10\0\0\0\0\0\0\0{}"], ids=["empty", "no file", "truncated"]
    )
    def test_are_not_in_errors(self, tmp_path, store, damage):
        urls = self.addresses(tmp_path, store)
        UPath(urls[1]).write_bytes(damage)
        with pytest.raises(CkptAvgError) as caught:
            ckptavg.average(urls, tmp_path / "out.safetensors")
        assert "/run/step_1.safetensors: " in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_are_not_in_what_a_store_raises(self, tmp_path, store, monkeypatch):
        urls = self.addresses(tmp_path, store)

        def fail(*_, **__):
            raise ConnectionError(f"403 for {urls[0]}")

        monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
        result = run("average", *urls, "-o", tmp_path / "out.safetensors", code=1)
        assert "cannot read it: 403 for memory://" in str(result.exception)
        assert "secret" not in str(result.exception)

    def test_are_not_in_a_mismatch(self, tmp_path, store):
        urls = self.addresses(tmp_path, store)
        save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
        UPath(urls[1]).write_bytes((tmp_path / "other.safetensors").read_bytes())
        with pytest.raises(MismatchError) as caught:
            ckptavg.average(urls, tmp_path / "out.safetensors")
        assert "layer.ids: missing in memory://" in str(caught.value)
        assert "secret" not in str(caught.value)


def test_the_provenance_of_files_here_and_there_has_no_absolute_path(tmp_path, store):
    states = [{"embed.weight": state["embed.weight"]} for state in random_state_dicts(2)]
    here, _ = save_run(tmp_path / "run", states)
    url = store.upload(tmp_path / "run")
    ckptavg.average([here, f"{url}/step_1.safetensors"], tmp_path / "out.safetensors")
    provenance = open_checkpoint(tmp_path / "out.safetensors").metadata["ckptavg"]
    names = [source["name"] for source in json.loads(provenance)["sources"]]
    assert names == ["step_0.safetensors", "step_1.safetensors"]
    assert str(tmp_path) not in provenance


def test_a_server_that_knows_no_ranges_is_named(tmp_path, store, monkeypatch):
    save_run(tmp_path / "run", random_state_dicts(2))
    url = store.upload(tmp_path / "run")
    original = MemoryFileSystem.cat_file

    def whole(files, path, start=None, end=None, **options):
        return original(files, path)

    source = open_source(as_path(f"{url}/step_0.safetensors"))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", whole)
    message = r"step_0\.safetensors: cannot be read in pieces: the server ignores ranges; "
    with pytest.raises(CkptAvgError, match=message):
        ckptavg.average(url, tmp_path / "out.safetensors")
    with pytest.raises(CkptAvgError, match=message):
        source.read(0, 8)
    with pytest.raises(CkptAvgError, match=message):
        source.read_many([(0, 8), (8, 8)])
