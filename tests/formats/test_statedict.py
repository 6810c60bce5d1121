"""Which of the mappings in a file are state dicts, and which of them is meant."""

from __future__ import annotations

import collections
import contextlib
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptavg.errors import NoStateDictError, SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.pickled import PickledTensor, Placeholder, Storage, UnreadableTensor
from ckptavg.formats.statedict import choose, find_state_dicts
from ckptavg.formats.tensors import BY_NAME
from ckptavg.formats.words import is_average

PATH = Path("run.pt")
TENSOR = PickledTensor(Storage("0", BY_NAME["float32"]), BY_NAME["float32"], 0, (4,), (1,))
STATE = {"a.weight": TENSOR, "a.bias": TENSOR}
OTHER = {"b.weight": TENSOR}


def found_in(root):
    return set(find_state_dicts(root))


# Finding


@pytest.mark.parametrize(
    "root",
    [
        STATE,
        collections.OrderedDict(STATE),
        {"w": UnreadableTensor("sparse")},
        {"w": TENSOR, "step": 3, "name": "x", "none": None},
        {"w": TENSOR, "layer._extra_state": {"t": TENSOR}},
        {"w": TENSOR, "_extra_state": {"t": TENSOR}},
        {"w": TENSOR, "config": {"width": 3}},
    ],
)
def test_a_mapping_of_names_to_tensors_is_a_state_dict(root):
    found = find_state_dicts(root)
    assert list(found) == [""]
    assert found[""] is root


@pytest.mark.parametrize(
    "root",
    [
        None,
        3,
        "state_dict",
        TENSOR,
        [STATE],
        (STATE,),
        Placeholder("m.Model", ()),
        {},
        {"a": 1},
        {1: TENSOR},
        {"w": TENSOR, 1: TENSOR},
        {"a": [TENSOR]},
        {"state_dict": {}},
        {"state_dict": {0: TENSOR}},
        {1: STATE},
    ],
)
def test_nothing_else_is_one(root):
    assert find_state_dicts(root) == {}


def test_a_tensor_beside_state_dicts_does_not_make_the_whole_file_one():
    assert found_in({"state_dict": STATE, "best": TENSOR}) == {"state_dict"}


def test_state_dicts_are_found_two_levels_down_and_no_deeper():
    root = {"a": STATE, "b": {"c": STATE, "d": {"e": STATE}}}
    assert found_in(root) == {"a", "b.c"}


def test_one_mapping_under_two_names_is_found_under_both():
    assert found_in({"model": STATE, "state_dict": STATE}) == {"model", "state_dict"}
    inner = {"net": STATE}
    assert found_in({"a": inner, "b": inner}) == {"a.net", "b.net"}


@pytest.mark.parametrize(
    "name",
    [
        "optimizer",
        "optim",
        "optimizer_states",
        "Optimizers",
        "model.optimizer",
        "scheduler",
        "lr_scheduler",
        "lr_schedulers",
        "rng_state",
        "cuda_rng_state",
        "scaler",
        "amp_scaler",
        "grad_scaler",
        "loops",
        "callbacks",
        "sampler_state",
        "criterion",
    ],
)
def test_what_belongs_to_the_training_is_no_model(name):
    assert found_in({name: STATE, "model": STATE}) == {"model"}
    assert found_in({"trainer": {name: STATE}}) == set()


@pytest.mark.parametrize("name", ["upsampler", "resampler", "upscaler", "string_model", "learning"])
def test_a_model_whose_name_only_contains_such_a_word_is_one(name):
    assert found_in({name: STATE}) == {name}


def test_cycles_and_shared_mappings_are_searched_once():
    cycle: dict[str, object] = {}
    cycle["self"] = cycle
    cycle["again"] = {"back": cycle}
    assert found_in(cycle) == set()
    cycle["model"] = STATE
    assert found_in(cycle) == {"model", "self.model"}


def test_a_state_dict_that_holds_itself_is_looked_at_once():
    state: dict[str, object] = {"w": TENSOR}
    state["self"] = state
    assert found_in(state) == {""}


def test_tensors_at_the_top_are_weights_unless_trainers_put_those_elsewhere():
    assert found_in({"w": TENSOR, "ema": STATE}) == {"", "ema"}
    assert found_in({"w": TENSOR, "model": STATE}) == {"model"}
    assert found_in({"w": TENSOR, "optimizer": {"m": TENSOR}}) == {""}
    assert found_in({"rng_state": TENSOR, "net": STATE}) == {"net"}


