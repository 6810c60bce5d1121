"""Several processes that share a pass, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ckptavg.errors import CkptAvgError, PeerError
from ckptavg.launched import is_launched

if TYPE_CHECKING:
    from collections.abc import Iterator

Value = TypeVar("Value")

_FOR_PEERS = timedelta(minutes=5)  # until all processes are there
_FOR_WORK = timedelta(days=7)  # until the slowest has done its share
_FAILED = "ckptavg/failed"


class Ranks:
    """This process among those that work on the same pass; alone unless there is a group.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, store: Any = None) -> None:  # noqa: ANN401
        self._group, self._store = group, store
        self._told: Exception | None = None
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def leave(self) -> None:
        """Let go of the others.

        An error's frames may hold this object until the interpreter ends, and torch's threads, if
        they end only then, at times take the process with them (SIGABRT).
        """
        self._group = self._store = None

    def gather(self, value: Value) -> list[Value]:
        """The value of each process, in the order of ranks; all have to call it.

        Raises:
            PeerError: another has failed.
            CkptAvgError: another is gone.
        """
        if self.size == 1:
            return [value]
        return self._gather(value)

    def _gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self._group)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise CkptAvgError(f"another process is gone: {str(error).splitlines()[0]}") from error
        failed = [one for one in found if isinstance(one, _Failure)]
        if failed and not isinstance(value, _Failure):
            raise PeerError(failed[0].message)
        return found

    def has_failed_peer(self) -> bool:
        """Whether another has failed, which the next `gather` raises: there is no need to go on."""
        if self._store is None:
            return False
        try:
            return bool(self._store.check([_FAILED]))
        except RuntimeError:  # who holds it is gone
            return True

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If one process fails, all do: the first with its own error, the rest with a `PeerError`.

        Raises:
            PeerError: another has failed.
        """
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if self.size > 1 and error is not self._told:
                self._told = error
                if self._store is not None:
                    with contextlib.suppress(RuntimeError):
                        self._store.set(_FAILED, str(self.rank))
                self._settle(error)
            raise

    def _settle(self, error: Exception) -> None:
        """Tell the others; of several that fail at once only the first is to speak.

        Raises:
            PeerError: that is another.
        """
        failure = _Failure(f"process {self.rank} of {self.size} failed: {error}")
        try:
            found = self._gather(failure)
        except CkptAvgError:  # they are gone already
            return
        first = next(rank for rank, one in enumerate(found) if isinstance(one, _Failure))
        if first != self.rank:
            raise PeerError(found[first].message) from error


class _Failure:
    """Takes the place of a value in an exchange."""

    def __init__(self, message: str) -> None:
        self.message = message


@contextlib.contextmanager
def from_environment() -> Iterator[Ranks]:
    """The processes that `torchrun` has started, this one among them; or this one alone.

    Raises:
        CkptAvgError: the others do not come.
    """
    if not is_launched():
        yield Ranks()
        return
    size = os.environ["WORLD_SIZE"]
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=_FOR_PEERS)))
        store.set_timeout(_FOR_PEERS)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("ckptavg", store),
            rank=rank,
            world_size=world,
            timeout=_FOR_WORK,
        )
    except (RuntimeError, ValueError) as error:
        raise CkptAvgError(
            f"RANK and WORLD_SIZE={size} are set, and the {size} processes did not come together: "
            f"{str(error).splitlines()[0]}",
            remedy="start it with torchrun --no-python, or unset RANK to run it alone",
        ) from error
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(own_device(None))
        ranks = Ranks(dist.group.WORLD, store)
        del store
        try:
            yield ranks
        finally:
            ranks.leave()
    finally:
        dist.destroy_process_group()


def own_device(wanted: torch.device | str | None) -> torch.device | str:
    """The device that is meant; None for a GPU if there are any. Each process has its own GPU."""
    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if str(device) == "cuda" and is_launched():
        local, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
        return f"cuda:{int(local) % max(1, count)}"
    return device
