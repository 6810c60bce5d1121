"""Directories of torch.distributed.checkpoint, saved by itself: by one process, and by four."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

import ckptavg
from ckptavg import cli
from ckptavg.errors import FormatError, SelectionError
from ckptavg.formats import dcp, dcpfiles, open_checkpoint, unpickler
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.parts import check_unchanged
from ckptavg.formats.paths import as_path
from tests.gloo import save_all, whole_state
from tests.helpers import outcome, save_dcp
from tests.oracle import StateDict, naive_mean, random_state_dicts, same_bits

# In which order `tests.gloo` saves them: each is another step.
LAYOUTS = ("rows1", "rows2", "rows4", "columns4", "copies4", "grid4", "strided4", "hybrid4")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_all(folder)
    return folder


def tensor_of(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    values = checkpoint.read(name)
    dtype = getattr(torch, checkpoint.tensors[name].dtype.name)
    if not values.size:
        return torch.empty(values.shape, dtype=dtype)
    return torch.frombuffer(bytearray(values.tobytes()), dtype=dtype).reshape(values.shape)


def assert_holds(checkpoint: Checkpoint, state: StateDict) -> None:
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in state.items():
        assert same_bits(tensor_of(checkpoint, name), tensor), name


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Change the metadata as an object of torch's, and write it as torch does."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata = change(metadata) or metadata
    path.write_bytes(pickle.dumps(metadata))


def tensors_of(metadata: Metadata, name: str) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata[name]
    assert isinstance(found, TensorStorageMetadata)
    return found


class TestPieces:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_are_put_together_bit_for_bit(self, sharded, layout):
        checkpoint = open_checkpoint(sharded / layout)
        assert_holds(checkpoint, whole_state(LAYOUTS.index(layout) + 1))
        assert (checkpoint.container, checkpoint.key) == ("dcp", "model")

    def test_that_are_not_contiguous_are_too(self, sharded):
        checkpoint = open_checkpoint(sharded / "turned4")
        state = {name: value for name, value in whole_state(9).items() if value.dim() == 2}
        assert_holds(checkpoint, state)

    def test_of_any_number_of_ranks_average_together(self, sharded, tmp_path):
        inputs = [sharded / layout for layout in LAYOUTS]
        ckptavg.average(inputs, tmp_path / "out.safetensors")
        averaged = load_file(tmp_path / "out.safetensors")
        states = [whole_state(step) for step in range(1, len(LAYOUTS) + 1)]
        assert set(averaged) == set(states[0])
        for name, value in averaged.items():
            assert same_bits(value, naive_mean([state[name] for state in states]).to(value.dtype))

    def test_of_one_shape_are_unpickled_once(self, tmp_path, monkeypatch):
        state = {f"{n}.{part}": torch.rand(n % 2 + 1) for n in range(20) for part in "ab"}
        save_dcp(state, tmp_path / "c")
        loaded = []

        def counted(pickled: bytes, *args: Any, **options: Any) -> object:
            loaded.append(pickled)
            return unpickler.load(pickled, *args, **options)

        monkeypatch.setattr(dcpfiles, "unpickler", SimpleNamespace(load=counted))
        assert_holds(open_checkpoint(tmp_path / "c"), state)
        assert len(loaded) == 1 + 2  # the metadata, and an item of each shape

    def test_that_are_not_contiguous_average_with_others(self, sharded, tmp_path):
        names = [name for name, value in whole_state(9).items() if value.dim() == 2]
        other = save_dcp(
            {"model": {name: whole_state(1)[name] for name in names}}, tmp_path / "other"
        )
        ckptavg.average([sharded / "turned4", other], tmp_path / "out.safetensors")
        averaged = load_file(tmp_path / "out.safetensors")
        for name in names:
            mean = naive_mean([whole_state(9)[name], whole_state(1)[name]])
            assert same_bits(averaged[name], mean), name

    def test_of_fsdp_are_the_state_dict_that_it_gathers(self, sharded, tmp_path):
        states = [torch.load(sharded / f"fsdp-{step}.pt") for step in (1, 2)]
        for step, state in zip((1, 2), states, strict=True):
            checkpoint = open_checkpoint(sharded / f"fsdp-{step}")
            assert_holds(checkpoint, state)
            assert checkpoint.training.steps == {"global_step": step}
            assert checkpoint.other_content
        ckptavg.average(
            [sharded / "fsdp-1", sharded / "fsdp-2"], out := tmp_path / "out.safetensors"
        )
        averaged = load_file(out)
        assert set(averaged) == set(states[0])
        for name, value in averaged.items():
            assert same_bits(value, naive_mean([state[name] for state in states])), name

    def test_lie_in_the_order_of_the_output_whatever_the_ranks(self, sharded):
        one, other = (open_checkpoint(sharded / layout).tensors for layout in ("rows1", "grid4"))
        assert {name: tensor.offset for name, tensor in one.items()} == {
            name: tensor.offset for name, tensor in other.items()
        }
        ends = [(tensor.offset, tensor.offset + tensor.nbytes) for tensor in one.values()]
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(ends))

    def test_are_counted_as_the_files_that_they_are_in(self, sharded):
        checkpoint = open_checkpoint(sharded / "fsdp-1")
        files = list((sharded / "fsdp-1").iterdir())
        assert checkpoint.size == sum(file.stat().st_size for file in files)
        assert {part.path for part in checkpoint.parts[1:]} == set(files)


class TestOneProcess:
    def test_odd_tensors_come_through(self, tmp_path):
        state = random_state_dicts(1)[0] | {
            "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
            "transposed": torch.randn(40, 30).t(),
            "sliced": torch.randn(9, 9)[2:5, 1:8:2],
            "expanded": torch.randn(3, 1).expand(3, 4),
            "half": torch.randn(5).half(),
            "fp8": torch.randn(5).to(torch.float8_e4m3fn),
            "complex": torch.randn(2, 3, dtype=torch.complex64),
        }
        assert_holds(open_checkpoint(save_dcp({"model": state}, tmp_path / "c")), state)

    def test_transposed_tensors_average(self, tmp_path):
        states = [{"w": torch.randn(30, 40).t(), "v": torch.randn(6)} for _ in range(2)]
        states.append({"w": torch.randn(40, 30), "v": torch.randn(6)})
        inputs = [
            save_dcp({"model": state, "step": number}, tmp_path / str(number))
            for number, state in enumerate(states)
        ]
        ckptavg.average(inputs, tmp_path / "out.safetensors")
        for name, value in load_file(tmp_path / "out.safetensors").items():
            assert same_bits(value, naive_mean([state[name].contiguous() for state in states]))

    def test_the_optimizer_is_not_read(self, tmp_path, bytes_read):
        shapes = {"a": (1000, 500), "b": (1500, 1000), "c": (7,)}
        for step in range(2):
            weights = {name: torch.randn(shape) for name, shape in shapes.items()}
            moments = {
                name: {"exp_avg": value + 1, "exp_avg_sq": value**2}
                for name, value in weights.items()
            }
            save_dcp({"model": weights, "optimizer": {"state": moments}}, tmp_path / f"step_{step}")
        ckptavg.average([tmp_path / "step_0", tmp_path / "step_1"], tmp_path / "out.safetensors")
        wanted = 2 * sum(value.nbytes for value in weights.values())
        assert wanted <= sum(bytes_read) <= 1.05 * wanted

    def test_a_link_to_it_counts_once(self, tmp_path):
        for step in (1, 2):
            save_dcp({"model": {"w": torch.full((3,), float(step))}}, tmp_path / f"step_{step}")
        (tmp_path / "last").symlink_to("step_2")
        inputs = [tmp_path / name for name in ("step_1", "step_2", "last")]
        ckptavg.average(inputs, tmp_path / "out.safetensors")
        assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [1.5, 1.5, 1.5]

    def test_a_file_rewritten_meanwhile_is_noticed(self, tmp_path):
        folder = save_dcp({"model": {"w": torch.ones(3)}}, tmp_path / "c")
        checkpoint = open_checkpoint(folder)
        save_dcp({"model": {"w": torch.zeros(30)}}, folder)
        for part in checkpoint.parts[1:]:
            with pytest.raises(ckptavg.CkptAvgError, match="changed"):
                check_unchanged([part])

    def test_behind_a_url(self, tmp_path):
        pytest.importorskip("upath")
        state = random_state_dicts(1)[0]
        folder = save_dcp({"model": state}, tmp_path / "c")
        remote = as_path("memory://bucket/run/c")
        remote.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            (remote / file.name).write_bytes(file.read_bytes())
        assert_holds(open_checkpoint(remote), state)


class TestNames:
    def opened(self, state: dict[str, Any], folder: Path, key: str | None = None) -> Checkpoint:
        return open_checkpoint(save_dcp(state, folder), key=key)

    @pytest.mark.parametrize("key", [None, "model", "model."])
    def test_are_those_within_the_model(self, tmp_path, key):
        state = {"model": {"w": torch.ones(2)}, "optimizer": {"w": torch.zeros(2)}}
        checkpoint = self.opened(state, tmp_path / "c", key)
        assert_holds(checkpoint, state["model"])
        assert checkpoint.key == "model"

    def test_may_begin_with_model_within_it(self, tmp_path):
        # Lightning: the module's own attribute is called `model` as often as not.
        state = {"model": {"model.w": torch.ones(2)}, "optimizer_0": {"w": torch.zeros(2)}}
        assert_holds(self.opened(state, tmp_path / "c"), state["model"])

    def test_of_torchtitan_stand_beside_its_state(self, tmp_path):
        weights = {"layers.0.weight": torch.ones(2), "norm.weight": torch.ones(3)}
        state = weights | {
            "optimizer": {"state.layers.0.weight.exp_avg": torch.zeros(2)},
            "lr_scheduler": {"last_epoch": 7},
            "train_state": {"step": torch.tensor(40), "ntokens_seen": torch.tensor(1000)},
        }
        checkpoint = self.opened(state, tmp_path / "c")
        assert_holds(checkpoint, weights)
        assert checkpoint.training.steps == {"step": 40}
        assert checkpoint.other_content

    @pytest.mark.parametrize("prefix", ["optimizer.state.", "chained_0.optimizer.state."])
    def test_of_megatron_are_flat(self, tmp_path, prefix):
        weights = {"decoder.layers.w": torch.ones(2, 3), "output_layer.weight": torch.ones(3)}
        moments = {f"{prefix}exp_avg.{name}": value + 1 for name, value in weights.items()}
        folder = save_dcp(weights | moments | {"rng_state": b"0"}, tmp_path / "c")
        edit(folder, lambda metadata: setattr(metadata, "planner_data", None))
        checkpoint = open_checkpoint(folder)
        assert_holds(checkpoint, weights)
        assert (checkpoint.key, checkpoint.other_content) == ("", True)

    def test_that_lost_their_nesting_find_it_again(self, tmp_path):
        state = {"model": {"w": torch.ones(2)}, "optimizer": {"w": torch.zeros(2)}}
        folder = save_dcp(state, tmp_path / "c")
        edit(folder, lambda metadata: setattr(metadata, "planner_data", None))
        checkpoint = open_checkpoint(folder)
        assert_holds(checkpoint, state["model"])
        assert checkpoint.key == "model"

    def test_of_a_llama_stay_whole(self, tmp_path):
        weights = {"model.layers.0.w": torch.ones(2), "lm_head.weight": torch.ones(3)}
        assert_holds(self.opened(weights, tmp_path / "1"), weights)
        beside = weights | {"optimizer.state.w": torch.ones(2)}
        folder = save_dcp(beside, tmp_path / "2")
        edit(folder, lambda metadata: setattr(metadata, "planner_data", None))
        assert_holds(open_checkpoint(folder), weights)

    def test_that_were_flat_when_saved_stay_whole(self, tmp_path):
        # A state dict of a model with tied embeddings: nothing but `model.` in it.
        weights = {"model.embed.weight": torch.ones(2), "model.norm.weight": torch.ones(3)}
        assert_holds(self.opened(weights, tmp_path / "c"), weights)
        checkpoint = open_checkpoint(tmp_path / "c", key="model")
        assert set(checkpoint.tensors) == {"embed.weight", "norm.weight"}

    def test_of_several_state_dicts_are_chosen_as_in_other_files(self, tmp_path):
        state = {"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}
        checkpoint = self.opened(state, tmp_path / "c")
        assert_holds(checkpoint, state["model"])
        assert checkpoint.other_keys == ("ema",)
        assert_holds(open_checkpoint(tmp_path / "c", key="ema"), state["ema"])

    def test_are_shown_without_reading_the_metadata_for_each(self, tmp_path, monkeypatch):
        save_dcp({f"net_{n}": {"w": torch.ones(n + 1)} for n in range(9)}, tmp_path / "c")
        read = []

        def counted(directory: Path) -> object:
            read.append(directory)
            return dcpfiles.Metadata(directory)

        monkeypatch.setattr(dcp, "Metadata", counted)
        code, shown, _ = outcome("inspect", tmp_path / "c", "--json")
        contents = json.loads(shown)["checkpoints"]
        assert code == 0
        assert {each["state_dict"]: each["elements"] for each in contents} == {
            f"net_{n}": n + 1 for n in range(9)
        }
        assert len(read) == 2  # once to find out that it is unclear which is meant

    @pytest.mark.parametrize(
        "names",
        [
            ("scaler.mean", "down_sampler.conv.weight", "criterion.weight"),
            ("optimus.weight", "scheduled.weight", "rng_net.w", "sampler.weight"),
        ],
    )
    @pytest.mark.parametrize("planned", [True, False])
    def test_like_those_of_the_training_s_state_are_kept(self, tmp_path, names, planned):
        weights = {name: torch.ones(number + 1) for number, name in enumerate(names)}
        folder = save_dcp(weights | {"optimizer.state.w": torch.zeros(2)}, tmp_path / "c")
        if not planned:
            edit(folder, lambda metadata: setattr(metadata, "planner_data", None))
        assert_holds(open_checkpoint(folder), weights)

    @pytest.mark.parametrize(
        "beside",
        [
            {"ema": {"w": torch.zeros(2)}},
            {"ema": {"w": torch.zeros(2)}, "swa_model": {"w": torch.zeros(2)}},
            {"counts": {"seen": torch.tensor(5), "left": torch.tensor(7)}},
            {"counts": {"seen": torch.tensor(5)}, "optimizer": {"m": torch.zeros(2)}},
        ],
        ids=["an average", "averages", "counters", "counters and an optimizer"],
    )
    def test_at_the_top_are_the_weights(self, tmp_path, beside):
        weights = {"layer.w": torch.ones(2), "layer.b": torch.ones(1)}
        checkpoint = self.opened(weights | beside, tmp_path / "c")
        assert_holds(checkpoint, weights)
        assert (checkpoint.key, checkpoint.other_content) == ("", True)

    def test_at_the_top_beside_other_tensors_are_a_choice(self, tmp_path):
        weights, others = {"w": torch.ones(2)}, {"shuffle": torch.zeros(3)}
        folder = save_dcp(weights | {"dataloader": others}, tmp_path / "c")
        with pytest.raises(SelectionError) as caught:
            open_checkpoint(folder)
        assert str(caught.value) == (
            f"{folder}: several state dicts in it: the tensors at the top, dataloader; choose one "
            "with `key` ('' is the top)"
        )
        assert_holds(open_checkpoint(folder, key=""), weights)
        assert_holds(open_checkpoint(folder, key="dataloader"), others)

    def test_that_are_not_there_are_an_error(self, tmp_path):
        folder = save_dcp({"optimizer": {"w": torch.zeros(2)}}, tmp_path / "c")
        with pytest.raises(SelectionError, match="no state dict"):
            open_checkpoint(folder)
        with pytest.raises(SelectionError, match="'ema'"):
            self.opened({"model": {"w": torch.ones(2)}}, tmp_path / "d", "ema")

    def test_of_what_is_no_tensor_are_left_out(self, tmp_path):
        state = {"model": {"w": torch.ones(2), "w._extra_state": b"abc"}}
        checkpoint = self.opened(state, tmp_path / "c")
        assert list(checkpoint.tensors) == ["w"]
        assert list(checkpoint.other_entries) == ["w._extra_state"]

    @pytest.mark.parametrize("name", ["global_step", "step", "epoch"])
    def test_of_the_step_give_the_order(self, tmp_path, name):
        state = {"model": {"w": torch.ones(2)}, name: 17}
        assert self.opened(state, tmp_path / "c").step == (name, 17)

    def test_lightning_has_the_step_in_a_file_of_its_own(self, tmp_path):
        folder = save_dcp({"model": {"w": torch.ones(2)}}, tmp_path / "epoch=3-step=40.ckpt")
        torch.save({"epoch": 3, "global_step": 40, "callbacks": {}}, folder / "meta.pt")
        assert open_checkpoint(folder).training.steps == {"epoch": 3, "global_step": 40}

    @pytest.mark.parametrize("step", ["7", 1 << 70, [7], torch.ones(2), torch.tensor(0.5)])
    def test_a_step_that_is_no_number_is_no_step(self, tmp_path, step):
        checkpoint = self.opened({"model": {"w": torch.ones(2)}, "step": step}, tmp_path / "c")
        assert checkpoint.training.steps == {}

    def test_a_step_in_two_places_or_none_is_no_step(self, tmp_path):
        def drop(metadata: Metadata) -> None:
            del metadata.storage_data[MetadataIndex("step")]

        def repeat(metadata: Metadata) -> None:
            # torch cannot say so twice, but a file can.
            info = metadata.storage_data[MetadataIndex("step")]
            metadata.storage_data[MetadataIndex("step", [])] = info
            [index] = [i for i in metadata.storage_data if i.offset is not None and i.fqn == "step"]
            object.__setattr__(index, "offset", None)

        for number, change in enumerate((drop, repeat)):
            folder = save_dcp({"model": {"w": torch.ones(2)}, "step": 7}, tmp_path / str(number))
            edit(folder, change)
            assert open_checkpoint(folder).training.steps == {}


class TestMetadata:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        state = {"w": torch.arange(12.0).reshape(4, 3)}
        return save_dcp({"model": state, "optimizer": {"w": torch.zeros(4)}}, tmp_path / "c")

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_of_any_pickle_protocol_opens(self, folder, protocol):
        path = folder / ".metadata"
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))
        assert_holds(open_checkpoint(folder), {"w": torch.arange(12.0).reshape(4, 3)})

    def test_of_older_versions_opens(self, folder):
        def older(metadata):
            for name in ("storage_meta", "version"):
                vars(metadata).pop(name, None)
            for info in metadata.storage_data.values():
                info.__dict__.pop("transform_descriptors", None)

        edit(folder, older)
        assert_holds(open_checkpoint(folder), {"w": torch.arange(12.0).reshape(4, 3)})

    def test_without_corners_of_whole_tensors_opens(self, folder):
        def cornerless(metadata):
            metadata.storage_data = {
                MetadataIndex(index.fqn): info for index, info in metadata.storage_data.items()
            }

        edit(folder, cornerless)
        assert_holds(open_checkpoint(folder), {"w": torch.arange(12.0).reshape(4, 3)})

    def test_that_lists_a_copy_again_opens(self, folder):
        def repeat(metadata):
            tensors_of(metadata, "model.w").chunks *= 2

        edit(folder, repeat)
        assert_holds(open_checkpoint(folder), {"w": torch.arange(12.0).reshape(4, 3)})

    def test_a_damaged_optimizer_does_not_matter(self, folder):
        def lose(metadata):
            metadata.storage_data = {
                index: info
                for index, info in metadata.storage_data.items()
                if index.fqn == "model.w"
            }

        edit(folder, lose)
        assert_holds(open_checkpoint(folder), {"w": torch.arange(12.0).reshape(4, 3)})


def truncate(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 2000)


def remove(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def scramble(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(b"x" * path.stat().st_size)


def not_a_pickle(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"\x80\x04nonsense")


def half_a_pickle(folder: Path) -> None:
    path = folder / ".metadata"
    os.truncate(path, path.stat().st_size // 2)


def empty_metadata(folder: Path) -> None:
    os.truncate(folder / ".metadata", 0)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def hostile(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))


def in_metadata(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def gap(metadata: Metadata) -> None:
    chunks = tensors_of(metadata, "model.w").chunks
    chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 3]))


def overlap(metadata: Metadata) -> None:
    tensors_of(metadata, "model.w").chunks.append(
        ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([1, 3]))
    )


def outside(metadata: Metadata) -> None:
    chunks = tensors_of(metadata, "model.w").chunks
    chunks[0] = ChunkStorageMetadata(torch.Size([0, 1]), torch.Size([4, 3]))


def no_pieces(metadata: Metadata) -> None:
    tensors_of(metadata, "model.w").chunks.clear()


def no_item(metadata: Metadata) -> None:
    assert metadata.storage_data is not None
    metadata.storage_data.clear()


def two_items(metadata: Metadata) -> None:
    # Equal indices cannot both be keys; an older version's, without the corner, can.
    assert metadata.storage_data is not None
    info = next(info for i, info in metadata.storage_data.items() if i.fqn == "model.w")
    metadata.storage_data[MetadataIndex("model.w")] = info


def other_dtype(metadata: Metadata) -> None:
    tensors_of(metadata, "model.w").properties.dtype = torch.float64


def other_shape(metadata: Metadata) -> None:
    entry = tensors_of(metadata, "model.w")
    entry.size = torch.Size([3, 4])
    entry.chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 4]))


def huge_shape(metadata: Metadata) -> None:
    entry = tensors_of(metadata, "model.w")
    entry.size = torch.Size([1 << 40, 1 << 40])
    entry.chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), entry.size)


def item(**changes: object) -> Callable[[Path], None]:
    def change(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        for info in metadata.storage_data.values():
            for name, value in changes.items():
                setattr(info, name, value)

    return in_metadata(change)


def long_pickle(folder: Path) -> None:
    """Each item is a zip as torch writes it, of a list of numbers."""
    torch.save([*range(3_000)], folder / "__0_0.distcp")
    item(offset=0, length=(folder / "__0_0.distcp").stat().st_size)(folder)


def one_place(metadata: Metadata) -> None:
    metadata.planner_data["optimizer.w"] = ("model", "w")


def endless_place(metadata: Metadata) -> None:
    metadata.planner_data["model.w"] = ("model",) * 1000


def huge_place(metadata: Metadata) -> None:
    metadata.planner_data["model.w"] = ("model", 2**61 - 1)  # whose hash is that of 0


def far_piece(metadata: Metadata) -> None:
    piece = ChunkStorageMetadata(torch.Size([2**61 - 1, 0]), torch.Size([1, 1]))
    tensors_of(metadata, "model.w").chunks[0] = piece


def endless_shape(metadata: Metadata) -> None:
    tensors_of(metadata, "model.w").size = torch.Size([1] * 1000)


def no_place(metadata: Metadata) -> None:
    metadata.planner_data["model.w"] = ("model", ["w"])


@pytest.fixture
def complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command that fails, in `tmp_path`; gives the one line that it says."""

    def run(*arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["ckptavg", *map(str, arguments)])
        assert cli._run() == 1
        [line] = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (truncate, "__0_0.distcp", "truncated"),
        (remove, "__0_0.distcp", "No such file"),
        (scramble, "__0_0.distcp", "damaged"),
        (not_a_pickle, ".metadata", "damaged pickle"),
        (half_a_pickle, ".metadata", "damaged pickle"),
        (empty_metadata, ".metadata", "damaged pickle"),
        (hostile, ".metadata", "has no Metadata"),
        (in_metadata(lambda _: {"a": 1}), ".metadata", "has no Metadata"),
        (in_metadata(gap), ".metadata", "model.w: lacks 3 elements"),
        (in_metadata(overlap), ".metadata", "model.w: has overlapping pieces at [0, 0] and [1, 0]"),
        (in_metadata(outside), ".metadata", "a piece [4, 3] at [0, 1], outside its [4, 3]"),
        (in_metadata(no_pieces), ".metadata", "lacks 12 elements"),
        (in_metadata(no_item), ".metadata", "its piece at [0, 0] has no place in the files"),
        (in_metadata(two_items), ".metadata", "its piece at [0, 0] has 2 places in the files"),
        (in_metadata(other_dtype), "__0_0.distcp", "model.w: has a piece of float32 [4, 3]"),
        (in_metadata(other_shape), "__0_0.distcp", "the metadata says float32 [3, 4]"),
        (in_metadata(huge_shape), ".metadata", "model.w: has no valid shape"),
        (in_metadata(one_place), ".metadata", "has the place of another entry"),
        (in_metadata(no_place), ".metadata", "no valid place in the state dict"),
        (in_metadata(endless_place), ".metadata", "no valid place in the state dict"),
        (in_metadata(huge_place), ".metadata", "no valid place in the state dict"),
        (in_metadata(endless_shape), ".metadata", "model.w: has no valid shape"),
        (in_metadata(far_piece), ".metadata", "model.w: has no valid shape"),
        (item(relative_path="/etc/passwd"), ".metadata", "outside the checkpoint"),
        (item(relative_path="../c2/__0_0.distcp"), ".metadata", "outside the checkpoint"),
        (item(relative_path=""), ".metadata", "outside the checkpoint"),
        (item(relative_path="a\0b"), ".metadata", "outside the checkpoint"),
        (item(relative_path="\ud800"), "\\ud800", "model.w: is not a possible file name"),
        (item(relative_path=7), ".metadata", "outside the checkpoint"),
        (item(offset=-1), ".metadata", "no valid place in its file"),
        (item(length=10**9), "__0_0.distcp", "truncated"),
        (item(offset=10), "__0_0.distcp", "model.w"),
        (long_pickle, "__0_0.distcp", "bytes where a tensor's has a few hundred"),
        (item(transform_descriptors=["zstd"]), ".metadata", "model.w: is stored by way of zstd"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, complaint, damage, file, message):
    state = {"model": {"w": torch.ones(4, 3)}, "optimizer": {"w": torch.zeros(4)}}
    folder, sound = save_dcp(state, tmp_path / "c"), save_dcp(state, tmp_path / "c2")
    damage(folder)
    line = complaint("average", folder, sound, "-o", "out.safetensors")
    assert str(folder / file) in line
    assert message in line
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "c2"]


