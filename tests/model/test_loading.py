"""Models and checkpoints whose names differ, and how each of them is loaded all the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import ckptavg
from ckptavg.cli.console import with_options
from ckptavg.errors import MismatchError, RefreshError, SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.model.loading import load_weights
from tests.helpers import run

pytestmark = pytest.mark.usefixtures("no_fsync", "user_folder")
BATCHES = torch.randn(12, 16, 5, generator=torch.Generator().manual_seed(7)) * 2 + 1
STATISTICS = ("running_mean", "running_var")
State = dict[str, torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, values):
        return self.head(self.norm(self.body(values)))


class RenamesAll(Net):
    """Reads files from before `norm` was called so."""

    def load_state_dict(self, state, strict=True, assign=False):  # noqa: FBT002 - torch's
        renamed = {name.replace("bn.", "norm."): value for name, value in state.items()}
        return super().load_state_dict(renamed, strict, assign)


class RenamesQuietly(RenamesAll):
    """Returns nothing, copies by itself, and passes by other dtypes on the way."""

    def load_state_dict(self, state, strict=True):  # type: ignore[override]  # noqa: FBT002
        del strict
        own = self.state_dict()
        for name, value in state.items():
            own[name.replace("bn.", "norm.")].data.copy_(value.double().detach().data)


class RenamesInPart(Net):
    def _load_from_state_dict(self, state, prefix, *args: Any) -> None:
        for name in [name for name in state if name.startswith("bn.")]:
            state[name.replace("bn.", "norm.")] = state.pop(name)
        super()._load_from_state_dict(state, prefix, *args)


class RenamesByHook(Net):
    def __init__(self) -> None:
        super().__init__()

        def rename(_module, state, *_: Any) -> None:
            for name in [name for name in state if name.startswith("bn.")]:
                state[name.replace("bn.", "norm.")] = state.pop(name)

        self.register_load_state_dict_pre_hook(rename)


class RenamesWithoutKeywords(Net):
    """Its methods have none of torch's other arguments, and `load_state_dict` returns nothing."""

    def state_dict(self):  # type: ignore[override]
        return super().state_dict()

    def load_state_dict(self, state):  # type: ignore[override]
        super().load_state_dict({k.replace("bn.", "norm."): v for k, v in state.items()})


class Changes(RenamesAll):
    """The statistics are not those of the file."""

    def load_state_dict(self, state, strict=True, assign=False):  # noqa: FBT002
        changed = {name: value + 1 if "running" in name else value for name, value in state.items()}
        return super().load_state_dict(changed, strict, assign)


def by_hand(state: State) -> State:
    model = Net()
    model.load_state_dict(state)
    update_bn(list(BATCHES), model)
    return model.state_dict()


def refresh(state: State, model: nn.Module, **options: Any) -> State:
    """The state dict that comes out of a refresh."""
    torch.save(state, "swa.pt")
    ckptavg.refresh_checkpoint(
        "swa.pt", "new.pt", model=model, loader=BATCHES, device="cpu", force=True, **options
    )
    refreshed: State = torch.load("new.pt")
    assert refreshed.keys() == state.keys()
    return refreshed


def assert_refreshed(refreshed: State, state: State, norm: str) -> None:
    """All is as it was but the statistics, which are those of `update_bn`."""
    plain = {name.replace(f"{norm}.", "norm."): value for name, value in state.items()}
    expected = by_hand({name: plain[name] for name in Net().state_dict()})
    for name in STATISTICS:
        torch.testing.assert_close(refreshed[f"{norm}.{name}"], expected[f"norm.{name}"])
    for name in state.keys() - {f"{norm}.{each}" for each in (*STATISTICS, "num_batches_tracked")}:
        assert torch.equal(refreshed[name], state[name])


