"""A disk that is full, fails or refuses: one clear line, nothing left, the old output intact."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults import Fault, Outcome, why_not
from tests.faults_scenes import EVERY_OR_SOME, LITTER, Stage, files, folders, server, stages
from tests.helpers import all_but_slow

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
stage = stages()


def refused(stage: Stage, root: Path, done: Outcome, *words: str) -> None:
    """It failed with one line that has these words, and left all as it was."""
    assert done.code == 1, done
    assert done.err.startswith("ckptavg: error: "), done
    assert done.err.count("\n") == 1, done
    assert all(word in done.err for word in words), done
    stage.check_inputs(root)
    assert stage.left_in(root) == [], done
    assert stage.output(root) == stage.old, done
    stage.clear(root)


OWN = re.compile(f"{LITTER.pattern}|\\(deleted\\)")

# A rename needs no room, and cannot be taken back if all of them fail.
FILLING = ("create", "allocate", "write", "sync", "mkdir", "link")


@EVERY_OR_SOME
def test_a_disk_that_is_full_from_any_write_on(stage, every):
    for number in stage.instants(every, FILLING):
        fault = Fault(kinds=FILLING, number=number, act="fail", value=errno.ENOSPC, sticky=True)
        root, done = stage.play(fault)
        refused(stage, root, done, os.strerror(errno.ENOSPC), "out")


@EVERY_OR_SOME
def test_a_disk_that_fails_once_at_any_sync_is_believed(stage, every):
    """The kernel tells it but once: the next fsync would succeed."""
    for number in stage.instants(every, ("sync",)):
        fault = Fault(kinds=("sync",), number=number, act="fail", value=errno.EIO)
        root, done = stage.play(fault)
        refused(stage, root, done, os.strerror(errno.EIO), "out")


@EVERY_OR_SOME
def test_any_change_that_fails_is_a_failure_or_does_not_matter(stage, every):
    for number in stage.instants(every):
        root, done = stage.play(Fault(number=number, act="fail", value=errno.EIO))
        if done.code:
            refused(stage, root, done, os.strerror(errno.EIO), "out")
            continue
        stage.check_inputs(root)
        assert (done.err, stage.left_in(root)) == ("", []), f"at change {number}"
        assert stage.output(root) == stage.new, f"at change {number}"
        stage.clear(root)


@EVERY_OR_SOME
def test_reads_and_writes_in_pieces_make_the_same_output(stage, every):
    for number in stage.instants(every, ("read", "write")):
        root, done = stage.play(Fault(kinds=("read", "write"), number=number, act="short"))
        assert (done.code, done.err) == (0, ""), f"call {number}"
        assert stage.output(root) == stage.new, f"call {number}"
        stage.clear(root)


@EVERY_OR_SOME
def test_a_file_that_cannot_be_read_from_any_byte_on_is_named(stage, every):
    reads = [call for call in stage.calls if call.kind == "read"]
    for number in stage.instants(every, ("read",)):
        if reads[number - 1].path.endswith(".py"):
            continue  # the user's code: Python's traceback is shown
        fault = Fault(kinds=("read",), number=number, act="fail", value=errno.EIO, sticky=True)
        root, done = stage.play(fault)
        if done.code == 0:  # it was read for the command that is proposed after the average
            assert reads[number - 1].path.endswith("config.json")
            assert stage.output(root) == stage.new
            continue
        failed = [call.path for call in done.calls if call.kind == "read"][number - 1 :]
        refused(stage, root, done, os.strerror(errno.EIO))
        # What is read back of the output has no name yet, or a temporary one.
        names = {"out" if OWN.search(path) else Path(path).name for path in failed}
        assert any(name in done.err for name in names), done


@pytest.mark.parametrize(
    "stage", ["a new file", "a new directory", "a training checkpoint"], indirect=True
)
def test_room_is_made_before_any_weight_is_read(stage):
    root, done = stage.play(
        Fault(kinds=("allocate",), number=1, act="fail", value=errno.ENOSPC, sticky=True)
    )
    refused(stage, root, done, os.strerror(errno.ENOSPC))
    kinds = [call.kind for call in done.calls]
    assert done.calls[kinds.index("allocate")].name.startswith("posix_fallocate")
    first = [call.kind for call in stage.calls].index("allocate")
    assert "read" in kinds[:first]  # the headers
    assert "read" not in kinds[first:]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; where it may not be mounted, one in a namespace."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    folder.mkdir()
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            try:
                yield folder
            finally:
                subprocess.run(["umount", "-l", folder], check=True)
            return
    script = '"$@" && echo mounted && cat'
    try:
        other = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", script, "sh", *mount],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    except OSError as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    assert other.stdout is not None
    if other.stdout.readline() != "mounted\n":
        other.communicate()
        pytest.skip("nothing can be mounted here, nor in a namespace")
    try:
        yield Path(f"/proc/{other.pid}/root{folder}")
    finally:
        other.communicate()


def average(root: Path, *arguments: object) -> Outcome:
    return server().run(root, ("average", "run", "-q", *arguments))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints of 400 kB."""
    (tmp_path / "run").mkdir()
    for step in range(2):
        save_file(
            {"w": torch.full((100_000,), float(step))}, tmp_path / "run" / f"{step}.safetensors"
        )
    return tmp_path


