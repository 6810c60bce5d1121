"""What the writers lay out, read back by the real libraries."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import json
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptavg.errors import OutputError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import PROVENANCE, Checkpoint
from ckptavg.formats.tensors import BY_NAME, DTYPES
from ckptavg.merge.jobs import OutputTensor
from ckptavg.merge.recipe import AverageOptions
from ckptavg.write.layouts import destination, lay_out
from ckptavg.write.output import Output
from ckptavg.write.safetensors import lay_out_safetensors
from ckptavg.write.torchzip import lay_out_torch

IN_SAFETENSORS = [dtype for dtype in DTYPES if dtype.code is not None]


def checkpoint(path, container="torch", versions=None):
    """A checkpoint whose files are of no interest."""
    return Checkpoint(path, container, (), {}, {}, "", module_versions=versions)


def random_bytes(count, dtype_name="uint8", seed=0):
    raw = np.random.default_rng([seed, count]).integers(0, 256, count, np.uint8)
    return (raw % 2 if dtype_name == "bool" else raw).tobytes()


def make(names, dtype_name, shape):
    """A description and the bytes to go with it."""
    dtype = BY_NAME[dtype_name]
    names = (names,) if isinstance(names, str) else tuple(names)
    size = int(np.prod(shape)) * dtype.itemsize
    seed = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:4], "little")
    return OutputTensor(names, dtype, tuple(shape), size), random_bytes(size, dtype_name, seed)


def write(layout, contents):
    """Fill a layout as the engine does."""
    with Output(layout, force=True, fsync=False) as output:
        for targets, content in zip(layout.targets, contents, strict=True):
            for target in targets:
                output.write(target, memoryview(content))
        output.publish()
    return layout.path


def write_safetensors(path, made, metadata=None):
    layout = lay_out_safetensors(path, [tensor for tensor, _ in made], metadata or {})
    return write(layout, [content for _, content in made])


def write_torch(path, made, metadata=None, versions=None):
    layout = lay_out_torch(
        path, [t for t, _ in made], metadata or {}, checkpoint(path, versions=versions)
    )
    return write(layout, [content for _, content in made])


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(state, made):
    """A state dict as torch or safetensors gives it holds what was written."""
    names = [name for tensor, _ in made for name in tensor.names]
    assert sorted(state) == sorted(names)
    for tensor, content in made:
        for name in tensor.names:
            found = state[name]
            assert str(found.dtype) == f"torch.{tensor.dtype.name}"
            assert tuple(found.shape) == tensor.shape
            assert found.is_contiguous()
            assert bits(found) == content


def several(dtypes, prefix=""):
    """All shapes of interest in each of the dtypes, in an order that leaves them unaligned."""
    shapes: list[tuple[int, ...]] = [(3, 5), (), (0, 3), (1,), (2, 1, 3, 1)]
    return [
        make(f"{prefix}{dtype.name}.{shape}", dtype.name, shape)
        for shape, dtype in itertools.product(shapes, dtypes)
    ]


# safetensors


def test_a_safetensors_file_is_read_by_the_real_library(tmp_path):
    made = several([dtype for dtype in IN_SAFETENSORS if dtype.name != "float8_e8m0fnu"])
    metadata = {"format": "pt", "ckptavg": json.dumps({"a": "ж"})}
    path = write_safetensors(tmp_path / "x.safetensors", made, metadata)
    assert_holds(safetensors.torch.load_file(path), made)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == metadata
        assert_holds({name: opened.get_tensor(name) for name in opened.keys()}, made)  # noqa: SIM118


@pytest.mark.parametrize("dtype", IN_SAFETENSORS, ids=lambda dtype: dtype.code)
def test_every_dtype_of_the_format_is_accepted_by_the_real_library(tmp_path, dtype):
    made = [make("w", dtype.name, (4, 6)), make("empty", dtype.name, (0,))]
    path = write_safetensors(tmp_path / "x.safetensors", made)
    with safetensors.safe_open(path, "np") as opened:
        piece = opened.get_slice("w")
        assert piece.get_dtype() == dtype.code
        assert piece.get_shape() == [4, 6]
    assert open_checkpoint(path).read("w").tobytes() == made[0][1]
    assert path.read_bytes().endswith(made[0][1])


def test_tied_tensors_are_written_under_each_name(tmp_path):
    made = [make(("embed", "head"), "float32", (3, 2)), make("b", "int8", (3,))]
    path = write_safetensors(tmp_path / "x.safetensors", made)
    assert_holds(safetensors.torch.load_file(path), made)


def test_a_safetensors_file_without_tensors_is_one(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", [], {"format": "pt"})
    assert safetensors.torch.load_file(path) == {}


def test_the_tensors_of_a_safetensors_file_begin_aligned(tmp_path):
    for length in range(20):
        path = write_safetensors(
            tmp_path / "x.safetensors", [make("n" * length, "float64", (2,))], {"k": "v"}
        )
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 8 == 0
        assert len(safetensors.torch.load_file(path)) == 1


def test_metadata_is_written_in_one_order():
    tensors = [make("w", "float32", (2,))[0]]
    one = lay_out_safetensors(Path("x"), tensors, {"a": "1", "b": "2"})
    other = lay_out_safetensors(Path("x"), tensors, {"b": "2", "a": "1"})
    assert one == other


def test_a_dtype_that_safetensors_lacks_is_an_error_that_names_the_tensor(tmp_path):
    tensor, _ = make("layer.w", "complex128", (2,))
    with pytest.raises(OutputError, match=r"x\.safetensors: layer\.w: .*complex128.*\.pt"):
        lay_out_safetensors(tmp_path / "x.safetensors", [tensor], {})


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800"])
def test_a_name_that_safetensors_cannot_hold_is_an_error(tmp_path, name):
    tensor = OutputTensor((name,), BY_NAME["uint8"], (2,), 2)
    with pytest.raises(OutputError) as caught:
        lay_out_safetensors(tmp_path / "x.safetensors", [tensor], {})
    assert str(caught.value).isprintable()
    assert str(tmp_path / "x.safetensors") in str(caught.value)


def test_a_header_beyond_the_format_s_limit_is_an_error(tmp_path):
    tensor = OutputTensor(("n" * 100_000_000,), BY_NAME["uint8"], (2,), 2)
    with pytest.raises(OutputError, match="header"):
        lay_out_safetensors(tmp_path / "x.safetensors", [tensor], {})


# torch


@pytest.mark.parametrize("mmap", [False, True])
def test_a_torch_file_is_read_by_torch(tmp_path, mmap):
    made = several(DTYPES)
    path = write_torch(tmp_path / "x.pt", made)
    state = torch.load(path, weights_only=True, mmap=mmap)
    assert isinstance(state, collections.OrderedDict)
    assert list(state) == [tensor.names[0] for tensor, _ in made]
    assert_holds(state, made)


def test_a_torch_file_is_read_by_torch_where_pickles_are_run(tmp_path):
    made = several(DTYPES)
    path = write_torch(tmp_path / "x.pt", made, versions={"": {"version": 1}})
    assert_holds(torch.load(path, weights_only=False), made)


def test_a_torch_file_is_read_by_torch_from_a_stream(tmp_path):
    made = several(DTYPES)
    path = write_torch(tmp_path / "x.pt", made)
    with path.open("rb") as file:
        assert_holds(torch.load(file, weights_only=True), made)


@pytest.mark.skipif(shutil.which("unzip") is None, reason="there is no unzip")
def test_a_torch_file_is_a_sound_zip_to_unzip(tmp_path):
    path = write_torch(tmp_path / "x.pt", several(DTYPES), {PROVENANCE: "{}"})
    done = subprocess.run(["unzip", "-t", path], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No errors" in done.stdout


def test_a_torch_file_is_a_sound_zip_with_the_records_that_torch_writes(tmp_path):
    made = several(DTYPES)
    path = write_torch(tmp_path / "x.pt", made)
    torch.save({"w": torch.ones(1)}, tmp_path / "archive.pt")
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / "archive.pt") as theirs:
        assert ours.testzip() is None
        for name in ("version", "byteorder"):
            assert ours.read(f"archive/{name}") == theirs.read(f"archive/{name}")
        for index, (_, content) in enumerate(made):
            assert ours.read(f"archive/data/{index}") == content
        for entry in ours.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)


def test_the_records_of_a_torch_file_begin_aligned(tmp_path):
    made = several(DTYPES)
    layout = lay_out_torch(tmp_path, [tensor for tensor, _ in made], {}, checkpoint(tmp_path))
    assert all(target % 64 == 0 for targets in layout.targets for target in targets)


def test_the_pickle_of_a_torch_file_is_one_that_pickletools_takes(tmp_path):
    path = write_torch(
        tmp_path / "x.pt", several(DTYPES), versions={"": {"version": 1}, "a": {"version": 2}}
    )
    with zipfile.ZipFile(path) as archive:
        pickletools.dis(archive.read("archive/data.pkl"), out=io.StringIO())


def test_our_reader_reads_what_our_writer_wrote(tmp_path):
    made = several(DTYPES)
    versions = {"": {"version": 1}, "layer": {"version": 2}}
    path = write_torch(tmp_path / "x.pt", made, {PROVENANCE: '{"scheme": "uniform"}'}, versions)
    opened = open_checkpoint(path)
    assert {name: opened.read(name).tobytes() for name in opened.tensors} == {
        tensor.names[0]: content for tensor, content in made
    }
    assert opened.provenance == {"scheme": "uniform"}
    assert opened.module_versions == versions


def test_tied_tensors_share_a_storage_after_torch_load(tmp_path):
    made = [make(("embed", "head"), "float32", (3, 2)), make("b", "float32", (3, 2))]
    state = torch.load(write_torch(tmp_path / "x.pt", made), weights_only=True)
    assert_holds(state, made)
    assert state["embed"].data_ptr() == state["head"].data_ptr() != state["b"].data_ptr()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 2


def test_the_versions_of_modules_are_kept(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state: Any = model.state_dict()
    made = [
        make(name, str(value.dtype).removeprefix("torch."), value.shape)
        for name, value in state.items()
    ]
    path = write_torch(tmp_path / "x.pt", made, versions=state._metadata)
    loaded = torch.load(path, weights_only=True)
    assert loaded._metadata == state._metadata
    assert isinstance(loaded._metadata, collections.OrderedDict)
    model.load_state_dict(loaded)


def test_only_plain_facts_of_modules_are_written(tmp_path):
    hostile = {"": {"version": 1, "x": pickle.Pickler, os.system: 1, "name": "n", "on": True}}
    path = write_torch(tmp_path / "x.pt", [make("w", "int8", (1,))], versions=hostile)
    loaded = torch.load(path, weights_only=True)
    assert loaded._metadata == {"": {"version": 1, "name": "n", "on": True}}


def test_a_torch_file_without_tensors_is_one(tmp_path):
    assert torch.load(write_torch(tmp_path / "x.pt", []), weights_only=True) == {}


def test_provenance_is_a_record_of_its_own(tmp_path):
    made = [make("w", "float32", (2,))]
    text = json.dumps({"sources": ["ж"]})
    path = write_torch(tmp_path / "x.pt", made, {PROVENANCE: text, "format": "pt"})
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/ckptavg").decode() == text
    assert_holds(torch.load(path, weights_only=True), made)


def test_names_of_any_text_pass(tmp_path):
    names = ["", "ж.вес", "日本", "a\nb", "\x00", "😀", 'q"\\', "n" * 5_000]
    made = [make(name, "int16", (2,)) for name in names]
    assert_holds(torch.load(write_torch(tmp_path / "x.pt", made), weights_only=True), made)
    path = write_safetensors(tmp_path / "x.safetensors", made)
    assert_holds(safetensors.torch.load_file(path), made)


# Both


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".safetensors"])
def test_the_ending_decides(tmp_path, ending):
    made = [make("w", "float32", (2,))]
    path = tmp_path / f"x{ending}"
    last = checkpoint(tmp_path)
    target = destination(path, last, AverageOptions())
    write(lay_out(target, [made[0][0]], {}, last, AverageOptions()), [made[0][1]])
    load = safetensors.torch.load_file if target.kind == "safetensors" else torch.load
    assert (target.kind == "safetensors") == (ending == ".safetensors")
    assert_holds(load(path), made)


@pytest.mark.parametrize("container", ["torch", "safetensors", "huggingface", "dcp"])
def test_a_slash_or_a_directory_that_is_there_asks_for_a_directory(tmp_path, container):
    last = checkpoint(tmp_path, container)
    assert destination(f"{tmp_path}/new.pt/", last, AverageOptions()).kind == "directory"
    assert destination(tmp_path, last, AverageOptions()).kind == "directory"


def test_directories_become_a_directory_by_any_other_name(tmp_path):
    last = checkpoint(tmp_path, "huggingface")
    assert destination(tmp_path / "Llama-3.1-avg", last, AverageOptions()).kind == "directory"
    assert destination(tmp_path / "x.safetensors", last, AverageOptions()).kind == "safetensors"


def test_shards_need_a_directory(tmp_path):
    options = AverageOptions(max_shard_size=10)
    with pytest.raises(OutputError, match="shards need a directory"):
        destination(tmp_path / "x.safetensors", checkpoint(tmp_path), options)


@pytest.mark.parametrize("output", ["s3://bucket/x.pt", "memory://x.pt"])
def test_outputs_behind_urls_are_refused(tmp_path, output):
    with pytest.raises(OutputError, match="on this machine only"):
        destination(output, checkpoint(tmp_path), AverageOptions())


@pytest.mark.parametrize("name", ["x", "x.npz", "x.PT.gz", ".pt"])
def test_an_ending_that_stands_for_nothing_is_an_error(tmp_path, name):
    with pytest.raises(OutputError, match="ending"):
        destination(tmp_path / name, checkpoint(tmp_path), AverageOptions())


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_same_input_gives_the_same_bytes(tmp_path, ending):
    script = """
