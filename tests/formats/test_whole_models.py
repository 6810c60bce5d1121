"""Files with a whole model in them, its class gone: the state dict that the model would give."""

from __future__ import annotations

import argparse
import collections
import sys
import time
import types
import zipfile
from typing import Any

import pytest
import torch

import ckptavg
from ckptavg.errors import FormatError, SelectionError
from ckptavg.formats import open_checkpoint, pickled
from ckptavg.formats.pickled import ModuleReader, PickledTensor, Placeholder, Storage, is_module
from ckptavg.formats.statedict import find_state_dicts
from ckptavg.formats.tensors import BY_NAME
from tests.helpers import assert_same, refusal, save_torch
from tests.oracle import naive_mean, same_bits

KINDS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
TENSOR = PickledTensor(Storage("0", BY_NAME["float32"]), BY_NAME["float32"], 0, (4,), (1,))

# The classes are in a module that is gone when the file is read.
SOURCE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.skip = None
        self.register_parameter("gate", None)
        self.register_buffer("nothing", None)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(3))
        self.scale = nn.Parameter(torch.randn(()))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(Block(8), Block(8)))
        self.stages = nn.ModuleList([Block(8), Block(8)])
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 2, bias=False)})
        self.extra = nn.ParameterList([torch.randn(2), torch.randn(3)])
        self.embed = nn.Embedding(7, 8)
        self.decode = nn.Linear(8, 7)
        self.decode.weight = self.embed.weight
        self.again = self.stages[0]
        self.attention = nn.MultiheadAttention(8, 2)
        self.rnn = nn.LSTM(8, 4)
        self.register_buffer("cache", torch.randn(5, 5), persistent=False)
        self.register_buffer("table", torch.arange(6).reshape(2, 3).t())
        self.yaml = {"depth": 3}
        self.names = ["x"]


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(3)
        self.other = nn.Linear(2, 2)
"""


def classes():
    module: Any = types.ModuleType("gone_models")
    exec(SOURCE, module.__dict__)  # noqa: S102
    return module


def save_and_forget(make, path, *, zipped=True):
    """Save what `make` makes of the classes; returns it. Afterwards nobody can import them."""
    module = sys.modules["gone_models"] = classes()
    try:
        root = make(module)
        save_torch(root, path, _use_new_zipfile_serialization=zipped)
    finally:
        del sys.modules["gone_models"]
    return root


def bare(module):
    torch.manual_seed(0)
    return module.Net().half()


@KINDS
@pytest.mark.parametrize("wrap", [None, "DataParallel", "Sequential"])
def test_a_bare_model_gives_names_and_bits_of_its_state_dict(tmp_path, zipped, wrap):
    path = tmp_path / "x.pt"
    model = save_and_forget(
        lambda module: getattr(torch.nn, wrap)(bare(module)) if wrap else bare(module),
        path,
        zipped=zipped,
    )
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(path, weights_only=False)
    opened = open_checkpoint(path)
    assert_same(opened, model.state_dict())
    assert opened.key == ""
    assert not any(name.endswith("cache") for name in opened.tensors)
    assert opened.other_keys == ()
    assert "gone_models" not in sys.modules


def test_names_come_in_the_order_of_the_state_dict(tmp_path):
    model = bare(classes())
    read = find_state_dicts(as_placeholder(model))[""]
    assert list(read) == list(model.state_dict())


def as_placeholder(model):
    """What the inert unpickler makes of a module, its tensors aside."""
    made = Placeholder("m.Module")
    made.state = {
        "_parameters": {n: None if v is None else TENSOR for n, v in model._parameters.items()},
        "_buffers": {n: None if v is None else TENSOR for n, v in model._buffers.items()},
        "_non_persistent_buffers_set": set(model._non_persistent_buffers_set),
        "_modules": {n: v and as_placeholder(v) for n, v in model._modules.items()},
    }
    return made


def test_shared_parts_are_tied_under_each_name(tmp_path):
    model = save_and_forget(bare, tmp_path / "x.pt")
    opened = open_checkpoint(tmp_path / "x.pt")
    for one, other in (
        ("embed.weight", "decode.weight"),
        ("stages.0.conv.weight", "again.conv.weight"),
    ):
        assert one in model.state_dict()
        assert opened.tensors[one] == opened.tensors[other]


def ultralytics(module, step=0, *, ema=True):
    """What Ultralytics' trainer saves."""
    torch.manual_seed(step)
    model = module.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {
        "epoch": step,
        "best_fitness": 0.5,
        "model": model,
        "ema": module.Net().half() if ema else None,
        "updates": 70,
        "optimizer": optimizer.state_dict(),
        "train_args": {"lr0": 0.01},
        "train_metrics": {"fitness": 0.5},
        "date": "2024-01-02",
        "version": "8.3.0",
    }


