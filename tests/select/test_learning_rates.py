"""The rates that checkpoints were made with, and their minima, in loops with torch's schedulers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import lr_scheduler

from ckptavg.errors import SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import Checkpoint, TrainingRecord
from ckptavg.select.learning_rates import local_minima, rates_and_minima

UPDATES = 3  # of an epoch
EPOCHS = 15

Make = Callable[[torch.optim.Optimizer, int], Any]
"""Makes a scheduler whose unit is an epoch, or (where 3 is given) an update of them."""


def warm_restarts(optimizer: torch.optim.Optimizer, unit: int, factor: int = 1) -> Any:
    return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3 * unit, factor, eta_min=0.001)


def cyclic(
    optimizer: torch.optim.Optimizer,
    unit: int,
    up: int = 2,
    down: int = 2,
    mode: Any = "triangular",
) -> Any:
    # Of 4 updates, each third one, a checkpoint's, takes 4 checkpoints to come to the same point.
    del unit
    return lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.1, up, down, mode=mode, gamma=0.95, cycle_momentum=False
    )


def warmed_up(optimizer: torch.optim.Optimizer, unit: int) -> Any:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2 * unit),
        lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4 * unit, eta_min=0.001),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [2 * unit])


def cosine(optimizer: torch.optim.Optimizer, unit: int) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 20 * unit, 0.002)


SCHEDULES: dict[str, Make] = {
    "restarts": warm_restarts,
    "growing restarts": lambda optimizer, unit: warm_restarts(optimizer, unit, 2),
    "triangular": cyclic,
    "lopsided": lambda optimizer, unit: cyclic(optimizer, unit, 1, 3),
    "triangular2": lambda optimizer, unit: cyclic(optimizer, unit, mode="triangular2"),
    "exp_range": lambda optimizer, unit: cyclic(optimizer, unit, mode="exp_range"),
    "after a warm-up": warmed_up,
}


class Run(NamedTuple):
    """A training.

    Attributes:
        checkpoints: as opened, one for each epoch.
        used: the rate of the last update before each.
        lowest: whether that rate was lower than those of the updates (or epochs) around it.
    """

    checkpoints: list[Checkpoint]
    used: list[float]
    lowest: list[bool]

    def only(self, indices: Sequence[int]) -> Run:
        """The same training of which only some checkpoints are left."""
        return Run(
            [self.checkpoints[index] for index in indices],
            [self.used[index] for index in indices],
            [self.lowest[index] for index in indices],
        )


def train(
    folder: Path,
    make: Make,
    *,
    every_update: bool = False,
    after: bool = True,
    first: int = 0,
    steps: bool = True,
    epochs: int = EPOCHS,
) -> Run:
    """A loop that saves each epoch, before the scheduler's step or after it.

    Args:
        folder: where to save.
        make: makes the scheduler.
        every_update: whether the scheduler steps with each update, rather than each epoch.
        after: whether to save after that.
        first: the number of the first epoch.
        steps: whether to record `global_step`.
        epochs: how many to train.
    """
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = make(optimizer, UPDATES if every_update else 1)
    per_unit: list[float] = []
    used, unit_of, paths = [], [], []

    def save(epoch: int) -> None:
        root: dict[str, Any] = {
            "epoch": epoch + first,
            "state_dict": {"weight": weight.detach().clone()},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        if steps:
            root["global_step"] = (epoch + 1) * UPDATES
        paths.append(folder / f"epoch_{epoch + first}.pt")
        torch.save(root, paths[-1])

    for epoch in range(epochs + 1):
        for update in range(UPDATES):
            rate = float(optimizer.param_groups[0]["lr"])
            if every_update or update == 0:
                per_unit.append(rate)
            weight.grad = torch.ones(2)
            optimizer.step()
            last = update == UPDATES - 1 and epoch < epochs  # one more epoch shows what follows
            if last:
                used.append(rate)
                unit_of.append(len(per_unit) - 1)
                if not after:
                    save(epoch)
            if every_update or update == UPDATES - 1:
                scheduler.step()
            if last and after:
                save(epoch)
    lowest = [u > 0 and per_unit[u - 1] > per_unit[u] < per_unit[u + 1] for u in unit_of]
    return Run([open_checkpoint(path) for path in paths], used, lowest)


def used_rates(run: Run) -> list[float]:
    return rates_and_minima(run.checkpoints)[0]


def doubts(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said, but that the rate was still falling at the end."""
    return [message for message in caplog.messages if "still falling" not in message]