import sys
from pathlib import Path
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.merge.jobs import OutputTensor
from ckptavg.merge.recipe import AverageOptions
from ckptavg.write.output import Output
from ckptavg.formats.tensors import DTYPES
from ckptavg.write.layouts import destination, lay_out

path = Path(sys.argv[1])
dtypes = [dtype for dtype in DTYPES if dtype.code]
tensors = [OutputTensor((d.name, d.name + "2"), d, (2, 3), 6 * d.itemsize) for d in dtypes]
versions = {"": {"version": 1}, "a": {"version": 1, "name": "version"}}
metadata = {name: "x" for name in {"one", "format", "other"}}
last = Checkpoint(path, "torch", (), {}, metadata, "", module_versions=versions)
entry = {name: "x" for name in {"one", "scheme", "other"}}
options = AverageOptions()
layout = lay_out(destination(path, last, options), tensors, entry, last, options)
with Output(layout, force=False, fsync=False) as output:
    for index, targets in enumerate(layout.targets):
        for target in targets:
            output.write(target, memoryview(bytes([index]) * tensors[index].nbytes))
    output.publish()
"""
    paths = [tmp_path / f"{seed}.{ending}" for seed in (1, 2)]
    for seed, path in enumerate(paths):
        subprocess.run(
            [sys.executable, "-c", script, str(path)],
            check=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": str(seed), "TZ": f"UTC+{seed}"},
        )
    assert paths[0].read_bytes() == paths[1].read_bytes()


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.lists(NAMES, min_size=1, max_size=3),
            st.sampled_from([dtype.name for dtype in DTYPES]),
            SHAPES,
        ),
        max_size=6,
        unique_by=lambda item: item[0][0],
    )
)
def test_any_tensors_come_back_from_the_real_libraries(tmp_path, wanted):
    taken: set[str] = set()
    made = []
    for names, dtype, shape in wanted:
        fresh = [name for name in dict.fromkeys(names) if name not in taken]
        taken |= set(fresh)
        if fresh:
            made.append(make(fresh, dtype, shape))
    assert_holds(torch.load(write_torch(tmp_path / "x.pt", made), weights_only=True), made)
    known = [item for item in made if item[0].dtype.name not in {"complex128", "float8_e8m0fnu"}]
    path = write_safetensors(tmp_path / "x.safetensors", known)
    assert_holds(safetensors.torch.load_file(path), known)


# Large


@pytest.mark.parametrize("ours", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_more_records_than_a_plain_zip_can_count(tmp_path, ours):
    """To read the pickle of so many tensors, as `ours` does, takes most of the time."""
    count = 70_000
    tensors = [
        OutputTensor((f"layer.{index}",), BY_NAME["uint16"], (1,), 2) for index in range(count)
    ]
    contents = [index.to_bytes(4, "little")[:2] for index in range(count)]
    path = write(lay_out_torch(tmp_path / "x.pt", tensors, {}, checkpoint(tmp_path)), contents)
    end = path.read_bytes()[-22:]
    assert end[8:12] == b"\xff\xff\xff\xff", "look into the 64-bit trailer"
    reader = torch._C.PyTorchFileReader(str(path))
    assert len(reader.get_all_records()) == count + 3
    assert reader.get_record("data/69999") == contents[-1]
    if ours:
        opened = open_checkpoint(path)
        assert len(opened.tensors) == count
        assert opened.read("layer.69999").tobytes() == contents[-1]


def write_sparse(path, layout, contents):
    """Fill a layout that is mostly a hole; only small records get their checksum."""
    with path.open("wb") as file:
        file.truncate(layout.size)
        for offset, blob in layout.files[""].blobs:
            file.seek(offset)
            file.write(blob)
        for targets, content in zip(layout.targets, contents, strict=True):
            file.seek(targets[0])
            file.write(content)
            for checksum in layout.files[""].checksums:
                if checksum.start == targets[0] and checksum.size == len(content):
                    for target in checksum.targets:
                        file.seek(target)
                        file.write(zlib.crc32(content).to_bytes(4, "little"))
    return path


def local_extra(path, entry):
    """The extra field of a record's own header, which `zipfile` passes over."""
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<2H", file.read(4))
        return file.read(name + extra)[name:]


