"""The refresh of a checkpoint file, and its commands."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import update_bn

import ckptavg
from ckptavg.batchnorm.files import refresh_checkpoint
from ckptavg.batchnorm.options import RefreshOptions
from ckptavg.batchnorm.together import average_and_refresh
from ckptavg.errors import (
    CkptAvgError,
    MismatchError,
    OutputError,
    RefreshError,
    UserCodeError,
)
from ckptavg.formats import open_checkpoint
from ckptavg.model.loading import as_torch, load_weights
from ckptavg.model.names import match_names
from tests.helpers import process, run, save_dcp, save_engine
from tests.oracle import same_bits
from tests.ranks import Job, command

TRAIN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, width=8, drop=0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(width, 5)
        self.norm = nn.BatchNorm1d(5, affine=False)
        self.decode = nn.Linear(width, 5)
        self.decode.weight = self.head.weight
        self.register_buffer("ids", torch.arange(6))

    def forward(self, images):
        found = self.drop(self.bn(self.conv(images)).relu()).mean((2, 3))
        return self.norm(self.head(found)) + self.decode(found)


def images(count=37):
    made = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=made) * 2 + 1


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)


def batches(size=16):
    return [(one, torch.zeros(len(one))) for one in images().split(size)]


def shuffled(size=8):
    return DataLoader(TensorDataset(images()), batch_size=size, shuffle=True)


def dicts():
    return [{"deep": [{"x": one}], "name": "text"} for one, _ in batches()]


def forward(model, batch):
    return model(batch["deep"][0]["x"])


def wrapped(inner="net"):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, inner, Net())

        def forward(self, images):
            return getattr(self, inner)(images)

    return Wrapper()


def endless():
    while True:
        yield images(8)


def broken():
    def forward(images):
        raise ZeroDivisionError("deliberately")

    model = Net()
    model.head.forward = forward
    return model


def raising():
    raise ZeroDivisionError("no model today")


def exits():
    raise SystemExit(0)


def nan():
    yield images(8) * float("inf")
    yield images(8) * float("nan")


net, stack = Net(), batches()
number = 3
"""


@pytest.fixture(autouse=True)
def _folder(user_folder, notices, no_fsync):
    (user_folder / "train.py").write_text(TRAIN)


@pytest.fixture
def net():
    """A model with statistics unlike any data's, and one half of its state dict's oddities."""
    from train import Net  # type: ignore[import-not-found]

    return disturbed(Net())


def disturbed(model: nn.Module) -> nn.Module:
    torch.default_generator.manual_seed(0)
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
            elif tensor.dim() == 0:
                tensor.fill_(123)
    return model


def options(model="train.py:Net", loader="train.py:batches", **others) -> dict[str, Any]:
    return {"model": model, "loader": loader, "device": "cpu", **others}


def save_safetensors(state, path, **metadata):
    contiguous = {name: value.contiguous().clone() for name, value in state.items()}
    save_file(contiguous, path, metadata={"format": "pt", **metadata})
    return path


def save(state, path):
    if path.suffix == ".safetensors":
        return save_safetensors(state, path, step="7")
    torch.save(state, path)
    return path


