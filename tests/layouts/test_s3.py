"""Objects of an S3 server: ranges of the needed bytes only, many at once."""

from __future__ import annotations

import re

import boto3
import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.errors import CkptAvgError
from tests.oracle import naive_mean, same_bits


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield boto3.client("s3")
        running.stop()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server, request):
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    server.create_bucket(Bucket=name)
    s3fs.S3FileSystem.clear_instance_cache()
    return name


@pytest.fixture
def asked(monkeypatch):
    """The ranges that are asked for."""
    ranges: list[int] = []
    original = s3fs.S3FileSystem._call_s3

    async def call(files, method, *args, **options):
        if method == "get_object":
            first, last = options["Range"].removeprefix("bytes=").split("-")
            ranges.append(int(last) - int(first) + 1)
        return await original(files, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    return ranges


def upload(server, bucket, folder):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.upload_file(str(path), bucket, f"run/{path.relative_to(folder).as_posix()}")
    return f"s3://{bucket}/run"


def test_training_checkpoints(server, bucket, asked, tmp_path):
    states = [{"w": torch.randn(1500, 1000), "b": torch.randn(7)} for _ in range(3)]
    (tmp_path / "run").mkdir()
    for step, state in enumerate(states):
        optimizer = {"state": {0: {"m": torch.randn(1500, 1000), "v": torch.randn(1500, 1000)}}}
        checkpoint = {"state_dict": state, "optimizer": optimizer, "epoch": step}
        torch.save(checkpoint, tmp_path / "run" / f"epoch_{step}.pt")
    url = upload(server, bucket, tmp_path / "run")
    summary = ckptavg.average(url, tmp_path / "out.safetensors")
    assert [source.step for source in summary.sources] == [("epoch", step) for step in range(3)]
    found = load_file(tmp_path / "out.safetensors")
    for name, value in found.items():
        assert same_bits(value, naive_mean([state[name] for state in states]))
    model = sum(value.nbytes for state in states for value in state.values())
    assert model <= sum(asked) <= 1.05 * model


def test_shards_and_their_configuration(server, bucket, tmp_path):
    states = [{"a": torch.randn(30), "b": torch.randn(20)} for _ in range(2)]
    for step, state in enumerate(states):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"a": state["a"]}, folder / "model-00001-of-00002.safetensors")
        save_file({"b": state["b"]}, folder / "model-00002-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", '
            '"b": "model-00002-of-00002.safetensors"}}'
        )
        (folder / "config.json").write_text("{}")
    ckptavg.average(upload(server, bucket, tmp_path / "run"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    ckptavg.average(tmp_path / "run", tmp_path / "local")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "local").iterdir()}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_missing_shard_is_named(server, bucket, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(CkptAvgError, match=r"s3://.*/run/x\.safetensors: is missing"):
        ckptavg.average(upload(server, bucket, folder), tmp_path / "out")


def test_a_bucket_that_is_not_there(server, tmp_path):
    with pytest.raises(CkptAvgError, match="s3://no-such-bucket/run: "):
        ckptavg.average("s3://no-such-bucket/run", tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_is_one_line(server, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CkptAvgError, match=f"s3://{bucket}/run: ") as caught:
        ckptavg.average(f"s3://{bucket}/run", tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