@KINDS
def test_the_model_of_ultralytics_is_taken_and_its_average_on_request(tmp_path, zipped):
    root = save_and_forget(ultralytics, tmp_path / "last.pt", zipped=zipped)
    opened = open_checkpoint(tmp_path / "last.pt")
    assert_same(opened, root["model"].state_dict())
    assert opened.key == "model"
    assert opened.other_keys == ("ema",)
    assert opened.other_content
    assert opened.training.steps == {"epoch": 0}
    assert opened.training.learning_rate == 0.01
    asked_for = open_checkpoint(tmp_path / "last.pt", key="ema")
    assert_same(asked_for, root["ema"].state_dict())


@pytest.mark.parametrize("present", ["model", "ema"])
def test_the_only_model_of_ultralytics_is_taken(tmp_path, present):
    def make(module):
        absent = "ema" if present == "model" else "model"
        return ultralytics(module) | {absent: None}

    root = save_and_forget(make, tmp_path / "best.pt")
    opened = open_checkpoint(tmp_path / "best.pt")
    assert_same(opened, root[present].state_dict())
    assert opened.key == present


@KINDS
def test_whole_models_average_to_the_naive_mean_bit_for_bit(tmp_path, zipped):
    states = []
    for step in range(3):
        root = save_and_forget(
            lambda module, step=step: ultralytics(module, step),
            tmp_path / f"epoch{step}.pt",
            zipped=zipped,
        )
        states.append(root["model"].state_dict())
    paths = [tmp_path / f"epoch{step}.pt" for step in range(3)]
    ckptavg.average(paths, tmp_path / "out.pt")
    result = torch.load(tmp_path / "out.pt")
    assert result.keys() == states[0].keys()
    classes().Net().load_state_dict(result)
    for name, last in states[-1].items():
        wanted = naive_mean([state[name] for state in states])
        assert same_bits(result[name], wanted if last.is_floating_point() else last), name
    assert result["embed.weight"].data_ptr() == result["decode.weight"].data_ptr()


def test_a_whole_model_averages_with_a_state_dict_of_the_same(tmp_path):
    root = save_and_forget(ultralytics, tmp_path / "epoch0.pt")
    other = {name: value + value for name, value in root["model"].state_dict().items()}
    other["table"] = root["model"].table
    for name in other:
        if name.endswith("num_batches_tracked"):
            other[name] = torch.tensor(5)
    save_torch({"model": other, "epoch": 1}, tmp_path / "epoch1.pt")
    ckptavg.average([tmp_path / "epoch0.pt", tmp_path / "epoch1.pt"], tmp_path / "out.pt")
    result = torch.load(tmp_path / "out.pt")
    pair = [root["model"].state_dict()["scale"], other["scale"]]
    assert same_bits(result["scale"], naive_mean(pair))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reparametrized_layers_give_what_torch_gives(tmp_path):
    class Parametrized(torch.nn.Module):
        pass

    old = torch.nn.utils.weight_norm(torch.nn.Linear(3, 2))
    new = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    spectral = torch.nn.utils.spectral_norm(torch.nn.Linear(3, 2))
    del old.weight, spectral.weight  # derived, with a history that cannot be saved
    path = save_torch(torch.nn.Sequential(old, spectral), tmp_path / "x.pt")
    expected = torch.nn.Sequential(old, spectral).state_dict()
    assert {"0.weight_g", "0.weight_v", "1.weight_orig", "1.weight_u"} < set(expected)
    assert_same(open_checkpoint(path), expected)
    # Torch itself refuses to pickle these, so what is compared are the names.
    with pytest.raises(RuntimeError, match="parametrized"):
        save_torch(new, tmp_path / "y.pt")
    assert list(find_state_dicts(as_placeholder(new))[""]) == list(new.state_dict())


