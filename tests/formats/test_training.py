"""What checkpoints record of the training: steps, rates, schedules, metrics."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import Checkpoint, TrainingRecord
from ckptavg.formats.pickled import PickledTensor, Placeholder, Storage
from ckptavg.formats.recorded import trainer_record, training_record
from ckptavg.formats.tensors import BY_NAME
from tests.helpers import save_dcp

TENSOR = PickledTensor(Storage("0", BY_NAME["float32"]), BY_NAME["float32"], 0, (4,), (1,))
SCALAR = PickledTensor(Storage("0", BY_NAME["float32"]), BY_NAME["float32"], 0, (), ())
STATE = {"a.weight": TENSOR, "a.bias": TENSOR}
WEIGHTS = {"w": torch.ones(2, 3)}


def saved(root: object, path: Path, **options: Any) -> Checkpoint:
    torch.save(root, path, **options)
    return open_checkpoint(path)


def record(root: object, name: str = "x.pt") -> TrainingRecord:
    return training_record(root, name, lambda wanted: dict.fromkeys(wanted, 0.5), whole=False)


# Steps and rates


def optimizer(rate):
    return {"state": {}, "param_groups": [{"lr": rate, "betas": (0.9, 0.99)}, {"lr": 9.0}]}


@pytest.mark.parametrize(
    ("root", "steps", "rate"),
    [
        (
            {"epoch": 3, "global_step": 70, "step": 7},
            {"epoch": 3, "global_step": 70, "step": 7},
            None,
        ),
        ({"epoch": 0}, {"epoch": 0}, None),
        ({"epoch": True, "step": 3.0, "global_step": TENSOR}, {}, None),
        ({"epoch": "3", "step": None, "global_step": Placeholder("numpy.int64", ())}, {}, None),
        ({"epoch": 10**5_000, "step": -(10**5_000), "global_step": 2**63}, {}, None),
        ({"optimizer": optimizer(0.1)}, {}, 0.1),
        ({"optimizer": optimizer(1)}, {}, 1.0),
        ({"optim": optimizer(0.1)}, {}, 0.1),
        ({"model_optimizer_state": optimizer(0.1)}, {}, 0.1),
        ({"optimizer_states": [optimizer(0.1), optimizer(0.2)]}, {}, 0.1),
        ({"optimizer_states": []}, {}, None),
        ({"optimizer": None, "optimizer_states": [optimizer(0.1)]}, {}, 0.1),
        ({"optimizer": {"param_groups": []}}, {}, None),
        ({"optimizer": {"param_groups": [{}]}}, {}, None),
        ({"optimizer": {"param_groups": {"lr": 0.1}}}, {}, None),
        ({"optimizer": optimizer(TENSOR)}, {}, None),
        ({"optimizer": optimizer(True)}, {}, None),
        ({"optimizer": optimizer(10**400)}, {}, None),
        ({"optimizer": optimizer(float("inf"))}, {}, None),
        ({"optimizer": optimizer(float("nan"))}, {}, None),
        ({"optimizer": Placeholder("m.Optimizer", ())}, {}, None),
        ({3: optimizer(0.1), None: 1}, {}, None),
        ({"global_steps": 7}, {}, None),
        ({"module": STATE, "dp_world_size": 2, "global_steps": 7}, {"global_step": 7}, None),
        (
            {"module": STATE, "ds_version": "0.16.4", "global_steps": 7, "global_step": 14},
            {"global_step": 14},
            None,
        ),
        ({"module": STATE, "ds_config": {}, "global_steps": TENSOR}, {}, None),
        ([], {}, None),
        (None, {}, None),
        (TENSOR, {}, None),
    ],
)
def test_steps_and_rates_are_plain_numbers_that_the_file_records(root, steps, rate):
    found = record(root)
    assert found.steps == steps
    assert found.learning_rate == rate


# Learning rate and schedule


def training_state(scheduler_class: Any = None, **options: Any) -> dict[str, Any]:
    """What a loop saves after two epochs."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    kind = scheduler_class or torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
    scheduler = kind(optimizer, **(options or {"T_0": 5}))
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    return {
        "model": WEIGHTS,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 1,
    }


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "several"),
    [
        ("optimizer", "scheduler", False),
        ("optim", "sched", False),
        ("optimizer_state_dict", "scheduler_state_dict", False),
        ("optimizer_states", "lr_schedulers", True),
        ("optimizers", "lr_scheduler_states", True),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_rate_and_schedule_are_read_under_any_of_their_names(
    tmp_path, optimizer, scheduler, several, zipped
):
    state = training_state()
    wanted = dict(state["scheduler"])
    for old, new in (("optimizer", optimizer), ("scheduler", scheduler)):
        value = state.pop(old)
        state[new] = [value, value | {"last_epoch": 99}] if several else value
    opened = saved(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert opened.training.scheduler == wanted
    assert opened.training.scheduler["last_epoch"] == 2
    assert opened.training.learning_rate == pytest.approx(0.1 * (1 + math.cos(0.4 * math.pi)) / 2)
    assert not opened.training.epochs_from_zero


def test_a_scheduler_saved_as_an_object_has_its_state(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False)
    found = saved({"model": WEIGHTS, "scheduler": scheduler}, tmp_path / "x.pt").training.scheduler
    assert found is not None
    assert found["total_size"] == 4000.0
    assert found["base_lrs"] == [0.01]


def test_milestones_and_schedulers_within_schedulers_are_plain(tmp_path):
    state = training_state(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 3, 3])
    found = saved(state, tmp_path / "x.pt").training.scheduler
    assert found is not None
    assert found["milestones"] == {1: 1, 3: 2}
    inner = {"_schedulers": [state["scheduler"]] * 2, "_milestones": [4], "last_epoch": 2}
    found = saved(state | {"scheduler": inner}, tmp_path / "y.pt").training.scheduler
    assert found is not None
    assert found["_schedulers"][1]["milestones"] == {1: 1, 3: 2}


def test_numpy_rates_count(tmp_path):
    optimizer = {"param_groups": [{"lr": np.float64(0.25)}]}
    scheduler = {"last_epoch": 1, "_last_lr": [np.float32(0.5)]}
    state = {"model": WEIGHTS, "optimizer": optimizer, "scheduler": scheduler}
    opened = saved(state, tmp_path / "x.pt")
    assert opened.training.learning_rate == 0.25
    assert opened.training.scheduler == {"last_epoch": 1, "_last_lr": [0.5]}


def test_without_an_optimizer_the_rate_is_the_scheduler_s(tmp_path):
    state = training_state()
    wanted = state.pop("optimizer")["param_groups"][0]["lr"]
    assert saved(state, tmp_path / "x.pt").training.learning_rate == wanted


def test_no_tensor_of_an_optimizer_is_read(tmp_path, bytes_read):
    weight = torch.nn.Parameter(torch.ones(200_000))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(200_000)
    optimizer.step()
    root = {"model": WEIGHTS, "optimizer": optimizer.state_dict(), "best_acc1": torch.tensor(0.5)}
    torch.save(root, tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").training.metrics == {"best_acc1": 0.5}
    assert 0 < sum(bytes_read) < 20_000


@pytest.mark.parametrize(
    ("mark", "known"),
    [
        ({"pytorch-lightning_version": "2.6.0"}, True),
        ({"arch": "resnet50", "version": 2}, True),
        ({"arch": "resnet50"}, False),
        ({}, False),
    ],
)
def test_lightning_and_timm_are_known_by_what_they_write(tmp_path, mark, known):
    opened = saved({"state_dict": WEIGHTS, "epoch": 3, **mark}, tmp_path / "x.pt")
    assert opened.training.epochs_from_zero == known


# Metrics


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_beside_the_weights_are_metrics(tmp_path, zipped):
    root = {
        "state_dict": WEIGHTS,
        "metric": 71,
        "best_acc1": torch.tensor(71.5),
        "val_loss": 0.25,
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
        "numpy": np.mean([0.5, 1.0]),
        "single": np.float32(0.125),
        "metrics": {"acc": 0.5, "count": 3, "auc": torch.tensor(0.75, dtype=torch.float64)},
        "train_metrics": {"fitness": math.nan},
        "epoch": 3,
        "seed": 7,
        "flag": True,
        "vector": torch.ones(2),
        "name": "x",
    }
    options = {"_use_new_zipfile_serialization": zipped}
    found = dict(saved(root, tmp_path / "x.pt", **options).training.metrics)
    assert math.isnan(found.pop("fitness"))
    assert found == {
        "metric": 71.0,
        "best_acc1": 71.5,
        "val_loss": 0.25,
        "half": 1.5,
        "numpy": 0.75,
        "single": 0.125,
        "acc": 0.5,
        "count": 3.0,
        "auc": 0.75,
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_s_numbers_are_read_in_any_protocol(tmp_path, protocol):
    values = {"a_metric": np.float64(-0.1), "b": np.float16(0.5), "metric": np.int64(-3)}
    opened = saved({"model": WEIGHTS, **values}, tmp_path / "x.pt", pickle_protocol=protocol)
    assert opened.training.metrics == {"a_metric": -0.1, "b": 0.5, "metric": -3.0}


def test_scalars_of_a_model_are_no_metrics(tmp_path):
    opened = saved({"w": torch.ones(2), "logit_scale": torch.tensor(2.5)}, tmp_path / "x.pt")
    assert opened.training.metrics == {}
    assert set(opened.tensors) == {"w", "logit_scale"}


def callbacks(*states: dict[str, Any]) -> dict[str, Any]:
    return {f"ModelCheckpoint{number}": state for number, state in enumerate(states)}


def model_checkpoint(current: object, kept: object, monitor: object = "val_loss") -> dict[str, Any]:
    return {"monitor": monitor, "current_score": current, "best_k_models": kept}


@pytest.mark.parametrize(
    ("states", "name", "found"),
    [
        ([model_checkpoint(0.1, {"/a/x.ckpt": 0.3, "/a/y.ckpt": 0.1})], "x.ckpt", 0.3),
        ([model_checkpoint(0.1, {"C:\\a\\x.ckpt": 0.3})], "x.ckpt", 0.3),
        ([model_checkpoint(0.1, {"/a/y.ckpt": 0.1})], "final.ckpt", None),
        ([model_checkpoint(0.1, {"/a/y.ckpt": 0.1})], "last-v1.ckpt", None),
        ([model_checkpoint(None, {})], "x.ckpt", None),
        ([model_checkpoint(0.1, {}), model_checkpoint(0.2, {})], "x.ckpt", None),
        ([model_checkpoint(0.1, {}), model_checkpoint(0.2, {"x.ckpt": 0.2})], "x.ckpt", 0.2),
        ([model_checkpoint(0.1, None)], "x.ckpt", None),
        ([model_checkpoint(0.1, {}, None)], "x.ckpt", None),
        ([{"wait_count": 3}, model_checkpoint(0.1, {"x.ckpt": 0.1})], "x.ckpt", 0.1),
    ],
)
def test_a_model_checkpoint_s_score_is_that_of_this_file(tmp_path, states, name, found):
    def scores(value: object) -> object:
        if isinstance(value, dict):
            return {key: scores(inner) for key, inner in value.items()}
        return torch.tensor(value) if isinstance(value, float) else value

    root = {"state_dict": WEIGHTS, "callbacks": scores(callbacks(*states))}
    metrics = saved(root, tmp_path / name).training.metrics
    assert metrics == ({} if found is None else {"val_loss": pytest.approx(found)})


def test_lightning_s_sharded_directories_have_it_beside_the_shards(tmp_path):
    folder = save_dcp({"model": WEIGHTS}, tmp_path / "epoch=3-step=40.ckpt")
    kept = {f"/run/{folder.name}": torch.tensor(0.5)}
    state = training_state()
    meta = {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.0",
        "callbacks": callbacks(model_checkpoint(torch.tensor(0.5), kept)),
        "lr_schedulers": [state["scheduler"]],
    }
    torch.save(meta, folder / "meta.pt")
    opened = open_checkpoint(folder)
    rate = state["scheduler"]["_last_lr"][0]
    assert opened.training.steps == {"epoch": 3, "global_step": 40}
    assert opened.training.learning_rate == rate
    assert opened.training.metrics == {"val_loss": 0.5}
    assert opened.training.scheduler == state["scheduler"]
    assert opened.training.epochs_from_zero


# Hugging Face's Trainer (tests/layouts has real runs of it)


def trainer_directory(folder: Path, state: object, scheduler: object = None) -> Checkpoint:
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors", {"format": "pt"})
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if scheduler is not None:
        torch.save(scheduler, folder / "scheduler.pt")
    return open_checkpoint(folder)


LOG = [
    {"step": 9, "learning_rate": 0.9, "loss": 9.0},
    {"step": 10, "learning_rate": 0.8, "loss": 8.0, "epoch": 1.0},
    {"step": 10, "eval_loss": 7.0, "eval_accuracy": 0.25, "eval_name": "x", "epoch": 1.0},
    {"step": 11, "learning_rate": 0.1, "loss": 1.0},
]


def test_the_trainer_s_log_is_read_at_the_checkpoint_s_step(tmp_path):
    state = {"global_step": 10, "log_history": LOG}
    scheduler = {"last_epoch": 10, "_last_lr": [0.7, 0.6], "base_lrs": [1.0, 1.0]}
    opened = trainer_directory(tmp_path / "checkpoint-10", state, scheduler)
    assert opened.training == TrainingRecord(
        steps={"global_step": 10},
        learning_rate=0.7,
        scheduler=scheduler,
        logged_rate=0.8,
        logged_before=0.9,
        metrics={"loss": 8.0, "eval_loss": 7.0, "eval_accuracy": 0.25},
    )


def test_without_a_scheduler_s_file_the_logged_rate_is_the_recorded_one(tmp_path):
    opened = trainer_directory(tmp_path / "c", {"global_step": 10, "log_history": LOG})
    assert opened.training.steps == {"global_step": 10}
    assert opened.training.learning_rate == 0.8
    assert opened.training.scheduler is None


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"global_step": "10", "log_history": LOG},
        {"global_step": True, "log_history": LOG},
        {"global_step": 10**30, "log_history": LOG},
        {"global_step": 10, "log_history": {"step": 10}},
        {"global_step": 10, "log_history": [3, None, [], {"step": [10]}, {"step": 10.0}]},
        {"global_step": 10, "log_history": [{"step": 10, "learning_rate": "x", "loss": [1]}]},
        {"global_step": 10, "log_history": [{"step": 10, "learning_rate": 10**400}]},
        {"global_step": 10, "log_history": [{"step": 10, "learning_rate": math.nan}]},
    ],
)
def test_strange_logs_of_trainers_record_nothing(state):
    found = trainer_record(state, {"last_epoch": "x", "_last_lr": [None]})
    assert found.learning_rate is None
    assert found.logged_rate is None
    assert found.metrics == {}


