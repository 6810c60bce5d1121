"""Directories as Hugging Face's libraries write them: index, shards, configuration, companions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.errors import FormatError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.huggingface import weight_files
from ckptavg.formats.jsontext import read_json
from tests.helpers import outcome, run, save_dcp
from tests.oracle import StateDict, naive_mean, same_bits

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(folder: Path, weight_map: object) -> Path:
    path = folder / INDEX
    path.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return path


def save_shards(folder: Path, value: float = 1.0) -> Path:
    """Two shards with a tensor each."""
    folder.mkdir(parents=True)
    save_file({"a": torch.full((2,), value)}, folder / ONE, {"format": "pt"})
    save_file({"b": torch.full((4,), -value)}, folder / TWO, {"format": "pt"})
    write_index(folder, {"a": ONE, "b": TWO})
    return folder


def save_model(folder: Path, state: StateDict, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def two_models(folder: Path, config: dict[str, Any] | None = None) -> list[StateDict]:
    states = [{"w": torch.randn(3, 5)} for _ in range(2)]
    for step, state in enumerate(states):
        save_model(folder / f"checkpoint-{step}", state, config)
    return states


class TestIndex:
    def test_joins_the_shards(self, tmp_path):
        opened = open_checkpoint(save_shards(tmp_path / "x"))
        assert opened.read("a").tolist() == [1, 1]
        assert opened.read("b").tolist() == [-1, -1, -1, -1]
        assert opened.container == "huggingface"

    @pytest.mark.parametrize(
        "shard",
        [
            "../y/model.safetensors", "./model.safetensors", "a/../../y", "/etc/passwd",
            "..\\y.safetensors", "a\0b", "", ".", 7, None, ["x"], {"x": 1},
        ],
        ids=repr,
    )  # fmt: skip
    def test_that_names_no_file_of_its_directory_is_an_error(self, tmp_path, shard):
        folder = save_shards(tmp_path / "x")
        write_index(folder, {"a": ONE, "b": shard})
        with pytest.raises(FormatError, match=r"b: names .*, which is not a file in its directory"):
            open_checkpoint(folder)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{}", "it has no weight_map"),
            ('{"weight_map": {}}', "it has no weight_map"),
            ('{"weight_map": ["a"]}', "it has no weight_map"),
            ('{"weight_map": null}', "it has no weight_map"),
            ('["weight_map"]', "is not a JSON object"),
            ('{"weight_map": ', "is not valid JSON"),
            ("", "is not valid JSON"),
            ("\udcff", "is not valid JSON"),
            ("[" * 100_000, "is not valid JSON"),
            (f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}', "the same key twice: a"),
            (
                '{"weight_map": {"a": "x"}, "weight_map": {"b": "x"}}',
                "the same key twice: weight_map",
            ),
            ('{"a\\u001b[31m": 1, "a\\u001b[31m": 2}', r"the same key twice: a\x1b[31m"),
        ],
    )
    def test_that_is_none_is_an_error(self, tmp_path, text, message):
        folder = save_shards(tmp_path / "x")
        (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(FormatError) as caught:
            open_checkpoint(folder)
        assert str(caught.value).startswith(f"{folder / INDEX}: ")
        assert message in str(caught.value)
        assert "\x1b" not in str(caught.value)

    def test_that_is_endless_is_not_even_read(self, tmp_path):
        path = tmp_path / "x.json"
        with path.open("wb") as file:
            file.truncate(257 << 20)
        with pytest.raises(FormatError, match="bytes long"):
            read_json(path)


class TestShards:
    def test_that_are_missing_are_named(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        (folder / TWO).unlink()
        with pytest.raises(FormatError, match=f"{TWO}: is missing: {INDEX} names it"):
            open_checkpoint(folder)

    def test_with_a_name_that_is_too_long_are_named(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        write_index(folder, {"a": ONE, "b": "x" * 256})
        with pytest.raises(
            FormatError, match=f"(cannot be read: .*;|is missing:) {INDEX} names it"
        ):
            open_checkpoint(folder)

    @pytest.mark.parametrize("link", [os.link, os.symlink])
    def test_that_are_one_file_are_named(self, tmp_path, link):
        folder = save_shards(tmp_path / "x")
        (folder / TWO).unlink()
        link(folder / ONE, folder / TWO)
        with pytest.raises(FormatError, match=f"{TWO}: is the same file as {ONE}: the same shard"):
            open_checkpoint(folder)

    def test_with_a_tensor_of_another_are_named(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        save_file({"a": torch.ones(2), "b": torch.ones(4)}, folder / TWO)
        with pytest.raises(FormatError, match=rf"{TWO}: a: is in it, .*: is it in two shards\?"):
            open_checkpoint(folder)

    def test_without_their_tensor_are_named(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        save_file({"c": torch.ones(2)}, folder / TWO)
        with pytest.raises(
            FormatError, match=f"{TWO}: b: is missing from it, although {INDEX} lists it"
        ):
            open_checkpoint(folder)


class TestWeightFiles:
    def test_are_one_file(self, tmp_path):
        folder = save_model(tmp_path / "x", {"w": torch.ones(2)}, {})
        (folder / "pytorch_model.bin").touch()
        assert weight_files(folder) == {"model.safetensors"}

    def test_are_the_index_and_its_shards(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        (folder / "model-00003-of-00003.safetensors").touch()
        assert weight_files(folder) == {INDEX, ONE, TWO}

    def test_are_named_with_the_folders_that_they_are_in(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        write_index(folder, {"a": ONE, "b": f"below/{TWO}"})
        assert weight_files(folder) == {INDEX, ONE, f"below/{TWO}"}

    def test_are_those_of_all_models(self, tmp_path):
        folder = save_model(tmp_path / "x", {"w": torch.ones(2)}, {})
        save_shards(folder / "2_Dense")
        save_model(folder / "3_Dense", {"w": torch.ones(2)}, {})
        (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        inside = {f"2_Dense/{name}" for name in (INDEX, ONE, TWO)}
        assert weight_files(folder) == {"model.safetensors", *inside}

    def test_are_the_folder_that_has_them(self, tmp_path):
        folder = tmp_path / "checkpoint-1"
        save_dcp({"model": {"w": torch.ones(2)}}, folder / "pytorch_model_fsdp_0")
        (folder / "trainer_state.json").write_text("{}")
        assert weight_files(folder) == {"pytorch_model_fsdp_0"}


class TestConfiguration:
    def test_has_the_new_dtype(self, tmp_path):
        config = {"dtype": "float32", "torch_dtype": "float32", "width": 3, "name": "ж"}
        two_models(tmp_path / "run", config)
        ckptavg.average(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        assert found == config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
        assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == torch.bfloat16

    def test_has_the_new_dtype_for_the_models_within_the_model(self, tmp_path):
        quantization = {"quantization_config": {"dtype": "float8"}}
        config = {
            "text_config": {"dtype": "float32", "rope": {"theta": 1.0}, **quantization},
            "vision_config": {"torch_dtype": "float32", "inner": {"torch_dtype": None}},
            **quantization,
        }
        two_models(tmp_path / "run", config)
        ckptavg.average(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
            "text_config": {"dtype": "bfloat16", "rope": {"theta": 1.0}, **quantization},
            "vision_config": {"torch_dtype": "bfloat16", "inner": {"torch_dtype": "bfloat16"}},
            **quantization,
        }

    @pytest.mark.parametrize(
        ("config", "dtype"), [({"width": 3}, "bfloat16"), ({"dtype": "float32"}, None)]
    )
    def test_is_the_last_one_s_where_no_dtype_in_it_changes(self, tmp_path, config, dtype):
        two_models(tmp_path / "run", config)
        ckptavg.average(tmp_path / "run", tmp_path / "out", dtype=dtype)
        own = tmp_path / "run" / "checkpoint-1" / "config.json"
        assert (tmp_path / "out" / "config.json").read_bytes() == own.read_bytes()

    def test_that_is_a_link_to_nothing_is_an_error(self, tmp_path):
        two_models(tmp_path / "run")
        (tmp_path / "run" / "checkpoint-1" / "config.json").symlink_to(tmp_path / "absent")
        code, _, said = outcome("average", tmp_path / "run", "-o", f"{tmp_path}/out/")
        assert code == 1
        assert said == (
            f"ckptavg: error: {tmp_path}/run/checkpoint-1/config.json: is not a regular file, or "
            "is a broken link\n"
        )
        assert not (tmp_path / "out").exists()


def save_modules(folder: Path, value: float, modules: object, *, nested: str = "2_Dense") -> None:
    """A model, and another in a folder, as sentence-transformers lays them out."""
    save_model(folder, {"w": torch.full((2,), value)}, {})
    save_model(folder / nested, {"w": torch.full((3,), -value)}, {})
    (folder / "modules.json").write_text(json.dumps(modules))


class TestSeveralModels:
    MODULES = ({"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"})

    def test_are_one_checkpoint(self, tmp_path):
        save_modules(tmp_path / "x", 1.0, self.MODULES)
        opened = open_checkpoint(tmp_path / "x")
        assert sorted(opened.tensors) == ["2_Dense/w", "w"]
        assert opened.read("2_Dense/w").tolist() == [-1, -1, -1]

    def test_in_folders_of_folders_are_found(self, tmp_path):
        for step in range(2):
            folder = tmp_path / "run" / f"checkpoint-{step}"
            save_modules(folder, step * 1.0, self.MODULES, nested="2_Dense/query_0")
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        found = load_file(tmp_path / "out" / "2_Dense" / "query_0" / "model.safetensors")
        assert found["w"].tolist() == [-0.5] * 3
        assert (tmp_path / "out" / "2_Dense" / "query_0" / "config.json").is_file()

    def test_that_differ_in_one_of_them_are_named(self, tmp_path):
        for step in range(2):
            save_modules(tmp_path / "run" / f"checkpoint-{step}", step * 1.0, self.MODULES)
        save_file({"v": torch.ones(3)}, tmp_path / "run/checkpoint-1/2_Dense/model.safetensors")
        code, _, said = outcome("average", tmp_path / "run", "-o", f"{tmp_path}/out/")
        assert code == 1
        assert "2_Dense/w: missing in" in said

    @pytest.mark.parametrize(
        "modules",
        [{"path": "2_Dense"}, ["2_Dense"], [{"path": "../x/2_Dense"}], [{"path": 7}], [{}], "x"],
        ids=str,
    )  # fmt: skip
    def test_are_not_found_where_nothing_names_them(self, tmp_path, modules):
        save_modules(tmp_path / "x", 1.0, modules)
        assert list(open_checkpoint(tmp_path / "x").tensors) == ["w"]

    def test_are_not_looked_for_along_links_between_folders(self, tmp_path):
        save_modules(tmp_path / "x", 1.0, self.MODULES)
        (tmp_path / "x" / "2_Dense" / "loop").symlink_to(tmp_path / "x")
        assert sorted(open_checkpoint(tmp_path / "x").tensors) == ["2_Dense/w", "w"]

    def test_named_by_a_damaged_file_are_an_error(self, tmp_path):
        save_modules(tmp_path / "x", 1.0, self.MODULES)
        (tmp_path / "x" / "modules.json").write_text("[")
        with pytest.raises(FormatError, match=r"modules\.json: is not valid JSON"):
            open_checkpoint(tmp_path / "x")

    def test_of_accelerate_s_fsdp_are_found_by_their_number(self, tmp_path):
        for step in range(2):
            folder = tmp_path / "run" / f"checkpoint_{step}"
            for number in range(2):
                state = {"w": torch.full((2 + number,), 1.0 * step)}
                save_dcp({"model": state}, folder / f"pytorch_model_fsdp_{number}")
            (folder / "random_states_0.pkl").touch()
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [0.5] * 2
        assert load_file(tmp_path / "out" / "model_1.safetensors")["w"].tolist() == [0.5] * 3

    def test_of_a_series_without_accelerate_are_not_found(self, tmp_path):
        folder = save_model(tmp_path / "x", {"w": torch.ones(2)}, {})
        save_file({"w": torch.ones(2)}, folder / "model_1.safetensors")
        assert list(open_checkpoint(folder).tensors) == ["w"]


class TestVariants:
    def test_without_a_configuration_are_files_of_a_run(self, tmp_path):
        (tmp_path / "run").mkdir()
        for name in ("model.ema.safetensors", "model.epoch1.safetensors"):
            save_file({"w": torch.ones(2)}, tmp_path / "run" / name)
        with pytest.raises(FormatError, match="without weights in a known layout"):
            open_checkpoint(tmp_path / "run")


class TestCompanions:
    def test_with_weights_that_are_left_behind_are_warned_of(self, tmp_path):
        two_models(tmp_path / "run")
        last = tmp_path / "run" / "checkpoint-1"
        save_model(last / "2_Dense", {"w": torch.ones(2)})
        (last / "3_Pooling").mkdir()
        save_file({"w": torch.ones(2)}, last / "model_1.safetensors")
        torch.save({}, last / "optimizer.pt")
        result = run("average", tmp_path / "run", "-o", tmp_path / "out")
        [warning] = [line for line in result.stderr.splitlines() if "warning" in line]
        assert warning == (
            "ckptavg: warning: has weights, but is neither averaged nor copied: "
            "2_Dense, model_1.safetensors"
        )
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]

    def test_without_weights_are_not(self, tmp_path):
        two_models(tmp_path / "run", {})
        (tmp_path / "run" / "checkpoint-1" / "rng_state.pth").touch()
        result = run("average", tmp_path / "run", "-o", tmp_path / "out")
        assert "warning" not in result.stderr


@pytest.mark.parametrize(
    "prefix",
    [
        "_forward_module.", "_forward_module.module.", "module._forward_module.",
        "_forward_module._orig_mod.",
    ],
)  # fmt: skip
def test_wrappers_are_taken_off_all_names(tmp_path, prefix):
    states: list[StateDict] = [{"w": torch.randn(3), "b.w": torch.randn(2)} for _ in range(2)]
    for step, state in enumerate(states):
        wrapped = {prefix + name: value for name, value in state.items()}
        save_model(tmp_path / "run" / f"checkpoint-{step}", wrapped)
    result = run("average", tmp_path / "run", "-o", tmp_path / "out")
    assert f"removed the wrapper's {prefix!r} from names" in result.stderr
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        assert same_bits(value, naive_mean([state[name] for state in states]))
