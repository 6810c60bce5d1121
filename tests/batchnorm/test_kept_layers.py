"""Layers of a checkpoint whose statistics a refresh leaves: frozen, absent, not asked for."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ckptavg
from ckptavg.errors import RefreshError
from ckptavg.formats import open_checkpoint
from tests.helpers import run

pytestmark = pytest.mark.usefixtures("no_fsync", "user_folder")
BATCHES = torch.randn(12, 16, 5, generator=torch.Generator().manual_seed(7)) * 2 + 1


class Net(nn.Module):
    """A backbone that may be left out of the state dict, as Lightning's documentation shows."""

    def __init__(self, *, hides_backbone: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone: Any = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout())
        self.head: Any = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
        self.hides_backbone = hides_backbone
        self.backbone(torch.randn(16, 5) + 3)  # it has been trained elsewhere

    def forward(self, values):
        return self.head(self.backbone(values))

    def state_dict(self, *args: Any, **keywords: Any) -> Any:
        state = super().state_dict(*args, **keywords)
        for name in [name for name in state if self.hides_backbone]:
            if name.startswith("backbone."):
                del state[name]
        return state


def members(model: Net, *, frozen: bool = True) -> Path:
    """A run in which the head is trained, and the backbone's norm layer unless it is frozen."""
    folder = Path("run")
    folder.mkdir()
    with torch.no_grad():
        for step in range(3):
            model.head[0].weight += 0.3 * torch.randn(4, 6)
            if not frozen and not model.hides_backbone:
                model.backbone[0].weight += 0.3 * torch.randn(6, 5)
                model.backbone[1].train()(torch.randn(16, 6) + step)
            model.head[1].train()(torch.randn(16, 4) + step)
            torch.save(model.state_dict(), folder / f"epoch_{step}.pt")
    return folder


def by_hand(model: Net, path: Path) -> dict[str, torch.Tensor]:
    """The head's statistics by `update_bn`, behind a backbone in eval mode with the weights."""
    model.load_state_dict(torch.load(path), strict=False)
    model.backbone.eval()
    with torch.no_grad():
        update_bn([model.backbone(batch) for batch in BATCHES], model.head)
    return {f"head.{name}": value for name, value in model.head.state_dict().items()}


def norm_stats(path: Path) -> Any:
    provenance = open_checkpoint(path).provenance
    assert provenance is not None
    return provenance["norm_stats"]


def refresh(output: str, model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    ckptavg.refresh_checkpoint(
        "swa.pt", output, model=model, loader=BATCHES, device="cpu", force=True, **options
    )
    state: dict[str, torch.Tensor] = torch.load(output)
    return state


@pytest.mark.parametrize("hides_backbone", [False, True], ids=["frozen", "not in the checkpoint"])
def test_a_backbone_without_new_statistics_works_in_eval_mode(hides_backbone, notices):
    ckptavg.average(members(Net(hides_backbone=hides_backbone)), "swa.pt")
    state = refresh("new.pt", Net(hides_backbone=hides_backbone))
    expected = by_hand(Net(hides_backbone=hides_backbone), Path("swa.pt"))
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-4)
    old = torch.load("swa.pt")
    for name in state.keys() - {f"head.1.{end}" for end in ("running_mean", "running_var")}:
        assert torch.equal(state[name], old[name]) or name == "head.1.num_batches_tracked"
    reason = "not in the checkpoint" if hides_backbone else "frozen: the same in all members"
    assert f"left 1 norm layer alone ({reason}" in notices.text
    assert norm_stats(Path("new.pt"))["state"] == "refreshed"


def test_frozen_layers_that_are_named_are_refreshed():
    ckptavg.average(members(Net()), "swa.pt")
    old, new = torch.load("swa.pt"), refresh("new.pt", Net(), layers=["backbone"])
    assert not torch.equal(new["backbone.1.running_mean"], old["backbone.1.running_mean"])
    assert torch.equal(new["head.1.running_mean"], old["head.1.running_mean"])
    assert norm_stats(Path("new.pt"))["state"] == "partly refreshed"