def test_a_lazy_model_that_was_never_run_is_refused_by_the_parameter_s_name(tmp_path):
    save_and_forget(lambda module: module.Lazy(), tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert ": linear.weight: cannot be averaged" in message
    assert "UninitializedParameter" in message


def test_models_from_before_there_were_buffers_that_are_not_saved_are_read():
    made = as_placeholder(torch.nn.BatchNorm1d(2))
    del made.state["_non_persistent_buffers_set"]
    assert "running_mean" in find_state_dicts(made)[""]


# What is beside a model, and what is none


def test_a_model_in_a_configuration_is_not_the_checkpoint_s(tmp_path):
    def make(module):
        return {
            "weights": {"w": torch.ones(2)},
            "hyper_parameters": {"backbone": module.Net()},
            "criterion": torch.nn.CrossEntropyLoss(weight=torch.ones(3)),
        }

    save_and_forget(make, tmp_path / "x.pt")
    opened = open_checkpoint(tmp_path / "x.pt")
    assert opened.key == "weights"
    assert opened.other_keys == ()


def test_a_tensor_beside_a_model_does_not_make_the_file_a_state_dict(tmp_path):
    root = save_and_forget(
        lambda module: {"net": bare(module), "best": torch.ones(1)}, tmp_path / "x.pt"
    )
    opened = open_checkpoint(tmp_path / "x.pt")
    assert opened.key == "net"
    assert_same(opened, root["net"].state_dict())


def test_two_models_are_left_to_the_user(tmp_path):
    save_and_forget(lambda module: {"g": bare(module), "d": bare(module)}, tmp_path / "x.pt")
    assert "`key`" in refusal(tmp_path / "x.pt", SelectionError)


@pytest.mark.parametrize(
    ("root", "kind"),
    [
        (argparse.Namespace(a=1), "argparse.Namespace"),
        ({"model": argparse.Namespace(a=1), "epoch": 3}, "argparse.Namespace"),
        (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
        (torch.nn.Sequential(torch.nn.ReLU()), "torch.nn.modules.container.Sequential"),
    ],
)
def test_any_other_object_is_called_by_its_name(tmp_path, root, kind):
    message = refusal(save_torch(root, tmp_path / "x.pt"), SelectionError)
    assert f"holds a whole {kind} object, not a state dict" in message
    assert "save its state_dict()" in message


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        {},
        {"_parameters": {}, "_buffers": {}},
        {"_parameters": {}, "_buffers": {}, "_modules": []},
        {"_parameters": Placeholder("x"), "_buffers": {}, "_modules": {}},
    ],
)
def test_an_object_without_a_module_s_dicts_is_no_module(state):
    made = Placeholder("m.Module")
    made.state = state
    assert not is_module(made)
    assert find_state_dicts(made) == {}
    assert find_state_dicts({"model": made}) == {}


# Hostile models


def module(parameters=None, buffers=None, modules=None, hidden=None):
    made = Placeholder("m.Module")
    made.state = {
        "_parameters": {"w": TENSOR} if parameters is None else parameters,
        "_buffers": buffers or {},
        "_modules": modules or {},
        "_non_persistent_buffers_set": hidden,
    }
    return made


def cycle():
    made = module()
    made.state["_modules"]["self"] = made
    return made


def doubling():
    made = module()
    for _ in range(200):
        made = module({}, modules={"a": made, "b": made})
    return made


def deep(depth):
    made = module()
    for _ in range(depth):
        made = module({}, modules={"a": made})
    return made


def wide():
    many = dict.fromkeys(map(str, range(30_000)))
    inner = module(many)
    return module({}, modules=dict.fromkeys(many, inner))


