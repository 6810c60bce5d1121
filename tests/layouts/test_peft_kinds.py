"""All kinds of adapters in PEFT: the mean of their tensors is silent only where it is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from safetensors.torch import load_file
from torch import nn

import ckptavg
from ckptavg.errors import FormatError, MismatchError
from tests.layouts.libraries import llama
from tests.oracle import assert_mean

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "target_r": 2, "init_r": 2},
    "ADAMSS": {"r": 4, "num_subspaces": 2, "subspace_rank": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 2, "stride_A": 1, "num_B": 2},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 2},
    "OFT": {"r": 0, "oft_block_size": 4},
    "OSF": {"effective_rank": 2},
    "PSOFT": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"r": 2, "sparsity": 0.5},
    "TRAINABLE_TOKENS": {"target_modules": ["embed"], "token_indices": [1, 2]},
    "UNILORA": {"r": 2, "theta_d_length": 16},
    "VBLORA": {"r": 2, "num_vectors": 4, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 10},
}
LINEAR = {
    "BEFT", "C3A", "FOURIERFT", "FROD", "IA3", "LN_TUNING", "MISS", "SHIRA", "TINYLORA",
    "TRAINABLE_TOKENS", "WAVEFT",
}  # fmt: skip
PROMPTS: dict[str, dict[str, Any]] = {
    "CARTRIDGE": {},
    "CPT": {"cpt_token_ids": [2, 3], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "PREFIX_TUNING": {},
    "PROMPT_TUNING": {},
    "P_TUNING": {},
}
# They need several adapters, tasks or a particular model, and are known to be of no linear kind.
OTHERS = {"ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "POLY", "SHADOW", "XLORA"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.embed, self.norm = nn.Embedding(6, 8), nn.LayerNorm(8)
            self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor, layer: str) -> torch.Tensor:
        """What one of the layers, which has the adapter, makes of the embedding."""
        x = self.embed(tokens)
        made: torch.Tensor = x if layer == "embed" else getattr(self, layer)(x)
        return made


def adapters(folder: Path, kind: str, base: Any, options: dict[str, Any]) -> list[Path]:
    """Two adapters as a run leaves them, whose trained tensors are random."""
    paths = []
    for step in range(2):
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), CONFIGS[kind](**options))
        torch.manual_seed(step + 1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.5 * torch.randn_like(parameter)
        paths.append(folder / f"step-{step}")
        model.save_pretrained(paths[-1])
    return paths


@pytest.mark.parametrize(
    "kind", sorted({kind.value for kind in peft.PeftType} - PROMPTS.keys() - OTHERS)
)
def test_a_kind_is_averaged_silently_if_outputs_are_averaged_too(tmp_path, caplog, kind):
    options = {"target_modules": ["q"], **OPTIONS.get(kind, {})}
    [layer] = options["target_modules"]
    paths = adapters(tmp_path / "run", kind, Net, options)
    ckptavg.average(tmp_path / "run", tmp_path / "out")

    def output(path: Path) -> torch.Tensor:
        model = peft.PeftModel.from_pretrained(Net(), path).eval()
        with torch.no_grad():
            result: torch.Tensor = model(torch.arange(6), layer).double()
        return result

    first, second = map(output, paths)
    error = (output(tmp_path / "out") - (first + second) / 2).abs().max()
    is_exact = error < 1e-4 * (first - second).abs().max()
    assert is_exact == (kind in LINEAR)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if is_exact:
        assert not warned
        with pytest.raises(FormatError, match=f"is of type {kind}, whose tensors are averaged"):
            ckptavg.average(tmp_path / "run", tmp_path / "exact", lora="exact")
        return
    [warning] = warned
    assert "tensor by tensor, which is not the average of what they add to the weights" in warning
    if kind == "LORA":
        ckptavg.average(tmp_path / "run", tmp_path / "exact", lora="exact")
        expected = (first + second) / 2
        torch.testing.assert_close(output(tmp_path / "exact"), expected, rtol=0, atol=1e-5)
        return
    assert f"adapter_config.json: is of type {kind}" in warning
    assert "lora=exact" not in warning
    with pytest.raises(FormatError, match=f"is of type {kind}: .* merge each adapter"):
        ckptavg.average(tmp_path / "run", tmp_path / "exact", lora="exact")


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_averaged_silently(tmp_path, caplog, kind):
    """They are embeddings: what they add to the inputs is what is stored."""
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2, **PROMPTS[kind]}
    paths = adapters(tmp_path / "run", kind, llama, options)
    states = [load_file(path / "adapter_model.safetensors") for path in paths]
    assert {name.rpartition(".")[2] for name in states[0]} <= {"prompt_embeddings"}
    ckptavg.average(tmp_path / "run", tmp_path / "out")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert_mean(dict(peft.get_peft_model_state_dict(model)), states)


@pytest.mark.parametrize("kind", ["HRA", "OFT", "ROAD", "DELORA"])
def test_a_model_with_an_adapter_in_it_is_warned_of_by_its_names(tmp_path, caplog, kind):
    for step in range(2):
        torch.manual_seed(step)
        options = {"target_modules": ["q"], **OPTIONS.get(kind, {})}
        model = peft.get_peft_model(Net(), CONFIGS[kind](**options))
        (tmp_path / "run").mkdir(exist_ok=True)
        torch.nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
        torch.save(model.state_dict(), tmp_path / "run" / f"step_{step}.pt")
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    assert "which is not the average of what they add to the weights" in caplog.text
    assert "merge each adapter into its model" in caplog.text


def test_frequencies_at_other_places_are_not_averaged(tmp_path):
    """The seed in the configuration says where the values belong."""
    for seed in range(2):
        options = {"target_modules": ["q"], "n_frequency": 10, "random_loc_seed": seed}
        model = peft.get_peft_model(Net(), CONFIGS["FOURIERFT"](**options))
        model.save_pretrained(tmp_path / "run" / f"step-{seed}")
    with pytest.raises(MismatchError, match=r"random_loc_seed: 0 in .*step-0, 1 in ") as error:
        ckptavg.average(tmp_path / "run", tmp_path / "out")
    assert "(merge each into its model, and average the models)" in str(error.value)
