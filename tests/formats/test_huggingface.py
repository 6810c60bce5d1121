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
        with pytest.raises(FormatError, match=r"b: names .*, which is no file of its directory"):
            open_checkpoint(folder)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{}", "without a weight_map"),
            ('{"weight_map": {}}', "without a weight_map"),
            ('{"weight_map": ["a"]}', "without a weight_map"),
            ('{"weight_map": null}', "without a weight_map"),
            ('["weight_map"]', "is no JSON object"),
            ('{"weight_map": ', "is no valid JSON"),
            ("", "is no valid JSON"),
            ("\udcff", "is no valid JSON"),
            ("[" * 100_000, "is no valid JSON"),
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
        with pytest.raises(FormatError, match=f"cannot be read: .*; {INDEX} names it"):
            open_checkpoint(folder)

    @pytest.mark.parametrize("link", [os.link, os.symlink])
    def test_that_are_one_file_are_named(self, tmp_path, link):
        folder = save_shards(tmp_path / "x")
        (folder / TWO).unlink()
        link(folder / ONE, folder / TWO)
        with pytest.raises(FormatError, match=f"{TWO}: is the same file as {ONE}: a shard twice"):
            open_checkpoint(folder)

    def test_with_a_tensor_of_another_are_named(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        save_file({"a": torch.ones(2), "b": torch.ones(4)}, folder / TWO)
        with pytest.raises(FormatError, match=rf"{TWO}: a: is in it, .*: in two shards\?"):
            open_checkpoint(folder)

    def test_without_their_tensor_are_named(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        save_file({"c": torch.ones(2)}, folder / TWO)
        with pytest.raises(FormatError, match=f"{TWO}: b: is not in it, though {INDEX} says so"):
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

    def test_in_folders_are_not_files_of_the_directory(self, tmp_path):
        folder = save_shards(tmp_path / "x")
        write_index(folder, {"a": ONE, "b": f"below/{TWO}"})
        assert weight_files(folder) == {INDEX, ONE}

    def test_are_none_where_a_folder_has_them(self, tmp_path):
        folder = tmp_path / "checkpoint-1"
        save_dcp({"model": {"w": torch.ones(2)}}, folder / "pytorch_model_fsdp_0")
        (folder / "trainer_state.json").write_text("{}")
        assert weight_files(folder) == frozenset()


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
            f"ckptavg: error: {tmp_path}/run/checkpoint-1/config.json: is no regular file, or a "
            "link to nothing\n"
        )
        assert not (tmp_path / "out").exists()


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
            "ckptavg: warning: not averaged and not brought along, though it has weights: "
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
    assert f"took the wrapper's {prefix!r} off names" in result.stderr
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        assert same_bits(value, naive_mean([state[name] for state in states]))