def hidden_buffers():
    many = dict.fromkeys(map(str, range(30_000)))
    inner = module({}, buffers=many, hidden=set(many))
    return module({}, modules=dict.fromkeys(many, inner))


def long_names():
    made = module({"x" * 1_000_000: TENSOR})
    for _ in range(100):
        made = module({}, modules={"x" * 1_000_000: made})
    return made


BOMBS = {
    "cycle": cycle,
    "doubling": doubling,
    "deep": lambda: deep(100_000),
    "wide": wide,
    "hidden buffers": hidden_buffers,
    "long names": long_names,
    "empty names": lambda: module({}, modules={"": doubling()}),
}


@pytest.mark.parametrize(
    ("kind", "inside"), [*((kind, False) for kind in BOMBS), ("doubling", True)]
)
def test_models_without_end_are_refused_soon(kind, inside):
    made = BOMBS[kind]()
    started = time.process_time()
    with pytest.raises(FormatError, match="without end") as caught:
        find_state_dicts({"model": made} if inside else made)
    assert time.process_time() - started < 30
    assert "state_dict()" in str(caught.value)


def test_many_models_that_share_their_parts_have_one_bound(monkeypatch):
    """Of which 14 would be one too many."""
    monkeypatch.setattr(pickled, "_MOST_CHARACTERS", 1 << 22)
    shared = module({}, modules={str(index): module() for index in range(10_000)})
    roots = {str(index): module({}, modules={"a": shared}) for index in range(90)}
    with pytest.raises(FormatError, match="without end"):
        find_state_dicts(roots)
    find_state_dicts({"0": roots["0"]})


def test_one_model_under_many_names_is_walked_once():
    big = module({str(index): TENSOR for index in range(10_000)})
    started = time.process_time()
    assert len(find_state_dicts(dict.fromkeys(map(str, range(100)), big))) == 100
    assert time.process_time() - started < 30


def test_a_deep_model_is_walked_without_recursion():
    [name] = find_state_dicts(deep(3_000))[""]
    assert name == "a." * 3_000 + "w"


@pytest.mark.parametrize(
    "made",
    [
        module({3: TENSOR}),
        module(buffers={None: TENSOR}),
        module(modules={Placeholder("key"): module()}),
        module(modules={"child": Placeholder("torch.jit._script.RecursiveScriptModule")}),
        module(modules={"child": {"w": TENSOR}}),
        module(modules={"\x1b[2J\n": TENSOR}),
    ],
)
def test_what_no_module_holds_is_refused_in_one_line(made):
    with pytest.raises(FormatError) as caught:
        find_state_dicts({"model": made})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("hidden", [None, 3, ["b"], "b", Placeholder("m.set")])
def test_a_strange_set_of_hidden_buffers_hides_none(hidden):
    read = ModuleReader(None).state_dict(module(buffers={"b": TENSOR}, hidden=hidden))
    assert list(read) == ["w", "b"]


def test_a_hidden_buffer_does_not_hide_a_parameter_of_its_name():
    read = ModuleReader(None).state_dict(module({"b": TENSOR}, {"c": TENSOR}, hidden={"b", "c"}))
    assert list(read) == ["b"]


