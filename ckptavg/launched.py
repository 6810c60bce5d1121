"""Whether this process is one of several that `torchrun` has started for the same command."""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether others work on the same command.

    What a training script starts by itself has the script's variables, and nobody to work with.
    """
    variables = all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"
    return variables and not _is_child_of_a_rank()


def _is_child_of_a_rank() -> bool:
    """Whether the process that started this one is a rank's own script (where /proc tells it).

    A shell that `torchrun` has started in order to start us is none.
    """
    parent = Path("/proc", str(os.getppid()))
    try:
        started_with = (parent / "environ").read_bytes().split(b"\0")
        program = os.path.basename(os.readlink(parent / "exe"))  # noqa: PTH115, PTH119
    except OSError:
        return False
    return f"RANK={os.environ['RANK']}".encode() in started_with and program.startswith("python")