class TestPartly:
    @pytest.fixture
    def average(self, user_folder: Path) -> None:
        ckptavg.average(members(Net(), frozen=False), user_folder / "swa.pt")

    @pytest.mark.usefixtures("average")
    def test_refreshed_says_so_and_which_layers_are_stale(self):
        refresh("new.pt", Net(), skip_layers=["backbone"])
        assert norm_stats(Path("new.pt")) | {"seed": 0} == {
            "state": "partly refreshed",
            "estimator": "paper",
            "batches": 12,
            "samples": 192,
            "seed": 0,
            "stale": ["backbone.1"],
        }
        assert (
            "norm statistics partly refreshed (stale: backbone.1)"
            in run("inspect", "new.pt").stdout
        )
        run("verify", "new.pt", "run")

    @pytest.mark.usefixtures("average")
    def test_refreshed_is_refreshed_whole_in_a_second_pass(self):
        refresh("new.pt", Net(), skip_layers=["backbone"])
        ckptavg.refresh_checkpoint("new.pt", None, model=Net(), loader=BATCHES, device="cpu")
        assert norm_stats(Path("new.pt"))["state"] == "refreshed"


class TestNothing:
    @pytest.fixture(autouse=True)
    def _code(self, user_folder: Path) -> None:
        (user_folder / "mine.py").write_text(
            "import torch\n"
            "from torch import nn\n"
            "class EvoNorm(nn.Module):\n"
            "    def __init__(self, channels):\n"
            "        super().__init__()\n"
            "        self.register_buffer('running_var', torch.ones(channels))\n"
            "    def forward(self, values):\n"
            "        return values / self.running_var.sqrt()\n"
            "def evo(): return nn.Sequential(nn.Linear(5, 4), EvoNorm(4))\n"
            "def net(): return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))\n"
            "def plain(): return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))\n"
            "def loader(): return torch.randn(3, 8, 5)\n"
            "def forgets(model, batch): return model[0](batch)\n"
        )

    @pytest.mark.parametrize(
        ("model", "arguments", "message"),
        [
            ("evo", (), "'1' (EvoNorm is of a kind that is not refreshed)"),
            ("net", ("--forward", "mine.py:forgets"), "'1' (not called)"),
            ("net", ("--skip-layers", "1"), "'1' (as asked)"),
            ("plain", (), "the model has no norm layers that track statistics"),
        ],
    )
    def test_refreshed_is_exit_1_with_the_layers_and_the_reason(self, model, arguments, message):
        torch.save(self.load(model).state_dict(), "a.pt")
        specs = ("--model", f"mine.py:{model}", "--loader", "mine.py:loader")
        result = run("bn-refresh", "a.pt", "-o", "b.pt", *specs, *arguments, code=1)
        assert isinstance(result.exception, RefreshError)
        assert message in str(result.exception)
        assert not Path("b.pt").exists()

    @pytest.mark.parametrize("model", ["plain", "net"])
    def test_to_refresh_is_no_obstacle_to_an_average(self, model):
        """A model without norm layers, or with frozen ones: the average is what was asked for."""
        Path("run").mkdir()
        state = self.load(model).state_dict()
        for step in range(3):
            state["0.weight"] = state["0.weight"] + step
            torch.save(state, f"run/epoch_{step}.pt")
        specs = ("--model", f"mine.py:{model}", "--loader", "mine.py:loader")
        result = json.loads(run("average", "run", "-o", "a.pt", *specs, "--json").stdout)
        assert Path("a.pt").exists()
        assert any("no norm layer was refreshed" in notice for notice in result["notices"])

    @staticmethod
    def load(name: str) -> nn.Module:
        space: dict[str, Any] = {}
        exec(Path("mine.py").read_text(), space)  # noqa: S102 - it is above
        model: nn.Module = space[name]()
        model(torch.randn(8, 5))  # it has seen data
        return model