class TestSmallDisk:
    @pytest.mark.parametrize("output", ["o.safetensors", "o.pt", "o/"])
    @pytest.mark.parametrize("missing", [1, 10, 90])
    def test_that_lacks_some_blocks_is_found_too_small(self, run, output, missing):
        if output == "o/":
            folders_of(run)
        with mounted(run / "disk", f"size={(98 - missing) * 4}k") as disk:
            done = average(run, "-o", f"{disk}/{output}")
            assert done.code == 1
            assert done.err.startswith(f"ckptavg: error: {disk}/o")
            assert "No space left on device (" in done.err
            assert " bytes are needed" in done.err
            assert done.err.count("\n") == 1
            assert os.listdir(disk) == []

    def test_with_room_for_one_of_two_keeps_the_old_one(self, run):
        with mounted(run / "disk", "size=600k") as disk:
            assert average(run, "-o", disk / "o.safetensors").code == 0
            before = (disk / "o.safetensors").read_bytes()
            done = average(run, "-o", disk / "o.safetensors", "--force", "--weights", "linear")
            assert done.code == 1
            assert "No space left" in done.err
            assert os.listdir(disk) == ["o.safetensors"]
            assert (disk / "o.safetensors").read_bytes() == before

    def test_with_room_for_each_of_two_outputs_lacks_it_for_both(self, run):
        with mounted(run / "disk", "size=600k") as disk:
            done = average(run, "-o", disk / "out", "--last", "1,2", "--hash")
            assert done.code == 1
            assert done.err.count("\n") == 1
            assert re.search(r"\(8\d{5} bytes are needed for 2 outputs, \d+ are free\)", done.err)
            assert done.count(("create", "allocate")) == 0
            assert os.listdir(disk) == []

    def test_with_room_for_it_holds_the_output_of_inputs_on_another_one(self, run):
        with mounted(run / "disk", "size=2m") as disk:
            for _ in range(2):
                done = average(run, "-o", disk / "o.safetensors", "--force")
                assert (done.code, done.err) == (0, "")
                assert load_file(disk / "o.safetensors")["w"].unique().tolist() == [0.5]
            folders_of(run)
            # Seen by way of /proc, whatever is in it looks like a mount point to Python.
            for _ in range(1 if disk.is_relative_to("/proc") else 2):
                done = average(run, "-o", f"{disk}/o/", "--force")
                assert (done.code, done.err) == (0, "")
            assert sorted(os.listdir(disk)) == ["o", "o.safetensors"]

    def test_of_no_inodes_is_full_as_well(self, run):
        with mounted(run / "disk", "size=2m,nr_inodes=1") as disk:
            done = average(run, "-o", disk / "o.safetensors")
            assert done.code == 1
            assert "No space left on device" in done.err
            assert os.listdir(disk) == []

    def test_without_room_for_the_result_is_found_before_the_model_is_made(self, run):
        (run / "train.py").write_text("raise SystemError('it began')")
        with mounted(run / "disk", "size=600k") as disk:
            assert average(run, "-o", disk / "o.safetensors").code == 0
            spec = f"{run}/train.py:x"
            arguments = ("bn-refresh", disk / "o.safetensors", "--model", spec, "--loader", spec)
            done = server(torch=True).run(run, arguments)
            assert done.code == 1
            assert done.err.startswith(
                f"ckptavg: error: {disk}/o.safetensors: cannot write it: No space left on device"
            )

    def test_without_room_for_the_result_is_found_before_the_inputs_are_hashed(self, run):
        with mounted(run / "disk", "size=100k") as disk:
            done = average(run, "-o", disk / "o.safetensors", "--hash")
            assert "No space left on device" in done.err
            assert sum(call.kind == "read" for call in done.calls) < 40
            whole = average(run, "-o", "o.safetensors", "--hash")
            assert whole.count(("read",)) > done.count(("read",))

    def test_that_is_read_only_is_refused(self, run):
        with mounted(run / "disk", "size=1m,ro") as disk:
            for output in ("o.safetensors", "o/"):
                done = average(run, "-o", f"{disk}/{output}")
                assert done.code == 1
                assert "disk is not writable" in done.err.splitlines()[-1]