def test_a_dtype_that_is_not_known_is_named_only_where_it_is_wanted(tmp_path):
    state = {"model": {"w": torch.ones(4)}, "ema": {"w": torch.zeros(4)}}
    folder = save_dcp(state, tmp_path / "c")

    def change(metadata: Metadata) -> None:
        tensors_of(metadata, "ema.w").properties.dtype = torch.qint8

    edit(folder, change)
    assert_holds(open_checkpoint(folder), state["model"])
    with pytest.raises(FormatError, match="w: cannot be averaged: a tensor of a dtype"):
        open_checkpoint(folder, key="ema")


def test_whatever_byte_is_damaged_the_error_is_a_known_one(tmp_path):
    state = {"w": torch.arange(12.0).reshape(4, 3), "v": torch.ones(3, 2).t(), "e": torch.ones(0)}
    folder = save_dcp(
        {"model": state, "optimizer": {"w": torch.zeros(4)}, "step": 3}, tmp_path / "c"
    )
    draw = np.random.default_rng(0)
    for path in (folder / ".metadata", folder / "__0_0.distcp"):
        sound = path.read_bytes()
        for _ in range(300):
            damaged = bytearray(sound)
            damaged[draw.integers(len(sound))] = draw.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(ckptavg.CkptAvgError):
                checkpoint = open_checkpoint(folder)
                assert [checkpoint.read(name) is not None for name in checkpoint.tensors]
        path.write_bytes(sound)
    assert_holds(open_checkpoint(folder), state)


def test_pieces_that_are_named_again_and_again_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("ckptavg.formats.dcpfiles._MOST_PIECES", 100)
    state = {"model": {str(number): torch.ones(4) for number in range(6)}}
    folder = save_dcp(state, tmp_path / "c")

    def repeat(metadata: Metadata) -> None:
        chunks = tensors_of(metadata, "model.0").chunks * 20
        for name in metadata.state_dict_metadata:
            tensors_of(metadata, name).chunks = chunks

    edit(folder, repeat)
    with pytest.raises(FormatError, match=r"model\.5: has more than 100 pieces"):
        open_checkpoint(folder)


def test_files_of_all_ranks_are_wanted(sharded, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(sharded / "grid4", folder)
    (folder / "__3_0.distcp").unlink()
    with pytest.raises(FormatError, match=r"__3_0\.distcp: .*No such file"):
        open_checkpoint(folder)
    for name in ("__0_0.distcp", ".metadata"):
        with pytest.raises(FormatError, match=r"a part of a directory .*name the directory"):
            open_checkpoint(folder / name)