def test_numbers_are_no_weights():
    counter = PickledTensor(TENSOR.storage, TENSOR.dtype, 0, (), ())
    assert found_in({"w": TENSOR, "train_state": {"step": counter}}) == {""}
    assert found_in({"best": counter, "a": {"b": STATE, "c": STATE}}) == {"a.b", "a.c"}
    assert found_in({"step": counter}) == {""}


def test_a_key_counts_whatever_its_name_says():
    root = {"optimized_model": STATE, "model": STATE}
    assert set(find_state_dicts(root)) == {"model"}
    assert set(find_state_dicts(root, key="optimized_model")) == {"model", "optimized_model"}
    assert set(find_state_dicts({"a": {"sched": STATE}}, key="a.sched")) == {"a.sched"}
    assert find_state_dicts({"a": {"sched": STATE}}, key="a.b.c") == {}


@pytest.mark.parametrize("inside", [{}, {"last": TENSOR}])
def test_many_names_of_one_big_mapping_take_no_longer_than_it(inside):
    names = [str(index) for index in range(30_000)]
    big: dict[str, object] = dict.fromkeys(names, 3) | inside
    started = time.process_time()
    for root in (
        dict.fromkeys(names, big),
        dict.fromkeys(names, dict.fromkeys(names, big)),
        {"w": TENSOR} | dict.fromkeys(names, big),
    ):
        with contextlib.suppress(SelectionError):  # more state dicts than anybody could choose from
            find_state_dicts(root)
    assert time.process_time() - started < 30


# Choosing


def chosen(root, key=None):
    return choose(PATH, find_state_dicts(root), key)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["state_dict", "state_dict_ema"], "state_dict"),
        (["state_dict_ema", "state_dict"], "state_dict"),
        (["state_dict", "swa_state_dict"], "state_dict"),
        (["model", "model_ema"], "model"),
        (["model", "ema"], "model"),
        (["student", "teacher"], "student"),
        (["current_model_state", "state_dict"], "current_model_state"),
        (["state_dict", "current_model_state", "averaging_state"], "current_model_state"),
        (["current_model_state"], "current_model_state"),
        (["model", "discriminator"], "model"),
        (["anything"], "anything"),
        (["ema"], "ema"),
        (["shadow_params"], "shadow_params"),
    ],
)
def test_the_weights_themselves_are_taken(names, expected):
    assert chosen(dict.fromkeys(names, STATE)) == expected


@pytest.mark.parametrize(
    "names",
    [["generator", "discriminator"], ["a", "b", "c"], ["state_dict", "model"], ["ema", "swa"]],
)
def test_an_unclear_choice_is_left_to_the_user(names):
    with pytest.raises(SelectionError, match="`key`") as caught:
        chosen(dict.fromkeys(names, STATE))
    assert caught.value.choices == tuple(names)
    for name in names:
        assert name in str(caught.value)
        assert chosen(dict.fromkeys(names, STATE), name) == name


def test_a_name_from_the_file_cannot_spoil_the_message():
    root = {"a\x1b[2J\n": STATE, "b": STATE}
    with pytest.raises(SelectionError) as caught:
        chosen(root)
    assert str(caught.value).isprintable()


def test_a_key_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(SelectionError, match=r"'x'.*there are: a, b"):
        chosen({"a": STATE, "b": OTHER}, "x")
    with pytest.raises(SelectionError, match="no state dict found"):
        chosen({}, "x")


@pytest.mark.parametrize(
    "name",
    ["ema", "model_ema", "state_dict_ema", "ema.model", "EMA", "swa-model", "averaged", "teacher"],
)
def test_these_are_names_of_averages(name):
    assert is_average(name)


@pytest.mark.parametrize(
    "name", ["state_dict", "model", "schema", "swan", "emanuel", "", "avgpool"]
)
def test_these_are_not(name):
    assert not is_average(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": np.ones(3)}, "w is a numpy array, not a tensor; save the arrays as tensors"),
        ({"model": {"w": np.ones(3)}}, "model.w is a numpy array, not a tensor"),
        (
            {"model": {"language_model": {"encoder": {"layers.0.w": torch.ones(2)}}}},
            "levels deep; `key` model.language_model.encoder takes the mapping that holds it",
        ),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).state_dict(), "an optimizer's state"),
        ({"epoch": 3}, "no state dict found in it"),
        (torch.ones(2), "it is a tensor without a name"),
    ],
    ids=["arrays", "arrays below", "Megatron-LM", "optimizer", "numbers", "tensor"],
)
def test_what_a_file_without_a_state_dict_holds_is_said(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(NoStateDictError) as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert message in str(caught.value)
    if "levels deep" in message:
        opened = open_checkpoint(tmp_path / "x.pt", key="model.language_model.encoder")
        assert opened.tensors.keys() == {"layers.0.w"}
