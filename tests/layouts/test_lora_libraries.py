"""Adapters of LyCORIS and loralib under the names that these libraries give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ckptavg
from ckptavg.errors import FormatError
from tests.oracle import assert_mean

pytestmark = pytest.mark.filterwarnings("ignore")

loralib: Any = pytest.importorskip("loralib")
wrapper: Any = pytest.importorskip("lycoris.wrapper")

SUMS = {"full", "ia3", "norm"}  # they add their tensors to weights, or multiply weights with them
PRODUCTS = {"lora", "locon", "dylora"}
MODULES = {**wrapper.network_module_dict, "norm": wrapper.NormModule}
OPTIONS: dict[str, dict[str, Any]] = {"dylora": {"block_size": 2}}


def lycoris(kind: str, layer: nn.Module, **options: Any) -> Any:
    """A layer with an adapter of rank 2 and alpha 1."""
    rank_and_alpha = () if kind == "norm" else (2, 1.0)
    made = MODULES[kind](
        "lycoris_q", layer, 1.0, *rank_and_alpha, **OPTIONS.get(kind, {}), **options
    )
    for parameter in made.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return made


def save(folder: Path, layer: Any, kind: str, **options: Any) -> list[Any]:
    """Two checkpoints of an adapter as LyCORIS names its tensors; the adapters."""
    folder.mkdir()
    torch.manual_seed(0)
    adapters = [lycoris(kind, layer, **options) for _ in range(2)]
    for step, adapter in enumerate(adapters):
        state = {f"lycoris_q.{name}": value for name, value in adapter.state_dict().items()}
        torch.save(state, folder / f"step_{step}.pt")
    return adapters


def layer_for(kind: str) -> nn.Module:
    return nn.LayerNorm(8) if kind == "norm" else nn.Linear(8, 8)


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_a_kind_of_lycoris_is_warned_of_if_it_is_no_sum(tmp_path, caplog, kind):
    save(tmp_path / "run", layer_for(kind), kind)
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    warned = "not the average of what they add to the weights" in caplog.text
    assert warned == (kind not in SUMS)
    assert ("lora=exact" in caplog.text) == (kind in PRODUCTS)
    if kind in SUMS:
        states = [torch.load(tmp_path / "run" / f"step_{step}.pt") for step in range(2)]
        assert_mean(torch.load(tmp_path / "out.pt"), states)


@pytest.mark.parametrize(
    "options", [{"use_tucker": True}, {"weight_decompose": True}], ids=["Tucker", "DoRA"]
)
@pytest.mark.parametrize("kind", ["locon", "loha"])
def test_what_is_no_plain_product_is_not_averaged_exactly(tmp_path, kind, options):
    save(tmp_path / "run", nn.Conv2d(4, 4, 3), kind, **options)
    with pytest.raises(FormatError, match=r"is a factor of (Tucker|DoRA|LoHa), not of a plain"):
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", lora="exact")


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 6), nn.Conv2d(4, 6, 3)], ids=lambda each: each._get_name()
)
def test_the_weights_that_lycoris_makes_of_an_exact_average(tmp_path, layer):
    adapters = save(tmp_path / "run", layer, "locon")
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", lora="exact")
    state = load_file(tmp_path / "out.safetensors")
    rank = len(state["lycoris_q.lora_down.weight"])
    joined = MODULES["locon"]("lycoris_q", layer, 1.0, rank, float(state["lycoris_q.alpha"]))
    joined.load_state_dict({name.partition(".")[2]: value for name, value in state.items()})
    wanted = sum(each.get_diff_weight()[0].double() for each in adapters) / 2
    torch.testing.assert_close(joined.get_diff_weight()[0].double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: loralib.Linear(8, 8, r=2),
        lambda: loralib.Embedding(6, 8, r=2),
        lambda: loralib.Conv2d(4, 4, 3, r=2),
        lambda: loralib.MergedLinear(8, 24, r=2, enable_lora=[True, False, True]),
    ],
    ids=["Linear", "Embedding", "Conv2d", "MergedLinear"],
)
def test_factors_of_loralib_have_no_scale(tmp_path, caplog, make):
    """It is in the code of the model alone: `lora_alpha`."""
    (tmp_path / "run").mkdir()
    for step in range(2):
        model = nn.Sequential(make())
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        torch.save(loralib.lora_state_dict(model), tmp_path / "run" / f"step_{step}.pt")
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    assert "not the average of what they add to the weights" in caplog.text
    assert "ib is unknown; merge each adapter into its model" in caplog.text
    with pytest.raises(
        FormatError, match="has no alpha, without which the scale in a file of lora"
    ):
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", lora="exact")
