"""The bar, on a terminal of its own."""

import os
import sys

import pytest
import torch

from tests.oracle import save_run

pty = pytest.importorskip("pty")


def _on_a_terminal(*command):
    """Exit code, and what the command has shown."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "ckptavg", *map(str, command)])  # noqa: S606
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


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("quiet", [False, True])
def test_bytes_and_their_rate(tmp_path, quiet):
    save_run(tmp_path / "run", [{"a": torch.full((100_000,), float(n))} for n in range(3)])
    options = ["--quiet"] if quiet else []
    command = ["average", tmp_path / "run", "-o", tmp_path / "o.safetensors", *options]
    code, shown = _on_a_terminal(*command)
    assert code == 0
    assert ("400.0 kB of 400.0 kB, " in shown) is not quiet
    assert ("B/s" in shown) is not quiet