def folders_of(run: Path) -> None:
    """Have the same checkpoints as directories."""
    for step in range(2):
        folder = run / "run" / f"checkpoint-{step}"
        folder.mkdir()
        (run / "run" / f"{step}.safetensors").rename(folder / "model.safetensors")
        (folder / "config.json").write_text("{}")


def without_privileges(root: Path, *arguments: object) -> Outcome:
    """Run the command as one for whom permission bits count, whoever we are."""
    command = [sys.executable, "-m", "ckptavg", *map(str, arguments)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root cannot give up its privileges here: there is no setpriv")
        command[:0] = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr, ())


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A directory whose permissions are put back."""
    files(tmp_path)
    folder = tmp_path / "locked"
    folder.mkdir()
    yield folder
    folder.chmod(0o755)


class TestPermission:
    @pytest.mark.parametrize("mode", all_but_slow([0o555, 0o444, 0o000], [0o444, 0o000]))
    def test_denied_to_the_directory_of_the_output(self, locked, mode):
        locked.chmod(mode)
        done = without_privileges(locked.parent, "average", "run", "-o", "locked/o.safetensors")
        assert done.code == 1
        assert done.err.startswith("ckptavg: error: locked")
        assert done.err.count("\n") == 1
        locked.chmod(0o755)
        assert os.listdir(locked) == []

    def test_denied_to_an_input(self, locked):
        path = locked.parent / "run" / "step_1.safetensors"
        path.chmod(0)
        done = without_privileges(locked.parent, "average", "run", "-o", "o.safetensors")
        assert done.code == 1
        assert done.err == (
            "ckptavg: error: run/step_1.safetensors: cannot read it: Permission denied\n"
        )
        assert not (locked.parent / "o.safetensors").exists()

    def test_denied_to_the_directory_of_the_inputs(self, locked):
        locked.chmod(0)
        done = without_privileges(locked.parent, "average", "locked", "-o", "o.safetensors")
        assert (done.code, done.err) == (1, "ckptavg: error: locked: Permission denied\n")

    def test_denied_to_the_directory_that_is_to_be_replaced(self, tmp_path):
        folders(tmp_path)
        assert average(tmp_path, "-o", "out/").code == 0
        (tmp_path / "out").chmod(0o555)
        done = without_privileges(tmp_path, "average", "run", "-o", "out/", "--force")
        (tmp_path / "out").chmod(0o755)
        assert done.code == 1
        assert done.err == ("ckptavg: error: out: is not writable; choose another output\n")

    def test_taken_away_during_the_run(self, locked):
        """Held before its first change, when all has been checked."""
        fault = Fault(number=1, act="before", value=signal.SIGSTOP)
        run = server().hold(locked.parent, ("average", "run", "-o", "locked/o.safetensors"), fault)
        shutil.rmtree(locked)
        done = run.to_end()
        locked.mkdir()
        assert done.code == 1
        assert done.err.startswith("ckptavg: error: locked/o.safetensors: ")
        assert done.err.count("\n") == 1


def test_a_directory_that_is_missing_is_named(tmp_path):
    files(tmp_path)
    done = average(tmp_path, "-o", "no/o.safetensors")
    assert (done.code, done.err) == (
        1, "ckptavg: error: no/o.safetensors: there is no directory no\n",
    )  # fmt: skip
