"""The output is there whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
import zlib
from pathlib import Path

import pytest

from ckptavg.errors import OutputError
from ckptavg.merge.jobs import Checksum, FileLayout, Layout
from ckptavg.write.output import Output
from ckptavg.write.temporary import temporary_beside
from ckptavg.write.writing import check_outputs

LAYOUT = FileLayout(size=20, blobs=((0, b"head"),))


def a_file(path: Path, layout: FileLayout = LAYOUT) -> Layout:
    return Layout(path, {"": layout}, ())


def write(
    path: Path, *, force: bool = False, fsync: bool = True, layout: FileLayout = LAYOUT
) -> None:
    with Output(a_file(path, layout), force=force, fsync=fsync) as sink:
        sink.write(4, memoryview(b"0123456789abcdef"))
        sink.publish()


@pytest.mark.parametrize("fsync", [True, False])
def test_appears_whole_and_alone(tmp_path, fsync):
    write(tmp_path / "out", fsync=fsync)
    assert (tmp_path / "out").read_bytes() == b"head0123456789abcdef"
    assert os.listdir(tmp_path) == ["out"]


def test_has_the_permissions_of_any_new_file(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "other").touch()
    mode = stat.S_IMODE((tmp_path / "out").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_replaces_only_with_force(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already"):
        write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"old"
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_bytes().startswith(b"head")
    assert os.listdir(tmp_path) == ["out"]


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    (tmp_path / "out").write_bytes(b"secret")
    (tmp_path / "out").chmod(0o600)
    write(tmp_path / "out", force=True)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


def test_the_longest_of_names_can_be_replaced(tmp_path):
    name = "\u5b57" * 85
    write(tmp_path / name)
    write(tmp_path / name, force=True)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve(tmp_path, monkeypatch, number):
    def refuse(*_arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_size == LAYOUT.size


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_directory_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    original = os.fsync

    def refuse(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        original(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path / "out")
    assert (tmp_path / "out").exists()


def test_of_two_writers_at_once_one_wins_and_the_other_says_so(tmp_path):
    with Output(a_file(tmp_path / "out"), force=False, fsync=False) as first:
        write(tmp_path / "out")
        with pytest.raises(OutputError, match="another process wrote it meanwhile"):
            first.publish()
    assert (tmp_path / "out").read_bytes() == b"head0123456789abcdef"
    assert os.listdir(tmp_path) == ["out"]


def test_an_exception_leaves_what_was_there_before(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    with (
        pytest.raises(KeyboardInterrupt),
        Output(a_file(tmp_path / "out"), force=True, fsync=True),
    ):
        raise KeyboardInterrupt
    assert (tmp_path / "out").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate", "link"])
def test_a_failing_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    def fail(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=r"out: cannot write it: No space left.*20 bytes"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_failure_of_the_background_write_is_not_forgotten(tmp_path, monkeypatch):
    """The kernel reports it once; the fsync at the end would succeed."""

    synced = threading.Event()

    def fail(_fd):
        synced.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr("ckptavg.write.output._SYNC_EVERY", 1)
    with Output(a_file(tmp_path / "out"), force=False, fsync=True) as sink:
        sink.write(4, memoryview(b"0123"))
        assert synced.wait(10)
        with pytest.raises(OutputError, match="cannot write it: Input/output error"):
            sink.publish()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_found_before_the_work_starts(tmp_path):
    enormous = FileLayout(size=1 << 60)
    with (
        pytest.raises(OutputError, match="cannot write it"),
        Output(a_file(tmp_path / "out", enormous), force=False, fsync=False),
    ):
        pytest.fail("it began")
    assert os.listdir(tmp_path) == []


def test_checksums_are_filled_in_from_what_was_written(tmp_path):
    layout = FileLayout(24, ((0, b"head"),), (Checksum(4, 16, (0, 20)),))
    write(tmp_path / "out", layout=layout)
    crc = zlib.crc32(b"0123456789abcdef").to_bytes(4, "little")
    assert (tmp_path / "out").read_bytes() == crc + b"0123456789abcdef" + crc


def test_a_file_that_is_shortened_meanwhile_is_an_error(tmp_path):
    layout = FileLayout(24, ((0, b"head"),), (Checksum(4, 16, (0, 20)),))
    with Output(a_file(tmp_path / "out", layout), force=False, fsync=False) as sink:
        sink.write(4, memoryview(b"0123456789abcdef"))
        os.truncate(sink.temporary, 10)
        with pytest.raises(OutputError, match="out: cannot write it: it was shortened meanwhile"):
            sink.publish()
    assert os.listdir(tmp_path) == []


class TestLink:
    """A link is written through: it stays, and what it leads to is replaced."""

    @pytest.fixture
    def real(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out").symlink_to("elsewhere/real")
        return tmp_path / "elsewhere" / "real"

    def assert_written(self, real, tmp_path):
        assert real.read_bytes() == b"head0123456789abcdef"
        assert str((tmp_path / "out").readlink()) == "elsewhere/real"
        assert os.listdir(real.parent) == ["real"]
        assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]

    def test_to_a_file(self, tmp_path, real):
        real.write_bytes(b"old")
        real.chmod(0o640)
        write(tmp_path / "out", force=True)
        self.assert_written(real, tmp_path)
        assert stat.S_IMODE(real.stat().st_mode) == 0o640

    def test_to_nothing(self, tmp_path, real):
        check_outputs([a_file(tmp_path / "out")], force=True)
        write(tmp_path / "out", force=True)
        self.assert_written(real, tmp_path)

    def test_has_the_temporary_file_beside_what_it_leads_to(self, tmp_path, real):
        with Output(a_file(tmp_path / "out"), force=True, fsync=False) as sink:
            assert sink.temporary.parent == real.parent

    @pytest.mark.parametrize("target", ["old", None])
    def test_needs_force(self, tmp_path, real, target):
        if target is not None:
            real.write_text(target)
        with pytest.raises(OutputError, match="exists already"):
            check_outputs([a_file(tmp_path / "out")], force=False)

    def test_into_a_directory_that_is_not_there(self, tmp_path, real):
        real.parent.rmdir()
        with pytest.raises(OutputError, match=r"there is no directory .*elsewhere"):
            check_outputs([a_file(tmp_path / "out")], force=True)


class TestDestination:
    def test_a_missing_directory_is_named(self, tmp_path):
        with pytest.raises(OutputError, match="there is no directory"):
            check_outputs([a_file(tmp_path / "no" / "out")], force=False)

    def test_a_directory_is_no_file(self, tmp_path):
        with pytest.raises(OutputError, match="is a directory"):
            check_outputs([a_file(tmp_path)], force=True)

    def test_a_fifo_is_no_file(self, tmp_path):
        os.mkfifo(tmp_path / "out")
        with pytest.raises(OutputError, match="is not a regular file"):
            check_outputs([a_file(tmp_path / "out")], force=True)

    def test_a_dangling_symlink_exists(self, tmp_path):
        (tmp_path / "out").symlink_to("nowhere")
        with pytest.raises(OutputError, match="exists already"):
            check_outputs([a_file(tmp_path / "out")], force=False)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_directory_without_permission(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(OutputError, match="is not writable"):
            check_outputs([a_file(tmp_path / "locked" / "out")], force=False)


def test_within_a_directory_of_its_own_no_other_run_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    with temporary_beside(tmp_path / "out", folder=True) as folder:
        (folder / "out").write_bytes(b"old")
        with Output(a_file(folder / "out", FileLayout(3)), force=True, fsync=False) as out:
            out.write(0, memoryview(b"new"))
            out.publish()
    assert list(tmp_path.iterdir()) == []