class Observer(nn.Module):
    """Takes the shape of what it loads, as the observers of quantisation-aware training do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(1))

    def _load_from_state_dict(self, state, prefix, *args: Any) -> None:
        if prefix + "scale" in state:
            self.scale.resize_(state[prefix + "scale"].shape)
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, values):
        return values


@pytest.mark.parametrize("adapts", [True, False])
def test_a_model_that_adapts_shapes_as_it_loads_decides_itself(adapts):
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), Observer() if adapts else Net())
    if not adapts:
        model[2] = nn.Identity()
        model[2].register_buffer("scale", torch.ones(1))
    state = model.state_dict() | {"2.scale": torch.rand(4)}
    torch.save(state, "swa.pt")
    if adapts:
        assert torch.equal(refresh("new.pt", model)["2.scale"], state["2.scale"])
    else:
        with pytest.raises(ckptavg.CkptAvgError, match=r"2\.scale: shape \(1,\) in the model"):
            refresh("new.pt", model)


class TestDryRun:
    def test_lists_the_layers_after_one_batch_and_writes_nothing(self, user_folder):
        ckptavg.average(members(Net()), "swa.pt")
        (user_folder / "mine.py").write_text(
            "from tests.batchnorm.test_kept_layers import BATCHES, Net\n"
            "def loader():\n"
            "    yield BATCHES[0]\n"
            "    raise AssertionError('one batch is enough')\n"
        )
        specs = ("--model", "mine.py:Net", "--loader", "mine.py:loader")
        before = Path("swa.pt").read_bytes()
        lines = run("bn-refresh", "swa.pt", *specs, "--dry-run").stdout.splitlines()
        assert [line.split() for line in lines[:2]] == [
            ["layer", "in", "a", "refresh"],
            ["head.1", "would", "be", "refreshed"],
        ]
        assert "backbone.1  would be left alone (frozen: the same in all members" in lines[2]
        assert lines[3] == "tried one batch, and wrote nothing"
        assert Path("swa.pt").read_bytes() == before

    def test_says_of_the_loader_what_the_refresh_would(self, notices):
        ckptavg.average(members(Net()), "swa.pt")
        dry = functools.partial(
            ckptavg.refresh_checkpoint, "swa.pt", None, model=Net(), dry_run=True
        )
        examples = BATCHES.flatten(0, 1)
        dry(loader=DataLoader(TensorDataset(examples), batch_size=16))
        assert "the loader does not shuffle: if the data are sorted" in notices.text

        class Endless(IterableDataset[torch.Tensor]):
            def __iter__(self):
                return itertools.cycle(examples)

        with pytest.raises(RefreshError, match="may be endless; limit the pass"):
            dry(loader=DataLoader(Endless(), batch_size=16))


@pytest.mark.parametrize("hides_backbone", [False, True], ids=["frozen", "not in the checkpoint"])
def test_an_evaluation_with_a_refresh_leaves_the_same_layers(hides_backbone):
    ckptavg.average(members(Net(hides_backbone=hides_backbone)), "swa.pt")
    model = Net(hides_backbone=hides_backbone)
    expected = by_hand(Net(hides_backbone=hides_backbone), Path("swa.pt"))
    seen: dict[str, torch.Tensor] = {}

    def look(model: nn.Module, batches: object) -> float:
        seen.update({name: value.clone() for name, value in model.named_buffers()})
        return 0.0

    refresh = ckptavg.RefreshOptions(model=model, loader=BATCHES, device="cpu")
    before = {name: value.clone() for name, value in model.backbone.named_buffers()}
    ckptavg.evaluate("swa.pt", model=model, loader=[0], metric=look, refresh=refresh, device="cpu")
    for name in ("head.1.running_mean", "head.1.running_var"):
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-4)
    if hides_backbone:
        assert all(torch.equal(seen[f"backbone.{name}"], value) for name, value in before.items())


class TestBatches:
    def test_that_are_dicts_of_the_models_arguments_are_its_keywords(self):
        class Keywords(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(5)

            def forward(self, values, mask=None):
                return self.norm(values * mask)

        model, mask = Keywords(), torch.rand(16, 5)
        batches = [{"mask": mask, "values": batch} for batch in BATCHES]
        ckptavg.refresh_norm(model, batches, estimator="exact")
        expected = (BATCHES * mask).flatten(0, 1).mean(0)
        torch.testing.assert_close(model.norm.running_mean, expected)

    def test_that_are_other_dicts_ask_for_a_function(self):
        with pytest.raises(RefreshError, match=r"yields a dict of image, label, .*; .*`forward`"):
            ckptavg.refresh_norm(Net(), [{"image": BATCHES[0], "label": 0}])

    def test_of_a_data_module_are_those_of_its_training(self):
        class Data:
            """What Lightning's data modules have."""

            def prepare_data(self):
                self.is_prepared = True

            def setup(self, stage):
                assert self.is_prepared
                self.stage = stage

            def train_dataloader(self):
                assert self.stage == "fit"
                return BATCHES

        torch.save(Net().state_dict(), "swa.pt")
        expected = refresh("a.pt", Net())
        ckptavg.refresh_checkpoint("swa.pt", "b.pt", model=Net, loader=Data(), device="cpu")  # type: ignore[arg-type]
        assert all(torch.equal(value, expected[name]) for name, value in torch.load("b.pt").items())


def test_frozen_layers_stay_frozen_in_a_second_refresh():
    ckptavg.average(members(Net()), "swa.pt")
    first = refresh("new.pt", Net())
    assert norm_stats(Path("new.pt"))["frozen"] == ["backbone.1"]
    ckptavg.refresh_checkpoint("new.pt", None, model=Net(), loader=BATCHES + 1, device="cpu")
    second = torch.load("new.pt")
    assert torch.equal(second["backbone.1.running_mean"], first["backbone.1.running_mean"])
    assert not torch.equal(second["head.1.running_mean"], first["head.1.running_mean"])