class TestRenames:
    @pytest.mark.parametrize(
        "kind",
        [RenamesAll, RenamesQuietly, RenamesInPart, RenamesByHook, RenamesWithoutKeywords],
        ids=lambda k: k.__name__,
    )
    @pytest.mark.parametrize("prefix", ["", "model."])
    def test_are_followed_back_to_the_checkpoint(self, kind, prefix):
        state = {
            prefix + name.replace("norm.", "bn."): value
            for name, value in Net().state_dict().items()
        }
        refreshed = refresh(state, kind())
        assert_refreshed(
            {name.removeprefix(prefix): value for name, value in refreshed.items()},
            {name.removeprefix(prefix): value for name, value in state.items()},
            "bn",
        )

    def test_that_change_the_values_are_an_error_that_says_so(self):
        state = {name.replace("norm.", "bn."): value for name, value in Net().state_dict().items()}
        with pytest.raises(RefreshError, match="does not copy the checkpoint's statistics"):
            refresh(state, Changes())

    def test_into_two_layers_are_an_error(self):
        class Twice(Net):
            def __init__(self) -> None:
                super().__init__()
                self.other = nn.BatchNorm1d(6)

            def forward(self, values):
                return self.head(self.other(self.norm(self.body(values))))

            def load_state_dict(self, state, strict=True, assign=False):  # noqa: FBT002
                copied = {
                    name.replace("norm.", "other."): value
                    for name, value in state.items()
                    if name.startswith("norm.")
                }
                return super().load_state_dict(state | copied, strict, assign)

        state = Net().state_dict()
        with pytest.raises(RefreshError, match=r"'norm\.running_mean' was loaded into several"):
            refresh(state, Twice())
        assert_refreshed(refresh(state, Twice(), skip_layers=["other"]), state, "norm")

    def test_are_no_hindrance_to_an_evaluation(self):
        torch.manual_seed(3)
        state = Net().state_dict()
        torch.save({name.replace("norm.", "bn."): value for name, value in state.items()}, "a.pt")
        torch.save(state, "b.pt")
        loader = [(BATCHES[0], torch.arange(16) % 4)]
        first, second = ckptavg.evaluate(["a.pt", "b.pt"], model=RenamesInPart, loader=loader)
        assert first.metrics == second.metrics

    def test_are_left_to_a_model_that_takes_what_it_is_given(self, notices):
        class Takes(Net):
            def load_state_dict(self, state, strict=True, assign=False):  # noqa: ARG002, FBT002
                return super().load_state_dict(state, strict=False, assign=assign)

        state = Net().state_dict() | {"total_ops": torch.ones(1)}
        del state["head.bias"]
        refreshed = refresh(state, Takes())
        assert torch.equal(refreshed["total_ops"], torch.ones(1))
        assert "a checkpoint that differs in head.bias, total_ops" in notices.text

    def test_that_leave_something_out_are_an_error(self):
        state = {name.replace("norm.", "bn."): value for name, value in Net().state_dict().items()}
        del state["bn.running_var"]
        with pytest.raises(MismatchError) as caught:
            refresh(state, RenamesAll())
        assert caught.value.differences == ("norm.running_var: in the model, missing in swa.pt",)


