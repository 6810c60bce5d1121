"""Directories with a file of each rank, saved by torch.distributed itself."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed._mesh_layout import _MeshLayout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry
from torch.distributed.tensor.placement_types import _StridedShard

import ckptavg
from ckptavg.errors import FormatError
from ckptavg.formats import open_checkpoint
from tests.helpers import assert_same, refusal, save_torch
from tests.oracle import StateDict, assert_mean
from tests.rank_files import LAYOUTS, save_all, state_at

KINDS = [*(f"fsdp2/{layout}" for layout in LAYOUTS), *(f"hf/{layout}" for layout in LAYOUTS[:3])]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rank_files")
    save_all(folder)
    return folder


def whole(kind: str) -> StateDict:
    """What was saved in a folder `fsdp2/rows2` or `hf/rows2`."""
    writer, _, layout = kind.partition("/")
    step = LAYOUTS.index(layout) + 1
    return state_at(step if writer == "fsdp2" else step + len(LAYOUTS))


class TestTensors:
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_put_together_bit_for_bit(self, saved, kind):
        checkpoint = open_checkpoint(saved / kind)
        assert_same(checkpoint, whole(kind))
        assert (checkpoint.container, checkpoint.metadata) == ("shards", {})

    @pytest.mark.parametrize("kind", ["fsdp1", "fsdp2-tp"])
    def test_of_trained_models_are_what_torch_gathers(self, saved, kind):
        assert_same(open_checkpoint(saved / kind), torch.load(saved / f"{kind}.pt"))

    @pytest.mark.parametrize("folder", ["whole", "whole/sharded"])
    def test_that_torch_has_joined_as_well_are_those(self, saved, folder):
        joined: StateDict = {}
        for path in (saved / "whole").glob("model-*.safetensors"):
            joined |= load_file(path)
        assert_same(open_checkpoint(saved / folder), joined)

    def test_of_shards_that_may_lack_the_last_rank_are_joined_with_a_notice(self, saved, notices):
        open_checkpoint(saved / "fsdp2/rows2")
        assert not notices.messages
        open_checkpoint(saved / "hf/rows3")
        assert "joined the shards of 3 ranks; they do not record" in notices.text

    def test_of_a_sharded_folder_alone_are_the_checkpoint_s(self, saved, tmp_path):
        shutil.copytree(saved / "whole" / "sharded", tmp_path / "step-100" / "sharded")
        opened = open_checkpoint(tmp_path / "step-100")
        assert opened.path == tmp_path / "step-100"
        assert opened.tensors.keys() == open_checkpoint(saved / "whole").tensors.keys()


class TestAverages:
    def test_of_all_kinds_are_the_mean(self, saved, tmp_path):
        summary = ckptavg.average([saved / kind for kind in KINDS], tmp_path / "out.safetensors")
        states = [whole(source.name) for source in summary.sources]
        assert len(states) == len(KINDS)
        assert_mean(load_file(tmp_path / "out.safetensors"), states)

    def test_of_a_run_of_verl_s(self, saved, tmp_path):
        run = tmp_path / "run"
        for step, layout in ((9, "rows2"), (10, "rows3")):
            folder = run / f"global_step_{step}"
            shutil.copytree(saved / "fsdp2" / layout, folder / "actor")
            (folder / "actor" / "huggingface").mkdir()
            (folder / "actor" / "huggingface" / "config.json").write_text("{}")
            torch.save({"_snapshot": {"_snapshot_step": step}}, folder / "data.pt")
        (run / "latest_checkpointed_iteration.txt").write_text("10")
        summary = ckptavg.average(run, tmp_path / "out.pt")
        names = [source.name for source in summary.sources]
        assert names == ["global_step_9/actor", "global_step_10/actor"]
        average = torch.load(tmp_path / "out.pt")
        assert_mean(average, [whole("fsdp2/rows2"), whole("fsdp2/rows3")])
        assert list(average) == list(whole("fsdp2/rows3"))

    def test_of_files_that_are_named_one_by_one(self, saved, tmp_path):
        files = [
            *(saved / "fsdp2" / "columns3").glob("model_*"),
            *(saved / "fsdp2" / "rows2").glob("model_*"),
            *(saved / "hf" / "rows3").iterdir(),
        ]
        summary = ckptavg.average(files, tmp_path / "out.safetensors")
        names = [source.name for source in summary.sources]
        assert names == ["fsdp2/columns3", "fsdp2/rows2", "hf/rows3"]
        assert_mean(load_file(tmp_path / "out.safetensors"), [*map(whole, names)])

    def test_need_the_files_of_all_ranks(self, saved, tmp_path):
        file = saved / "fsdp2" / "rows2" / "model_world_size_2_rank_1.pt"
        with pytest.raises(FormatError, match=r"_rank_1\.pt.* one rank of 2.*name the directory"):
            ckptavg.average([file, saved / "fsdp2" / "rows3"], tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()


Change = Callable[[StateDict, dict[str, Any]], None]


def rewrite(path: Path, target: Path, change: Change) -> None:
    """Write a shard after a change of its tensors, and of what it says of their places."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors, places = load_file(path), json.loads(metadata["DCP_SHARDING_INFO"])
    change(tensors, places)
    save_file(tensors, target, metadata | {"DCP_SHARDING_INFO": json.dumps(places)})


