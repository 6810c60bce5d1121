"""Processes that share their work, with the environment that `torchrun` gives them.

They are forks of one process that has imported everything and computed nothing, so that a test
of three processes does not import torch three times.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        # Without pytest each fork would import it: it is the main module of the tests.
        *("pytest", "tests.ranks", "tests.gloo", "ckptavg.cli", "ckptavg.average"),
        *("ckptavg.batchnorm.together", "ckptavg.evaluation.judging", "ckptavg.landscape.rays"),
        "ckptavg.evaluation.sweep",
        # What a refresh, an optimizer and a saved state import when they are first needed.
        *("ckptavg.landscape.saving", "numpy.random", "torch._dynamo", "fsspec"),
    ]
)
LONGEST = 300  # seconds until a process ends whose test was killed
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the host's name may resolve to nothing


def variables(size: int) -> dict[str, str]:
    """What the launcher sets for all of its processes alike."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "none",
        "GLOO_SOCKET_IFNAME": LOOPBACK,
    }


def command(*words: object) -> Callable[[], None]:
    """A call of the command line."""
    return partial(_command, *map(str, words))


def _command(*words: str) -> None:
    from ckptavg.cli import main

    sys.argv = ["ckptavg", *words]
    main()


class Job:
    """Several processes, or a single one that nobody has launched.

    Args:
        calls: what each process does.
        folder: where they work.
        more: of their environment.

    Attributes:
        processes: one for each call.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], folder: Path, **more: str) -> None:
        self._said = tempfile.TemporaryDirectory()
        common = (variables(len(calls)) if len(calls) > 1 else {}) | more
        self.processes = []
        for rank, call in enumerate(calls):
            environment = common | {"RANK": str(rank)} if len(calls) > 1 else common
            files = [Path(self._said.name, f"{name}{rank}") for name in ("out", "err")]
            arguments = (call, folder, environment, files)
            self.processes.append(SERVER.Process(target=_work, args=arguments))
            self.processes[-1].start()

    def finish(self, *codes: int) -> list[tuple[str, str]]:
        """Wait for the processes, and expect these exit codes.

        Returns:
            What each has printed: stdout and stderr.
        """
        for process in self.processes:
            process.join(timeout=120)
            process.kill()
            process.join()
        outputs = [
            (Path(self._said.name, f"out{rank}").read_text(),
             Path(self._said.name, f"err{rank}").read_text())
            for rank in range(len(self.processes))
        ]  # fmt: skip
        self._said.cleanup()
        assert [process.exitcode for process in self.processes] == list(codes), outputs
        return outputs


def _work(
    call: Callable[[], Any], folder: Path, environment: dict[str, str], files: Sequence[Path]
) -> None:
    """What a process does; what it prints goes into files."""
    import torch

    signal.alarm(LONGEST)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)  # sums do not depend on how many share them
    call()