class TestWrappersWithin:
    """Of one submodule: torch.compile, DistributedDataParallel."""

    @pytest.mark.parametrize("part", ["_orig_mod", "module"])
    def test_of_the_run_are_taken_off(self, part):
        state = {
            name.replace("norm.", f"norm.{part}."): value
            for name, value in Net().state_dict().items()
        }
        assert_refreshed(refresh(state, Net()), state, f"norm.{part}")

    def test_of_the_model_are_put_on(self):
        class Compiled(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self._orig_mod = module

            def forward(self, values):
                return self._orig_mod(values)

        model = Net()
        model.norm = Compiled(model.norm)  # type: ignore[assignment]
        state = Net().state_dict()
        assert_refreshed(refresh(state, model), state, "norm")

    def test_that_the_model_needs_to_tell_layers_apart_stay(self):
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.ModuleDict(
                    {"module": nn.BatchNorm1d(2), "weight_of": nn.Linear(1, 1)}
                )

        state = {name: torch.full_like(value, 3) for name, value in Both().state_dict().items()}
        torch.save(state, "a.pt")
        model = Both()
        load_weights(model, open_checkpoint(Path("a.pt")))
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class TestIgnore:
    CODE = (
        "import torch\n"
        "from tests.model.test_loading import BATCHES, Net\n"
        "def loader():\n"
        "    return list(BATCHES)\n"
        "def held_out():\n"
        "    return [(BATCHES[0], torch.arange(16) % 4)]\n"
    )

    @pytest.fixture
    def counted(self, user_folder) -> State:
        """What is left of thop's profile: two tensors in each module."""
        (user_folder / "mine.py").write_text(self.CODE)
        state = Net().state_dict()
        for layer in ("", "body.", "norm.", "head."):
            state |= {f"{layer}total_ops": torch.ones(1), f"{layer}total_params": torch.ones(1)}
        torch.save(state, "swa.pt")
        return state

    @pytest.mark.parametrize("command", ["bn-refresh", "evaluate"])
    def test_is_what_the_error_says_and_what_helps(self, command, counted):
        arguments = ["swa.pt", "--model", "mine.py:Net"]
        if command == "bn-refresh":
            arguments += ["--loader", "mine.py:loader", "-o", "new.pt"]
        else:
            arguments += ["--loader", "mine.py:held_out"]
        message = str(run(command, *arguments, code=1).exception)
        assert "8 differences" in message
        [way_out] = re.findall(r"\((`ignore` .*) leaves these tensors alone\):", message)
        run(command, *arguments, *shlex.split(with_options(way_out)))
        if command == "bn-refresh":
            assert_refreshed(torch.load("new.pt"), counted, "norm")

    def test_lets_the_model_keep_what_it_has(self):
        model, state = Net(), Net().state_dict()
        del state["head.weight"]
        with pytest.raises(MismatchError, match=r"1 differences .*`ignore` "):
            refresh(state, model)
        before = model.head.weight.clone()
        refreshed = refresh(state, model, ignore=["^head"])
        assert torch.equal(model.head.weight, before)
        assert torch.equal(refreshed["head.bias"], state["head.bias"])

    def test_that_fits_nothing_is_an_error(self, counted):
        with pytest.raises(SelectionError, match="`ignore` 'nowhere' matches no tensor's name"):
            refresh(counted, Net(), ignore=["total_", "nowhere"])

    @pytest.mark.usefixtures("counted")
    def test_of_everything_is_an_error(self):
        specs = ("--model", "mine.py:Net", "--loader", "mine.py:held_out")
        result = run("evaluate", "swa.pt", *specs, "--ignore", ".", code=1)
        assert "`ignore` leaves no tensor to load" in str(result.exception)

    @pytest.mark.usefixtures("counted")
    def test_need_not_fit_each_checkpoint_of_an_evaluation(self):
        torch.save(Net().state_dict(), "plain.pt")
        first, second = ckptavg.evaluate(
            ["swa.pt", "plain.pt"], model=Net, loader=[(BATCHES[0], torch.arange(16) % 4)],
            ignore=["total_"],
        )  # fmt: skip
        assert first.metrics == second.metrics


def test_tensors_that_differ_alike_are_one_line(tmp_path):
    def blocks(width: int) -> nn.Module:
        pairs = ((nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)) for _ in range(20))
        return nn.Sequential(*(layer for pair in pairs for layer in pair))

    path, of_convs = tmp_path / "a.pt", "0.weight, 2.weight, 4.weight and 17 more"
    torch.save(blocks(4).state_dict(), path)
    with pytest.raises(MismatchError) as caught:
        load_weights(blocks(6), open_checkpoint(path))
    assert str(caught.value).splitlines() == [
        f"{path} does not fit the model: 120 differences (`model_arg` can give it other sizes):",
        f"  {of_convs}: shape (6, 6, 1, 1) in the model, (4, 4, 1, 1) in {path}",
        f"  0.bias, 1.weight, 1.bias and 97 more: shape (6,) in the model, (4,) in {path}",
    ]