def test_records_beyond_four_gigabytes_are_found(tmp_path):
    big = 5 << 30
    tensors = [
        OutputTensor(("first",), BY_NAME["float32"], (2,), 8),
        OutputTensor(("huge",), BY_NAME["uint8"], (big,), big),
        OutputTensor(("exact",), BY_NAME["uint8"], ((1 << 32) - 1,), (1 << 32) - 1),
        OutputTensor(("below",), BY_NAME["uint8"], ((1 << 32) - 2,), (1 << 32) - 2),
        OutputTensor(("last",), BY_NAME["float32"], (2,), 8),
    ]
    path = tmp_path / "x.pt"
    layout = lay_out_torch(path, tensors, {}, checkpoint(tmp_path))
    contents = [
        np.array([1, 2], np.float32).tobytes(),
        b"a",
        b"b",
        b"c",
        np.array([3, 4], np.float32).tobytes(),
    ]
    path = write_sparse(path, layout, contents)
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no holes")
    with zipfile.ZipFile(path) as archive:
        by_name = {entry.filename: entry for entry in archive.infolist()}
        for index, tensor in enumerate(tensors):
            entry = by_name[f"archive/data/{index}"]
            assert entry.file_size == entry.compress_size == tensor.nbytes
            with archive.open(entry) as record:
                assert record.read(1) == contents[index][:1]
            wide = struct.pack("<2H2Q", 1, 16, tensor.nbytes, tensor.nbytes)
            assert (wide in local_extra(path, entry)) == (tensor.nbytes >= 0xFFFFFFFF)
    state = torch.load(path, weights_only=True, mmap=True)
    assert state["first"].tolist() == [1, 2]
    assert state["last"].tolist() == [3, 4]
    assert state["huge"].shape == (big,)
    assert [int(state[name][0]) for name in ("huge", "exact", "below")] == [97, 98, 99]
    assert open_checkpoint(path).read("last").tolist() == [3, 4]


@pytest.mark.slow
def test_a_whole_file_beyond_four_gigabytes_is_sound(tmp_path):
    size = (4 << 30) + 5
    tensors = [
        OutputTensor(("huge",), BY_NAME["uint8"], (size,), size),
        OutputTensor(("last",), BY_NAME["float32"], (2,), 8),
    ]
    contents = [b"a", np.array([3, 4], np.float32).tobytes()]
    path = write(lay_out_torch(tmp_path / "x.pt", tensors, {}, checkpoint(tmp_path)), contents)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    state = torch.load(path, weights_only=True, mmap=True)
    assert int(state["huge"][0]) == 97
    assert state["last"].tolist() == [3, 4]