# Hostile values

DEEP: dict[str, Any] = {"last_epoch": 1}
for _ in range(100):
    DEEP = {"last_epoch": 1, "inner": DEEP, "list": [DEEP, DEEP]}
MANY_GROUPS: dict[str, Any] = {"param_groups": [{"lr": "x"}] * 100_000}
LOOP: dict[str, Any] = {"last_epoch": 1, "_last_lr": [0.1]}
LOOP["loop"] = [LOOP, LOOP]


@pytest.mark.parametrize(
    "state",
    [
        DEEP,
        LOOP,
        {"last_epoch": 10**400, "_last_lr": [10**400]},
        {"last_epoch": SCALAR, "_last_lr": SCALAR},
        {"last_epoch": 1, "_last_lr": []},
        {"last_epoch": 1, "_last_lr": [[[[[[[[0.1]]]]]]]]},
        {"last_epoch": 1, "x": "y" * 10_000_000, "l": list(range(1_000_000))},
        {"last_epoch": 1} | {str(n): n for n in range(1_000_000)},
        {"last_epoch": 1, None: 3, 2.5: 3, (1,): 3},
        {"last_epoch": 1, "milestones": Placeholder("collections.Counter", ("x",))},
        {"last_epoch": 1, "milestones": Placeholder("collections.Counter", ())},
        Placeholder("torch.optim.lr_scheduler.StepLR", (DEEP,)),
    ],
)
def test_strange_schedules_are_small_and_do_no_harm(state):
    started = time.process_time()
    found = record({"model": STATE, "scheduler": state})
    assert time.process_time() - started < 30
    assert len(repr(found.scheduler)) < 100_000


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (1, 2),
        (Placeholder("numpy.dtype", ()), b"12345678"),
        (Placeholder("numpy.dtype", ("f8",)), b"1234"),
        (Placeholder("numpy.dtype", ("f8",)), "12345678"),
        (Placeholder("numpy.dtype", ("U8",)), b"12345678"),
        (Placeholder("numpy.dtype", ([],)), b"12345678"),
        (Placeholder("numpy.dtype", ("f8",)), Placeholder("_codecs.encode", (3, "latin1"))),
    ],
)
def test_what_only_looks_like_a_number_of_numpy_s_is_none(arguments):
    scalar = Placeholder("numpy._core.multiarray.scalar", arguments)
    found = record({"model": STATE, "metric": scalar, "optimizer": optimizer(scalar)})
    found = dataclasses.replace(found, other_rates=(), has_optimizer_state=None)
    assert found == TrainingRecord()