FIRST = "shard-00001-model-00001-of-00002.safetensors"
SECOND = "shard-00002-model-00001-of-00002.safetensors"
THIRD = "shard-00003-model-00001-of-00002.safetensors"


class TestDamage:
    @pytest.fixture
    def hf(self, saved, tmp_path) -> Path:
        return Path(shutil.copytree(saved / "hf" / "rows3", tmp_path / "hf"))

    @pytest.fixture
    def fsdp(self, saved, tmp_path) -> Path:
        return Path(shutil.copytree(saved / "fsdp2" / "rows2", tmp_path / "fsdp"))

    def test_files_that_are_missing(self, hf, fsdp):
        (fsdp / "model_world_size_2_rank_0.pt").unlink()
        assert refusal(fsdp) == "/model_world_size_2_rank_0.pt: is missing"
        (hf / SECOND).unlink()
        assert re.search(rf"lacks \d+ elements.*; {SECOND} is not there", refusal(hf))
        for path in hf.glob("*model-00001-of*"):
            path.unlink()
        assert "shard-*-model-00001-of-00002.safetensors: is missing" in refusal(hf)

    def test_a_file_of_the_last_rank_may_be_missing(self, hf, notices):
        """Rows that are not there make a tensor shorter, and a rank without a part has no file."""
        open_checkpoint(hf)
        assert "does not exist" not in notices.text
        (hf / THIRD).unlink()
        open_checkpoint(hf)
        [notice] = [each for each in notices.messages if "does not exist" in each]
        assert notice.startswith(str(hf / THIRD))

    def test_files_that_are_there_twice(self, hf, fsdp):
        shutil.copy(hf / SECOND, hf / SECOND.replace("00002-model", "00004-model"))
        assert "shard-00004-model-00001-of-00002.safetensors" in refusal(hf)
        assert f"that {SECOND} has too" in refusal(hf)
        shutil.copy(fsdp / "model_world_size_2_rank_1.pt", fsdp / "model_world_size_2_rank_01.pt")
        assert "is from another save than" in refusal(fsdp)
        (fsdp / "model_world_size_2_rank_01.pt").rename(fsdp / "model_world_size_2_rank_2.pt")
        assert refusal(fsdp) == "/model_world_size_2_rank_2.pt: is not from any of 2 ranks"
        shutil.copy(fsdp / "model_world_size_2_rank_1.pt", fsdp / "model_world_size_2_rank_0.pt")
        (fsdp / "model_world_size_2_rank_2.pt").unlink()
        assert re.fullmatch(
            r"/model_world_size_2_rank_1\.pt: \w+: has the piece at \[4, 0\] that "
            r"model_world_size_2_rank_0\.pt has too, and others are missing",
            refusal(fsdp),
        )

    def test_files_of_two_saves(self, saved, hf, fsdp):
        shutil.copytree(saved / "fsdp2" / "rows3", fsdp, dirs_exist_ok=True)
        assert "is from another save than model_world_size_" in refusal(fsdp)
        shutil.copy(hf / SECOND, hf / SECOND.replace("of-00002", "of-00003"))
        assert "is from another save than shard-" in refusal(hf)

    @pytest.mark.parametrize("kind", ["hf", "fsdp"])
    def test_truncated_files(self, kind, request):
        folder = request.getfixturevalue(kind)
        for path in folder.glob("*model*"):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) * 2 // 3])
            assert refusal(folder).startswith(f"/{path.name}: ")
            path.write_bytes(content)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda _, p: p["grid"].update(saved_offsets=[2, 0]), "overlapping pieces at [0, 0]"),
            (lambda _, p: p["grid"].update(saved_offsets=[9, 0]), "lacks"),
            (lambda _, p: p["grid"].update(saved_offsets=[2]), "no valid place"),
            (lambda _, p: p["grid"].update(saved_offsets=[-1, 0]), "no valid place"),
            (lambda _, p: p["grid"].update(saved_offsets=[True, 0]), "no valid place"),
            (lambda _, p: p["grid"].update(saved_offsets=[1 << 59, 1 << 59]), "no valid shape"),
            (lambda _, p: p.update(grid=[]), "no valid place"),
            (lambda _, p: p.clear(), "no valid place"),
            (lambda t, _: t.update(grid=t["grid"].half()), "float16"),
            (lambda t, _: t.update(grid=t["grid"][:, :5].contiguous()), "lacks"),
            (lambda t, p: t.update(grid=t["grid"][0] + 0) or p["grid"].update(saved_offsets=[4]),
             "has a piece of a tensor of float32 [6], but"),
        ],
    )  # fmt: skip
    def test_pieces_that_do_not_go_together(self, hf, change, message, tmp_path):
        rewrite(hf / SECOND, hf / SECOND, change)
        text = refusal(hf)
        assert message in text
        assert "grid" in text or "no valid place" in text
        if "lacks" not in text and "shape" not in text:
            assert text.startswith(f"/{SECOND}: ")
        with pytest.raises(FormatError):
            ckptavg.average([hf], tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    def test_places_that_are_no_json(self, hf):
        metadata = {"DCP_SHARDING_INFO": "[" * 100_000}
        save_file(load_file(hf / SECOND), hf / SECOND, metadata)
        assert refusal(hf).startswith(f"/{SECOND}: has damaged DCP_SHARDING_INFO")

    @pytest.mark.parametrize(
        "name",
        [
            "model_world_size_999999999_rank_999999998.pt",
            "shard-999999999-model-00001-of-999999999.safetensors",
        ],
    )
    def test_names_of_millions_of_ranks(self, tmp_path, name):
        (tmp_path / name).touch()
        assert refusal(tmp_path).endswith("is missing")

    def test_tensors_without_placements(self, tmp_path):
        for rank in range(2):
            save_torch({"w": torch.ones(2)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
        assert "python -m verl.model_merger merge" in refusal(tmp_path)
        one = tmp_path / "one"
        one.mkdir()
        save_torch({"w": torch.ones(2)}, one / "model_world_size_1_rank_0.pt")
        assert_same(open_checkpoint(one), {"w": torch.ones(2)})


class Spread:
    """Is pickled as a DTensor, of which torch would not let us make so odd ones."""

    def __init__(self, local: object, mesh: dict[str, Any], *placements: object) -> None:
        self.local, self.mesh, self.placements = local, mesh, placements
        self.shape: object = (4, 3)
        self.order: object = None
        self.kind: type = DTensor

    def __reduce__(self) -> Any:
        mesh = object.__new__(DeviceMesh)
        vars(mesh).update(self.mesh)
        spec = object.__new__(DTensorSpec)
        vars(spec).update(mesh=mesh, placements=self.placements, shard_order=self.order)
        arguments = (self.kind, torch.float32, self.shape, (3, 1), 0)
        state = (None, {"_local_tensor": self.local, "_spec": spec})
        function = torch._utils._rebuild_wrapper_subclass
        return torch._tensor._rebuild_from_type_v2, (function, self.kind, arguments, state)


def mesh_of_old(sizes: tuple[int, ...], place: object) -> dict[str, Any]:
    """What older versions of torch pickle of a mesh."""
    mesh = torch.arange(torch.Size(sizes).numel(), dtype=torch.int32).reshape(sizes)
    return {"device_type": "cpu", "mesh": mesh, "_coordinate_on_dim": place}


class TestDTensorsInOneFile:
    def test_are_read_if_they_are_whole(self, tmp_path):
        value = torch.rand(4, 3)
        state = {
            "world_of_1": Spread(value, mesh_of_old((1,), [0]), Shard(0)),
            "copies": Spread(value + 1, mesh_of_old((2, 2), [1, 0]), Replicate(), Replicate()),
            "grid_of_1": Spread(value + 2, mesh_of_old((1, 1), [0, 0]), Shard(1), Partial()),
        }
        opened = open_checkpoint(save_torch(state, tmp_path / "x.pt"))
        wanted = {name: value + number for number, name in enumerate(state)}
        assert_same(opened, wanted)

    def test_of_one_rank_are_refused_with_the_number_of_ranks(self, saved, tmp_path):
        shutil.copy(saved / "fsdp2/rows3/model_world_size_3_rank_1.pt", tmp_path / "x.pt")
        text = refusal(tmp_path / "x.pt")
        assert "the part of one rank of 3" in text
        assert "to model_world_size_3_rank_0.pt and so on" in text
        shutil.copy(saved / f"hf/rows3/{SECOND}", tmp_path / "x.safetensors")
        text = refusal(tmp_path / "x.safetensors")
        assert "the part of one rank of several" in text
        assert "to shard-00001-model-00001-of-00001.safetensors and so on" in text

    def test_of_older_torch_are_joined(self, tmp_path):
        value = torch.rand(4, 3)
        for rank, rows in enumerate(value.split(2)):
            piece = Spread(rows.clone(), mesh_of_old((2,), [rank]), Shard(0))
            save_torch({"w": piece}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
        assert_same(open_checkpoint(tmp_path), {"w": value})

    @pytest.mark.parametrize(
        ("module", "remedy"),
        [
            ("torchao.quantization", "; average the checkpoints before they are quantised"),
            ("a", ""),
        ],
    )
    def test_of_another_class_are_named(self, tmp_path, monkeypatch, module, remedy):
        kind = type("Int8Tensor", (), {"__module__": module})
        library: Any = types.ModuleType(module)
        library.Int8Tensor = kind
        for name in {module, module.partition(".")[0]}:
            monkeypatch.setitem(sys.modules, name, library)
        spread = Spread(torch.rand(4, 3), {})
        spread.kind = kind
        message = refusal(save_torch({"w": spread}, tmp_path / "x.pt"))
        assert message.endswith(f"w: cannot be averaged: a {module}.Int8Tensor{remedy}")

    @pytest.mark.parametrize(
        ("spread", "reason"),
        [
            (Spread(torch.rand(4, 3), mesh_of_old((2,), [0]), Partial()), "placements are unknown"),
            (Spread(torch.rand(2, 3), mesh_of_old((2,), [2]), Shard(0)), "placements are unknown"),
            (Spread(torch.rand(2, 3), mesh_of_old((2,), [0]), Shard(7)), "placements are unknown"),
            (Spread(torch.rand(3, 3), mesh_of_old((2,), [0]), Shard(0)), "[3, 3] where"),
            (Spread(torch.rand(2, 3), mesh_of_old((2,), [0, 0]), Shard(0)), "place in its mesh"),
            (Spread(torch.rand(2, 3), mesh_of_old((2,), ["0"]), Shard(0)), "place in its mesh"),
            (Spread(torch.rand(2, 3), mesh_of_old((2, 1), [0]), Shard(0)), "valid mesh"),
            (Spread(torch.rand(2, 3), {"_layout": 3}, Shard(0)), "valid mesh"),
            (Spread(torch.rand(2, 3), {}, Shard(0)), "valid mesh"),
            (Spread(torch.rand(2, 3), mesh_of_old((2,), [0]), _StridedShard(0, split_factor=3)),
             "placements are unknown"),
            (Spread("?", mesh_of_old((2,), [0]), Shard(0)), "unknown kind"),
        ],
    )  # fmt: skip
    def test_that_are_odd_are_refused(self, tmp_path, spread, reason):
        text = refusal(save_torch({"w": spread}, tmp_path / "x.pt"))
        assert reason in text
        assert "w: cannot be averaged" in text

    def test_that_were_split_in_another_order_are_refused(self, tmp_path):
        """Which placements alone do not tell."""
        mesh = mesh_of_old((2, 2), [0, 1])
        for order, is_known in (((0, 1), True), ((1, 0), False)):
            spread = Spread(torch.rand(1, 3), mesh, Shard(0), Shard(0))
            spread.order = (ShardOrderEntry(0, order),)
            text = refusal(save_torch({"w": spread}, tmp_path / "x.pt"))
            assert ("the part of one rank of 4" if is_known else "of an unknown kind") in text

    @pytest.mark.parametrize("member", ["shape", "layout"])
    def test_of_sizes_without_end_are_refused_at_once(self, tmp_path, member):
        endless: Any = (2, 2)
        for _ in range(60):
            endless = (endless, endless)
        mesh = mesh_of_old((2,), [0])
        if member == "layout":
            layout = object.__new__(_MeshLayout)
            vars(layout).update(shape=endless)
            mesh = {"_layout": layout, "_coordinate_on_dim": [0]}
        spread = Spread(torch.rand(2, 3), mesh, Shard(0))
        spread.shape = endless if member == "shape" else (4, 3)
        assert "cannot be averaged" in refusal(save_torch({"w": spread}, tmp_path / "x.pt"))
