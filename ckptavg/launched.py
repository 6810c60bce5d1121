"""Whether this process is one of several that `torchrun` has started for the same command."""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_TORCHRUN = "TORCHELASTIC_RUN_ID"


def is_launched() -> bool:
    """Whether others work on the same command.

    What a training script starts by itself has the script's variables, and nobody to work with.
    """
    variables = all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"
    return variables and not _comes_from_a_rank()


def is_launched_by_torchrun() -> bool:
    """Whether that is sure: a container or a shell may have the variables for other commands."""
    return _OF_TORCHRUN in os.environ and is_launched()


def _comes_from_a_rank() -> bool:
    """Whether a rank's own script started this, itself or by way of a shell (where /proc tells).

    `torchrun` has no rank, and a shell that it started in order to start us is no script.
    """
    rank, process = f"RANK={os.environ['RANK']}".encode(), Path("/proc", str(os.getppid()))
    try:
        while rank in (process / "environ").read_bytes().split(b"\0"):
            if (process / "exe").readlink().name.startswith("python"):
                return True
            status = (process / "stat").read_text()
            process = Path("/proc", status.rpartition(")")[2].split()[1])
    except OSError:
        return False
    return False
