"""What fuzzing has found stays mended, and containers that are wrong somewhere are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptavg.formats import open_checkpoint
from tests import strategies
from tests.fuzz import mutators, targets, words
from tests.fuzz.containers import legacy_of, packed, safetensors_of, unpacked

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
INPUTS = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


def seed(target, label):
    return (CORPUS / target / f"seed-{label}").read_bytes()


def test_every_target_has_a_corpus_a_mutator_and_words():
    names = {path.name for path in CORPUS.iterdir()}
    assert names == set(targets.TARGETS) == set(mutators.MUTATORS) == set(words.WORDS)
    assert sum(path.stat().st_size for path in INPUTS) < 1 << 20


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_input_is_read_or_refused_in_one_line(tmp_path, path):
    targets.run(path.parent.name, path.read_bytes(), tmp_path)


# Containers that are put together wrong

many = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@many
@given(strategies.headers())
def test_a_sound_header_of_safetensors_is_read_as_it_is(tmp_path, header):
    entries, end = header
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_of(entries, bytes(end)))
    start = path.stat().st_size - end
    opened = open_checkpoint(path)
    assert opened.metadata == entries.pop("__metadata__", {})
    for name, entry in entries.items():
        tensor = opened.tensors[name]
        assert [tensor.dtype.code, list(tensor.shape)] == [entry["dtype"], entry["shape"]]
        assert [tensor.offset - start, tensor.offset - start + tensor.nbytes] == (
            entry["data_offsets"]
        )
        assert opened.read(name).nbytes == tensor.nbytes


@many
@given(strategies.safetensors())
def test_headers_that_are_wrong_in_places(tmp_path, data):
    targets.run("safetensors", data, tmp_path)


@many
@given(st.data())
@pytest.mark.parametrize("label", ["views", "zip64", "ours"])
def test_zips_with_odd_records(tmp_path, label, data):
    targets.run("zip", data.draw(strategies.zips(seed("zip", label))), tmp_path)


@many
@given(strategies.PICKLES)
def test_pickles_of_odd_tensors_and_modules(tmp_path, pickled):
    targets.run("pickle", pickled, tmp_path)


@many
@given(strategies.PICKLES)
def test_files_from_before_1_6_of_odd_tensors(tmp_path, pickled):
    targets.run("legacy", legacy_of(pickled), tmp_path)


@many
@given(st.data())
@pytest.mark.parametrize("label", ["nested", "strided"])
def test_directories_whose_metadata_say_something_else(tmp_path, label, data):
    metadata, shard = unpacked(seed("dcp", label), 2)
    changed = data.draw(strategies.respelled(metadata))
    targets.run("dcp", packed(changed, shard), tmp_path)


@many
@given(strategies.indices())
def test_files_beside_shards_that_name_odd_things(tmp_path, data):
    targets.run("index", data, tmp_path)
