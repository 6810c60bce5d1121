"""LoRA adapters as diffusers loads them: its own, with PEFT's configuration, and kohya-ss's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

import ckptavg
from ckptavg.errors import MismatchError
from tests.oracle import StateDict

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "pytorch_lora_weights.safetensors"


def unet() -> Any:
    """The same small network each time."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
    )  # fmt: skip


def adapted(seed: int, **config: Any) -> tuple[Any, StateDict]:
    """The network with random factors for linear layers and convolutions, and these alone."""
    network = unet()
    network.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "conv1"], **config))
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return network, dict(get_peft_model_state_dict(network))


def merged(path: Path) -> StateDict:
    """The weights of the network in float64, once diffusers has merged an adapter into them."""
    pipeline = diffusers.StableDiffusionPipeline
    state, alphas, metadata = pipeline.lora_state_dict(path, return_lora_metadata=True)
    network = unet()
    network.load_lora_adapter(
        state, prefix="unet", network_alphas=alphas, metadata=metadata, adapter_name="mine"
    )
    network.double().fuse_lora(adapter_names=["mine"])
    network.unload_lora()
    return dict(network.state_dict())


def assert_merges_to_the_mean(average: Path, paths: list[Path], weights: list[float]) -> None:
    states, found = [merged(path) for path in paths], merged(average)
    moved = 0.0
    for name, base in unet().double().state_dict().items():
        terms = (weight * state[name] for weight, state in zip(weights, states, strict=True))
        expected = sum(terms, torch.zeros_like(base)) / sum(weights)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-5)
        moved = max(moved, float((expected - base).abs().max()))
    assert moved > 1


@pytest.fixture
def recorded(tmp_path: Path) -> list[Path]:
    """Adapters of unlike ranks and alphas, in the Trainer's folders."""
    paths = []
    for step in range(3):
        pattern = {"down_blocks.0.resnets.0.conv1": 2}
        network, state = adapted(step, r=4 + step, lora_alpha=8, rank_pattern=pattern)
        folder = tmp_path / "run" / f"checkpoint-{step + 1}00"
        diffusers.StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=state,
            unet_lora_adapter_metadata=network.peft_config["default"].to_dict(),
        )
        paths.append(folder / WEIGHTS)
    return paths


def test_the_configuration_in_the_header_gives_the_scales(recorded, tmp_path):
    average = tmp_path / "average.safetensors"
    ckptavg.average(tmp_path / "run", average, lora="exact", weights=[1, 2, 3])
    assert_merges_to_the_mean(average, recorded, [1, 2, 3])


def test_adapters_without_a_configuration(tmp_path):
    paths = []
    for step in range(2):
        _, state = adapted(step, r=4 - step, lora_alpha=4 - step)
        folder = tmp_path / "run" / f"checkpoint-{step + 1}00"
        diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
        paths.append(folder / WEIGHTS)
    average = tmp_path / "average.safetensors"
    ckptavg.average(tmp_path / "run", average, lora="exact")
    assert_merges_to_the_mean(average, paths, [1, 1])


def test_adapters_of_kohya(tmp_path):
    """The names of sd-scripts, with an alpha beside the factors, of which each file has another."""
    paths = []
    for epoch, alpha in enumerate((4.0, 8.0, 2.0), 1):
        _, state = adapted(epoch, r=4, lora_alpha=4)
        named = {}
        for name, value in state.items():
            module, _, factor = name.partition(".lora_")
            module = f"lora_unet_{module.replace('.', '_')}"
            down_or_up = "down" if factor.startswith("A") else "up"
            named[f"{module}.lora_{down_or_up}.weight"] = value.contiguous()
            named[f"{module}.alpha"] = torch.tensor(alpha)
        paths.append(tmp_path / "run" / f"mine-{epoch:06}.safetensors")
        paths[-1].parent.mkdir(exist_ok=True)
        save_file(named, paths[-1], {"ss_network_alpha": str(alpha)})
    with pytest.raises(MismatchError, match=r"alpha and 23 more: 4\.0 in"):
        ckptavg.average(tmp_path / "run", tmp_path / "apart.safetensors")
    average = tmp_path / "average.safetensors"
    ckptavg.average(tmp_path / "run", average, lora="exact")
    assert_merges_to_the_mean(average, paths, [1, 1, 1])


def test_a_directory_is_loaded_by_its_name(recorded, tmp_path):
    ckptavg.average(tmp_path / "run", f"{tmp_path / 'average'}{os.sep}", lora="exact")
    assert_merges_to_the_mean(tmp_path / "average" / WEIGHTS, recorded, [1, 1, 1])
