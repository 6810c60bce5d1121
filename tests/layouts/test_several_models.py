"""Directories with several models: averaged together, and loaded back by the library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import ckptavg
from ckptavg.errors import OutputError
from tests.helpers import outcome, run
from tests.layouts import libraries
from tests.oracle import StateDict, assert_mean, naive_mean, same_bits

pytestmark = pytest.mark.filterwarnings("ignore")


def move(*models: nn.Module) -> None:
    """What a step of a training does."""
    for model in models:
        for value in model.parameters():
            value.data.add_(0.01 * torch.randn_like(value))


def copied(model: nn.Module) -> StateDict:
    return copied_state(model.state_dict())


def copied_state(state: StateDict) -> StateDict:
    return {name: value.clone() for name, value in state.items()}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class TestSentenceTransformers:
    @pytest.fixture
    def library(self) -> Any:
        return pytest.importorskip("sentence_transformers")

    @staticmethod
    def train(folder: Path, library: Any, **dense: Any) -> list[StateDict]:
        """Two checkpoints of a model that pools by the maximum, which is not the default."""
        from sentence_transformers import models
        from transformers import BertConfig, BertModel

        libraries.tokenizer().save_pretrained(folder / "bert")
        config = BertConfig(
            vocab_size=libraries.WORDS, hidden_size=8, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=8,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder / "bert")
        modules = [models.Transformer(str(folder / "bert")), models.Pooling(8, pooling_mode="max")]
        if dense:
            modules.append(models.Dense(8, **dense))
        model = library.SentenceTransformer(modules=modules, device="cpu")
        states = []
        for step in (5, 10):
            move(model)
            model.save(str(folder / "run" / f"checkpoint-{step}"))
            states.append(copied(model))
        return states

    def test_folders_without_weights_come_along(self, library, tmp_path):
        states = self.train(tmp_path, library)
        run("average", tmp_path / "run", "-o", f"{tmp_path}/out/")
        model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
        assert_mean(model.state_dict(), states)
        assert model[1].pooling_mode == "max"

    def test_folders_with_weights_are_averaged(self, library, tmp_path):
        states = self.train(tmp_path, library, out_features=4)
        result = run("average", tmp_path / "run", "-o", f"{tmp_path}/out/")
        assert "warning" not in result.stderr
        model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
        assert_mean(model.state_dict(), states)
        assert files(tmp_path / "out") == files(tmp_path / "run" / "checkpoint-10")
        run("verify", tmp_path / "out", tmp_path / "run")
        assert "  models       model, 2_Dense/model\n" in run("inspect", tmp_path / "out").output

    def test_an_average_may_be_replaced(self, library, tmp_path):
        states = self.train(tmp_path, library, out_features=4)
        for force in (False, True):
            ckptavg.average(tmp_path / "run", tmp_path / "out", force=force)
        model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
        assert_mean(model.state_dict(), states)

    def test_another_dtype_is_that_of_all_models(self, library, tmp_path):
        states = self.train(tmp_path, library, out_features=4)
        ckptavg.average(tmp_path / "run", tmp_path / "out", dtype="float16")
        model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
        assert model[0].state_dict().popitem()[1].dtype == torch.float16
        for name, value in model.state_dict().items():
            wanted = naive_mean([state[name] for state in states], torch.float16)
            assert torch.equal(value.half(), wanted), name

    def test_tensors_of_one_model_are_taken_from_the_last_by_their_names(self, library, tmp_path):
        states = self.train(tmp_path, library, out_features=4)
        ckptavg.average(tmp_path / "run", tmp_path / "out", take_last=["2_Dense/"])
        model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
        assert same_bits(model.state_dict()["2.linear.weight"], states[1]["2.linear.weight"])

    def test_one_file_cannot_hold_several_models(self, library, tmp_path):
        self.train(tmp_path, library, out_features=4)
        with pytest.raises(
            OutputError, match=r"holds the models in checkpoint-10: model, 2_Dense/model"
        ):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        paths = sorted((tmp_path / "run").glob("checkpoint-*/model.safetensors"))
        assert len(ckptavg.average(paths, tmp_path / "out.safetensors").sources) == 2

    def test_a_classifier_is_the_last_one_s_with_a_warning(self, library, tmp_path):
        """As SetFit saves it beside the modules."""
        joblib = pytest.importorskip("joblib")
        linear_model = pytest.importorskip("sklearn.linear_model")
        self.train(tmp_path, library)
        for step in (5, 10):
            head = linear_model.LogisticRegression().fit([[0.0], [float(step)]], [0, 1])
            joblib.dump(head, tmp_path / "run" / f"checkpoint-{step}" / "model_head.pkl")
        _, _, said = outcome("average", tmp_path / "run", "-o", f"{tmp_path}/out/")
        assert "model_head.pkl is a pickled classifier, which is copied from" in said
        found = joblib.load(tmp_path / "out" / "model_head.pkl")
        assert found.coef_ == head.coef_


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        """Accelerate's state is the process's."""
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickled"])
    def test_its_second_model_is_averaged(self, tmp_path, safe):
        accelerator = accelerate.Accelerator(cpu=True)
        models = accelerator.prepare(nn.Linear(3, 2), nn.BatchNorm1d(3))
        states = []
        for step in range(2):
            move(*models)
            folder = tmp_path / "run" / f"checkpoint_{step}"
            accelerator.save_state(str(folder), safe_serialization=safe)
            states.append([copied(model) for model in models])
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        for path in folder.glob("*model*"):
            path.unlink()
        for path in (tmp_path / "out").iterdir():
            path.rename(folder / path.name)
        accelerator.load_state(str(folder))
        for model, saved in zip(models, zip(*states, strict=True), strict=True):
            assert_mean(model.state_dict(), saved)

    def test_an_average_of_two_models_is_verified(self, tmp_path):
        accelerator = accelerate.Accelerator(cpu=True)
        models = accelerator.prepare(nn.Linear(3, 2), nn.Linear(2, 3))
        for step in range(2):
            move(*models)
            accelerator.save_state(str(tmp_path / "run" / f"checkpoint_{step}"))
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        result = run("verify", tmp_path / "out", tmp_path / "run")
        assert "4 tensors" in result.output


class TestAdapters:
    """PEFT saves the adapters of a model but the first in folders with their names."""

    @staticmethod
    def train(folder: Path, peft: Any) -> list[list[StateDict]]:
        """For each adapter, its weights in two checkpoints; the ranks differ."""
        states = []
        for step in (5, 10):
            options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "lora_alpha": 6}
            model = peft.get_peft_model(libraries.llama(), peft.LoraConfig(r=2, **options))
            model.add_adapter("ref", peft.LoraConfig(r=3, **options))
            torch.manual_seed(step)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter)
            model.save_pretrained(folder / f"checkpoint-{step}")
            states.append(
                [peft.get_peft_model_state_dict(model, adapter_name=n) for n in ("default", "ref")]
            )
        return [[copied_state(state) for state in pair] for pair in zip(*states, strict=True)]

    @pytest.fixture
    def library(self) -> Any:
        return pytest.importorskip("peft")

    @staticmethod
    def load(folder: Path, peft: Any) -> list[StateDict]:
        model = peft.PeftModel.from_pretrained(libraries.llama(), folder)
        model.load_adapter(folder / "ref", "ref")
        return [peft.get_peft_model_state_dict(model, adapter_name=n) for n in ("default", "ref")]

    def test_all_of_a_model_are_averaged(self, library, tmp_path):
        states = self.train(tmp_path / "run", library)
        _, _, said = outcome("average", tmp_path / "run", "-o", f"{tmp_path}/out/")
        assert "neither averaged nor copied" not in said
        assert files(tmp_path / "out") == files(tmp_path / "run" / "checkpoint-10")
        for found, saved in zip(self.load(tmp_path / "out", library), states, strict=True):
            assert_mean(found, saved)

    def test_the_products_of_all_are_averaged(self, library, tmp_path):
        states = self.train(tmp_path / "run", library)
        ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")
        found = self.load(tmp_path / "out", library)
        pairs = zip(found, states, (3.0, 2.0), strict=True)  # alpha / rank; 1 in the average
        for joined, saved, scale in pairs:
            for name, a in joined.items():
                if "lora_A" not in name:
                    continue
                up = name.replace("lora_A", "lora_B")
                expected = sum(scale * each[up].double() @ each[name].double() for each in saved)
                product = joined[up].double() @ a.double()
                torch.testing.assert_close(product, expected / 2, rtol=0, atol=1e-5)
        run("verify", tmp_path / "out", tmp_path / "run")
        config = tmp_path / "out" / "ref" / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 5'))
        code, _, said = outcome("verify", tmp_path / "out", tmp_path / "run")
        assert code == 1
        assert "ref/adapter_config.json: differs from that of its members" in said

    def test_checkpoints_beside_a_finished_adapter_are_the_members(self, library, tmp_path):
        states = self.train(tmp_path / "run", library)
        for path in (tmp_path / "run" / "checkpoint-10").glob("adapter_*"):
            shutil.copy(path, tmp_path / "run")
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        assert_mean(self.load(tmp_path / "out", library)[0], states[0])


diffusers = pytest.importorskip("diffusers")


def autoencoder() -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
    )  # fmt: skip


class TestVariants:
    @pytest.mark.parametrize("options", [{}, {"max_shard_size": "2KB"}], ids=["file", "shards"])
    def test_that_stand_alone_are_averaged(self, tmp_path, options):
        model, states = autoencoder().half(), []
        for step in (5, 10):
            move(model)
            folder = tmp_path / "run" / f"checkpoint-{step}"
            model.save_pretrained(folder, variant="fp16", **options)
            states.append(copied(model))
        assert "diffusion_pytorch_model.safetensors" not in files(folder)
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        found = diffusers.AutoencoderTiny.from_pretrained(
            tmp_path / "out", variant="fp16", torch_dtype=torch.float16
        )
        assert_mean(found.state_dict(), states)
        assert any("index" in name for name in files(tmp_path / "out")) is bool(options)

    def test_of_transformers_are_averaged(self, tmp_path):
        model, states = libraries.llama().half(), []
        for step in (5, 10):
            move(model)
            model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}", variant="fp16")
            states.append(copied(model))
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        found = type(model).from_pretrained(tmp_path / "out", variant="fp16")
        assert_mean(found.state_dict(), states)

    @pytest.mark.parametrize("output", ["out/", "out.safetensors"])
    def test_beside_the_plain_weights_are_left_out_with_a_warning(self, tmp_path, output):
        model, states = autoencoder(), []
        for step in (5, 10):
            move(model)
            folder = tmp_path / "run" / f"checkpoint-{step}"
            model.save_pretrained(folder)
            states.append(copied(model))
            torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
            autoencoder().half().save_pretrained(folder, variant="fp16")
        result = run("average", tmp_path / "run", "-o", f"{tmp_path}/{output}")
        assert (
            "has weights, but is neither averaged nor copied: "
            "diffusion_pytorch_model.bin, diffusion_pytorch_model.fp16.safetensors" in result.stderr
        )
        if output == "out/":
            found = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "out")
            assert_mean(found.state_dict(), states)

    def test_of_two_kinds_without_plain_weights_are_an_error(self, tmp_path):
        for step in (5, 10):
            for variant in ("fp16", "non_ema"):
                folder = tmp_path / "run" / f"checkpoint-{step}"
                autoencoder().save_pretrained(folder, variant=variant)
        code, _, said = outcome("average", tmp_path / "run", "-o", f"{tmp_path}/out/")
        assert code == 1
        assert "checkpoint-5: has several variants of the weights: fp16, non_ema" in said
        assert not (tmp_path / "out").exists()


class TestPipelines:
    @staticmethod
    def pipeline() -> Any:
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8), layers_per_block=1, sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8, norm_num_groups=2, attention_head_dim=2,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
        import transformers

        config = transformers.CLIPTextConfig(
            hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1,
            vocab_size=libraries.WORDS,
        )  # fmt: skip
        return diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=transformers.CLIPTextModel(config), unet=unet,
            tokenizer=libraries.tokenizer(), scheduler=diffusers.DDIMScheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    @staticmethod
    def save(pipeline: Any, folder: Path, **options: Any) -> dict[str, StateDict]:
        """A pipeline after a further step of training; its models' state dicts."""
        models = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
        move(*models.values())
        pipeline.save_pretrained(folder, **options)
        return {name: copied(model) for name, model in models.items()}

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_are_averaged_model_by_model(self, tmp_path, variant):
        pipeline = self.pipeline()
        saved = [self.save(pipeline, tmp_path / "run" / name, variant=variant) for name in "ab"]
        ckptavg.average(tmp_path / "run", tmp_path / "out")
        assert files(tmp_path / "out") == files(tmp_path / "run" / "b")
        found = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", variant=variant)
        for name in saved[0]:
            assert_mean(getattr(found, name).state_dict(), [each[name] for each in saved])

    def test_that_are_named_are_the_members(self, tmp_path):
        pipeline = self.pipeline()
        for name in "ab":
            self.save(pipeline, tmp_path / name)
        result = run("average", tmp_path / "a", tmp_path / "b", "-o", f"{tmp_path}/out/")
        assert "left out" not in result.stderr
        assert "averaged 2 checkpoints: a to b" in result.output

    def test_a_finished_one_does_not_hide_the_checkpoints_around_it(self, tmp_path):
        pipeline, states = self.pipeline(), []
        for step in (5, 10):
            move(pipeline.unet)
            folder = tmp_path / "run" / f"checkpoint-{step}"
            pipeline.unet.save_pretrained(folder / "unet")
            (folder / "random_states_0.pkl").touch()
            states.append(copied(pipeline.unet))
        self.save(pipeline, tmp_path / "run")
        result = run("average", tmp_path / "run", "-o", f"{tmp_path}/out/")
        assert "left out: text_encoder, unet, vae" in result.stderr
        found = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")
        assert_mean(found.state_dict(), states)


def test_a_configuration_one_level_up_comes_along(tmp_path):
    model, states = libraries.llama(), []
    for step in (5, 10):
        move(model)
        folder = tmp_path / "run" / f"checkpoint-{step}"
        model.save_pretrained(folder)
        for path in folder.glob("*.json"):
            path.unlink()
        states.append(copied(model))
    model.config.save_pretrained(tmp_path / "run")
    libraries.tokenizer().save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("{}")
    result = run("average", tmp_path / "run", "-o", f"{tmp_path}/out/", "--dtype", "bfloat16")
    assert "checkpoint-10 has no config.json; copied from the directory above it" in (result.stderr)
    found = type(model).from_pretrained(tmp_path / "out")
    assert_mean(found.state_dict(), states, torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not (tmp_path / "out" / "results.json").exists()