def chosen(run: Run) -> list[bool]:
    return rates_and_minima(run.checkpoints)[1]


def expected(run: Run) -> list[bool]:
    """The lowest, and a last one on its way down."""
    found = list(run.lowest)
    found[-1] = found[-1] or run.used[-1] < run.used[-2]
    return found


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("every_update", [False, True], ids=["epochs", "updates"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_those_made_with_the_lowest_rates_are_chosen(
    tmp_path, caplog, name, *, every_update, after, first
):
    run = train(tmp_path, SCHEDULES[name], every_update=every_update, after=after, first=first)
    assert sum(run.lowest) >= 2
    ends = run.only([index for index, lowest in enumerate(run.lowest) if lowest])
    caplog.set_level(logging.WARNING)
    for some in (run, ends):
        assert used_rates(some) == pytest.approx(some.used)
        assert chosen(some) == expected(some)
    assert not caplog.messages


def test_the_weights_before_the_training_are_no_sign_of_epochs_from_0(tmp_path):
    run = train(tmp_path, warm_restarts, first=1)
    root = torch.load(run.checkpoints[0].path)
    root["scheduler"] |= {"last_epoch": 0, "_last_lr": [0.1]}
    root["optimizer"]["param_groups"][0]["lr"] = 0.1
    torch.save(root | {"epoch": 0, "global_step": 0}, tmp_path / "epoch_0.pt")
    records = [open_checkpoint(tmp_path / "epoch_0.pt"), *run.checkpoints]
    rates = rates_and_minima(records)[0]
    assert rates == pytest.approx([0.1, *run.used])


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_epoch_0_tells_from_what_epochs_are_counted(tmp_path, after):
    run = train(tmp_path, warm_restarts, after=after, steps=False)
    assert used_rates(run) == pytest.approx(run.used)
    assert chosen(run) == expected(run)


@pytest.mark.parametrize(("after", "first"), [(False, 1), (True, 0)])
def test_a_scheduler_ahead_or_behind_tells_it_too(tmp_path, after, first):
    run = train(tmp_path, warm_restarts, after=after, first=first, steps=False).only(range(4, 12))
    assert used_rates(run) == pytest.approx(run.used)


@pytest.mark.parametrize(("after", "first"), [(False, 0), (True, 1)])
def test_where_nothing_tells_it_the_recorded_rate_is_taken_with_a_warning(
    tmp_path, caplog, after, first
):
    run = train(tmp_path, cosine, after=after, first=first, steps=False).only(range(4, 12))
    recorded = [checkpoint.training.learning_rate for checkpoint in run.checkpoints]
    caplog.set_level(logging.WARNING)
    assert used_rates(run) == recorded
    assert (recorded == pytest.approx(run.used)) == (not after)
    [message] = caplog.messages
    assert "is unknown whether" in message
    assert run.checkpoints[0].name in message
    assert "and 3 more" in message


@pytest.mark.parametrize(("after", "first"), [(False, 0), (True, 1)])
def test_it_is_an_error_if_the_choice_depends_on_it(tmp_path, after, first):
    run = train(tmp_path, warm_restarts, after=after, first=first, steps=False).only(range(4, 12))
    with pytest.raises(SelectionError, match=r"and 3 more is the one used or the next") as caught:
        used_rates(run)
    assert run.checkpoints[0].name in str(caught.value)
    assert "lr_recorded" in str(caught.value)
    rates, low = rates_and_minima(run.checkpoints, "next" if after else "used")
    assert rates == pytest.approx(run.used)
    assert low == expected(run)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("known", ["", "lightning", "timm"])
def test_lightning_and_timm_are_known_to_count_from_0(tmp_path, caplog, known, first):
    """Of a loop that counts from 1 this would be wrong: so the trainer's mark is what counts."""
    run = train(tmp_path, cosine, after=bool(first), first=first, steps=False)
    run = run.only(range(4, 12))
    extra = {"": {}, "lightning": {"pytorch-lightning_version": "2.6"}}.get(
        known, {"arch": "resnet", "version": 2}
    )
    records = []
    for checkpoint in run.checkpoints:
        torch.save(torch.load(checkpoint.path) | extra, checkpoint.path)
        records.append(open_checkpoint(checkpoint.path))
    caplog.set_level(logging.WARNING)
    recorded = [checkpoint.training.learning_rate for checkpoint in records]
    assert rates_and_minima(records)[0] == recorded
    assert bool(caplog.messages) == (not known)


MONOTONE: dict[str, Make] = {
    "cosine": cosine,
    "steps": lambda o, u: lr_scheduler.StepLR(o, 4 * u),
    "milestones": lambda o, u: lr_scheduler.MultiStepLR(o, [2 * u, 5 * u, 5 * u]),
    "exponential": lambda o, _: lr_scheduler.ExponentialLR(o, 0.9),
    "linear": lambda o, u: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=9 * u),
    "constant": lambda o, u: lr_scheduler.ConstantLR(o, 0.2, total_iters=6 * u),
    "polynomial": lambda o, u: lr_scheduler.PolynomialLR(o, 17 * u, 2.0),
}


@pytest.mark.parametrize("every_update", [False, True], ids=["epochs", "updates"])
@pytest.mark.parametrize("name", MONOTONE)
def test_the_rate_of_any_class_with_a_formula_is_computed(tmp_path, caplog, name, every_update):
    run = train(tmp_path, MONOTONE[name], every_update=every_update).only(range(0, EPOCHS, 2))
    caplog.set_level(logging.INFO)
    assert used_rates(run) == pytest.approx(run.used)
    assert not doubts(caplog)


def lambdas(optimizer: torch.optim.Optimizer, unit: int) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.7 * (step / unit % 3) / 3)


