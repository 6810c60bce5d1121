"""The processes that `torchrun` starts for one command.

A process that works alone has a `Ranks` too (`ALONE`), which does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ckptavg.errors import CkptAvgError, PeerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

Value = TypeVar("Value")

_START_TIMEOUT = timedelta(minutes=5)  # until all processes have arrived
_WORK_TIMEOUT = timedelta(days=7)  # until the slowest process has done its share
_FAILED = "ckptavg/failed"  # key in the store that a failing process sets
_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"


class Ranks:
    """This process and the others that share its work.

    Args:
        group: torch's process group; None for this process alone.
        store: torch's key-value store, in which a failing process leaves a mark for the others.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, group: ProcessGroup | None = None, store: Store | None = None) -> None:
        self._group, self._store = group, store
        self._announced: Exception | None = None
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    def share(self, batches: int) -> int:
        """The most batches that a process has when so many are divided among all."""
        return -(-batches // self.size)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in the order of ranks. All processes must call this.

        A failing process sends a `PeerError` instead of a value.

        Raises:
            PeerError: another process has failed.
            CkptAvgError: another process has died.
        """
        if self.size == 1:
            return [value]
        values = self._exchange(value)
        for each in values:
            if isinstance(each, PeerError):
                raise each
        return values

    def _exchange(self, value: Any) -> list[Any]:  # noqa: ANN401
        import torch.distributed as dist  # noqa: PLC0415 - only several processes need torch

        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise CkptAvgError(
                f"lost the connection to another process: {str(error).splitlines()[0]}"
            ) from error
        return values

    def has_failed_peer(self) -> bool:
        """Whether another process has failed, so that the next `gather` will raise."""
        if self._store is None:
            return False
        try:
            return bool(self._store.check([_FAILED]))
        except RuntimeError:  # the process that serves the store has died
            return True

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let all processes fail if one fails in this block.

        The one that fails raises its own error.

        Raises:
            PeerError: another process has failed.
        """
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            # An outer block sees the error of an inner one again.
            if self.size > 1 and error is not self._announced:
                self._announced = error
                self._announce(error)
            raise

    def _announce(self, error: Exception) -> None:
        """Tell the other processes of an error.

        Raises:
            PeerError: a process of a lower rank fails at the same time, and reports its error.
        """
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(_FAILED, str(self.rank))
        failure = PeerError(f"process {self.rank} of {self.size} failed: {error}")
        try:
            values = self._exchange(failure)
        except CkptAvgError:  # the others have died already
            return
        for value in values[: self.rank]:
            if isinstance(value, PeerError):
                raise value from error

    def close(self) -> None:
        """Drop the references to the process group and the store: see `_clear_frames`."""
        self._group = self._store = None


ALONE: Final = Ranks()
"""The ranks of a process that works alone."""


@contextlib.contextmanager
def launched_ranks(*, only_torchrun: bool = False) -> Iterator[Ranks]:
    """The processes that a launcher started for this command, or this process alone.

    If one of them fails, all fail: see `Ranks.together`.

    Args:
        only_torchrun: ignore the variables of other launchers, which containers and job schedulers
            may set for other commands.

    Raises:
        CkptAvgError: the other processes did not arrive.
        PeerError: another process has failed.
    """
    if not is_launched() or (only_torchrun and _TORCHRUN_VARIABLE not in os.environ):
        yield ALONE
        return
    import torch.distributed as dist  # noqa: PLC0415 - only several processes need torch

    ranks = _join_group()
    try:
        with ranks.together():
            yield ranks
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        ranks.close()
        dist.destroy_process_group()


def _clear_frames(error: BaseException | None) -> None:
    """Drop the local variables of the frames in the tracebacks of an error and of its causes.

    Torch's frames hold the process group. If it lives until the interpreter exits, its threads
    sometimes abort the process then.
    """
    left, cleared = [error], set[int]()
    while left:
        error = left.pop()
        if error is not None and id(error) not in cleared:  # causes may run in a circle
            cleared.add(id(error))
            traceback.clear_frames(error.__traceback__)
            left += [error.__cause__, error.__context__]


def _join_group() -> Ranks:
    """Wait for the other processes, and make a process group of all.

    Raises:
        CkptAvgError: they did not arrive.
    """
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.distributed_c10d import PrefixStore  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    cuda = torch.cuda.is_available()
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
        store.set_timeout(_START_TIMEOUT)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("ckptavg", store),
            rank=rank,
            world_size=size,
            timeout=_WORK_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        size = os.environ["WORLD_SIZE"]
        raise CkptAvgError(
            f"RANK and WORLD_SIZE={size} are set, and the {size} processes did not connect: "
            f"{str(error).splitlines()[0]}",
            remedy="start it with torchrun --no-python, or unset RANK to run it alone",
        ) from error
    if cuda:
        torch.cuda.set_device(local_device(None))
    return Ranks(dist.group.WORLD, store)


def local_device(device: torch.device | str | None) -> torch.device | str:
    """Device on which this process computes. Each launched process takes its own GPU.

    Args:
        device: the user's choice; None for a GPU if there is one, else the CPU.
    """
    import torch  # noqa: PLC0415

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if str(device) == "cuda" and is_launched():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    return device


def is_launched() -> bool:
    """Whether a launcher such as `torchrun` started several processes of this command.

    A process that a training script starts inherits the script's variables, but works alone.
    """
    if not os.environ.keys() >= _VARIABLES or os.environ["WORLD_SIZE"] == "1":
        return False
    return not _descends_from_rank()


def _descends_from_rank() -> bool:
    """Whether a Python process with the same RANK started this one, directly or through shells.

    `torchrun` itself has no RANK. False where the system has no /proc.
    """
    rank = f"RANK={os.environ['RANK']}".encode()
    process = Path("/proc", str(os.getppid()))
    try:
        while rank in (process / "environ").read_bytes().split(b"\0"):
            if (process / "exe").readlink().name.startswith("python"):
                return True
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            process = Path("/proc", parent)
    except OSError:
        return False
    return False
