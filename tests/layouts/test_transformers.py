"""Directories of transformers: `save_pretrained`, the Trainer's checkpoints, the Hub's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ckptavg
from tests.helpers import outcome, run
from tests.layouts.libraries import Sentences, differ, llama, tokenizer, trainer
from tests.oracle import StateDict, assert_mean

INDEX = "model.safetensors.index.json"


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def state(folder: Path, **options: Any) -> StateDict:
    return dict(load(folder, **options).state_dict())


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the Trainer, with the last model beside its checkpoints."""
    folder: Path = tmp_path_factory.mktemp("trained") / "run"
    made = trainer(folder, llama())
    made.train()
    made.save_model()
    return folder


@pytest.fixture(scope="module")
def checkpoints(trained: Path) -> list[Path]:
    return [trained / f"checkpoint-{step}" for step in (4, 8, 12)]


def test_evaluate_prints_the_loss_of_the_trainer(trained, checkpoints):
    loader = torch.utils.data.DataLoader(Sentences(), batch_size=8)
    [result] = ckptavg.evaluate(checkpoints[-1], model=llama, loader=loader)
    loss = trainer(trained, load(checkpoints[-1])).evaluate(Sentences())["eval_loss"]
    assert result.metrics == {"loss": pytest.approx(loss, rel=1e-5)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models in shards."""
    folder: Path = tmp_path_factory.mktemp("saved")
    for seed in range(3):
        llama(seed, tied=False).save_pretrained(folder / f"step-{seed}", max_shard_size="30KB")
    return folder


@pytest.fixture
def shards(saved: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


class TestTrainer:
    def test_the_average_of_a_run_is_loaded(self, trained, checkpoints, tmp_path):
        summary = ckptavg.average(trained, tmp_path / "out")
        assert [source.name for source in summary.sources] == [path.name for path in checkpoints]
        assert [source.step for source in summary.sources] == [
            ("global_step", step) for step in (4, 8, 12)
        ]
        states = [state(path) for path in checkpoints]
        assert differ(states)
        model = load(tmp_path / "out")
        assert_mean(model.state_dict(), states)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_the_root_s_model_is_left_out_with_a_notice(self, trained, tmp_path):
        result = run("average", trained, "-o", f"{tmp_path}/out/", "--expect", 3)
        assert "left out: " in result.stderr
        assert "model.safetensors" in result.stderr

    def test_a_single_file_holds_the_same(self, trained, checkpoints, tmp_path):
        ckptavg.average(trained, tmp_path / "out.safetensors")
        states = [load_file(path / "model.safetensors") for path in checkpoints]
        assert_mean(load_file(tmp_path / "out.safetensors"), states)

    def test_the_order_is_that_of_trainer_state(self, checkpoints, tmp_path):
        for name, path in zip(("c", "a", "b"), checkpoints, strict=True):
            shutil.copytree(path, tmp_path / "run" / name)
        summary = ckptavg.average(tmp_path / "run", tmp_path / "out", weights=[0, 0, 1])
        assert [source.name for source in summary.sources] == ["b"]  # the last
        assert_mean(state(tmp_path / "out"), [state(checkpoints[-1])])

    def test_configuration_comes_along_and_the_training_s_state_does_not(
        self, trained, checkpoints, tmp_path
    ):
        ckptavg.average(trained, tmp_path / "out")
        along = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert names(tmp_path / "out") == {*along, "model.safetensors"}
        for name in along:
            assert (tmp_path / "out" / name).read_bytes() == (checkpoints[-1] / name).read_bytes()
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert found("w5 w7")["input_ids"] == [5, 7]

    def test_the_average_goes_on_in_a_trainer(self, trained, tmp_path):
        ckptavg.average(trained, tmp_path / "out")
        made = trainer(tmp_path / "more", load(tmp_path / "out"))
        made.train()
        ckptavg.average(tmp_path / "more", tmp_path / "again")
        differences = (
            load(tmp_path / "again").lm_head.weight - load(tmp_path / "out").lm_head.weight
        )
        assert bool(differences.abs().max() > 0)

    def test_checkpoints_may_be_named_one_by_one(self, checkpoints, tmp_path):
        ckptavg.average(checkpoints[1:], tmp_path / "out")
        assert_mean(state(tmp_path / "out"), [state(path) for path in checkpoints[1:]])

    def test_the_output_in_the_run_is_no_input_and_may_be_replaced(self, checkpoints, tmp_path):
        for path in checkpoints:
            shutil.copytree(path, tmp_path / "run" / path.name)
        for force in (False, True):
            summary = ckptavg.average(tmp_path / "run", tmp_path / "run" / "swa", force=force)
            assert len(summary.sources) == 3
        assert_mean(state(tmp_path / "run" / "swa"), [state(path) for path in checkpoints])


class TestShards:
    def test_are_read_and_written(self, saved, tmp_path):
        assert (saved / "step-0" / INDEX).is_file()
        ckptavg.average(saved, tmp_path / "out")
        states = [state(saved / f"step-{seed}") for seed in range(3)]
        assert differ(states)
        assert_mean(state(tmp_path / "out"), states)
        assert (tmp_path / "out" / INDEX).is_file()

    def test_become_one_file(self, saved, tmp_path):
        ckptavg.average(saved, tmp_path / "out.safetensors")
        states = [state(saved / f"step-{seed}") for seed in range(3)]
        assert_mean(load_file(tmp_path / "out.safetensors"), states)

    @pytest.mark.parametrize("size", ["10KB", "50kB", "1MiB"])
    def test_are_as_large_as_asked_for(self, saved, tmp_path, size):
        out = tmp_path / "out"
        run("average", saved, "-o", f"{out}/", "--max-shard-size", size)
        most = {"10KB": 10_000, "50kB": 50_000, "1MiB": 1 << 20}[size]
        parts = [load_file(path) for path in out.glob("*.safetensors")]
        assert (len(parts) == 1) is (size == "1MiB")
        for part in parts:
            assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= most
        assert_mean(state(out), [state(saved / f"step-{seed}") for seed in range(3)])

    def test_tied_weights_may_be_in_shards_too(self, tmp_path):
        for seed in range(2):
            llama(seed).save_pretrained(tmp_path / "run" / f"step-{seed}", max_shard_size="20KB")
        ckptavg.average(tmp_path / "run", tmp_path / "out", max_shard_size=10_000)
        states = [state(tmp_path / "run" / f"step-{seed}") for seed in range(2)]
        assert_mean(state(tmp_path / "out"), states)

    def test_may_be_distributed_in_another_way_in_each_checkpoint(self, tmp_path):
        for seed, size in enumerate(("20KB", "35KB", "5GB")):
            model = llama(seed, tied=False)
            model.save_pretrained(tmp_path / "run" / f"step-{seed}", max_shard_size=size)
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        states = [state(tmp_path / "run" / f"step-{seed}") for seed in range(3)]
        assert_mean(state(tmp_path / "out"), states)
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_the_index_tells_what_is_where(self, saved, tmp_path):
        ckptavg.average(saved, tmp_path / "out")
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        for file in set(index["weight_map"].values()):
            wanted = {name for name, place in index["weight_map"].items() if place == file}
            assert load_file(tmp_path / "out" / file).keys() == wanted
        theirs = json.loads((saved / "step-0" / INDEX).read_text())
        assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]


class TestPickledWeights:
    """`pytorch_model.bin`, which transformers 5 reads and no longer writes: torch.save does."""

    @staticmethod
    def save(folder: Path, seed: int, files: int) -> StateDict:
        """A model as transformers 4 laid it out with `safe_serialization=False`."""
        model = llama(seed, tied=False)
        model.config.save_pretrained(folder)
        whole = dict(model.state_dict())
        if files == 1:
            torch.save(whole, folder / "pytorch_model.bin")
            return whole
        weight_map: dict[str, str] = {}
        for number in range(files):
            name = f"pytorch_model-{number + 1:05}-of-{files:05}.bin"
            part = dict(list(whole.items())[number::files])
            torch.save(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        total = sum(value.nbytes for value in whole.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return whole

    @pytest.mark.parametrize("files", [1, 3])
    def test_is_averaged_and_loaded(self, tmp_path, files):
        states = []
        for seed in range(3):
            states.append(self.save(tmp_path / "run" / f"step-{seed}", seed, files))
            assert_mean(state(tmp_path / "run" / f"step-{seed}"), states[-1:])
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        assert_mean(state(tmp_path / "out"), states)
        assert not list((tmp_path / "out").glob("*.bin*"))

    def test_may_stand_beside_safetensors(self, tmp_path):
        """transformers takes the latter, and so do we."""
        for seed in range(2):
            folder = tmp_path / "run" / f"step-{seed}"
            self.save(folder, seed + 10, 1)
            llama(seed, tied=False).save_pretrained(folder)
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        states = [dict(llama(seed, tied=False).state_dict()) for seed in range(2)]
        assert_mean(state(tmp_path / "out"), states)


def test_another_dtype_is_loaded(checkpoints, tmp_path):
    out = tmp_path / "out"
    run("average", *checkpoints, "-o", f"{out}/", "--dtype", "bfloat16")
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {
        torch.bfloat16
    }
    states = [state(path) for path in checkpoints]
    assert_mean(state(out, dtype=torch.bfloat16), states, torch.bfloat16)


def test_a_model_saved_in_16_bits_stays_so(tmp_path):
    for seed in range(3):
        llama(seed).to(torch.bfloat16).save_pretrained(tmp_path / "run" / f"step-{seed}")
    ckptavg.average(tmp_path / "run", tmp_path / "out")
    states = [state(tmp_path / "run" / f"step-{seed}", dtype="auto") for seed in range(3)]
    assert_mean(state(tmp_path / "out", dtype="auto"), states)
    assert states[0]["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder(tmp_path, tied):
    def bert(seed: int) -> Any:
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=50, tie_word_embeddings=tied,
        )  # fmt: skip
        return transformers.BertForMaskedLM(config)

    states = []
    for seed in range(3):
        bert(seed).save_pretrained(tmp_path / "run" / f"step-{seed}")
        states.append(dict(bert(seed).state_dict()))
    ckptavg.average(tmp_path / "run", tmp_path / "out")
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert_mean(model.state_dict(), states)
    head, embedding = model.cls.predictions.decoder.weight, model.bert.embeddings.word_embeddings
    assert (head is embedding.weight) is tied


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:transformers")
def test_a_processor_and_its_chat_templates_come_along(tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    words = tokenizer()
    words.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    for seed in range(2):
        folder = tmp_path / "run" / f"step-{seed}"
        llama(seed).save_pretrained(folder)
        transformers.Wav2Vec2Processor(extractor, words).save_pretrained(folder)
    ckptavg.average(tmp_path / "run", tmp_path / "out")
    assert names(tmp_path / "out") == names(tmp_path / "run" / "step-1")
    assert "additional_chat_templates/tools.jinja" in names(tmp_path / "out")
    found = transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "out")
    assert found.feature_extractor.sampling_rate == 8000
    assert found.tokenizer.chat_template == words.chat_template


def test_the_hub_s_cache_is_read_through_its_links(tmp_path):
    """`snapshots/REVISION/` links into `blobs/`, whose names say nothing of what they are."""
    root = tmp_path / "models--somebody--tiny"
    (root / "blobs").mkdir(parents=True)
    states = []
    for seed in range(2):
        model = llama(seed, tied=False)
        model.save_pretrained(tmp_path / "made", max_shard_size="30KB")
        states.append(dict(model.state_dict()))
        snapshot = root / "snapshots" / f"{seed}{'a' * 39}"
        snapshot.mkdir(parents=True)
        for path in (tmp_path / "made").iterdir():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, root / "blobs" / digest)
            (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
        shutil.rmtree(tmp_path / "made")
    ckptavg.average(root / "snapshots", tmp_path / "out")
    assert_mean(state(tmp_path / "out"), states)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


# Damage, and the file that the message names.


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def missing(folder: Path) -> tuple[Path, str]:
    path = shard(folder, 1)
    path.unlink()
    return path, "is missing"


def dangling(folder: Path) -> tuple[Path, str]:
    path = shard(folder, 1)
    path.unlink()
    path.symlink_to("../../blobs/none")
    return path, "is missing"


def truncated(folder: Path) -> tuple[Path, str]:
    path = shard(folder, 1)
    path.write_bytes(path.read_bytes()[:-100])
    return path, ""


def empty(folder: Path) -> tuple[Path, str]:
    path = shard(folder, 1)
    path.write_bytes(b"")
    return path, "is empty"


def exchanged(folder: Path) -> tuple[Path, str]:
    one, other = shard(folder, 0), shard(folder, 1)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return one, "is missing from it"


def hard_link(folder: Path) -> tuple[Path, str]:
    one, other = shard(folder, 0), shard(folder, 1)
    other.unlink()
    os.link(one, other)
    return other, "is the same file as"


def symlink(folder: Path) -> tuple[Path, str]:
    one, other = shard(folder, 0), shard(folder, 1)
    other.unlink()
    other.symlink_to(one.name)
    return other, "is the same file as"


def two_names(folder: Path) -> tuple[Path, str]:
    """One file, whose tensors the index puts into two."""
    one, twin = shard(folder, 0), folder / "model-00000-of-00000.safetensors"
    os.link(one, twin)

    def change(weight_map: dict[str, str]) -> None:
        mine = [name for name, file in weight_map.items() if file == one.name]
        weight_map[mine[0]] = twin.name

    edit_index(folder, change)
    return twin, ""


def in_two_shards(folder: Path) -> tuple[Path, str]:
    one, other = load_file(shard(folder, 0)), load_file(shard(folder, 1))
    save_file(other | {next(iter(one)): torch.zeros(2)}, shard(folder, 1), {"format": "pt"})
    return shard(folder, 1), "in two shards"


def not_in_its_shard(folder: Path) -> tuple[Path, str]:
    edit_index(folder, lambda weight_map: weight_map.update(extra=shard(folder, 0).name))
    return shard(folder, 0), "is missing from it"


def outside(name: str) -> Callable[[Path], tuple[Path, str]]:
    def damage(folder: Path) -> tuple[Path, str]:
        if name.startswith(".."):
            shutil.copyfile(shard(folder, 0), folder.parents[1] / "x.safetensors")
        edit_index(folder, lambda weight_map: weight_map.update({min(weight_map): name}))
        return folder / INDEX, "which is not a file in its directory"

    return damage


def twice_in_the_index(folder: Path) -> tuple[Path, str]:
    text = (folder / INDEX).read_text()
    name = next(iter(json.loads(text)["weight_map"]))
    entry = json.dumps(name) + ": " + json.dumps("other.safetensors")
    text = text.replace('"weight_map": {', '"weight_map": {' + entry + ",")
    (folder / INDEX).write_text(text)
    return folder / INDEX, "twice"


def no_json(folder: Path) -> tuple[Path, str]:
    (folder / INDEX).write_bytes(b'{"weight_map": {"\xff')
    return folder / INDEX, "not valid JSON"


def deep_json(folder: Path) -> tuple[Path, str]:
    (folder / INDEX).write_text("[" * 100_000)
    return folder / INDEX, "not valid JSON"


def no_weight_map(folder: Path) -> tuple[Path, str]:
    (folder / INDEX).write_text('{"weight_map": {}}')
    return folder / INDEX, "it has no weight_map"


DAMAGE = {
    **{
        damage.__name__: damage
        for damage in (
            *(missing, dangling, truncated, empty, exchanged, hard_link, symlink, two_names),
            *(in_two_shards, not_in_its_shard, twice_in_the_index, no_json, deep_json),
            no_weight_map,
        )
    },
    "above": outside("../../x.safetensors"),
    "above and back": outside("sub/../model.safetensors"),
    "absolute": outside("/etc/hostname"),
    "a directory": outside(".."),
    "backslash": outside("..\\x.safetensors"),
    "null": outside("a\0b"),
    "no name": outside(""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_shards_are_an_error_that_names_the_file(shards, tmp_path, damage):
    path, what = damage(shards / "step-1")
    before = names(tmp_path)
    code, _, said = outcome("average", shards, "-o", f"{tmp_path}/out/")
    assert code == 1, said
    *_, line = said.splitlines()
    assert "Traceback" not in said
    assert line.startswith(f"ckptavg: error: {path}: ")
    assert what in line
    assert names(tmp_path) == before


def test_the_same_damage_in_an_unused_checkpoint_is_no_trouble(shards, tmp_path):
    """What is not named is not looked at."""
    missing(shards / "step-1")
    used = [shards / "step-0", shards / "step-2"]
    ckptavg.average(used, tmp_path / "out")
    assert_mean(state(tmp_path / "out"), [state(path) for path in used])


@pytest.fixture
def two_models(tmp_path: Path) -> Path:
    llama(0).save_pretrained(tmp_path / "run" / "step-0")
    model = llama(1)
    model.resize_token_embeddings(77)
    model.save_pretrained(tmp_path / "run" / "step-1")
    return tmp_path / "run"


def test_two_models_in_one_directory_are_an_error_that_lists_what_differs(two_models, tmp_path):
    code, _, said = outcome("average", two_models, "-o", f"{tmp_path}/out/")
    assert code == 1
    assert "the checkpoints do not have the same tensors" in said
    assert "model.embed_tokens.weight: shape (200, 32) in" in said
    assert not (tmp_path / "out").exists()


def test_the_command_that_average_proposes_makes_the_model(user_folder):
    """With the class that the configuration names; a missing `--model` proposes it as well."""
    sizes: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
    config = transformers.ResNetConfig(**sizes, num_labels=2, layer_type="basic")
    for step in (1, 2):
        torch.manual_seed(step)
        model = transformers.ResNetForImageClassification(config)
        model.save_pretrained(user_folder / "run" / f"checkpoint-{step}")
    batch = "{'pixel_values': torch.randn(8, 3, 16, 16), 'labels': torch.arange(8) % 2}"
    (user_folder / "data.py").write_text(f"import torch\nloader = [{batch}]")
    expected = ["--model", "transformers:ResNetForImageClassification.from_pretrained"]
    argument = "pretrained_model_name_or_path=run/checkpoint-2"
    for output, more in (("my swa/", []), ("swa.safetensors", ["--model-arg", argument])):
        *_, line = outcome("average", "run", "-o", output)[1].splitlines()
        command = shlex.split(line)[1:]
        assert command[2:-2] == [*expected, *more]
        assert outcome(*command[:-1], "data.py:loader")[0] == 0
    for name, inputs in (("bn-refresh", "my swa"), ("evaluate", "run"), ("evaluate", "my swa")):
        code, _, said = outcome(name, inputs)
        assert code == 2
        proposed = said.splitlines()[-1].removeprefix("To make the model with transformers: ")
        assert shlex.split(proposed) == expected
    code, _, said = outcome("evaluate", "my swa", *expected, "--loader", "data.py:loader")
    assert code == 0
    assert "ResNetForImageClassification.from_pretrained is given my swa" in said
    own = "import transformers\nclass Own:\n    @classmethod\n    def from_pretrained(cls, path):\n"
    own += "        return transformers.ResNetForImageClassification.from_pretrained(path)\n"
    (user_folder / "own.py").write_text(own)
    options = ("--model", "own.py:Own.from_pretrained", "--loader", "data.py:loader")
    assert outcome("evaluate", "my swa", *options, "--model-arg", "path=my swa")[0] == 0
