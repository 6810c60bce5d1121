"""Signals that are held back while a thread starts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from ckptavg.merge.signals import signals_waiting


class TerminatedError(Exception):
    """What the handler of SIGTERM raises."""


@pytest.fixture(autouse=True)
def _terminated() -> Iterator[None]:
    def terminate(*_: object) -> None:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


def interrupted_block(steps: list[str], *, raises: bool) -> None:
    with signals_waiting():
        os.kill(os.getpid(), signal.SIGTERM)
        steps.append("after the signal")
        if raises:
            raise ValueError


def test_a_signal_arrives_at_the_end_of_the_block():
    steps: list[str] = []
    with pytest.raises(TerminatedError):
        interrupted_block(steps, raises=False)
    assert steps == ["after the signal"]


def test_a_signal_is_not_lost_when_the_block_raises():
    with pytest.raises(TerminatedError) as caught:
        interrupted_block([], raises=True)
    assert isinstance(caught.value.__context__, ValueError)


def test_afterwards_handlers_are_those_of_before():
    with pytest.raises(ValueError), signals_waiting():
        raise ValueError
    with pytest.raises(TerminatedError):
        os.kill(os.getpid(), signal.SIGTERM)
