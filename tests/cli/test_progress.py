"""Progress bars, on a terminal of their own."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch

from tests.oracle import save_run

pty = pytest.importorskip("pty")

# A run of the command line whose bars are drawn after so many seconds. It reports each chunk, so
# that the first report is not the last, whichever thread is faster. It ends by saying, on the
# terminal, whether tqdm was imported.
SCRIPT = """
import sys
from ckptavg import cli
from ckptavg.cli import console
from ckptavg.merge import engine
engine._REPORT_EVERY = 1
console._DELAY = float(sys.argv.pop(1))
try:
    cli.main()
finally:
    print("tqdm", "tqdm" in sys.modules, file=sys.stderr)
"""


def on_a_terminal(*command, delay=0.0, columns=80):
    """Exit code, and what the command has shown on a terminal of its own."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(  # noqa: S606
            sys.executable, [sys.executable, "-c", SCRIPT, str(delay), *map(str, command)]
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # that is how a terminal ends
            break
        if not piece:
            break
        shown += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


@pytest.fixture
def average(tmp_path):
    """A run that reports its progress several times."""
    save_run(tmp_path / "run", [{"a": torch.full((1_000_000,), float(n))} for n in range(3)])
    return ["average", tmp_path / "run", "-o", tmp_path / "o.safetensors"]


pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def test_shows_bytes_and_their_rate_and_clears_its_line(average):
    code, shown = on_a_terminal(*average)
    assert code == 0
    drawn, _, after = shown.rpartition("B/s")
    assert "averaging: " in drawn
    assert "/4.00M [00:" in drawn
    assert after.split("\r")[1].strip() == ""
    assert "averaging" not in after


def test_leaves_the_bar_out_where_there_is_no_room(average):
    code, shown = on_a_terminal(*average, columns=40)
    assert code == 0
    assert re.search(r"averaging: +\d+%, (\?|[\d:]+) left", shown)
    assert "|" not in shown


def test_is_not_drawn_in_a_quick_run(average):
    code, shown = on_a_terminal(*average, delay=60)
    assert code == 0
    assert "B/s" not in shown
    assert "tqdm False" in shown


def test_is_not_drawn_when_quiet(average):
    code, shown = on_a_terminal(*average, "--quiet")
    assert (code, shown.split()) == (0, ["tqdm", "False"])


def test_is_not_drawn_in_a_pipe(average):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "0", *map(str, average)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.split() == ["tqdm", "False"]
