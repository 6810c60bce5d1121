"""Files that are damaged or made to do harm: one line, soon, in little memory, and nothing left."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ckptavg.errors import CkptAvgError
from ckptavg.formats import open_checkpoint
from tests.helpers import all_but_slow, outcome
from tests.hostile_files import ALIKE, KINDS, MEMORY, SECONDS, _every_cut
from tests.pickle_bombs import Asked


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """What comes of a kind, in processes of their own."""
    asked = Asked("tests.hostile_files", tmp_path_factory.mktemp("hostile"))
    yield asked
    asked.close()


@pytest.mark.parametrize("kind", all_but_slow(KINDS, ALIKE))
def test_is_one_line_and_nothing_else(asked, kind):
    code, said, seconds, memory, nothing_left = asked(kind)
    assert code == "1", said
    assert said.startswith("ckptavg: error: ")
    assert said.endswith("\n")
    assert said[:-1].isprintable(), said
    assert len(said) < 2_000
    assert seconds < SECONDS
    assert memory < MEMORY
    assert nothing_left


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("100,001 tensors", "has 100,001 tensors, more than the 100,000 that a file may have"),
        ("17 MB of metadata", "for 1 tensors at most 16,000,300"),
        ("1,000 state dicts", "has more than 100 state dicts in it; choose one with --key"),
    ],
)
def test_what_is_above_a_limit_is_told_the_limit(asked, kind, limit):
    assert limit in asked(kind)[1]


@pytest.mark.slow
def test_a_file_of_as_many_tensors_as_it_may_have_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    entries = (b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(100_000))
    header = b'{"__metadata__":{"a":"%s"},%s}' % (b"x" * 15_900_000, b",".join(entries))
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert len(open_checkpoint(path).tensors) == 100_000


def test_holes_of_files_are_not_read(tmp_path):
    """Copies are found out by comparing all of their bytes, here of 1 TB each."""
    for name in ("epoch_1", "epoch_2"):
        entry = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (1 << 38, 1 << 40)
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(len(entry).to_bytes(8, "little") + entry)
        os.truncate(path, 8 + len(entry) + (1 << 40))
        with path.open("r+b") as file:
            file.seek(1 << 39)
            file.write(b"x" if name == "epoch_1" else b"y")
    _, out, _ = outcome("average", tmp_path, "-o", tmp_path / "o.safetensors", "--dry-run")
    assert "would average 2 checkpoints" in out


def test_every_beginning_of_a_file_is_refused_by_name(tmp_path):
    _every_cut(tmp_path / "cut")
    for path in (tmp_path / "cut").iterdir():
        with pytest.raises(CkptAvgError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).isprintable()
