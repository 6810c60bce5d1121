"""Adapters of PEFT: `save_pretrained`, and the Trainer's checkpoints with an adapter in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import ckptavg
from tests.layouts.libraries import differ, llama, trainer
from tests.oracle import StateDict, assert_mean

pytestmark = [
    # PEFT asks transformers 5 as it asked version 4.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:No label_names provided"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted(seed: int) -> Any:
    """The same model each time, with an adapter of random factors."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    for seed in range(3):
        adapted(seed).save_pretrained(tmp_path / "run" / f"step-{seed}")
    return tmp_path / "run"


def states(folder: Path, pattern: str = "step-*") -> list[StateDict]:
    paths = sorted(folder.glob(pattern), key=lambda path: int(path.name.partition("-")[2]))
    return [load_file(path / WEIGHTS) for path in paths]


def reload(folder: Path) -> StateDict:
    model = peft.PeftModel.from_pretrained(llama(), folder)
    return dict(peft.get_peft_model_state_dict(model))


def test_the_factors_means_are_loaded(adapters, tmp_path):
    assert differ(states(adapters))
    ckptavg.average(adapters, tmp_path / "out")
    assert_mean(reload(tmp_path / "out"), states(adapters))


def test_the_configuration_comes_along(adapters, tmp_path):
    ckptavg.average(adapters, tmp_path / "out")
    last = adapters / "step-2"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in last.iterdir()
    }
    assert (tmp_path / "out" / CONFIG).read_bytes() == (last / CONFIG).read_bytes()
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 4


def test_a_trainer_s_checkpoints_are_averaged(tmp_path):
    trainer(tmp_path / "run", adapted(0)).train()
    wanted = states(tmp_path / "run", "checkpoint-*")
    assert len(wanted) == 3
    assert differ(wanted)
    summary = ckptavg.average(tmp_path / "run", tmp_path / "out")
    assert [source.step for source in summary.sources] == [
        ("global_step", step) for step in (4, 8, 12)
    ]
    assert_mean(reload(tmp_path / "out"), wanted)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_the_average_is_merged_into_the_model(adapters, tmp_path):
    ckptavg.average(adapters, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").merge_and_unload()
    mean = {
        name: torch.stack([state[name].double() for state in states(adapters)]).mean(0)
        for name in states(adapters)[0]
    }
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    update = 2 * mean[name.format("B")] @ mean[name.format("A")]
    before = llama().model.layers[0].self_attn.q_proj.weight.double()
    found = model.model.layers[0].self_attn.q_proj.weight.double()
    torch.testing.assert_close(found, before + update, rtol=1e-5, atol=1e-5)


def test_pickled_adapters_are_averaged(tmp_path):
    """As PEFT writes them with `safe_serialization=False`."""
    wanted = []
    for seed in range(2):
        model = adapted(seed)
        model.save_pretrained(tmp_path / "run" / f"step-{seed}", safe_serialization=False)
        wanted.append(dict(peft.get_peft_model_state_dict(model)))
    assert (tmp_path / "run" / "step-0" / "adapter_model.bin").is_file()
    ckptavg.average(tmp_path / "run", tmp_path / "out")
    assert_mean(reload(tmp_path / "out"), wanted)


def test_an_adapter_is_evaluated_on_the_base_that_it_was_trained_on(adapters):
    """The file has neither the base nor the adapter's name, and the model has both."""
    ids = torch.arange(48).reshape(6, 8) % 32
    batches = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    found = ckptavg.evaluate(adapters, model=adapted(seed=9), loader=batches, device="cpu")
    for each in found:
        model = peft.PeftModel.from_pretrained(llama(), each.path).eval()
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids).loss
        assert each.metrics == {"loss": pytest.approx(float(expected), rel=1e-5)}
