"""Loaders that a library has dealt out to processes are not dealt out again."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from lightning.fabric.wrappers import _FabricDataLoader
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from ckptavg import refresh_norm
from ckptavg.distributed import Ranks
from ckptavg.errors import RefreshError
from ckptavg.model.feeding import Feed

DATA = TensorDataset(torch.arange(64.0)[:, None])


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self):
        yield from torch.arange(64.0)[:, None]

    def __len__(self):
        return 64


def accelerated(rank: int) -> object:
    return prepare_data_loader(
        DataLoader(DATA, 8), num_processes=2, process_index=rank, put_on_device=False
    )


def accelerated_stream(rank: int) -> object:
    return prepare_data_loader(
        DataLoader(Stream(), 8), num_processes=2, process_index=rank, put_on_device=False
    )


def of_fabric(rank: int) -> object:
    sampler: DistributedSampler[object] = DistributedSampler(
        DATA, num_replicas=2, rank=rank, shuffle=False
    )
    return _FabricDataLoader(DataLoader(DATA, 8, sampler=sampler))


def of(rank: int, size: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


LOADERS = pytest.mark.parametrize("make", [accelerated, accelerated_stream, of_fabric])


@LOADERS
def test_each_example_is_drawn_once(make):
    drawn = []
    for rank in range(2):
        for _, batch in Feed(make(rank), of(rank, 2)):
            drawn += (batch[0] if isinstance(batch, list | tuple) else batch).flatten().tolist()
    assert sorted(drawn) == DATA.tensors[0].flatten().tolist()


@LOADERS
def test_for_other_processes_they_are_refused(make):
    with pytest.raises(RefreshError, match="for process 1 of 2, and this is process 1 of 3"):
        list(Feed(make(1), of(1, 3)))


@LOADERS
def test_a_part_of_the_data_alone_is_warned_of(make, notices):
    refresh_norm(nn.BatchNorm1d(1), make(0))
    assert "the loader returns one of 2 parts of the data" in notices.text