def test_the_checkpoint_before_has_the_rate_of_a_schedule_without_a_formula(tmp_path, caplog):
    run = train(tmp_path, lambdas, after=True)
    caplog.set_level(logging.INFO)
    rates = used_rates(run)
    assert rates[1:] == pytest.approx(run.used[1:])
    [message] = doubts(caplog)
    assert "is the next one" in message
    assert "epoch_0.pt" in message
    assert "epoch_1.pt" not in message
    assert chosen(run)[1:] == expected(run)[1:]


def test_without_the_checkpoint_before_the_recorded_rate_stands_with_a_notice(tmp_path, caplog):
    run = train(tmp_path, lambdas, after=True).only(range(0, EPOCHS, 2))
    caplog.set_level(logging.INFO)
    recorded = [checkpoint.training.learning_rate for checkpoint in run.checkpoints]
    assert used_rates(run) == recorded
    [message] = doubts(caplog)
    assert "is the next one" in message


def test_a_formula_that_does_not_give_the_recorded_rate_is_not_used(tmp_path, caplog):
    class Squared(lr_scheduler.CosineAnnealingWarmRestarts):
        def get_lr(self) -> Any:
            return [rate * rate for rate in super().get_lr()]

    run = train(tmp_path, lambda o, unit: Squared(o, 3 * unit)).only(range(0, EPOCHS, 2))
    caplog.set_level(logging.INFO)
    recorded = [checkpoint.training.learning_rate for checkpoint in run.checkpoints]
    assert used_rates(run) == recorded
    assert any("is the next one" in message for message in caplog.messages)


