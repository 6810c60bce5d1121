"""The loop and what feeds it: threads, runs, chunks."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import ckptavg
from ckptavg.errors import CkptAvgError
from ckptavg.formats.parts import Memory
from ckptavg.formats.tensors import BY_NAME, Tensor
from ckptavg.merge.engine import execute
from ckptavg.merge.jobs import CHUNK, Job, Mean, StoredTensor
from tests.oracle import naive_mean, same_bits

FLOAT32 = BY_NAME["float32"]


class Store:
    """A sink in memory."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


def job(*columns: np.ndarray, targets: tuple[int, ...] = (0,)) -> Job:
    inputs = tuple(
        StoredTensor(
            Memory(Path("x"), bytearray(column.tobytes())), Tensor(FLOAT32, column.shape, 0, 0)
        )
        for column in columns
    )
    mean = Mean((1.0,) * len(columns), float(len(columns)), targets)
    return Job(inputs, columns[0].size, False, FLOAT32, (mean,), 0)


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_element_is_made_whatever_the_chunks(count, threads):
    columns = [np.random.default_rng(seed).standard_normal(count, np.float32) for seed in (1, 2)]
    store = Store(8 * count)
    done = sum(execute(iter([job(*columns, targets=(0, 4 * count))]), [store], threads))
    wanted = ((columns[0].astype(float) + columns[1]) / 2).astype(np.float32)
    assert done == 8 * count
    assert store.data == wanted.tobytes() * 2


def test_no_thread_outlives_a_failure():
    class Broken(Store):
        def write(self, offset: int, data: memoryview) -> None:
            if offset:
                raise CkptAvgError(f"broken at {len(data)} bytes")
            time.sleep(0.05)

    column = np.ones(20 * CHUNK, np.float32)
    before = threading.active_count()
    with pytest.raises(CkptAvgError, match="broken"):
        list(execute(iter([job(column)]), [Broken(0)], 3))
    assert threading.active_count() == before


def test_no_thread_outlives_an_interruption():
    class Slow(Store):
        def write(self, offset: int, data: memoryview) -> None:
            time.sleep(0.02)
            super().write(offset, data)

    column = np.ones(50 * CHUNK, np.float32)
    before = threading.active_count()
    steps = execute(iter([job(column)]), [Slow(column.nbytes)], 2)
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert threading.active_count() == before


def test_a_signal_between_two_threads_leaves_no_thread_that_writes(monkeypatch):
    original = threading.Thread.start
    started: list[threading.Thread] = []

    def start(self: threading.Thread) -> None:
        started.append(self)
        original(self)
        if len(started) == 2:
            time.sleep(0.05)  # a thread that did not wait would write meanwhile
            raise KeyboardInterrupt  # as the handler of SIGINT does

    monkeypatch.setattr(threading.Thread, "start", start)
    store = Store(4 * CHUNK)
    with pytest.raises(KeyboardInterrupt):
        list(execute(iter([job(np.ones(CHUNK, np.float32))]), [store], 3))
    for thread in started:
        thread.join()
    assert len(started) == 2
    assert not any(store.data)


def test_fewer_threads_than_asked_for_do_the_work(monkeypatch):
    original = threading.Thread.start
    started: list[threading.Thread] = []

    def start(self: threading.Thread) -> None:
        if len(started) == 1:
            raise RuntimeError("can't start new thread")
        started.append(self)
        original(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    column = np.ones(3 * CHUNK, np.float32)
    store = Store(column.nbytes)
    assert sum(execute(iter([job(column)]), [store], 4)) == column.nbytes
    assert store.data == column.tobytes()


def test_tied_tensors_beside_others_in_one_storage(tmp_path):
    """Neighbours in the input become one run, but what is written twice goes alone."""
    for step in range(2):
        base = torch.randn(12) + step
        torch.save(
            {"a": base[:4], "b": base[4:8], "tied": base[4:8], "c": base[8:]},
            tmp_path / f"{step}.pt",
        )
    ckptavg.average(tmp_path, tmp_path / "out.pt")
    states = [torch.load(tmp_path / f"{step}.pt") for step in range(2)]
    result = torch.load(tmp_path / "out.pt")
    for name in ("a", "b", "c", "tied"):
        assert same_bits(result[name], naive_mean([state[name] for state in states])), name


def test_of_many_neighbours_one_job_is_made(tmp_path, monkeypatch):
    """A job for each of 100,000 tensors takes longer than to average them."""
    made = []

    def counted(**fields: Any) -> Job:
        made.append(fields)
        return Job(**fields)

    monkeypatch.setattr("ckptavg.merge.plan.Job", counted)
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(2) for _ in range(50)))
    for step in range(2):
        state = {name: torch.rand(2) for name in model.state_dict() if "tracked" not in name}
        save_file(state, tmp_path / f"{step}.safetensors")
    ckptavg.average(tmp_path, tmp_path / "out.safetensors")
    assert [fields["count"] for fields in made] == [50 * 4 * 2]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_neighbours_are_joined_and_every_element_is_made_once(tmp_path_factory, data):
    """Tensors with gaps between them in one of two checkpoints, in any order."""
    folder = tmp_path_factory.mktemp("neighbours")
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    gaps = data.draw(st.lists(st.integers(0, 1), min_size=len(sizes), max_size=len(sizes)))
    order = data.draw(st.permutations(range(len(sizes))))
    storages = [torch.randn(sum(sizes) + sum(gaps) + 1) for _ in range(2)]
    states: list[dict[str, torch.Tensor]] = [{}, {}]
    start = 0
    for number in order:
        start += gaps[number]
        views = [storage[start : start + sizes[number]] for storage in storages]
        states[0][str(number)], states[1][str(number)] = views[0], views[1].clone()
        start += sizes[number]
    paths = [folder / "1.pt", folder / "2.pt"]
    for state, path in zip(states, paths, strict=True):
        torch.save(state, path)
    ckptavg.average(paths, folder / "out.pt")
    result = torch.load(folder / "out.pt")
    assert result.keys() == states[0].keys()
    for name, value in result.items():
        assert same_bits(value, naive_mean([state[name] for state in states])), name