def load(path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return found


def metadata_of(path) -> dict[str, str]:
    return dict(open_checkpoint(path).metadata)


def provenance(path):
    return json.loads(metadata_of(path)["ckptavg"])


def ours(state, tmp_path, name="ours.safetensors"):
    """A file of our own making, with stale statistics."""
    inputs = [
        save_safetensors(state, tmp_path / f"in{index}_{name}.safetensors") for index in (1, 2)
    ]
    with torch.no_grad():
        save_safetensors(
            {
                key: value * 2 if value.is_floating_point() else value
                for key, value in state.items()
            },
            inputs[1],
        )
    ckptavg.average(inputs, tmp_path / name)
    return tmp_path / name


def contents(folder):
    """All the files below a directory."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


REFRESHED = {
    f"{layer}.{name}"
    for layer in ("bn", "norm")
    for name in ("running_mean", "running_var", "num_batches_tracked")
}


class TestValues:
    @pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt", "bin"])
    def test_are_those_of_update_bn(self, kind, net, tmp_path):
        from train import batches

        path = save(net.state_dict(), tmp_path / f"a.{kind}")
        out = tmp_path / f"o.{kind}"
        others = {"estimator": "torch", "memory_format": "contiguous"}
        report = refresh_checkpoint(path, out, **options(**others))
        update_bn(batches(), net)
        found, expected = load(out), net.state_dict()
        for layer in ("bn", "norm"):
            scale = expected[f"{layer}.running_var"].sqrt()
            apart = found[f"{layer}.running_mean"] - expected[f"{layer}.running_mean"]
            assert (apart.abs() <= 1e-5 * scale).all()
            ratio = found[f"{layer}.running_var"] / expected[f"{layer}.running_var"]
            assert ((ratio - 1).abs() <= 1e-5).all()
            assert found[f"{layer}.num_batches_tracked"] == 3
        assert (report.batches, report.samples) == (3, 37)
        assert [layer.name for layer in report.layers] == ["bn", "norm"]

    def test_are_loaded_into_the_model_first(self, net, tmp_path):
        """The second norm layer sees what the checkpoint's weights make of the data."""
        path = save(net.state_dict(), tmp_path / "a.pt")
        refresh_checkpoint(path, tmp_path / "o.pt", **options(estimator="exact"))
        from train import batches

        ckptavg.refresh_norm(net, batches(), estimator="exact")
        found = load(tmp_path / "o.pt")
        for name in sorted(REFRESHED):
            assert same_bits(found[name], net.state_dict()[name]), name

    def test_of_another_dtype_are_rounded_to_it(self, net, tmp_path):
        state = {
            name: value.bfloat16() if name.startswith("bn.running") else value
            for name, value in net.state_dict().items()
        }
        path = save(state, tmp_path / "a.safetensors")
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        found = load(tmp_path / "o.safetensors")
        refresh_checkpoint(
            save(net.state_dict(), tmp_path / "b.safetensors"),
            tmp_path / "p.safetensors",
            **options(),
        )
        expected = load(tmp_path / "p.safetensors")
        for name in ("bn.running_mean", "bn.running_var"):
            assert same_bits(found[name], expected[name].bfloat16())

    def test_too_large_for_it_are_an_error(self, net, tmp_path):
        with torch.no_grad():
            net.conv.weight.mul_(1e3)
        state = {
            name: value.half() if name == "bn.running_var" else value
            for name, value in net.state_dict().items()
        }
        path = save(state, tmp_path / "a.safetensors")
        with pytest.raises(RefreshError, match=r"'bn\.running_var' is too large .*float16"):
            refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        assert not (tmp_path / "o.safetensors").exists()

    def test_nan_in_the_old_ones_does_not_survive(self, net, tmp_path):
        net.bn.running_mean[0] = net.bn.running_var[1] = torch.nan
        path = save(net.state_dict(), tmp_path / "a.pt")
        refresh_checkpoint(path, tmp_path / "o.pt", **options())
        assert all(value.isfinite().all() for value in load(tmp_path / "o.pt").values())

    def test_of_a_checkpoint_without_counters_are_written_without(self, net, tmp_path):
        """As torch before 0.4.1 saved it."""
        state = {
            name: value for name, value in net.state_dict().items() if "num_batches" not in name
        }
        path = save(state, tmp_path / "a.safetensors")
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        found = load(tmp_path / "o.safetensors")
        assert set(found) == set(state)
        assert not torch.equal(found["bn.running_mean"], state["bn.running_mean"])

    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_of_lazy_layers_work(self, net, tmp_path):
        (tmp_path / "lazy_train.py").write_text(
            "from torch import nn\n"
            "def make():\n"
            "    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())\n"
        )
        state = nn.Sequential(net.conv, net.bn).state_dict()
        path = save(state, tmp_path / "a.pt")
        refresh_checkpoint(path, tmp_path / "o.pt", **options("lazy_train.py:make"))
        refresh_checkpoint(
            save(net.state_dict(), tmp_path / "b.pt"), tmp_path / "p.pt", **options()
        )
        expected = load(tmp_path / "p.pt")["bn.running_mean"]
        assert same_bits(load(tmp_path / "o.pt")["1.running_mean"], expected)

    def test_of_a_layer_under_two_names_come_under_both(self, net, tmp_path):
        (tmp_path / "shared_train.py").write_text(
            "from train import Net\n"
            "def make():\n"
            "    model = Net()\n"
            "    model.again = model.bn\n"
            "    return model\n"
        )
        net.again = net.bn
        for name in ("a.pt", "a.safetensors"):
            path = save(net.state_dict(), tmp_path / name)
            out = path.with_stem("o")
            refresh_checkpoint(path, out, **options("shared_train.py:make"))
            found = load(out)
            assert not torch.equal(found["bn.running_mean"], net.bn.running_mean)
            assert same_bits(found["again.running_mean"], found["bn.running_mean"])
            assert same_bits(found["again.running_var"], found["bn.running_var"])
            assert found["again.num_batches_tracked"] == found["bn.num_batches_tracked"] == 3
        found = torch.load(tmp_path / "o.pt")
        assert found["again.running_mean"].data_ptr() == found["bn.running_mean"].data_ptr()

    def test_of_a_layer_that_a_wrapper_stops_from_tracking_are_written(self, net, tmp_path):
        (tmp_path / "stopping_train.py").write_text(
            "import torch\n"
            "from train import Net\n"
            "def stop(layer, _):\n"
            "    if not torch.is_grad_enabled():\n"
            "        layer.track_running_stats = False\n"
            "def make():\n"
            "    model = Net()\n"
            "    model.bn.register_forward_pre_hook(stop)\n"
            "    return model\n"
        )
        path = save(net.state_dict(), tmp_path / "a.pt")
        refresh_checkpoint(path, tmp_path / "o.pt", **options("stopping_train.py:make"))
        refresh_checkpoint(path, tmp_path / "p.pt", **options())
        found, expected = load(tmp_path / "o.pt"), load(tmp_path / "p.pt")
        torch.testing.assert_close(found["bn.running_mean"], expected["bn.running_mean"])
        torch.testing.assert_close(found["bn.running_var"], expected["bn.running_var"])


class TestEverythingElse:
    def odd(self, net):
        """Tensors that are easily changed on the way."""
        net.ids.copy_(torch.tensor([-1, 2**62, 0, 7, -(2**63), 5]))
        state = net.state_dict()
        with torch.no_grad():
            state["conv.bias"][:3] = torch.tensor([-0.0, 1e-42, 1e5])
            # A NaN with a payload, which arithmetic would not keep.
            state["decode.bias"].view(torch.int32)[2] = 0x7FC12345
        return state

    @pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
    @pytest.mark.parametrize("kind", ["safetensors", "pt"])
    def test_is_the_same_byte_for_byte(self, kind, estimator, net, tmp_path):
        state = self.odd(net)
        path = save(state, tmp_path / f"a.{kind}")
        before = path.read_bytes()
        out = tmp_path / f"o.{kind}"
        (tmp_path / "plain_train.py").write_text(
            "from train import Net\n"
            "class Plain(Net):\n"
            "    def forward(self, images):\n"
            "        return self.norm(self.head(self.bn(self.conv(images)).mean((2, 3))))\n"
        )
        refresh_checkpoint(path, out, **options("plain_train.py:Plain", estimator=estimator))
        assert path.read_bytes() == before
        found = load(out)
        assert set(found) == set(state)
        changed = {name for name in state if not same_bits(found[name], state[name])}
        assert changed == REFRESHED

    def test_is_so_for_strided_and_tied_tensors_of_a_torch_file(self, net, tmp_path):
        state = self.odd(net)
        state["conv.weight"] = state["conv.weight"].contiguous(memory_format=torch.channels_last)
        state["ids"] = torch.arange(12)[::2]
        state["decode.bias"] = torch.zeros(3, 5).t()[:, 1]
        path = save(state, tmp_path / "a.pt")
        refresh_checkpoint(path, tmp_path / "o.pt", **options())
        found = torch.load(tmp_path / "o.pt")
        changed = {name for name in state if not same_bits(found[name], state[name])}
        assert changed == REFRESHED
        assert found["head.weight"].data_ptr() == found["decode.weight"].data_ptr()

    def test_is_so_for_tensors_that_no_model_has(self, net, tmp_path):
        """Outside of the model's prefix there may be anything, fp8 among it."""
        state = {f"model.{name}": value for name, value in net.state_dict().items()}
        state["loss.scale"] = torch.rand(9).to(torch.float8_e4m3fn)
        state["seen"] = torch.tensor([True, False])
        path = save(state, tmp_path / "a.safetensors")
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        found = load(tmp_path / "o.safetensors")
        changed = {name for name in state if not same_bits(found[name], state[name])}
        assert changed == {f"model.{name}" for name in REFRESHED}

    def test_is_so_for_the_metadata(self, net, tmp_path):
        path = save_safetensors(
            net.state_dict(), tmp_path / "a.safetensors", step="7", note="été", format="mlx"
        )
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        with safe_open(tmp_path / "o.safetensors", "pt") as opened:
            found = opened.metadata()
        assert {**found, "ckptavg": ""} == {
            "format": "mlx", "step": "7", "note": "été", "ckptavg": ""
        }  # fmt: skip

    def test_is_so_for_the_aliases_in_it(self, net, tmp_path):
        inputs = []
        for index in range(2):
            net.head.weight.data += index
            net.bn.running_mean += index
            net.norm.running_mean += index
            inputs.append(save(net.state_dict(), tmp_path / f"step_{index}.pt"))
        path = tmp_path / "a.safetensors"
        ckptavg.average(inputs, path, drop_aliases=True)
        before, tensors = metadata_of(path), load(path)
        assert before["head.weight"] == "decode.weight"
        refresh_checkpoint(path, None, **options())
        assert {**metadata_of(path), "ckptavg": ""} == {**before, "ckptavg": ""}
        found = load(path)
        assert set(found) == set(tensors)
        assert {name for name in found if not same_bits(found[name], tensors[name])} == REFRESHED

    def test_is_so_for_the_versions_of_modules_in_a_torch_file(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        refresh_checkpoint(path, tmp_path / "o.pt", **options())
        found = torch.load(tmp_path / "o.pt")
        assert found._metadata == net.state_dict()._metadata

    def test_and_the_output_loads_strictly(self, net, tmp_path):
        from train import Net

        for name in ("a.pt", "a.safetensors"):
            path = save(net.state_dict(), tmp_path / name)
            refresh_checkpoint(path, path.with_stem("o"), **options())
            Net().load_state_dict(load(path.with_stem("o")), strict=True)

    @pytest.mark.parametrize("kinds", [("pt", "safetensors"), ("safetensors", "pt")])
    def test_stays_when_the_container_changes(self, kinds, net, tmp_path):
        state = net.state_dict()
        path = save(state, tmp_path / f"a.{kinds[0]}")
        out = tmp_path / f"o.{kinds[1]}"
        refresh_checkpoint(path, out, **options())
        found = load(out)
        assert {name for name in state if not same_bits(found[name], state[name])} == REFRESHED


class TestWithoutNormLayers:
    @pytest.mark.parametrize("kind", ["safetensors", "pt"])
    def test_the_output_is_a_copy_and_the_loader_is_not_even_imported(
        self, kind, net, tmp_path, caplog
    ):
        state = net.conv.state_dict(prefix="conv.")
        path = save(state, tmp_path / f"a.{kind}")
        out = tmp_path / f"o.{kind}"
        spec = options("train.py:Bare", "absent.py:loader")
        report = refresh_checkpoint(path, out, **spec, is_optional=True)
        found = load(out)
        assert set(found) == set(state)
        assert all(same_bits(found[name], state[name]) for name in state)
        assert report.layers == ()
        assert "no norm layers that track statistics" in caplog.text
        assert provenance(out)["norm_stats"] == {"state": "none"}

    def test_layers_that_are_all_idle_are_an_error(self, net, tmp_path):
        (tmp_path / "idle_train.py").write_text("def forward(model, batch):\n    pass\n")
        path = ours(net.state_dict(), tmp_path)
        before = load(path)
        with pytest.raises(RefreshError, match=r"refreshed: 'bn', 'norm' \(not called\)"):
            refresh_checkpoint(path, None, **options(forward="idle_train.py:forward"))
        assert provenance(path)["norm_stats"] == {"state": "stale"}
        assert all(same_bits(value, before[name]) for name, value in load(path).items())


class TestNames:
    def lightning(self, net, prefix="model."):
        return {prefix + name: value for name, value in net.state_dict().items()}

    @pytest.mark.parametrize("prefix", ["model.", "module.", "module._orig_mod.", "a.b.c."])
    def test_may_have_a_prefix_in_the_checkpoint(self, prefix, net, tmp_path, caplog):
        path = save(self.lightning(net, prefix), tmp_path / "a.safetensors")
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        found = load(tmp_path / "o.safetensors")
        assert set(found) == set(self.lightning(net, prefix))
        assert found[f"{prefix}bn.num_batches_tracked"] == 3
        assert f"without a prefix, to the checkpoint's, with the prefix '{prefix}'" in caplog.text

    def test_may_have_one_in_the_model(self, net, tmp_path, caplog):
        path = save(net.state_dict(), tmp_path / "a.safetensors")
        refresh_checkpoint(
            path, tmp_path / "o.safetensors",
            **options("train.py:wrapped", model_args={"inner": "module"}),
        )  # fmt: skip
        found = load(tmp_path / "o.safetensors")
        assert set(found) == set(net.state_dict())
        assert found["bn.num_batches_tracked"] == 3
        assert "with the prefix 'module.', to the checkpoint's, without a prefix" in caplog.text

    def test_may_have_unlike_ones(self, net, tmp_path, caplog):
        path = save(self.lightning(net, "module."), tmp_path / "a.safetensors")
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options("train.py:wrapped"))
        assert load(tmp_path / "o.safetensors")["module.bn.num_batches_tracked"] == 3
        assert "the prefix 'net.', to the checkpoint's, with the prefix 'module.'" in caplog.text

    def test_without_a_prefix_are_matched_without_a_word(self, net, tmp_path, caplog):
        path = save(net.state_dict(), tmp_path / "a.safetensors")
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        assert caplog.text == ""

    def test_outside_of_a_prefix_are_left_alone_with_a_notice(self, net, tmp_path, caplog):
        state = self.lightning(net) | {"metric.total": torch.zeros(2), "head.weight": torch.ones(3)}
        path = save(state, tmp_path / "a.safetensors")
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        assert set(load(tmp_path / "o.safetensors")) == set(state)
        assert "ignored 2 tensors without the prefix 'model.'" in caplog.text

    @pytest.mark.parametrize("prefix", ["", "model."])
    def test_that_differ_are_all_listed(self, prefix, net, tmp_path):
        state = self.lightning(net, prefix)
        del state[f"{prefix}conv.weight"], state[f"{prefix}bn.running_mean"]
        state[f"{prefix}extra\n"] = torch.zeros(1)
        state[f"{prefix}head.bias"] = torch.zeros(7)
        path = save(state, tmp_path / "a.pt")
        with pytest.raises(MismatchError, match="does not fit the model: 4 differences") as caught:
            refresh_checkpoint(path, tmp_path / "o.pt", **options())
        assert sorted(caught.value.differences) == sorted(
            [
                f"conv.weight: in the model, missing in {path}",
                f"bn.running_mean: in the model, missing in {path}",
                f"{prefix}extra\\n: in {path}, missing in the model",
                f"head.bias: shape (5,) in the model, (7,) in {path}",
            ]
        )
        assert not (tmp_path / "o.pt").exists()

    def test_beyond_a_model_with_a_prefix_are_not_left_alone(self, net, tmp_path):
        path = save({**net.state_dict(), "extra": torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(MismatchError) as caught:
            refresh_checkpoint(path, tmp_path / "o.safetensors", **options("train.py:wrapped"))
        assert caught.value.differences == (f"extra: in {path}, missing in the model",)

    def test_that_match_twice_are_an_error(self, net, tmp_path):
        state = self.lightning(net) | self.lightning(net, "ema_model.")
        path = save(state, tmp_path / "a.safetensors")
        with pytest.raises(MismatchError, match="holds the model 2 times") as caught:
            refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        assert set(caught.value.differences) == {"model.", "ema_model."}

    def test_of_a_tied_tensor_one_is_enough(self, net, tmp_path):
        state = net.state_dict()
        del state["decode.weight"]
        path = save(state, tmp_path / "a.safetensors")
        refresh_checkpoint(path, tmp_path / "o.safetensors", **options())
        assert set(load(tmp_path / "o.safetensors")) == set(state)

    def test_of_a_tied_tensor_none_is_too_few(self, net, tmp_path):
        state = net.state_dict()
        del state["decode.weight"], state["head.weight"]
        path = save(state, tmp_path / "a.safetensors")
        with pytest.raises(MismatchError, match="2 differences"):
            refresh_checkpoint(path, tmp_path / "o.safetensors", **options())

    def test_of_a_part_is_not_that_of_the_whole(self, tmp_path):
        """A view that begins where the missing tensor does is not the same tensor."""

        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.whole = nn.Parameter(torch.zeros(10))
                self.register_buffer("part", self.whole.detach()[:4])

        path = save({"part": torch.ones(4)}, tmp_path / "a.safetensors")
        with pytest.raises(MismatchError, match="whole: in the model, missing"):
            load_weights(Flat(), open_checkpoint(path))

    @pytest.mark.parametrize(
        ("wanted", "given", "expected"),
        [
            ("a b.c", "a b.c", {"a": "a", "b.c": "b.c"}),
            ("a b.c", "a b.c x.a", {"a": "a", "b.c": "b.c", "x.a": "x.a"}),
            ("a b.c", "x.a x.b.c a", {"a": "x.a", "b.c": "x.b.c"}),
            ("x.a x.b.c", "a b.c", {"x.a": "a", "x.b.c": "b.c"}),
            ("x.y.a x.y.b", "z.a z.b", {"x.y.a": "z.a", "x.y.b": "z.b"}),
            ("x.a x.b", "x.x.a x.x.b", {"x.a": "x.x.a", "x.b": "x.x.b"}),
            ("x.a x.b c", "a b c", {"x.a": "a", "x.b": "b", "x.c": "c"}),
            ("x.a b", "x._orig_mod.a b", {"x.a": "x._orig_mod.a", "b": "b"}),
            ("x._orig_mod.a b", "x.a b", {"x._orig_mod.a": "x.a", "b": "b"}),
            ("x.a b", "y.x.module.a y.b", {"x.a": "y.x.module.a", "b": "y.b"}),
            ("x.a x.module.a", "x.a x.module.a", {"x.a": "x.a", "x.module.a": "x.module.a"}),
            ("a b", "c d", {"c": "c", "d": "d"}),
            ("a", "", {}),
            ("", "a", {"a": "a"}),
        ],
    )
    def test_matching(self, wanted, given, expected):
        keys = (dict.fromkeys(names.split()).keys() for names in (wanted, given))
        assert match_names(*keys) == expected


class TestLoadWeights:
    @pytest.mark.parametrize("kind", ["safetensors", "pt"])
    def test_gives_the_model_every_bit(self, kind, net, tmp_path):
        from train import Net

        state = net.state_dict()
        path = save(state, tmp_path / f"a.{kind}")
        model = Net()
        names = load_weights(model, open_checkpoint(path)).names
        assert names.keys() == state.keys()
        assert all(own in theirs for own, theirs in names.items())
        assert all(same_bits(value, state[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize(
        "dtype",
        [
            *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
            *(torch.int8, torch.uint16, torch.bool),
        ],
        ids=str,
    )
    def test_reads_every_dtype(self, dtype, tmp_path):
        state = {
            "a": torch.rand(3, 4).mul(9).to(dtype),
            "b": torch.zeros(0, 3).to(dtype),
            "c": torch.rand(()).to(dtype),
        }
        checkpoint = open_checkpoint(save(state, tmp_path / "a.pt"))
        assert all(same_bits(as_torch(checkpoint, name), state[name]) for name in state)

    def test_what_the_model_raises_is_shown(self, tmp_path):
        class Picky(nn.Linear):
            def load_state_dict(self, *_, **__):
                raise ZeroDivisionError

        path = save(nn.Linear(2, 3).state_dict(), tmp_path / "a.pt")
        with pytest.raises(UserCodeError, match="load_state_dict raised") as caught:
            load_weights(Picky(2, 3), open_checkpoint(path))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


class TestWhereItGoes:
    @pytest.mark.parametrize("name", ["ours.safetensors", "ours.pt"])
    def test_our_own_file_is_refreshed_in_place(self, name, net, tmp_path):
        path = ours(net.state_dict(), tmp_path, name)
        before = load(path)
        refresh_checkpoint(path, None, **options())
        after = load(path)
        assert {name for name in before if not same_bits(after[name], before[name])} == REFRESHED
        assert provenance(path)["norm_stats"]["state"] == "refreshed"
        assert sorted(one.name for one in tmp_path.glob("*ours*")) == sorted(
            [f"in1_{name}.safetensors", f"in2_{name}.safetensors", name]
        )

    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
    def test_anybody_elses_is_not_unless_he_says_so(self, name, net, tmp_path):
        path = save(net.state_dict(), tmp_path / name)
        before = path.read_bytes()
        with pytest.raises(OutputError, match=r"was not made by ckptavg; .*`output`.*`in_place`"):
            refresh_checkpoint(path, None, **options())
        with pytest.raises(OutputError, match=r"is the checkpoint itself; .*`in_place`"):
            refresh_checkpoint(path, path, **options(), force=True)
        os.link(path, tmp_path / f"link_{name}")
        with pytest.raises(OutputError, match="is the checkpoint itself"):
            refresh_checkpoint(path, tmp_path / f"link_{name}", **options(), force=True)
        assert path.read_bytes() == before
        refresh_checkpoint(path, None, **options(), in_place=True)
        assert provenance(path)["norm_stats"]["state"] == "refreshed"
        # Now ckptavg made it.
        refresh_checkpoint(path, None, **options())

    def test_what_a_link_leads_to_is_refreshed_in_place(self, net, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        path = save(net.state_dict(), tmp_path / "elsewhere" / "a.safetensors")
        link = tmp_path / "link.safetensors"
        link.symlink_to("elsewhere/a.safetensors")
        refresh_checkpoint(link, None, **options(), in_place=True)
        assert str(link.readlink()) == "elsewhere/a.safetensors"
        assert provenance(path)["norm_stats"]["state"] == "refreshed"
        assert os.listdir(tmp_path / "elsewhere") == ["a.safetensors"]

    def container(self, net, tmp_path):
        path = tmp_path / "run.ckpt"
        state = {f"model.{name}": value for name, value in net.state_dict().items()}
        torch.save({"state_dict": state, "global_step": 7, "optimizer_states": [{"a": 1}]}, path)
        return path

    def test_a_training_container_stays_one_in_place(self, net, tmp_path):
        path = self.container(net, tmp_path)
        before = torch.load(path, weights_only=False)
        with pytest.raises(OutputError, match=r"run\.ckpt: .*`output`"):
            refresh_checkpoint(path, None, **options())
        refresh_checkpoint(path, None, **options(), in_place=True)
        after = torch.load(path, weights_only=False)
        assert after.keys() == before.keys()
        assert str(after["optimizer_states"]) == str(before["optimizer_states"])
        changed = {
            name
            for name, value in before["state_dict"].items()
            if not same_bits(value, after["state_dict"][name])
        }
        assert changed == {
            f"model.{layer}.{name}"
            for layer in ("bn", "norm")
            for name in ("running_mean", "running_var", "num_batches_tracked")
        }

    def test_a_training_container_gives_its_state_dict(self, net, tmp_path, caplog):
        path = self.container(net, tmp_path)
        refresh_checkpoint(path, tmp_path / "o.ckpt", **options())
        found = load(tmp_path / "o.ckpt")
        assert set(found) == {f"model.{name}" for name in net.state_dict()}
        assert "only the state dict is written, not the rest of run.ckpt" in caplog.text

    def test_key_takes_one_of_several(self, net, tmp_path):
        weights = nn.Sequential(OrderedDict(conv=net.conv, bn=net.bn)).state_dict()
        both = {"state_dict": net.state_dict(), "state_dict_ema": {**weights}}
        torch.save(both, tmp_path / "a.pt")
        (tmp_path / "small_train.py").write_text(
            "from collections import OrderedDict\nfrom torch import nn\n"
            "model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8)))\n"
        )
        refresh_checkpoint(
            tmp_path / "a.pt", tmp_path / "o.pt", **options("small_train.py:model"),
            key="state_dict_ema",
        )  # fmt: skip
        assert set(load(tmp_path / "o.pt")) == set(weights)

    def test_entries_that_are_no_tensors_stay(self, net, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({**net.state_dict(), "_extra_state": {"epoch": 3}}, path)
        refresh_checkpoint(path, tmp_path / "o.pt", **options())
        refresh_checkpoint(path, None, **options(), in_place=True)
        for found in (load(tmp_path / "o.pt"), load(path)):
            assert set(found) == {*net.state_dict(), "_extra_state"}
            assert found["_extra_state"] == {"epoch": 3}
            assert found["bn.num_batches_tracked"] == 3

    def test_a_file_that_is_not_what_its_name_says_is_not_either(self, net, tmp_path):
        path = save_safetensors(net.state_dict(), tmp_path / "model.bin")
        before = path.read_bytes()
        with pytest.raises(OutputError, match="is a safetensors file by its content"):
            refresh_checkpoint(path, None, **options(), in_place=True)
        assert path.read_bytes() == before

    def test_an_existing_output_is_not_replaced_without_force(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        out = tmp_path / "o.pt"
        out.write_text("precious")
        with pytest.raises(OutputError, match="exists already; `force` replaces it"):
            refresh_checkpoint(path, out, **options("train.py:raising"))
        assert out.read_text() == "precious"
        refresh_checkpoint(path, out, **options(), force=True)
        assert load(out)["bn.num_batches_tracked"] == 3

    @pytest.mark.parametrize("name", ["o.npz", "o", "absent/o.pt", "folder.pt"])
    def test_an_impossible_output_is_found_out_before_the_model_is_made(self, name, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        (tmp_path / "folder.pt").mkdir()
        (tmp_path / "folder.pt" / "precious").touch()
        with pytest.raises(OutputError):
            refresh_checkpoint(path, tmp_path / name, **options("train.py:raising"))

    @pytest.mark.parametrize(
        ("bad", "error"),
        [
            ({"loader": "train.py:nan"}, RefreshError),
            ({"loader": "train.py:number"}, RefreshError),
            ({"loader": "train.py:dicts"}, RefreshError),
            ({"model": "train.py:broken"}, UserCodeError),
            ({"model": "train.py:Bare"}, MismatchError),
            ({"forward": "train.py:absent"}, CkptAvgError),
        ],
        ids=str,
    )
    def test_a_failure_leaves_all_as_it_was(self, bad, error, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        before = {one: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()}
        for output in (None, tmp_path / "o.safetensors"):
            with pytest.raises(error):
                refresh_checkpoint(path, output, **options(**bad))
        assert {one: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()} == before

    @pytest.mark.parametrize("kind", ["pytorch_model.bin", "DeepSpeed", "DCP"])
    def test_a_directory_without_safetensors_is_not_refreshed_in_place(self, kind, net, tmp_path):
        folder = tmp_path / "folder"
        if kind == "DeepSpeed":
            save_engine(folder, net.state_dict())
        elif kind == "DCP":
            save_dcp({"model": net.state_dict(), "optim": {"lr": torch.ones(1)}}, folder)
        else:
            folder.mkdir()
            torch.save(net.state_dict(), folder / kind)
        before = contents(folder)
        for output in (None, folder):
            with pytest.raises(
                OutputError, match="more than weights, or with weights in other files"
            ):
                refresh_checkpoint(folder, output, **options("train.py:raising"), in_place=True)
        assert contents(folder) == before
        refresh_checkpoint(folder, tmp_path / "o.safetensors", **options())

    @pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
    def test_a_trainer_s_directory_is_refused_before_the_model_is_made(self, name, net, tmp_path):
        folder = self.directory(net, tmp_path)
        (folder / name).write_text("{}")
        before = contents(folder)
        with pytest.raises(OutputError, match=rf"does not have \({name}\)"):
            refresh_checkpoint(folder, None, **options("train.py:raising"), in_place=True)
        assert contents(folder) == before

    def test_a_directory_is_refreshed_in_place(self, net, tmp_path):
        folder = self.directory(net, tmp_path)
        before = load(folder / "model.safetensors")
        refresh_checkpoint(folder, None, **options(), in_place=True)
        assert set(contents(folder)) == {"config.json", "model.safetensors"}
        after = load(folder / "model.safetensors")
        assert {name for name in before if not same_bits(after[name], before[name])} == REFRESHED

    def directory(self, net, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        save_safetensors(net.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        return folder

    def test_a_whole_model_stays_one_in_place(self, net, tmp_path):
        path = tmp_path / "whole.pt"
        torch.save(net, path)
        refresh_checkpoint(path, None, **options(), in_place=True)
        found = torch.load(path, weights_only=False)
        assert type(found) is type(net)
        state = found.state_dict()
        changed = {name for name, v in net.state_dict().items() if not same_bits(state[name], v)}
        assert changed == REFRESHED
        assert found.decode.weight is found.head.weight

    def weight_averaging(self, net, path, value):
        """What Lightning's WeightAveraging leaves."""
        average = {name: value.clone() for name, value in net.state_dict().items()}
        own = {
            name: tensor * value if tensor.is_floating_point() else tensor
            for name, tensor in net.state_dict().items()
        }
        counter = {"n_averaged": torch.tensor(3)}
        root = {"current_model_state": own, "state_dict": average, "averaging_state": counter}
        torch.save({"global_step": value, **root}, path)
        return path

    def test_the_average_of_weight_averaging_is_left_alone(self, net, tmp_path):
        path = self.weight_averaging(net, tmp_path / "a.ckpt", 2)
        before = torch.load(path)
        refresh_checkpoint(path, None, **options(), in_place=True)
        after = torch.load(path)
        for name, value in before["state_dict"].items():
            assert same_bits(after["state_dict"][name], value), name
        own = before["current_model_state"]
        changed = {
            name
            for name, value in after["current_model_state"].items()
            if not same_bits(value, own[name])
        }
        assert changed == REFRESHED

    def test_an_average_of_ours_is_refreshed_where_weight_averaging_loads_it(self, net, tmp_path):
        inputs = [self.weight_averaging(net, tmp_path / f"{n}.ckpt", n) for n in (1, 3)]
        path = tmp_path / "swa.ckpt"
        ckptavg.average(inputs, path, container="last")
        before = torch.load(path)["state_dict"]
        refresh_checkpoint(path, None, **options())
        after = torch.load(path)
        for name, value in after["state_dict"].items():
            assert same_bits(after["current_model_state"][name], value), name
            assert same_bits(value, before[name]) == (name not in REFRESHED), name


def leaves(value, path=""):
    """Everything in nested containers, by its place in them."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            place: leaf
            for key, item in pairs
            for place, leaf in leaves(item, f"{path}/{key}").items()
        }
    return {path: value}


def optimizer_of(net, kind):
    """The state of an optimizer that made one step; SGD's has no tensors."""
    optimizer = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[kind](net.parameters(), lr=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


class TestInPlaceKeepsAllElse:
    """Only the norm statistics of a training checkpoint change, however it holds its weights."""

    def roots(self, net):
        optimizer = optimizer_of(net, "Adam")
        state = net.state_dict()
        other = {name: value.clone() for name, value in state.items()}
        channels_last = state["conv.weight"].contiguous(memory_format=torch.channels_last)
        whole = disturbed(type(net)())
        return {
            "top, Adam": {**state, "optimizer": optimizer},
            "top, Adam and more": {**state, "optimizer": optimizer, "epoch": 3},
            "top, SGD": {**state, "optimizer": optimizer_of(net, "SGD"), "epoch": 3},
            "key": {"state_dict": state, "optimizer": optimizer, "epoch": 3, "args": {"lr": 0.5}},
            "nested key": {"trainer": {"model": state}, "optimizer": optimizer},
            "two keys": {"model": state, "model_ema": other, "optimizer": optimizer},
            "one under two keys": {"model": state, "best_ema": state, "optimizer": optimizer},
            "extra state": {**state, "_extra_state": {"scale": torch.ones(3), "step": 3}},
            "extra state and Adam": {
                "model": {**state, "_extra_state": {"scale": torch.ones(3), "step": 3}},
                "optimizer": optimizer,
            },
            "module": whole,
            "module and Adam": {"model": whole, "optimizer": optimizer},
            "weights alone": state,
            "parameters": dict(itertools.chain(net.named_parameters(), net.named_buffers())),
            "another order": dict(reversed(list(state.items()))),
            "channels last": {**state, "conv.weight": channels_last},
        }

    @pytest.mark.parametrize(
        ("number", "zipped"),
        [*((number, True) for number in range(15)), *((number, False) for number in (1, 6, 9, 14))],
    )
    def test_in_a_torch_file(self, number, zipped, net, tmp_path):
        name, root = list(self.roots(net).items())[number]
        path = tmp_path / "c.pt"
        torch.save(root, path, _use_new_zipfile_serialization=zipped)
        before = torch.load(path, weights_only=False)
        refresh_checkpoint(path, None, **options(), in_place=True)
        after = torch.load(path, weights_only=False)
        assert type(after) is type(before)
        found, expected = leaves(after), leaves(before)
        assert list(found) == list(expected)
        changed = set()
        for place, value in expected.items():
            if not isinstance(value, torch.Tensor):
                assert found[place] == value, place
                continue
            assert found[place].requires_grad == value.requires_grad
            assert found[place].stride() == value.stride()
            if not same_bits(found[place].detach(), value.detach()):
                changed.add(place)
        prefixes = {"": "/", "key": "/state_dict/", "nested key": "/trainer/model/"}
        prefixes |= dict.fromkeys(("two keys", "extra state and Adam"), "/model/")
        prefixes |= {"module and Adam": "/model/"}
        wanted = {prefixes.get(name, "/") + one for one in REFRESHED}
        if name == "one under two keys":
            wanted = {f"/{key}/{one}" for key in root for one in REFRESHED if key != "optimizer"}
        assert changed == wanted

    def test_of_the_state_dict_that_key_names(self, net, tmp_path):
        path = tmp_path / "c.pt"
        torch.save(self.roots(net)["two keys"], path)
        before = leaves(torch.load(path))
        refresh_checkpoint(path, None, **options(), in_place=True, key="model_ema")
        after = leaves(torch.load(path))
        changed = {
            place
            for place, value in before.items()
            if isinstance(value, torch.Tensor) and not same_bits(after[place], value)
        }
        assert changed == {f"/model_ema/{one}" for one in REFRESHED}

    def test_of_a_safetensors_file(self, net, tmp_path):
        path = save_safetensors(net.state_dict(), tmp_path / "c.safetensors", step="7", note="x")
        before = load(path)
        refresh_checkpoint(path, None, **options(), in_place=True)
        assert {**metadata_of(path), "ckptavg": ""} == {
            "format": "pt", "step": "7", "note": "x", "ckptavg": ""
        }  # fmt: skip
        after = load(path)
        assert {name for name in before if not same_bits(after[name], before[name])} == REFRESHED

    def test_or_is_refused_before_the_model_runs(self, net, tmp_path):
        """Tensors that share bytes in part cannot be replaced one by one."""
        path = tmp_path / "c.pt"
        both = torch.zeros(16)
        state = net.state_dict() | {"bn.running_mean": both[:8], "bn.bias": both[4:12]}
        torch.save({"model": state, "optimizer": {}}, path)
        before = path.read_bytes()
        with pytest.raises(OutputError, match=r"bn\..* shares bytes with .*; write another file"):
            refresh_checkpoint(path, None, **options("train.py:raising"), in_place=True)
        assert path.read_bytes() == before

    def test_but_another_file_has_the_weights_alone(self, net, tmp_path, caplog):
        path = tmp_path / "c.pt"
        torch.save(self.roots(net)["top, Adam"], path)
        refresh_checkpoint(path, tmp_path / "o.pt", **options())
        assert "only the state dict is written, not the rest of c.pt" in caplog.text
        assert "optimizer" not in load(tmp_path / "o.pt")


class TestLinks:
    """A symbolic link stays, and what it leads to is replaced."""

    @pytest.fixture(params=["c.pt", "c.safetensors", "c/"])
    def checkpoint(self, request, net, tmp_path):
        """A checkpoint in a folder, and a link to it in another one."""
        path = tmp_path / "run" / request.param
        path.parent.mkdir()
        if request.param == "c/":
            path.mkdir()
            save_safetensors(net.state_dict(), path / "model.safetensors")
        else:
            save(net.state_dict(), path)
        link = tmp_path / "links" / f"last{path.suffix}"
        link.parent.mkdir()
        link.symlink_to(os.path.relpath(path, link.parent))
        return path, link

    def assert_refreshed(self, path, link):
        assert link.is_symlink()
        assert not path.is_symlink()
        assert link.readlink() == Path("..", "run", path.name)
        assert provenance(path)["norm_stats"]["state"] == "refreshed"
        assert [entry.name for entry in link.parent.iterdir()] == [link.name]
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_are_written_through_in_place(self, checkpoint):
        path, link = checkpoint
        with pytest.raises(OutputError, match="was not made by ckptavg"):
            refresh_checkpoint(link, None, **options())
        with pytest.raises(OutputError, match="is the checkpoint itself"):
            refresh_checkpoint(link, path, **options(), force=True)
        with pytest.raises(OutputError, match="is the checkpoint itself"):
            refresh_checkpoint(path, link, **options(), force=True)
        refresh_checkpoint(link, None, **options(), in_place=True)
        self.assert_refreshed(path, link)
        refresh_checkpoint(link, None, **options())  # now it is ours
        refresh_checkpoint(path, link, **options())
        refresh_checkpoint(link, path, **options())
        self.assert_refreshed(path, link)

    def test_are_written_through_as_outputs(self, checkpoint, net, tmp_path):
        path, link = checkpoint
        source = save(disturbed(net).state_dict(), tmp_path / "source.pt")
        refresh_checkpoint(source, link, **options(), force=True)
        self.assert_refreshed(path, link)
        folder = tmp_path / "ckpts"
        folder.mkdir()
        for step in range(2):
            save(disturbed(net).state_dict(), folder / f"step_{step}.pt")
        average_and_refresh([folder], link, RefreshOptions(**options()), force=True)
        self.assert_refreshed(path, link)
        assert len(provenance(path)["sources"]) == 2

    def test_that_a_failure_leaves_alone(self, checkpoint, tmp_path):
        _, link = checkpoint
        before = contents(tmp_path / "run")
        with pytest.raises(RefreshError):
            refresh_checkpoint(link, None, **options(loader="train.py:nan"), in_place=True)
        assert contents(tmp_path / "run") == before
        assert link.is_symlink()
        assert len(list(link.parent.iterdir())) == 1


class TestProvenance:
    def test_says_what_was_done(self, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        average = provenance(path)
        assert average["norm_stats"] == {"state": "stale"}
        refresh_checkpoint(path, None, **options(seed=5, estimator="exact"))
        assert provenance(path) == {
            **average,
            "norm_stats": {
                "state": "refreshed",
                "estimator": "exact",
                "batches": 3,
                "samples": 37,
                "seed": 5,
            },
        }

    def test_of_a_foreign_file_names_it(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        refresh_checkpoint(path, tmp_path / "o.pt", **options())
        entry = provenance(tmp_path / "o.pt")
        assert entry["version"] == ckptavg.__version__
        assert [source["name"] for source in entry["sources"]] == ["a.pt"]
        assert entry["sources"][0]["bytes"] == path.stat().st_size

    def test_is_replaced_by_a_second_refresh(self, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        refresh_checkpoint(path, None, **options(seed=1))
        first, values = provenance(path), load(path)
        refresh_checkpoint(path, None, **options(seed=2, max_samples=17))
        second = provenance(path)
        assert (first["norm_stats"]["batches"], second["norm_stats"]["batches"]) == (3, 2)
        assert second["sources"] == first["sources"]
        assert not torch.equal(load(path)["bn.running_mean"], values["bn.running_mean"])
        refresh_checkpoint(path, None, **options(seed=1))
        assert provenance(path) == first
        assert all(same_bits(value, values[name]) for name, value in load(path).items())

    @pytest.mark.parametrize("kind", ["safetensors", "pt"])
    def test_torch_and_safetensors_do_not_mind_it(self, kind, net, tmp_path):
        path = ours(net.state_dict(), tmp_path, f"ours.{kind}")
        refresh_checkpoint(path, None, **options())
        assert set(load(path)) == set(net.state_dict())


class TestSeed:
    def refreshed(self, path, tmp_path, **others):
        out = tmp_path / f"o{len(list(tmp_path.iterdir()))}.safetensors"
        refresh_checkpoint(
            path, out, **options(loader="train.py:shuffled", max_samples=17, **others)
        )
        return out

    def test_the_same_gives_the_same_bytes(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.safetensors")
        one = self.refreshed(path, tmp_path)
        torch.rand(7)
        other = self.refreshed(path, tmp_path)
        assert one.read_bytes() == other.read_bytes()

    def test_another_gives_others(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.safetensors")
        one, other = self.refreshed(path, tmp_path), self.refreshed(path, tmp_path, seed=1)
        assert not torch.equal(load(one)["bn.running_mean"], load(other)["bn.running_mean"])

    def test_is_that_of_a_loader_whose_module_draws_when_it_is_imported(self, net, tmp_path):
        """The first refresh imports it, the second one finds it imported."""
        (tmp_path / "drawing.py").write_text(
            "import torch\n"
            "torch.rand(3)\n"
            "def loader():\n"
            "    return [torch.randn(8, 3, 8, 8) for _ in range(2)]\n"
        )
        path = save(net.state_dict(), tmp_path / "a.pt")
        written = []
        for name in ("first.safetensors", "second.safetensors"):
            refresh_checkpoint(path, tmp_path / name, **options(loader="drawing.py:loader"))
            written.append((tmp_path / name).read_bytes())
        assert written[0] == written[1]

    @pytest.mark.parametrize("seed", [0, 7, 2**32 + 3, 2**64 - 1, 2**70 + 5])
    def test_is_that_of_all_three_generators(self, seed, net, tmp_path):
        (tmp_path / "random_train.py").write_text(
            "import random, numpy, torch\n"
            "drawn = []\n"
            "def loader():\n"
            "    drawn.append((random.random(), numpy.random.rand(), torch.rand(()).item()))\n"
            "    return [torch.ones(4, 3, 8, 8), torch.zeros(4, 3, 8, 8)]\n"
        )
        path = save(net.state_dict(), tmp_path / "a.pt")
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        for _ in range(2):
            refresh_checkpoint(
                path, tmp_path / "o.pt", **options(loader="random_train.py:loader", seed=seed),
                force=True,
            )  # fmt: skip
        [one, other] = sys.modules["random_train"].drawn
        assert one == other
        assert random.getstate() == state[0]
        assert str(np.random.get_state()) == str(state[1])
        assert torch.equal(torch.get_rng_state(), state[2])


class TestUsersObjects:
    @pytest.mark.parametrize("model", ["Net", "net", "wrapped"])
    def test_a_model_may_be_a_class_an_instance_or_a_function(self, model, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        refresh_checkpoint(path, tmp_path / "o.pt", **options(f"train.py:{model}"))
        assert load(tmp_path / "o.pt")["bn.num_batches_tracked"] == 3

    @pytest.mark.parametrize("loader", ["train:batches", "train:stack"])
    def test_a_loader_may_be_an_iterable_or_a_function(self, loader, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        assert refresh_checkpoint(path, tmp_path / "o.pt", **options(loader=loader)).samples == 37

    def test_arguments_go_to_the_callables(self, tmp_path):
        from train import Net

        path = save(Net(width=11).state_dict(), tmp_path / "a.pt")
        report = refresh_checkpoint(
            path, tmp_path / "o.pt",
            **options(model_args={"width": 11, "drop": 0.5}, loader_args={"size": 10}),
        )  # fmt: skip
        assert report.batches == 4

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"model": "train.py:number"}, "train.py:number is a int, not a torch.nn.Module"),
            ({"model": "train.py:batches"}, "train.py:batches is a list, not a torch.nn.Module"),
            ({"loader": "train.py:number"}, "train.py:number is a int, which returns no batches"),
            ({"loader": "train.py:Net"}, "train.py:Net is a Net, which returns no batches"),
            (
                {"model": "train.py:net", "model_args": {"width": 3}},
                "train.py:net is no callable: there is nothing to pass width to",
            ),
            (
                {"loader": "train.py:stack", "loader_args": {"size": 3}},
                "train.py:stack is no callable: there is nothing to pass size to",
            ),
            (
                {"loader_args": {"absent": 3}},
                r"train.py:batches does not take absent \(`loader_arg`\); it takes size",
            ),
            (
                {"model_args": {"absent": 3}},
                r"train.py:Net does not take absent \(`model_arg`\); it takes width, drop",
            ),
        ],
        ids=str,
    )
    def test_of_a_wrong_kind_are_a_clear_error(self, bad, message, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        with pytest.raises(RefreshError, match=message):
            refresh_checkpoint(path, tmp_path / "o.pt", **options(**bad))

    @pytest.mark.parametrize("device", ["cuda:77", "nonsense"])
    def test_a_device_that_is_not_there_is_an_error(self, device, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        wrong = options() | {"device": device}
        with pytest.raises(RefreshError, match=f"cannot use device '{device}'"):
            refresh_checkpoint(path, tmp_path / "o.pt", **wrong)

    def test_a_model_without_values_is_an_error(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        empty = options() | {"model": nn.BatchNorm1d(3, device="meta")}
        with pytest.raises(RefreshError, match=r"has tensors on device 'meta'.*; make the model"):
            refresh_checkpoint(path, tmp_path / "o.pt", **empty)

    @pytest.mark.parametrize(
        ("bad", "error"),
        [
            ({"model": "train.py:raising"}, ZeroDivisionError),
            ({"model": "train.py:exits"}, SystemExit),
            ({"loader": "train.py:raising"}, ZeroDivisionError),
        ],
        ids=str,
    )
    def test_that_raise_show_what_they_raised(self, bad, error, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        with pytest.raises(UserCodeError) as caught:
            refresh_checkpoint(path, tmp_path / "o.pt", **options(**bad))
        assert isinstance(caught.value.__cause__, error)


class TestAverageAndRefresh:
    def inputs(self, net, tmp_path):
        ours(net.state_dict(), tmp_path)
        folder = tmp_path / "ckpts"
        folder.mkdir()
        for index, path in enumerate(sorted(tmp_path.glob("in*.safetensors"))):
            path.rename(folder / f"step_{index}.safetensors")
        return folder, tmp_path / "ours.safetensors"

    @pytest.mark.parametrize("name", ["o.safetensors", "o.pt"])
    def test_is_one_after_the_other(self, name, net, tmp_path):
        folder, average = self.inputs(net, tmp_path)
        refresh_checkpoint(average, None, **options())
        summary, report = average_and_refresh(
            [folder], tmp_path / name, RefreshOptions(**options())
        )
        found, expected = load(tmp_path / name), load(average)
        assert set(found) == set(expected)
        assert all(same_bits(found[key], expected[key]) for key in expected)
        entry = provenance(tmp_path / name)
        assert entry["norm_stats"] == provenance(average)["norm_stats"]
        assert [source["name"] for source in entry["sources"]] == [
            "step_0.safetensors",
            "step_1.safetensors",
        ]
        assert len(report.layers) == 2
        assert summary.output == str(tmp_path / name)
        assert summary.norm_stats == "refreshed"
        assert summary.bytes_written == (tmp_path / name).stat().st_size

    def test_leaves_nothing_behind_when_the_refresh_fails(self, net, tmp_path):
        folder, _ = self.inputs(net, tmp_path)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RefreshError):
            average_and_refresh(
                [folder], tmp_path / "o.pt", RefreshOptions(**options(loader="train.py:nan"))
            )
        assert [one for one in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(one)] == [
            one for one in before if "__pycache__" not in str(one)
        ]

    def test_finds_an_existing_output_first(self, net, tmp_path):
        _, average = self.inputs(net, tmp_path)
        with pytest.raises(OutputError, match="exists already"):
            average_and_refresh([tmp_path / "absent"], average, RefreshOptions(**options()))

    def test_does_not_replace_what_it_is_made_of(self, net, tmp_path):
        folder, _ = self.inputs(net, tmp_path)
        output = folder / "step_1.safetensors"
        before = output.read_bytes()
        with pytest.raises(OutputError, match="is itself one of the checkpoints"):
            average_and_refresh([folder], output, RefreshOptions(**options()), force=True)
        assert output.read_bytes() == before
        assert len(list(folder.iterdir())) == 2

    def test_replaces_the_average_that_is_updated(self, net, tmp_path):
        _, average = self.inputs(net, tmp_path)
        new = save_safetensors(disturbed(net).state_dict(), tmp_path / "new.safetensors")
        expected = tmp_path / "expected.safetensors"
        ckptavg.average([average, new], expected, update=True)
        refresh_checkpoint(expected, None, **options())
        with pytest.raises(OutputError, match="exists already"):
            average_and_refresh([average, new], average, RefreshOptions(**options()), update=True)
        average_and_refresh(
            [average, new], average, RefreshOptions(**options()), update=True, force=True
        )
        found, wanted = load(average), load(expected)
        assert all(same_bits(found[name], wanted[name]) for name in wanted)
        assert provenance(average) == provenance(expected)
        assert len(provenance(average)["sources"]) == 3

    @pytest.mark.parametrize(
        ("output", "arguments", "message"),
        [
            ("ckpts/step_1.safetensors", {}, "is itself one of the checkpoints"),
            ("ckpts/", {}, "is the directory of the checkpoints"),
            ("ours.safetensors", {"force": False}, "exists already"),
            ("absent/o.pt", {}, "there is no directory"),
            ("o.npz", {}, "is not that of a format"),
            ("o.pt", {"max_shard_size": 500}, "shards need a directory"),
            ("full/", {}, r"has files that the output does not have \(mine\)"),
            ("o.pt", {"expect": 3}, "expected 3 checkpoints"),
            ("o.pt", {"refresh": {"model": "train.py:absent"}}, "has no 'absent'"),
            ("o.pt", {"refresh": {"loader": "absent.py:loader"}}, r"absent\.py"),
            ("o.pt", {"refresh": {"forward": "train.py:absent"}}, "has no 'absent'"),
        ],
        ids=str,
    )
    def test_is_refused_before_any_tensor_is_read(self, output, arguments, message, net, tmp_path):
        folder, _ = self.inputs(net, tmp_path)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").touch()
        arguments = {"force": True, **arguments}
        refresh = RefreshOptions(**options(**arguments.pop("refresh", {})))
        told: list[int] = []
        before = contents(tmp_path)
        with pytest.raises(CkptAvgError, match=message):
            average_and_refresh(
                [folder], os.path.join(tmp_path, output), refresh,  # noqa: PTH118 - the slash
                progress=lambda done, _: told.append(done), **arguments,
            )  # fmt: skip
        assert told == []
        after = contents(tmp_path)
        assert {name: after[name] for name in after if "__pycache__" not in name} == before

    def test_needs_room_for_the_average_and_the_output(self, net, tmp_path, monkeypatch):
        folder, average = self.inputs(net, tmp_path)
        room = os.statvfs(tmp_path)
        factor = 1.5

        def statvfs(path):
            blocks = int(factor * average.stat().st_size)
            return os.statvfs_result((1, 1, 2 * blocks, blocks, blocks, *room[5:]))

        monkeypatch.setattr(os, "statvfs", statvfs)
        told: list[int] = []
        common = {"progress": lambda done, _: told.append(done)}
        with pytest.raises(OutputError, match="No space left"):
            average_and_refresh(
                [folder], tmp_path / "o.safetensors", RefreshOptions(**options()), **common
            )
        assert told == []
        factor = 2.5
        average_and_refresh(
            [folder], tmp_path / "o.safetensors", RefreshOptions(**options()), **common
        )

    def test_makes_shards_of_the_size_that_is_asked_for(self, net, tmp_path):
        folder, average = self.inputs(net, tmp_path)
        out = tmp_path / "out"
        run("average", folder, "-o", f"{out}/", "--max-shard-size", "500", *SPECS)
        shards = sorted(out.glob("model-*.safetensors"))
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert {shard.name for shard in shards} == set(index.values())
        assert len(shards) > 1
        refresh_checkpoint(average, None, **options())
        expected = load(average)
        found = {name: value for shard in shards for name, value in load(shard).items()}
        assert found.keys() == index.keys() == expected.keys()
        assert all(same_bits(found[name], value) for name, value in expected.items())
        sizes = [sum(value.nbytes for value in tensors.values()) for tensors in map(load, shards)]
        largest = max(value.nbytes for value in expected.values())
        assert all(size <= max(500, largest) for size in sizes)
        assert not list(tmp_path.glob(".ckptavg*"))

    def test_hands_on_what_average_takes(self, net, tmp_path):
        folder, _ = self.inputs(net, tmp_path)
        told: list[int] = []
        summary, report = average_and_refresh(
            [folder], tmp_path / "o.safetensors", RefreshOptions(**options()),
            progress=lambda done, _: told.append(done),
            refresh_progress=lambda done, _: told.append(-done),
            dtype="bfloat16", norm_stats="last", expect=2,
        )  # fmt: skip
        assert told[-report.batches :] == [-1] * 3
        assert max(told) > 0  # a thread that found no work left may report first
        assert load(tmp_path / "o.safetensors")["bn.running_mean"].dtype == torch.bfloat16
        assert len(summary.sources) == 2


SPECS = ("--model", "train.py:Net", "--loader", "train.py:batches", "--device", "cpu")


class TestCommand:
    def test_says_what_it_did(self, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        result = run("bn-refresh", path, *SPECS)
        lines = result.stdout.splitlines()
        assert lines[0] == (
            "refreshed 2 norm layers with 3 batches of 37 samples in all (estimator paper)"
        )
        assert lines[1].startswith("  largest change: mean by ")
        assert " standard deviations in " in lines[1]
        assert ", variance by a factor of " in lines[1]
        assert lines[2].startswith("  remaining error: mean ")
        assert lines[3:] == [f"  wrote {path}"]
        assert result.stderr == ""

    def test_says_the_same_in_json(self, net, tmp_path):
        path = save({f"m.{k}": v for k, v in net.state_dict().items()}, tmp_path / "a.pt")
        result = run("bn-refresh", path, "-o", tmp_path / "o.pt", *SPECS, "--json")
        found = json.loads(result.stdout)
        assert (found["estimator"], found["batches"], found["samples"]) == ("paper", 3, 37)
        assert [layer["name"] for layer in found["layers"]] == ["bn", "norm"]
        assert all(layer["calls"] == 3 for layer in found["layers"])
        assert all(layer["mean_change"] > 0 < layer["variance_ratio"] for layer in found["layers"])
        assert (found["skipped"], found["kept"]) == (0, [])
        assert "with the prefix 'm.'" in found["notices"][0]
        assert "with the prefix 'm.'" in result.stderr

    @pytest.mark.parametrize("refresh", [(), SPECS], ids=["average", "both"])
    def test_an_output_is_spelled_as_the_user_did(self, refresh, net, tmp_path):
        (tmp_path / "run").mkdir()
        for step in (1, 2):
            save(net.state_dict(), tmp_path / "run" / f"step_{step}.pt")
            net.bn.weight.data += 1
        found = json.loads(
            run("average", tmp_path / "run", "-o", "./a.safetensors", *refresh, "--json").stdout
        )
        assert found["output"] == "a.safetensors"

    @pytest.mark.parametrize(
        ("arguments", "batches", "samples"),
        [
            (("--max-samples", 17), 2, 32),
            (("--loader", "train.py:endless", "--max-samples", 50), 7, 56),
            (("--loader-arg", "size=37"), 1, 37),
            (("--loader", "train.py:dicts", "--forward", "train:forward"), 3, 37),
            (("--loader", "train.py:stack", "--model", "train.py:net"), 3, 37),
            (("--model-arg", "drop=0.5", "--train-mode", "full"), 3, 37),
            (("--memory-format", "channels_last", "--seed", 3, "--no-fsync"), 3, 37),
        ],
        ids=str,
    )
    def test_takes_every_option(self, arguments, batches, samples, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.safetensors")
        out = tmp_path / "o.safetensors"
        result = run("bn-refresh", path, "-o", out, *SPECS, *arguments, "--json")
        found = json.loads(result.stdout)
        assert (found["batches"], found["samples"]) == (batches, samples)
        assert provenance(out)["norm_stats"]["samples"] == samples

    @pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
    def test_estimator_chooses_one(self, estimator, net, tmp_path):
        from train import batches

        path = save(net.state_dict(), tmp_path / "a.pt")
        run(
            *("bn-refresh", path, "-o", tmp_path / "o.pt", *SPECS, "--estimator", estimator),
            *("--memory-format", "contiguous"),
        )
        ckptavg.refresh_norm(net, batches(), estimator=estimator, memory_format="contiguous")
        assert same_bits(load(tmp_path / "o.pt")["norm.running_var"], net.norm.running_var)
        assert provenance(tmp_path / "o.pt")["norm_stats"]["estimator"] == estimator

    def test_train_mode_full_lets_dropout_act(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        found = []
        for mode in ("norm", "full"):
            out = tmp_path / f"{mode}.pt"
            run(
                *("bn-refresh", path, "-o", out, *SPECS, "--model-arg", "drop=0.9"),
                *("--train-mode", mode),
            )
            found.append(load(out)["norm.running_var"])
        assert (found[1] > 1.4 * found[0]).all()

    def test_in_place_allows_a_foreign_file(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        result = run("bn-refresh", path, *SPECS, code=1)
        assert isinstance(result.exception, OutputError)
        run("bn-refresh", path, *SPECS, "--in-place")
        assert provenance(path)["norm_stats"]["state"] == "refreshed"

    def test_force_replaces_an_output(self, net, tmp_path):
        path = save(net.state_dict(), tmp_path / "a.pt")
        (tmp_path / "o.pt").write_text("old")
        assert isinstance(
            run("bn-refresh", path, "-o", tmp_path / "o.pt", *SPECS, code=1).exception, OutputError
        )
        run("bn-refresh", path, "-o", tmp_path / "o.pt", *SPECS, "--force")

    def test_a_model_without_norm_layers_is_told_of(self, net, tmp_path):
        path = save(net.conv.state_dict(prefix="conv."), tmp_path / "a.pt")
        arguments = ("bn-refresh", path, "-o", tmp_path / "o.pt", *SPECS)
        result = run(*arguments, "--model", "train.py:Bare", code=1)
        message = str(result.exception)
        assert "the model has no norm layers that track statistics" in message
        assert "use the checkpoint as it is: it needs no refresh" in message
        assert not (tmp_path / "o.pt").exists()

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("--model", "train.py:Net"),
            ("--loader", "train.py:batches"),
            (*SPECS, "--estimator", "mine"),
            (*SPECS, "--memory-format", "rows"),
            (*SPECS, "--train-mode", "half"),
            (*SPECS, "--max-samples", "0"),
            (*SPECS, "--seed", "-1"),
            (*SPECS, "--model", "train.py"),
            (*SPECS, "--forward", "forward"),
            (*SPECS, "--model-arg", "width"),
            (*SPECS, "--loader-arg", "1=2"),
        ],
        ids=str,
    )
    def test_wrong_usage_is_2(self, arguments, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        before = path.read_bytes()
        run("bn-refresh", path, *arguments, code=2)
        assert path.read_bytes() == before

    def test_specs_may_come_from_the_configuration(self, net, tmp_path):
        (tmp_path / "pyproject.toml").write_text(
            '[tool.ckptavg]\nmodel = "train.py:Net"\nloader = "train.py:batches"\ndevice = "cpu"\n'
            '[tool.ckptavg.bn-refresh]\nestimator = "exact"\n'
        )
        path = ours(net.state_dict(), tmp_path)
        result = run("bn-refresh", path)
        assert "(estimator exact)" in result.stdout

    def test_the_metric_of_the_selection_is_not_that_of_the_evaluation(self, net, tmp_path):
        (tmp_path / "pyproject.toml").write_text(
            '[tool.ckptavg]\nmetric = "val_loss"\nmode = "min"\n'
        )
        run("bn-refresh", ours(net.state_dict(), tmp_path), *SPECS)

    @pytest.mark.parametrize("as_json", [False, True])
    def test_average_refreshes_too(self, as_json, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        refresh_checkpoint(path, None, **options(estimator="exact"))
        arguments = ("--json",) if as_json else ()
        result = run(
            *(
                "average",
                *sorted(tmp_path.glob("in*.safetensors")),
                "-o",
                tmp_path / "o.safetensors",
            ),
            *(*SPECS, "--estimator", "exact", *arguments),
        )
        assert (tmp_path / "o.safetensors").read_bytes() == path.read_bytes()
        if as_json:
            found = json.loads(result.stdout)
            assert found["norm_stats"] == "refreshed"
            assert found["output"] == str(tmp_path / "o.safetensors")
            assert len(found["refresh"]["layers"]) == 2
        else:
            assert "stale" not in result.stdout
            assert "refreshed 2 norm layers with 3 batches of 37 samples" in result.stdout
            assert f"wrote {tmp_path / 'o.safetensors'} (" in result.stdout


class TestProcess:
    def test_shows_the_traceback_of_the_users_model_and_ends_with_1(self, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        before = path.read_bytes()
        call = command("bn-refresh", path, *SPECS, "--model", "train.py:broken")
        [(output, errors)] = Job([call], tmp_path).finish(1)
        assert output == ""
        lines = errors.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert any('train.py", line' in line for line in lines)
        assert "ZeroDivisionError: deliberately" in lines
        assert lines[-1] == (
            "ckptavg: error: the forward pass raised ZeroDivisionError: deliberately"
        )
        assert path.read_bytes() == before

    def test_shows_no_traceback_of_ours(self, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        call = command("bn-refresh", path, *SPECS, "--loader", "train.py:dicts")
        [(_, errors)] = Job([call], tmp_path).finish(1)
        assert errors.startswith("ckptavg: error: the loader yields a dict")
        assert "--forward" in errors
        assert errors.count("\n") == 1

    def test_does_as_it_does_in_this_process(self, net, tmp_path):
        path = ours(net.state_dict(), tmp_path)
        done = process("bn-refresh", path, "-o", "o.safetensors", *SPECS, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        refresh_checkpoint(path, tmp_path / "p.safetensors", **options())
        assert (tmp_path / "o.safetensors").read_bytes() == (
            tmp_path / "p.safetensors"
        ).read_bytes()

    def test_wrong_usage_is_2(self, tmp_path):
        done = process("bn-refresh", "a.pt", cwd=tmp_path)
        assert done.returncode == 2
        assert "Missing option '--model'" in done.stderr


class Scaled(torch.nn.BatchNorm2d):
    """A subclass that normalises something else than what it is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        return super().forward(input * 2)


def test_a_layer_that_scales_its_input_keeps_its_own_statistics(caplog):
    from ckptavg.batchnorm.refresh import refresh_norm

    batches = [torch.randn(8, 3, 4, 4) for _ in range(3)]
    mine, theirs = torch.nn.Sequential(Scaled(3)), torch.nn.Sequential(Scaled(3))
    refresh_norm(mine, batches, estimator="torch", memory_format="contiguous")
    torch.optim.swa_utils.update_bn(batches, theirs)
    found, wanted = (dict(one.named_buffers())["0.running_var"] for one in (mine, theirs))
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert caplog.text == ""

    handmade = torch.nn.Sequential(Handmade(3))
    refresh_norm(handmade, batches, estimator="torch", memory_format="contiguous")
    [found] = [value for name, value in handmade.named_buffers() if name == "0.running_var"]
    assert torch.allclose(found, wanted, rtol=1e-5)  # it computes them itself


class Handmade(torch.nn.BatchNorm2d):
    """The same without torch's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        variance, mean = torch.var_mean(input * 2, (0, 2, 3))
        assert self.momentum is not None
        for held, new in ((self.running_mean, mean), (self.running_var, variance)):
            assert held is not None
            held.mul_(1 - self.momentum).add_(new, alpha=self.momentum)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        return (input * 2 - mean[:, None, None]) / (variance[:, None, None] + self.eps).sqrt()


def test_a_model_whose_norms_are_hidden_stays_stale(tmp_path):
    for step in range(2):
        state = {"0.running_mean": torch.randn(2), "0.running_var": torch.rand(2)}
        torch.save(state, tmp_path / f"{step}.pt")
    (tmp_path / "hidden.py").write_text(
        "import torch\n"
        "class Norm(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('running_mean', torch.zeros(2))\n"
        "        self.register_buffer('running_var', torch.ones(2))\n"
        "def model(): return torch.nn.Sequential(Norm())\n"
        "def loader(): raise AssertionError\n"
    )
    ckptavg.average(tmp_path, tmp_path / "swa.safetensors")
    spec = str(tmp_path / "hidden.py")
    with pytest.raises(RefreshError, match=r"'0' \(Norm is of a kind that is not refreshed\)"):
        refresh_checkpoint(
            tmp_path / "swa.safetensors", None, model=f"{spec}:model", loader=f"{spec}:loader"
        )
    made = open_checkpoint(tmp_path / "swa.safetensors").provenance
    assert made is not None
    assert made["norm_stats"] == {"state": "stale"}


def test_a_load_state_dict_that_does_nothing_is_found(tmp_path):
    (tmp_path / "idle.py").write_text(
        "import torch\n"
        "class Idle(torch.nn.Sequential):\n"
        "    def load_state_dict(self, *_, **__): pass\n"
        "def model(): return Idle(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))\n"
        "loader = [torch.randn(4, 2)]\n"
    )
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    state = {name: value + 1 for name, value in state.items()}
    torch.save(state, tmp_path / "c.pt")
    spec = str(tmp_path / "idle.py")
    with pytest.raises(RefreshError, match="copied none of the weights"):
        refresh_checkpoint(
            tmp_path / "c.pt",
            tmp_path / "o.pt",
            model=f"{spec}:model",
            loader=f"{spec}:loader",
        )
