"""Directories that `torch.distributed.checkpoint` loads: read by itself, with 1, 2 and 3 ranks."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import ckptavg
from ckptavg.errors import CkptAvgError, OutputError
from ckptavg.formats import open_checkpoint
from tests import gloo
from tests.helpers import DTYPES, bits, outcome, run, save_dcp, tensors_and_views
from tests.helpers_norm import Mlp
from tests.oracle import (
    StateDict,
    assert_mean,
    naive_mean,
    random_state_dicts,
    same_bits,
    save_run,
)
from tests.ranks import Job, command

pytestmark = pytest.mark.usefixtures("no_fsync")


def metadata_of(folder: Path) -> Metadata:
    found = pickle.loads((folder / ".metadata").read_bytes())
    assert isinstance(found, Metadata)
    return found


def unpacked(folder: Path) -> Any:
    """The nested state dict, as torch's own tool makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, folder.with_suffix(".unpacked"))
    return torch.load(folder.with_suffix(".unpacked"))


def load_into(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    return state


def assert_holds(found: StateDict, wanted: StateDict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert same_bits(found[name], value), name


def save_states(folder: Path, states: list[StateDict]) -> list[Path]:
    """Save a run as a training loop does, with the optimizer's state."""
    folder.mkdir(exist_ok=True)
    return [
        save_dcp(
            {"model": state, "step": step, "optimizer": {"m": torch.ones(3)}}, folder / f"{step}"
        )
        for step, state in enumerate(states)
    ]


class TestWhatTorchWrites:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_what_the_metadata_say(self, tmp_path, dtype):
        state = {"model": tensors_and_views(dtype)}
        save_dcp(state, tmp_path / "torch")
        ckptavg.convert(tmp_path / "torch", tmp_path / "ours", format="dcp")
        ours, its = metadata_of(tmp_path / "ours"), metadata_of(tmp_path / "torch")
        assert ours.state_dict_metadata == its.state_dict_metadata
        assert ours.planner_data == its.planner_data
        assert ours.version == its.version
        assert type(ours.storage_meta) is type(its.storage_meta)
        hints = [{each: each.index for each in found.storage_data} for found in (ours, its)]
        assert hints[0] == hints[1]
        found = unpacked(tmp_path / "ours")["model"]
        assert {name: bits(each) for name, each in found.items()} == {
            name: bits(each) for name, each in state["model"].items()
        }

    def test_is_the_same_for_entries_that_are_no_tensors(self, tmp_path):
        state = {"w": torch.ones(2), "w._extra_state": io.BytesIO(b"abc"), "steps": 3}
        save_dcp(state, tmp_path / "torch")
        torch.save(state, tmp_path / "a.pt")
        ckptavg.convert(tmp_path / "a.pt", tmp_path / "ours", format="dcp")
        ours, its = metadata_of(tmp_path / "ours"), metadata_of(tmp_path / "torch")
        assert ours.state_dict_metadata == its.state_dict_metadata
        assert ours.storage_data.keys() == its.storage_data.keys()
        found = load_into(dict.fromkeys(state) | {"w": torch.zeros(2)}, tmp_path / "ours")
        assert found["w._extra_state"].getvalue() == b"abc"
        assert (found["steps"], found["w"].tolist()) == (3, [1, 1])

    def test_has_the_state_of_modules(self, tmp_path):
        kept = {"a._extra_state": (1.5, "x"), "b._extra_state": io.BytesIO(b"abc")}
        lost = {"c._extra_state": torch.nn.Identity()}
        save_dcp({"model": {"w": torch.ones(2), **kept, **lost}}, tmp_path / "in")
        code, _, said = outcome("convert", tmp_path / "in", "-o", tmp_path / "o", "--format", "dcp")
        assert code == 0
        assert (
            "entries that are not tensors are copied from in: a._extra_state, b._extra_state"
            in said
        )
        assert "left out entries that are not tensors: c._extra_state" in said
        ours, its = metadata_of(tmp_path / "o"), metadata_of(tmp_path / "in")
        del its.state_dict_metadata["model.c._extra_state"]
        assert ours.state_dict_metadata == its.state_dict_metadata
        wanted = {"model": {"w": torch.zeros(2), **dict.fromkeys(kept)}}
        found = load_into(wanted, tmp_path / "o")["model"]
        assert found["a._extra_state"] == (1.5, "x")
        assert found["b._extra_state"].getvalue() == b"abc"
        ckptavg.convert(tmp_path / "in", tmp_path / "a.pt")
        saved = torch.load(tmp_path / "a.pt", weights_only=False)
        assert saved["a._extra_state"] == (1.5, "x")

    def test_items_are_where_the_metadata_say(self, tmp_path):
        state = {"w": torch.arange(7), "v": torch.randn(3).bfloat16()}
        save_file(state, tmp_path / "a.safetensors")
        ckptavg.convert(tmp_path / "a.safetensors", tmp_path / "ours", format="dcp")
        for index, info in metadata_of(tmp_path / "ours").storage_data.items():
            data = (tmp_path / "ours" / info.relative_path).read_bytes()[info.offset :]
            assert same_bits(torch.load(io.BytesIO(data[: info.length])), state[index.fqn])


class TestAnyNumberOfRanks:
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_loads_it(self, tmp_path, size):
        states = random_state_dicts(3)
        save_states(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp", max_shard_size=10_000)
        Job([partial(load_sharded, tmp_path, states)] * size, tmp_path).finish(*[0] * size)

    @pytest.mark.parametrize("size", [2, 3])
    def test_goes_on_with_fsdp(self, tmp_path, size):
        states = [gloo.model().state_dict() for _ in range(2)]
        for state in states:
            for value in state.values():
                value.add_(torch.randn_like(value))
        save_states(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp")
        Job([partial(load_fsdp, tmp_path, states)] * size, tmp_path).finish(*[0] * size)


def begin(folder: Path) -> DeviceMesh:
    """Join the other processes."""
    rank, size = (int(os.environ.get(name, alone)) for name, alone in
                  (("RANK", "0"), ("WORLD_SIZE", "1")))  # fmt: skip
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    return DeviceMesh("cpu", list(range(size)))


def load_sharded(folder: Path, states: list[StateDict]) -> None:
    """Load an average into tensors of which each process has some rows."""
    mesh = begin(folder)
    empty = {name: torch.zeros_like(value) for name, value in states[0].items()}
    loaded = load_into({"model": gloo.sharded(empty, mesh, Shard(0))}, folder / "out")
    assert_mean({name: whole(value) for name, value in loaded["model"].items()}, states)
    dist.destroy_process_group()


def load_fsdp(folder: Path, states: list[StateDict]) -> None:
    """Resume a training loop of FSDP2 from an average."""
    mesh = begin(folder)
    network = gloo.model()
    fully_shard(network, mesh=mesh)
    state = load_into({"model": get_model_state_dict(network)}, folder / "out")
    set_model_state_dict(network, state["model"])
    options = StateDictOptions(full_state_dict=True)
    full: Any = get_model_state_dict(network, options=options)
    if dist.get_rank() == 0:
        assert_mean(full, states)
    dist.destroy_process_group()


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


class TestKeys:
    @pytest.mark.parametrize(
        ("nested", "key"),
        [
            (lambda weights: {"model": weights}, None),
            (lambda weights: {"model": weights}, "model"),
            (lambda weights: {"state_dict": weights, "global_step": 3}, None),
            (lambda weights: {"app": {"model": weights}, "step": 3}, None),
            (lambda weights: {f"model.{name}": each for name, each in weights.items()}, None),
            (lambda weights: {f"model.{name}": each for name, each in weights.items()}, "model"),
            (lambda weights: weights | {"optimizer.state.w": torch.ones(2)}, None),
            (lambda weights: {"model": {f"_orig_mod.{n}": w for n, w in weights.items()}}, None),
        ],
        ids=[
            *("model", "model by name", "Lightning's", "deeper", "a prefix", "a prefix by name"),
            *("flat", "compiled"),
        ],
    )
    def test_are_those_of_the_inputs(self, tmp_path, nested, key):
        states = [{"a.w": torch.randn(3), "b": torch.randn(2, 2)} for _ in range(2)]
        (tmp_path / "run").mkdir()
        its = [save_dcp(nested(each), tmp_path / "run" / f"{n}") for n, each in enumerate(states)]
        ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp", key=key)
        ours, last = metadata_of(tmp_path / "out"), metadata_of(its[-1])
        described: dict[str, Any] = {
            name: each
            for name, each in last.state_dict_metadata.items()
            if name.endswith(("a.w", "b"))
        }
        assert ours.state_dict_metadata == described
        if not ("model.a.w" in nested(states[0]) and key):  # then it becomes a dict
            assert ours.planner_data == {name: last.planner_data[name] for name in described}
        mean = {name: naive_mean([state[name] for state in states]) for name in states[0]}
        zeros = {name: torch.zeros(each.size) for name, each in described.items()}
        found = load_into(zeros, tmp_path / "out")
        for name, value in found.items():
            assert same_bits(value, mean["b" if name.endswith("b") else "a.w"])
        assert ckptavg.verify(tmp_path / "out", its).compared == 2

    def test_of_other_layouts_are_flat(self, tmp_path):
        states = [{"scheduler.w": torch.randn(3), "optimizer.w": torch.randn(2)} for _ in "ab"]
        save_run(tmp_path / "run", states, "pt")
        ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp")
        planned = metadata_of(tmp_path / "out").planner_data
        assert planned == {name: (name,) for name in states[0]}
        assert_mean(unpacked(tmp_path / "out"), states)
        assert open_checkpoint(tmp_path / "out").tensors.keys() == states[0].keys()

    def test_that_are_hostile_are_only_text(self, tmp_path):
        names = [
            "../../up",
            "a\nb",
            "c'__0_0.distcp",
            "\N{SNOWMAN}\ud800",
            "torch",
            "fqn",
            ".",
            "x" * 999,
        ]
        state = {name: torch.tensor([float(number)]) for number, name in enumerate(names)}
        torch.save(state, tmp_path / "a.pt")
        ckptavg.convert(tmp_path / "a.pt", tmp_path / "out", format="dcp")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            ".metadata",
            "__0_0.distcp",
        }
        assert_holds(unpacked(tmp_path / "out"), state)
        found = open_checkpoint(tmp_path / "out")
        assert {name: found.read(name).tolist() for name in names} == {
            name: value.tolist() for name, value in state.items()
        }


class TestTensors:
    def test_there_and_back(self, tmp_path):
        state = random_state_dicts(1)[0]
        save_dcp({"model": state}, tmp_path / "in")
        ckptavg.convert(tmp_path / "in", tmp_path / "a.safetensors")
        ckptavg.convert(tmp_path / "a.safetensors", tmp_path / "out", format="dcp")
        ckptavg.convert(tmp_path / "out", tmp_path / "b.safetensors")
        assert_holds(unpacked(tmp_path / "out"), state)
        assert_holds(load_file(tmp_path / "b.safetensors"), state)

    def test_that_are_tied_are_stored_once(self, tmp_path):
        shared = torch.randn(100, 100)
        torch.save({"embed": shared, "head": shared}, tmp_path / "a.pt")
        summary = ckptavg.convert(tmp_path / "a.pt", tmp_path / "out", format="dcp")
        assert summary.bytes_written < 1.2 * shared.nbytes
        assert_holds(unpacked(tmp_path / "out"), {"embed": shared, "head": shared})
        ckptavg.convert(tmp_path / "out", tmp_path / "b.pt")
        again = torch.load(tmp_path / "b.pt")
        assert again["embed"].data_ptr() == again["head"].data_ptr()
        assert same_bits(again["head"], shared)
        with pytest.raises(OutputError, match="no aliases to drop"):
            ckptavg.convert(tmp_path / "a.pt", tmp_path / "o", format="dcp", drop_aliases=True)

    def test_come_with_files_that_lightning_and_megatron_have_beside_them(self, tmp_path):
        save_dcp(random_state_dicts(1)[0], tmp_path / "in")
        torch.save({"epoch": 3}, tmp_path / "in" / "meta.pt")
        for name in ("common.pt", "metadata.json", "other.json"):
            (tmp_path / "in" / name).write_text(f"of {name}")
        ckptavg.convert(tmp_path / "in", tmp_path / "out", format="dcp")
        along = {"meta.pt", "common.pt", "metadata.json"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            *along,
            ".metadata",
            "__0_0.distcp",
        }
        for name in along:
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()

    def test_fill_files_of_a_size(self, tmp_path):
        state = {f"w{number}": torch.randn(100) for number in range(5)}
        torch.save(state, tmp_path / "a.pt")
        code, _, _ = outcome("convert", tmp_path / "a.pt", "-o", tmp_path / "out", "--format",
                             "dcp", "--max-shard-size", "900")  # fmt: skip
        assert code == 0
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            ".metadata",
            *(f"__0_{number}.distcp" for number in range(3)),
        ]
        found = load_into({name: torch.zeros(100) for name in state}, tmp_path / "out")
        assert_holds(found, state)

    def test_of_another_dtype(self, tmp_path):
        states = [{"w": torch.randn(50), "n": torch.arange(3)} for _ in range(3)]
        save_run(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp", dtype="bfloat16")
        assert_mean(unpacked(tmp_path / "out"), states, torch.bfloat16)


class TestProvenance:
    def test_is_found_again(self, tmp_path):
        states = random_state_dicts(4)
        members = save_states(tmp_path / "run", states)
        ckptavg.average(members[:3], tmp_path / "out", format="dcp", hash=True)
        assert "uniform average of 3 checkpoints" in run("inspect", tmp_path / "out").stdout
        assert ckptavg.verify(tmp_path / "out", members[:3]).sources_hashed == 3
        update = [tmp_path / "out", members[3]]
        ckptavg.average(update, tmp_path / "four", format="dcp", update=True)
        provenance = open_checkpoint(tmp_path / "four").provenance
        assert provenance is not None
        assert [each["name"] for each in provenance["sources"]] == ["0", "1", "2", "3"]

    def test_keeps_it_out_of_other_averages(self, tmp_path):
        states = random_state_dicts(3)
        save_states(tmp_path / "run", states)
        for _ in range(2):
            ckptavg.average(tmp_path / "run", tmp_path / "run" / "swa", format="dcp", force=True)
            assert_mean(unpacked(tmp_path / "run" / "swa")["model"], states)

    def test_is_not_there_after_torch_has_saved_again(self, tmp_path):
        save_run(tmp_path / "run", random_state_dicts(2))
        ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp")
        assert open_checkpoint(tmp_path / "out").is_average
        save_dcp({"w": torch.ones(2)}, tmp_path / "out")
        assert not open_checkpoint(tmp_path / "out").is_average

    @pytest.mark.parametrize("damaged", [3, "{", "\ud800", b"{}"])
    def test_that_is_damaged_is_none(self, tmp_path, damaged):
        path = save_dcp({"w": torch.ones(2)}, tmp_path / "in")
        metadata: Any = metadata_of(path)
        metadata.ckptavg = damaged
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        assert open_checkpoint(path).provenance is None
        ckptavg.convert(path, tmp_path / "out", format="dcp")
        assert unpacked(tmp_path / "out")["w"].tolist() == [1, 1]

    def test_the_same_inputs_give_the_same_bytes(self, tmp_path):
        save_run(tmp_path / "run", random_state_dicts(2))
        for name in ("a", "b"):
            ckptavg.average(tmp_path / "run", tmp_path / name, format="dcp")
        for name in (".metadata", "__0_0.distcp"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class TestRefresh:
    @pytest.fixture
    def members(self, tmp_path: Path) -> list[Path]:
        return save_states(tmp_path / "run", [Mlp().state_dict() for _ in range(2)])

    @pytest.fixture
    def refresh(self) -> dict[str, Any]:
        made = torch.Generator().manual_seed(0)
        return {"model": Mlp, "loader": [torch.randn(16, 5, generator=made) for _ in range(3)]}

    def test_in_place_of_an_average(self, tmp_path, members, refresh):
        out = tmp_path / "out"
        ckptavg.average(members, out, format="dcp")
        before = unpacked(out)["model"]
        assert ckptavg.refresh_checkpoint(out, None, **refresh).state == "refreshed"
        after = unpacked(out)["model"]
        changed = {name for name in before if not same_bits(before[name], after[name])}
        assert {name.rpartition(".")[2] for name in changed} >= {"running_mean", "running_var"}
        assert not changed & {name for name in before if name.endswith(("weight", "bias"))}
        assert ckptavg.verify(out, members).refreshed

    def test_together_with_the_average(self, tmp_path, members, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("dcp_batches.py").write_text("import torch\nbatches = [torch.ones(16, 5)] * 2\n")
        run("average", "run", "-o", "out/", "--format", "dcp", "--model", "tests.helpers_norm:Mlp",
            "--loader", "dcp_batches.py:batches")  # fmt: skip
        states = [unpacked(path)["model"] for path in members]
        found = unpacked(tmp_path / "out")["model"]
        assert same_bits(found["0.weight"], naive_mean([each["0.weight"] for each in states]))
        assert "norm statistics refreshed" in run("inspect", tmp_path / "out").stdout

    def test_into_another(self, tmp_path, members, refresh):
        ckptavg.refresh_checkpoint(members[0], tmp_path / "out", format="dcp", **refresh)
        assert unpacked(tmp_path / "out").keys() == {"model"}

    def test_in_place_would_lose_the_optimizer(self, members, refresh):
        before = {path: path.read_bytes() for path in members[0].iterdir()}
        with pytest.raises(OutputError, match="more than weights"):
            ckptavg.refresh_checkpoint(members[0], None, in_place=True, **refresh)
        assert {path: path.read_bytes() for path in members[0].iterdir()} == before


class TestPublication:
    def test_says_what_is_not_written(self, tmp_path, notices):
        save_states(tmp_path / "run", random_state_dicts(2))
        ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp")
        assert "only the weights are written, not the rest of 1" in notices.text

    def test_a_dry_run_writes_nothing(self, tmp_path):
        save_run(tmp_path / "run", random_state_dicts(2))
        dry = ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp", dry_run=True)
        assert not (tmp_path / "out").exists()
        wet = ckptavg.average(tmp_path / "run", tmp_path / "out", format="dcp")
        files = (tmp_path / "out").iterdir()
        assert dry.bytes_written == wet.bytes_written == sum(file.stat().st_size for file in files)

    def test_processes_share_the_work(self, tmp_path):
        states = random_state_dicts(3)
        save_run(tmp_path / "run", states)
        words = ("average", "run", "-o", "out/", "--format", "dcp", "--max-shard-size", "100kB")
        Job([command(*words)] * 2, tmp_path).finish(0, 0)
        assert_mean(unpacked(tmp_path / "out"), states)

    def test_several_averages(self, tmp_path):
        states = random_state_dicts(3)
        save_run(tmp_path / "run", states)
        run("average", tmp_path / "run", "-o", tmp_path / "out", "--last", "2,3",
            "--format", "dcp")  # fmt: skip
        assert_mean(unpacked(tmp_path / "out" / "last2-uniform"), states[1:])
        assert_mean(unpacked(tmp_path / "out" / "last3-uniform"), states)

    def test_replaces_only_what_it_brings(self, tmp_path):
        out = tmp_path / "out"
        states = random_state_dicts(2)
        save_run(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", out, format="dcp", max_shard_size=100)
        with pytest.raises(OutputError, match="exists already"):
            ckptavg.average(tmp_path / "run", out, format="dcp")
        ckptavg.average(tmp_path / "run", out, format="dcp", force=True)
        assert sorted(path.name for path in out.iterdir()) == [".metadata", "__0_0.distcp"]
        (out / "notes.txt").write_text("keep")
        with pytest.raises(OutputError, match=r"notes\.txt"):
            ckptavg.average(tmp_path / "run", out, format="dcp", force=True)
        assert (out / "notes.txt").exists()

    @pytest.mark.parametrize(
        ("output", "options", "message"),
        [
            ("o.safetensors", {}, "dcp is a format of directories"),
            ("o.pt", {}, "dcp is a format of directories"),
            ("run/0", {"force": True}, "is the directory of the checkpoints"),
            ("o", {"format": "hf"}, "'huggingface' or 'dcp', not 'hf'"),
        ],
    )
    def test_refusals_leave_nothing_behind(self, tmp_path, output, options, message):
        [path] = save_states(tmp_path / "run", [{"w": torch.ones(2)}])
        with pytest.raises(CkptAvgError, match=message):
            ckptavg.convert(path, tmp_path / output, **{"format": "dcp", **options})
        assert [each.name for each in tmp_path.iterdir()] == ["run"]

    @pytest.mark.parametrize(
        "arguments", [["-o", "o.pt"], ["-o", "o/", "--drop-aliases"]], ids=["a file", "aliases"]
    )
    def test_options_without_effect_are_errors_of_use(self, tmp_path, arguments, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
        for name in ("average", "convert"):
            code, _, err = outcome(name, "a.pt", *arguments, "--format", "dcp")
            assert code == 2
            assert "has no effect with" in err


def test_torch_is_not_needed(tmp_path):
    import subprocess
    import sys

    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    code = (
        "import sys; sys.modules['torch'] = None; import ckptavg; "
        "ckptavg.convert('a.safetensors', 'out', format='dcp')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert same_bits(unpacked(tmp_path / "out")["w"], torch.ones(2))


def test_a_tensor_takes_little_memory_beside_what_is_written(tmp_path):
    """Of each tensor 0.8 kB of zip and 0.4 kB of metadata are written."""
    count = 3_000
    state = {f"model.layers.{number}.weight": torch.ones(4) for number in range(count)}
    save_file(state, tmp_path / "x.safetensors")
    ckptavg.convert(tmp_path / "x.safetensors", tmp_path / "first/", format="dcp")  # imports
    tracemalloc.start()
    try:
        ckptavg.convert(tmp_path / "x.safetensors", tmp_path / "second/", format="dcp")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_800 * count