@KINDS
def test_a_file_with_a_model_that_holds_itself_is_refused_with_its_name(tmp_path, zipped):
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model._modules["self"] = model
    path = save_torch({"model": model}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert "without end" in refusal(path)


# DeepSpeed


def deepspeed(model, **changed):
    """What DeepSpeedEngine saves as `mp_rank_00_model_states.pt`, as of 0.16."""
    shapes = {name: value.shape for name, value in model.named_parameters()}
    return {
        "module": collections.OrderedDict(model.state_dict()),
        "buffer_names": [name for name, _ in model.named_buffers()],
        "optimizer": None,
        "param_shapes": [collections.OrderedDict(shapes)],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 700,
        "global_samples": 5_600,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": 8, "zero_optimization": {"stage": 2}},
        "ds_version": "0.16.4",
    } | changed


def normed():
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def emptied(model):
    """The module's state dict as ZeRO's stage 3 leaves it: buffers, and nothing of parameters."""
    names = {name for name, _ in model.named_parameters()}
    return {
        name: torch.empty(0) if name in names else value
        for name, value in model.state_dict().items()
    }


def test_the_weights_of_deepspeed_are_those_of_its_module(tmp_path):
    model = normed()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    root = deepspeed(model, frozen_param_fragments=frozen, epoch=3)
    opened = open_checkpoint(save_torch(root, tmp_path / "mp_rank_00_model_states.pt"))
    assert opened.key == "module"
    assert_same(opened, model.state_dict())
    assert opened.training.steps == {"global_step": 700, "epoch": 3}
    assert opened.other_keys == ()


def test_an_empty_parameter_is_no_sign_of_stage_3(tmp_path):
    model = normed()
    model.register_parameter("none", torch.nn.Parameter(torch.empty(0)))
    path = save_torch(deepspeed(model), tmp_path / "mp_rank_00_model_states.pt")
    assert_same(open_checkpoint(path), model.state_dict())


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", {"module": emptied(normed())}),
        ("zero_pp_rank_1_mp_rank_00_model_states.pt", {}),
        ("copied.pt", {"module": emptied(normed()), "ds_config": None}),
        ("copied.pt", {"ds_config": {"zero_optimization": {"stage": 3}}}),
        (
            "copied.pt",
            {
                "module": emptied(normed()),
                "ds_config": {},
                "param_shapes": [],
                "frozen_param_shapes": {"0.weight": torch.Size([2, 3])},
            },
        ),
    ],
)
def test_weights_that_deepspeed_spread_over_files_are_refused(tmp_path, name, changed):
    message = refusal(save_torch(deepspeed(normed(), **changed), tmp_path / name))
    assert "ZeRO stage 3" in message
    assert "zero_to_fp32.py" in message


@pytest.mark.parametrize(
    "changed",
    [
        {"param_shapes": None, "ds_config": None},
        {"param_shapes": 3, "ds_config": 3},
        {"param_shapes": [3, None], "frozen_param_shapes": [1]},
        {"param_shapes": [{"0.weight": 3, 4: None}], "ds_config": {"zero_optimization": True}},
    ],
)
def test_strange_facts_of_deepspeed_s_do_no_harm(tmp_path, changed):
    model = normed()
    opened = open_checkpoint(save_torch(deepspeed(model, **changed), tmp_path / "x.pt"))
    assert_same(opened, model.state_dict())


def test_a_pipeline_s_file_without_weights_has_no_state_dict(tmp_path):
    path = save_torch(deepspeed(normed(), module=None), tmp_path / "mp_rank_00_model_states.pt")
    assert "no state dict" in refusal(path, SelectionError)


# Programs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile_", ["script", "trace"])
def test_a_torchscript_program_is_called_one(tmp_path, compile_):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
    made = (
        torch.jit.script(model)
        if compile_ == "script"
        else torch.jit.trace(model, torch.ones(1, 3))
    )
    torch.jit.save(made, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert "is a TorchScript program" in message
    assert "state_dict()" in message


def test_an_exported_program_is_called_one(tmp_path):
    exported = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(exported, tmp_path / "x.pt2")
    message = refusal(tmp_path / "x.pt2")
    assert "is a torch.export program" in message
    assert "state_dict()" in message


def test_an_exported_program_of_torch_2_1_is_called_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        for name in ("serialized_exported_program.json", "serialized_state_dict.json", "version"):
            archive.writestr(name, "{}")
    assert "is a torch.export program" in refusal(tmp_path / "x.pt2")


def test_a_compiled_package_is_called_one(tmp_path):
    package = pytest.importorskip("torch.export.pt2_archive._package")
    (tmp_path / "model.so").write_bytes(b"code")
    package.package_pt2(tmp_path / "x.pt2", aoti_files={"model": [str(tmp_path / "model.so")]})
    message = refusal(tmp_path / "x.pt2")
    assert "is an AOTInductor package" in message
    assert "state_dict()" in message