@pytest.mark.parametrize(
    "root",
    [
        {f"{n}metrics": dict.fromkeys(map(str, range(30_000)), "x") for n in range(50)},
        dict.fromkeys(
            (f"{n} metrics" for n in range(30_000)), dict.fromkeys(map(str, range(30_000)), 0.5)
        ),
        {str(n): 0.5 for n in range(300_000)},
        {str(n): SCALAR for n in range(300_000)},
        {"x" * 1_000_000: 0.5, 3: 0.5, None: 0.5},
        {"callbacks": dict.fromkeys(
            map(str, range(30_000)),
            model_checkpoint(0.5, dict.fromkeys(map(str, range(30_000)), 0.5)),
        )},
        {"callbacks": [model_checkpoint(0.5, {3: 0.5})]},
        dict.fromkeys((f"{n}scheduler" for n in range(30_000)), DEEP | {"last_epoch": "x"}),
        dict.fromkeys((f"{n}optim" for n in range(30_000)), optimizer("x")),
        dict.fromkeys((f"{n}optim" for n in range(30_000)), MANY_GROUPS),
    ],
)  # fmt: skip
def test_thousands_of_entries_are_looked_at_in_no_time(root):
    started = time.process_time()
    found = record(root)
    assert time.process_time() - started < 30
    assert len(found.metrics) <= 1_000
    assert all(len(name) <= 200 for name in found.metrics)


def test_scalars_that_cannot_be_read_are_left_out(tmp_path):
    root = {"model": WEIGHTS, "val_loss": torch.tensor(0.5), "acc": 0.25}
    torch.save(root, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    # The record of the scalar, in the zip's directory and before its bytes.
    (tmp_path / "x.pt").write_bytes(data.replace(b"x/data/1", b"x/data/9"))
    opened = open_checkpoint(tmp_path / "x.pt")
    assert opened.training.metrics == {"acc": 0.25}
    assert set(opened.tensors) == {"w"}