class WithAdapter(nn.Module):
    """As PEFT has it: the base is in the model's state dict, and not in the adapter's file."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.base = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
        self.query = nn.ModuleDict(
            {
                "base_layer": nn.Linear(6, 6),
                "lora_A": nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)}),
                "lora_B": nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)}),
            }
        )
        self.norm = nn.ModuleDict(
            {
                "original_module": nn.BatchNorm1d(6),
                "modules_to_save": nn.ModuleDict({"default": nn.BatchNorm1d(6)}),
            }
        )
        self.base(BATCHES[1] + 3)  # it was trained elsewhere

    def forward(self, values):
        query: Any = self.query
        values = self.base(values)
        change = query["lora_B"]["default"](query["lora_A"]["default"](values))
        saved: Any = self.norm["modules_to_save"]
        return saved["default"](query["base_layer"](values) + change)


class TestAdapters:
    @pytest.fixture
    def adapter(self) -> State:
        return {
            name.replace(".modules_to_save", "").replace(".default", ""): value.clone()
            for name, value in WithAdapter().state_dict().items()
            if "lora" in name or "modules_to_save" in name
        }

    def test_alone_are_refreshed_on_their_base_which_rests(self, adapter, notices):
        refreshed = refresh(adapter, WithAdapter())
        model: Any = WithAdapter()
        model.eval()
        model.norm["modules_to_save"].train()
        with torch.no_grad():
            seen = model.norm["modules_to_save"]["default"]
            seen.reset_running_stats()
            seen.momentum = None
            for batch in BATCHES:
                model(batch)
        for name in STATISTICS:
            torch.testing.assert_close(refreshed[f"norm.{name}"], getattr(seen, name))
        assert "holds only an adapter: 12 other tensors" in notices.text
        assert "left 2 norm layers alone (not in the checkpoint): " in notices.text
        assert "'base.1', 'norm.original_module'" in notices.text

    def test_that_lack_a_factor_are_an_error(self, adapter):
        del adapter["query.lora_B.weight"]
        with pytest.raises(MismatchError, match=r"query\.lora_B\.default\.weight: in the model"):
            refresh(adapter, WithAdapter())

    def test_with_a_part_of_their_base_are_an_error(self, adapter):
        adapter["query.base_layer.weight"] = torch.ones(6, 6)
        with pytest.raises(MismatchError, match=r"query\.base_layer\.bias: in the model, missing"):
            refresh(adapter, WithAdapter())

    def test_of_a_model_that_keeps_its_base_to_itself(self):
        """What `state_dict` leaves out is refreshed, since the checkpoint has it."""

        class Hides(Net):
            def state_dict(self, *args: Any, **keywords: Any) -> Any:
                state = super().state_dict(*args, **keywords)
                return {name: value for name, value in state.items() if name.startswith("head")}

        state = Net().state_dict()
        assert_refreshed(refresh(state, Hides()), state, "norm")


def test_what_an_average_leaves_out_its_refresh_does_not_look_for(user_folder):
    (user_folder / "mine.py").write_text(TestIgnore.CODE)
    Path("run").mkdir()
    for step in range(2):
        torch.save(Net().state_dict() | {"total_ops": torch.ones(1) * step}, f"run/{step}.pt")
    specs = ("--model", "mine.py:Net", "--loader", "mine.py:loader", "--skip", "total_ops")
    run("average", "run", "-o", "swa.pt", *specs)
    assert torch.load("swa.pt").keys() == Net().state_dict().keys()


class Merging(Net):
    """Merges a change into its weights in eval mode, as layers of LoRA do."""

    def __init__(self) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.full((6, 5), 0.5))
        self.is_merged = False

    def train(self, mode=True):  # noqa: FBT002 - torch's
        super().train(mode)
        if mode == self.is_merged:
            self.body.weight.data += -self.change.data if mode else self.change.data
            self.is_merged = not mode
        return self

    def forward(self, values):
        change = 0 if self.is_merged else values @ self.change.T
        return self.head(self.norm(self.body(values) + change))


def test_a_model_that_comes_merged_is_refreshed_with_the_weights_of_the_checkpoint():
    state = Merging().state_dict()
    state["change"] = torch.randn(6, 5)
    expected = refresh(state, Merging())
    model = Merging().eval()
    assert model.is_merged
    refreshed = refresh(state, model)
    assert all(torch.equal(refreshed[name], value) for name, value in expected.items())
    assert model.is_merged
    assert not model.training


class Learner:
    """Trains a network, as a `Learner` of fastai or a `Trainer` does."""

    def __init__(self, network: nn.Module, attribute: str = "model") -> None:
        setattr(self, attribute, network)


class Yolo(nn.Module):
    """Is a module, too; its `train` runs a training, and calling it makes a copy of the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def train(self, trainer=None, **settings):  # type: ignore[override]
        raise AssertionError((trainer, settings))

    def forward(self, *values):
        raise AssertionError(values)


@pytest.mark.parametrize("train_mode", ["norm", "full"])
@pytest.mark.parametrize("kind", [Learner, lambda net: Learner(net, "module_"), Yolo])
def test_the_network_of_what_trains_it_is_the_model(kind, train_mode, notices):
    state = Net().state_dict()
    assert_refreshed(refresh(state, kind(Net()), train_mode=train_mode), state, "norm")
    assert re.search(r"is a (Learner|Yolo): using its attribute '(model|module_)'", notices.text)
