"""Files that are damaged or made to do harm: one line, soon, in little memory, and nothing left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptavg.errors import CkptAvgError
from ckptavg.formats import open_checkpoint
from tests.helpers import all_but_slow
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


def test_every_beginning_of_a_file_is_refused_by_name(tmp_path):
    _every_cut(tmp_path / "cut")
    for path in (tmp_path / "cut").iterdir():
        with pytest.raises(CkptAvgError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).isprintable()