def test_fractional_steps_within_epochs_count_as_saved_before(tmp_path):
    """`scheduler.step(epoch + i / iters)` after each update, as torch's documentation has it."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3)
    checkpoints = []
    for epoch in range(9):
        for update in range(8):
            weight.grad = torch.ones(2)
            optimizer.step()
            scheduler.step(epoch + update / 8)
        root = {
            "epoch": epoch,
            "model": {"weight": weight.detach()},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        torch.save(root, tmp_path / f"{epoch}.pt")
        checkpoints.append(open_checkpoint(tmp_path / f"{epoch}.pt"))
    _, chosen = rates_and_minima(checkpoints)
    assert [index for index, low in enumerate(chosen) if low] == [2, 5, 8]


# Records without files


def saved(
    rate: float | None, scheduler: Any = None, logged: float | None = None, **steps: int
) -> Checkpoint:
    training = TrainingRecord(
        steps=steps, learning_rate=rate, scheduler=scheduler, logged_rate=logged
    )
    return Checkpoint(Path(), "torch", (), {}, {}, "", training)


def rates_of(records: Sequence[Checkpoint]) -> list[float]:
    return rates_and_minima(records)[0]


def test_without_a_scheduler_the_recorded_rate_is_the_one_used(caplog):
    caplog.set_level(logging.INFO)
    records = [saved(0.3, epoch=1), saved(0.1, epoch=2), saved(0.2, epoch=3)]
    records = [replace(each, name_in_run=f"c{n}") for n, each in enumerate(records, 1)]
    assert rates_of(records) == [0.3, 0.1, 0.2]
    [message] = caplog.messages
    assert message.startswith("the recorded learning rates count as those that were used before")
    assert message.endswith("add `lr_recorded` next: the minima are then c3")


@pytest.mark.parametrize(
    ("rates", "epochs"),
    [([3, 2, 1], range(3)), ([2, 2, 2], range(3)), ([2, 2, 2], (0, 5, 10))],
    ids=["falling", "constant", "constant with gaps"],
)
def test_nothing_is_assumed_where_the_choice_is_the_same(caplog, rates, epochs):
    caplog.set_level(logging.INFO)
    rates_of([saved(rate, epoch=epoch) for rate, epoch in zip(rates, epochs, strict=True)])
    assert not doubts(caplog)


def test_where_the_next_rate_could_not_be_known_the_notice_gives_other_options(caplog):
    caplog.set_level(logging.INFO)
    rates_of([saved(rate, epoch=5 * n) for n, rate in enumerate((3, 1, 2))])
    [message] = caplog.messages
    assert "the minima cannot be known: choose by `cycle`" in message


def without_scheduler(run: Run, momentum: float = 0.9) -> list[Checkpoint]:
    """The checkpoints of a loop that saves model and optimizer only."""
    checkpoints = []
    for each in run.checkpoints:
        root = torch.load(each.path)
        del root["scheduler"]
        root["optimizer"]["state"] = {0: {"momentum_buffer": torch.ones(2)}} if momentum else {}
        torch.save(root, each.path)
        checkpoints.append(open_checkpoint(each.path))
    return checkpoints


def epochs_of(run: Run, minima: Sequence[bool]) -> str:
    pairs = zip(run.checkpoints, minima, strict=True)
    return ", ".join(each.path.name for each, lowest in pairs if lowest)


@pytest.mark.parametrize("name", ["restarts", "growing restarts"])
def test_restarts_from_the_initial_rate_tell_that_epoch_0_recorded_the_next_one(
    tmp_path, caplog, name
):
    run = train(tmp_path, SCHEDULES[name], epochs=12)
    caplog.set_level(logging.INFO)
    checkpoints = without_scheduler(run)
    rates, minima = rates_and_minima(checkpoints)
    assert rates[1:] == pytest.approx(run.used[1:])
    assert minima == expected(run)
    [message] = doubts(caplog)
    assert "rate of epoch_0.pt is below the initial one" in message
    other = rates_and_minima(checkpoints, "used")[1]
    assert message.endswith(f"`lr_recorded` used: the minima are then {epochs_of(run, other)}")


def test_what_the_rates_tell_is_said_before_an_error(tmp_path, caplog):
    checkpoints = without_scheduler(train(tmp_path, warm_restarts))
    caplog.set_level(logging.INFO)
    with pytest.raises(SelectionError, match="the step or epoch before was not saved"):
        rates_and_minima(checkpoints[:6] + checkpoints[7:])
    [message] = caplog.messages
    assert "add `lr_recorded` used" in message


def held(optimizer: torch.optim.Optimizer, unit: int) -> Any:
    del unit
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: (1, 1, 0.1)[epoch % 3])


@pytest.mark.parametrize(
    ("make", "after", "first", "skipped"),
    [
        (warm_restarts, False, 0, 0),
        (warm_restarts, False, 0, 1),  # the first epoch that is saved is 1, the second
        (warm_restarts, False, 1, 0),
        (warm_restarts, True, 1, 0),
        (held, True, 1, 0),  # as the rates are before the scheduler's step, but for epoch 1
        (held, True, 0, 0),
    ],
)
def test_where_the_rates_do_not_tell_it_the_notice_has_the_minima_of_the_next_ones(
    tmp_path, caplog, make, *, after, first, skipped
):
    run = train(tmp_path, make, after=after, first=first, epochs=12).only(range(skipped, 12))
    checkpoints = without_scheduler(run)
    caplog.set_level(logging.INFO)
    rates, used = rates_and_minima(checkpoints)
    assert rates == [each.training.learning_rate for each in checkpoints]
    [message] = doubts(caplog)
    following = rates_and_minima(checkpoints, "next")[1]
    assert (following if after else used) == expected(run)
    assert message.endswith(f"`lr_recorded` next: the minima are then {epochs_of(run, following)}")


@pytest.mark.parametrize("every_update", [False, True], ids=["epochs", "updates"])
@pytest.mark.parametrize("name", ["triangular", "lopsided", "after a warm-up"])
def test_other_cycles_without_a_scheduler_do_not_tell_that_the_next_one_is(
    tmp_path, caplog, name, every_update
):
    run = train(tmp_path, SCHEDULES[name], every_update=every_update, after=False)
    caplog.set_level(logging.INFO)
    rates, _ = rates_and_minima(without_scheduler(run))
    assert rates == pytest.approx(run.used)
    assert not any("is below the initial one" in message for message in caplog.messages)


class TestTheNextRateWithoutAScheduler:
    def test_is_what_the_checkpoint_before_recorded(self):
        records = [saved(rate, epoch=epoch) for epoch, rate in enumerate([2, 1, 3, 2, 1, 3])]
        rates, minima = rates_and_minima(records, "next")
        assert rates[1:] == [2, 1, 3, 2, 1]
        assert minima == [False, False, True, False, False, True]

    def test_is_an_error_where_that_one_was_not_saved(self):
        records = [saved(rate, epoch=epoch) for epoch, rate in ((0, 3), (5, 2), (10, 1))]
        with pytest.raises(SelectionError, match="the step or epoch before was not saved"):
            rates_and_minima(records, "next")

    def test_of_the_first_is_unknown_which_matters_where_the_rate_then_rises(self):
        records = [saved(rate, epoch=epoch) for epoch, rate in enumerate([1, 2, 1, 3])]
        with pytest.raises(SelectionError, match="recorded nowhere, and the choice depends on it"):
            rates_and_minima(records, "next")


def test_the_state_of_another_optimizer_s_scheduler_says_nothing():
    scheduler = {"last_epoch": 2, "_last_lr": [0.7], "base_lrs": [0.7], "gamma": 0.5}
    assert rates_of([saved(0.3, scheduler, epoch=1)]) == [0.3]


def test_the_rate_that_was_logged_at_the_step_is_the_one_used():
    records = [
        saved(1.0 - 0.1 * n, {"last_epoch": 10 * n}, 0.95 - 0.1 * n, global_step=10 * n)
        for n in range(1, 5)
    ]
    assert rates_of(records) == pytest.approx([0.85, 0.75, 0.65, 0.55])


def test_older_trainers_logged_the_next_rate_and_the_used_one_a_step_before(caplog):
    records = [
        saved(1.0 - 0.1 * n, {"last_epoch": 10 * n}, 1.0 - 0.1 * n, global_step=10 * n)
        for n in range(1, 5)
    ]
    caplog.set_level(logging.INFO)
    assert rates_of(records) == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert "is the next one" in caplog.messages[0]
    caplog.clear()
    with_log = [
        dataclasses.replace(
            record, training=dataclasses.replace(record.training, logged_before=0.5 + n)
        )
        for n, record in enumerate(records)
    ]
    assert rates_of(with_log) == [0.5, 1.5, 2.5, 3.5]
    assert not caplog.messages


def test_a_constant_rate_that_was_logged_raises_no_doubt(caplog):
    caplog.set_level(logging.INFO)
    records = [saved(0.1, {"last_epoch": n}, 0.1, global_step=n) for n in (10, 20, 30)]
    assert rates_of(records) == [0.1, 0.1, 0.1]
    assert local_minima(rates_of(records)) == [True] * 3
    assert not caplog.messages


def test_a_run_without_any_rate_is_an_error_that_names_the_alternatives():
    with pytest.raises(SelectionError) as caught:
        rates_of([saved(None, epoch=1), saved(None, epoch=2)])
    message = str(caught.value)
    assert message.startswith("none of the checkpoints records a learning rate; ")
    for rule in ("cycle", "steps", "every"):
        assert rule in message


def test_checkpoints_without_a_rate_are_named():
    rates = (0.1, None, 0.2, *[None] * 7)
    records = [replace(saved(rate), name_in_run=f"c{index}") for index, rate in enumerate(rates)]
    with pytest.raises(SelectionError, match=r"c1, c3, c4, c5, c6 and 3 more record no learning"):
        rates_of(records)


# Minima


@pytest.mark.parametrize(
    ("rates", "taken"),
    [
        ([], ""),
        ([0.1], "x"),
        ([0.1, 0.1, 0.1], "xxx"),
        ([3, 1, 2], ".x."),
        ([3, 1, 1, 1, 2], ".xxx."),
        ([1, 2, 3], "..."),
        ([1, 1, 3], "..."),
        ([1, 3, 1, 3, 1, 3], "..x.x."),
        ([3, 2, 1], "..x"),
        ([3, 2, 2, 1, 4, 3], "...x.x"),
        ([3, 3, 1, 1], "..xx"),
        ([3, 1, 3, 0.5, 3, 2], ".x.x.x"),
        ([0.1, 0.05, 0.05 + 1e-9, 0.1], ".xx."),
        ([0.1, 1e-18, 0.0, 0.1], ".xx."),
        ([1e-9, 1e-10, 2e-10], ".x."),
        ([1, 3, 2, 2.5, 2, 3], "..x.x."),
    ],
)
def test_minima_are_lower_than_both_neighbours(rates, taken):
    assert local_minima(rates) == [mark == "x" for mark in taken]


def naive_minima(rates: Sequence[float]) -> list[bool]:
    """Walk both ways over equal rates from each point; the first is none unless all are equal."""
    found = []
    for index, rate in enumerate(rates):
        near_left = next((o for o in reversed(rates[:index]) if o != rate), None)
        near_right = next((o for o in rates[index + 1 :] if o != rate), None)
        found.append(
            (near_left is None and near_right is None)
            or (near_left is not None and near_left > rate and (near_right or 9.0) > rate)
        )
    return found


def test_minima_of_all_short_sequences_are_those_of_a_naive_search():
    for length in range(1, 7):
        for rates in itertools.product((0.1, 0.2, 0.3), repeat=length):
            assert local_minima(rates) == naive_minima(rates), rates


def test_a_slow_descent_is_not_flat():
    rates = [1.0 - 4e-7 * index for index in range(100)]
    assert sum(local_minima(rates)) < 5
    assert local_minima(rates)[-1]


def test_a_last_one_on_its_way_down_is_said(caplog):
    caplog.set_level(logging.INFO)
    assert rates_and_minima([saved(3), saved(2), saved(1)])[1] == [False, False, True]
    assert "still falling" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("rates", "scheduler"),
    [
        ([3, 1, 2], None),
        ([3, 1, 1], None),
        ([1, 1], None),
        ([1], None),
        ([3, 2, 0.025], {"T_0": 3, "last_epoch": 2}),  # the last of three epochs
    ],
)
def test_nothing_is_said_where_it_is_none(caplog, rates, scheduler):
    caplog.set_level(logging.INFO)
    *records, _ = map(saved, rates)
    state = scheduler and RESTARTS | scheduler | {"_last_lr": [rates[-1]]}
    records.append(saved(rates[-1], state, global_step=3))
    assert rates_and_minima(records)[1][-1] == (rates[-1] == min(rates))
    assert "still falling" not in caplog.text


# Hostile values

RESTARTS = {
    "T_0": 3, "T_i": 3, "T_mult": 1, "eta_min": 0.0, "T_cur": 0,
    "base_lrs": [0.1], "last_epoch": 3, "_last_lr": [0.1],
}  # fmt: skip
CYCLIC = {
    "max_lrs": [0.1], "total_size": 4.0, "step_ratio": 0.5, "mode": "triangular2", "gamma": 1.0,
    "base_lrs": [0.01], "last_epoch": 2, "_last_lr": [0.1],
}  # fmt: skip
STEPS = {"milestones": {2: 1}, "gamma": 0.1, "base_lrs": [1.0], "last_epoch": 2, "_last_lr": [0.1]}
NESTED: dict[str, Any] = {"_milestones": [2], "last_epoch": 3, "_schedulers": [STEPS, RESTARTS]}
STRANGE: list[Any] = [
    None, "x", [], {}, 0, -1, 1, 2**62, 1e308, -1e308, math.nan, math.inf, [None], ["x"], [[]],
    {"a": 1}, True, [2**62], [math.nan],
]  # fmt: skip


@pytest.mark.parametrize("state", [RESTARTS, CYCLIC, STEPS, NESTED])
def test_strange_states_of_schedulers_do_no_harm(state):
    started = time.process_time()
    for key, value in itertools.product(state, STRANGE):
        records = [saved(0.1, state | {key: value}, epoch=n, global_step=n) for n in (2, 3, 4)]
        for recorded in (None, "used", "next"):
            with contextlib.suppress(SelectionError):
                rates, _ = rates_and_minima(records, recorded)
                assert all(math.isfinite(rate) for rate in rates)
    assert time.process_time() - started < 5


def test_a_scheduler_within_itself_has_an_end():
    loop: dict[str, Any] = dict(NESTED)
    loop["_schedulers"] = [loop, loop]
    assert rates_of([saved(0.1, loop, epoch=3)]) == [0.1]