@pytest.mark.parametrize("options", [{"layers": ["head"]}, {"skip_layers": ["backbone"]}], ids=str)
def test_frozen_layers_that_are_not_asked_for_are_not_stale(options):
    ckptavg.average(members(Net()), "swa.pt")
    refresh("new.pt", Net(), **options)
    assert norm_stats(Path("new.pt"))["state"] == "refreshed"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_layers_are_recorded_by_their_names_in_the_checkpoint(prefix):
    run_folder = members(Net(), frozen=False)
    for path in run_folder.iterdir():
        state = torch.load(path)
        torch.save({"state_dict": {prefix + name: value for name, value in state.items()}}, path)
    ckptavg.average(run_folder, "swa.pt")
    refresh("new.pt", Net(), skip_layers=["backbone"])
    assert norm_stats(Path("new.pt"))["stale"] == [f"{prefix}backbone.1"]


def test_statistics_of_the_last_member_are_frozen_too_if_all_are_equal():
    summary = ckptavg.average(members(Net()), "swa.pt", norm_stats="last")
    assert summary.norm_stats == "stale"
    assert norm_stats(Path("swa.pt"))["frozen"] == ["backbone.1"]


def test_statistics_that_were_never_computed_are_not_frozen():
    """Means of 0 and variances of 1 in all members: they were reset, to be computed at the end."""
    folder = Path("run")
    folder.mkdir()
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    for step in range(3):
        state = model.state_dict() | {"0.weight": torch.randn(4, 5)}
        torch.save(state, folder / f"epoch_{step}.pt")
    assert ckptavg.average(folder, "swa.pt").norm_stats == "stale"
    assert refresh("new.pt", model)["1.running_mean"].any()


def test_a_container_with_a_wrappers_prefix_knows_its_frozen_layers():
    folder = members(Net())
    for path in folder.iterdir():
        state = torch.load(path)
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    ckptavg.average(folder, "swa.pt", container="last")
    before = torch.load("swa.pt")["state_dict"]
    ckptavg.refresh_checkpoint("swa.pt", None, model=Net(), loader=BATCHES, device="cpu")
    after = torch.load("swa.pt")["state_dict"]
    name = "module.backbone.1.running_mean"
    assert torch.equal(after[name], before[name])


def test_evaluations_of_members_leave_the_layers_that_are_the_same_in_all():
    folder = members(Net())
    ckptavg.average(folder, "swa.pt")
    means = []

    def look(model: nn.Module, batches: object) -> float:
        means.append(dict(model.named_buffers())["backbone.1.running_mean"].clone())
        return 0.0

    refresh = ckptavg.RefreshOptions(model=Net(), loader=BATCHES, device="cpu")
    ckptavg.evaluate(
        [folder, "swa.pt"], model=Net(), loader=[0], metric=look, refresh=refresh, device="cpu"
    )
    frozen = torch.load("swa.pt")["backbone.1.running_mean"]
    assert len(means) == 4
    assert all(torch.equal(mean, frozen) for mean in means)


def test_layers_that_a_refresh_has_done_are_not_stale_after_the_next():
    ckptavg.average(members(Net(), frozen=False), "swa.pt")
    for layers, state in ((["backbone"], "partly refreshed"), (["head"], "refreshed")):
        ckptavg.refresh_checkpoint(
            "swa.pt", None, model=Net(), loader=BATCHES, layers=layers, device="cpu"
        )
        assert norm_stats(Path("swa.pt"))["state"] == state


def test_a_batch_that_moves_itself_is_the_models_argument():
    class Graphs:
        def __init__(self, nodes):
            self.nodes, self.num_graphs = nodes, 4

        def to(self, _device):
            return self

    class OfGraphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, graphs):
            return self.norm(graphs.nodes)

    model = OfGraphs()
    report = ckptavg.refresh_norm(model, [Graphs(batch) for batch in BATCHES], estimator="exact")
    assert report.samples == 4 * len(BATCHES)
    torch.testing.assert_close(model.norm.running_mean, BATCHES.flatten(0, 1).mean(0))


def test_where_all_are_frozen_the_error_says_how_to_refresh_them():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 5))
    Path("run").mkdir()
    for step in range(2):
        torch.save(model.state_dict() | {"0.bias": torch.randn(4)}, f"run/epoch_{step}.pt")
    ckptavg.average("run", "swa.pt")
    with pytest.raises(RefreshError, match=r"'1' \(frozen: the same .*\); `layers` refreshes"):
        refresh("new.pt", model)
    refresh("new.pt", model, layers=["1"])
    assert norm_stats(Path("new.pt"))["state"] == "refreshed"
