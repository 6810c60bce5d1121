"""LoRA adapters under the names of many libraries, against their products in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import ckptavg
from ckptavg.errors import FormatError, MismatchError, OutputError, VerificationError

Arrays = dict[str, np.ndarray[Any, Any]]

DOWN_AND_UP = {
    "kohya-ss": ("lora_unet_down_blocks_0_attn1_to_q", ".lora_down.weight", ".lora_up.weight"),
    "text encoder of kohya-ss": ("lora_te1_mlp_fc1", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("unet.mid.to_q", ".lora.down.weight", ".lora.up.weight"),
    "attention processors": ("unet.mid.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
    "linear layers": (
        "text_encoder.q_proj", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight",
    ),
    "diffusers with PEFT": ("transformer.blocks.0.to_q", ".lora_A.weight", ".lora_B.weight"),
}  # fmt: skip
SCHEMES = pytest.mark.parametrize(("module", "down", "up"), DOWN_AND_UP.values(), ids=DOWN_AND_UP)
KOHYA = DOWN_AND_UP["kohya-ss"]


def factors(names, seed: int, rank: int = 4, alpha=None, dtype: Any = np.float32) -> Arrays:
    """The factors of a linear layer, and its alpha as a tensor where there is one."""
    module, down, up = names
    made = np.random.default_rng(seed)
    state = {
        f"{module}{down}": made.normal(size=(rank, 6)).astype(dtype),
        f"{module}{up}": made.normal(size=(5, rank)).astype(dtype),
    }
    return state if alpha is None else {**state, f"{module}.alpha": np.array(alpha, dtype)}


def product(state: Arrays, names) -> Any:
    """What is added to the weight: alpha is the rank where there is none."""
    module, down, up = names
    a, b = (state[f"{module}{factor}"].astype(np.float64) for factor in (down, up))
    alpha = float(state.get(f"{module}.alpha", len(a)))
    return alpha / len(a) * np.tensordot(b, a, (1, 0)).reshape(len(b), *a.shape[1:])


def save(folder: Path, *states: Arrays, metadata: dict[str, str] | None = None) -> Path:
    """A run as kohya-ss leaves it."""
    folder.mkdir()
    for epoch, state in enumerate(states, 1):
        safetensors.numpy.save_file(state, folder / f"mine-{2 * epoch:06}.safetensors", metadata)
    return folder


def load(path: Path) -> tuple[Arrays, dict[str, str]]:
    with safe_open(path, "numpy") as file:
        return safetensors.numpy.load_file(path), file.metadata()


@SCHEMES
def test_factors_apart_are_averaged_with_a_warning(tmp_path, caplog, module, down, up):
    names = (module, down, up)
    run = save(tmp_path / "run", *(factors(names, seed) for seed in range(2)))
    ckptavg.average(run, tmp_path / "out.safetensors")
    assert (
        "not the average of what they add to the weights; `lora=exact` computes that average"
        in caplog.text
    )


@SCHEMES
def test_the_product_of_the_average_is_the_mean_of_the_products(tmp_path, module, down, up):
    names = (module, down, up)
    states = [factors(names, 0, 4, 2.0), factors(names, 1, 2, 6.0), factors(names, 2, 3, 3.0)]
    run = save(tmp_path / "run", *states)
    summary = ckptavg.average(run, tmp_path / "out.safetensors", lora="exact", weights=[1, 2, -0.5])
    assert summary.roles == {"joined": 3}
    found, _ = load(tmp_path / "out.safetensors")
    assert found[f"{module}.alpha"] == len(found[f"{module}{down}"]) == 9
    terms = zip((1, 2, -0.5), states, strict=True)
    expected = sum(weight * product(state, names) for weight, state in terms) / 2.5
    np.testing.assert_allclose(product(found, names), expected, rtol=0, atol=5e-6)


@SCHEMES
def test_without_an_alpha_it_is_the_rank_and_that_is_said(tmp_path, caplog, module, down, up):
    names = (module, down, up)
    states = [factors(names, 0, 4), factors(names, 1, 2)]
    ckptavg.average(save(tmp_path / "run", *states), tmp_path / "out.safetensors", lora="exact")
    assert "no alpha is recorded: the rank counts as alpha" in caplog.text
    found, _ = load(tmp_path / "out.safetensors")
    expected = np.mean([product(state, names) for state in states], axis=0)
    np.testing.assert_allclose(product(found, names), expected, rtol=0, atol=5e-6)


@SCHEMES
def test_unlike_alphas_are_refused_with_file_and_value(tmp_path, module, down, up):
    names = (module, down, up)
    run = save(tmp_path / "run", factors(names, 0, alpha=4.0), factors(names, 1, alpha=8.0))
    with pytest.raises(
        MismatchError, match=r"not averaged if their ranks, alphas or .* differ \(`lora=exact`"
    ) as caught:
        ckptavg.average(run, tmp_path / "out.safetensors")
    [difference] = caught.value.differences
    first, last = run / "mine-000002.safetensors", run / "mine-000004.safetensors"
    assert difference == f"{module}.alpha: 4.0 in {first}, 8.0 in {last}"
    assert not (tmp_path / "out.safetensors").exists()


def test_convolutions(tmp_path):
    names = ("lora_unet_conv_in", ".lora_down.weight", ".lora_up.weight")
    made = np.random.default_rng(0)
    states = [
        {
            "lora_unet_conv_in.lora_down.weight": made.normal(size=(rank, 3, 2, 2)),
            "lora_unet_conv_in.lora_up.weight": made.normal(size=(4, rank, 1, 1)),
            "lora_unet_conv_in.alpha": np.array(alpha),
        }
        for rank, alpha in ((2, 1.0), (3, 4.5))
    ]
    ckptavg.average(save(tmp_path / "run", *states), tmp_path / "out.safetensors", lora="exact")
    found, _ = load(tmp_path / "out.safetensors")
    assert found["lora_unet_conv_in.lora_up.weight"].shape == (4, 5, 1, 1)

    def kernel(state):
        flat = {name: np.squeeze(each) if "up" in name else each for name, each in state.items()}
        return product(flat, names)

    expected = np.mean([kernel(state) for state in states], axis=0)
    np.testing.assert_allclose(kernel(found), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_alpha_that_16_bits_cannot_hold_is_made_up_for(tmp_path, dtype):
    """A rank of 259 is 260 as a bfloat16."""
    states = [factors(KOHYA, seed, rank, 8) for seed, rank in ((0, 130), (1, 129))]
    run = save(tmp_path / "run", *states)
    ckptavg.average(run, tmp_path / "out.safetensors", lora="exact", dtype=dtype)
    found, _ = load(tmp_path / "out.safetensors")
    assert found[f"{KOHYA[0]}.alpha"] == ml_dtypes.bfloat16(259) == 260
    expected = np.mean([product(state, KOHYA) for state in states], axis=0)
    tolerance = 2e-2 if dtype else 1e-5
    np.testing.assert_allclose(product(found, KOHYA), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("lora", ["separate", "exact"])
def test_an_alpha_that_only_some_have_is_refused_with_the_way_out(tmp_path, lora):
    run = save(tmp_path / "run", factors(KOHYA, 0, alpha=4.0), factors(KOHYA, 1))
    with pytest.raises(MismatchError) as caught:
        ckptavg.average(run, tmp_path / "out.safetensors", lora=lora)
    [difference] = caught.value.differences
    assert difference.startswith(f"{KOHYA[0]}.alpha: missing in {run / 'mine-000004.safetensors'}")
    assert difference.endswith("; merge each adapter into its model, and average the models")


def test_alphas_that_are_integers(tmp_path):
    """kohya-ss stores the rank, an integer, where no alpha is given."""
    states = [
        {**factors(KOHYA, seed), f"{KOHYA[0]}.alpha": np.array(alpha)}
        for seed, alpha in ((0, 4), (1, 8))
    ]
    run = save(tmp_path / "run", *states)
    with pytest.raises(MismatchError, match=r"alpha: 4\.0 in .*, 8\.0 in "):
        ckptavg.average(run, tmp_path / "out.safetensors")
    ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")
    found, _ = load(tmp_path / "out.safetensors")
    expected = np.mean([product(state, KOHYA) for state in states], axis=0)
    np.testing.assert_allclose(product(found, KOHYA), expected, rtol=0, atol=5e-6)


def test_an_alpha_that_no_byte_can_hold_is_refused(tmp_path):
    states = [
        {**factors(KOHYA, seed, 100), f"{KOHYA[0]}.alpha": np.array(4, np.int8)}
        for seed in range(2)
    ]
    run = save(tmp_path / "run", *states)
    with pytest.raises(ckptavg.CkptAvgError, match="200 does not fit int8"):
        ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")


@pytest.mark.parametrize("alpha", [0.0, np.inf, [4.0, 4.0]], ids=str)
def test_an_alpha_that_makes_no_sense_is_refused(tmp_path, alpha):
    states = [factors(KOHYA, seed, alpha=alpha) for seed in range(2)]
    run = save(tmp_path / "run", *states)
    with pytest.raises(FormatError, match=r"mine-000002.*alpha: is not a valid alpha"):
        ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")


def test_an_alpha_of_another_layer_is_averaged_as_ever(tmp_path):
    states = [
        {**factors(KOHYA, seed, alpha=4.0), "snake.alpha": np.array(float(seed))}
        for seed in range(2)
    ]
    run = save(tmp_path / "run", *states)
    for lora in ("separate", "exact"):
        ckptavg.average(run, tmp_path / "out.safetensors", lora=lora, force=True)
        assert load(tmp_path / "out.safetensors")[0]["snake.alpha"] == 0.5


def test_metadata_of_kohya_are_those_of_the_average(tmp_path):
    metadata = {
        "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_args": "{}", "ss_epoch": "4",
        "ss_network_module": "networks.lora",
    }  # fmt: skip
    states = [factors(KOHYA, seed, alpha=2.0) for seed in range(3)]
    run = save(tmp_path / "run", *states, metadata=metadata)
    ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")
    _, found = load(tmp_path / "out.safetensors")
    assert {name: text for name, text in found.items() if name.startswith("ss_")} == {
        "ss_network_dim": "12",
        "ss_network_alpha": "12",
        "ss_network_module": "networks.lora",
    }
    ckptavg.average(run, tmp_path / "apart.safetensors")
    _, found = load(tmp_path / "apart.safetensors")
    assert found["ss_network_alpha"] == "2.0"


def test_alphas_in_the_metadata_alone(tmp_path):
    run = save(tmp_path / "run", factors(KOHYA, 0), metadata={"ss_network_alpha": "4"})
    safetensors.numpy.save_file(
        factors(KOHYA, 1), run / "mine-000004.safetensors", {"ss_network_alpha": "8"}
    )
    with pytest.raises(MismatchError, match=r"ss_network_alpha: 4 in .*000002.*, 8 in .*000004"):
        ckptavg.average(run, tmp_path / "out.safetensors")
    with pytest.raises(FormatError, match=r"000004.*record 8 as alpha, .* use the rank, 4"):
        ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")


def test_copies_under_other_metadata_are_copies_if_the_alpha_is_a_tensor(tmp_path):
    state = factors(KOHYA, 0, alpha=4.0)
    run = save(tmp_path / "run", state, factors(KOHYA, 1, alpha=4.0))
    safetensors.numpy.save_file(state, run / "mine.safetensors", {"ss_network_alpha": "8"})
    assert len(ckptavg.average(run, tmp_path / "out.safetensors").sources) == 2


OTHER_KINDS = {
    "LoKr": ["q.lokr_w1", "q.lokr_w2_a", "q.lokr_w2_b"],
    "LoHa": ["q.hada_w1_a", "q.hada_w1_b", "q.hada_w2_a", "q.hada_w2_b"],
    "DoRA": ["q.lora_down.weight", "q.lora_up.weight", "q.dora_scale"],
    "Tucker": ["q.lora_down.weight", "q.lora_up.weight", "q.lora_mid.weight"],
    "GLoRA": [f"lycoris_q.{name}.weight" for name in ("a1", "a2", "b1", "b2")],
    "T-LoRA": ["lycoris_q.p_layer.weight", "lycoris_q.q_layer.weight", "lycoris_q.lambda_layer"],
    "AdaLoRA": ["q.lora_A", "q.lora_B", "q.lora_E"],
    "VeRA": ["q.vera_lambda_b", "q.vera_lambda_d"],
    "RandLoRA": ["q.randlora_lambda", "q.randlora_gamma"],
    "VB-LoRA": ["q.vblora_logits_A", "q.vblora_logits_B"],
    "OFT": ["q.oft_blocks"],
}


def of_kind(kind: str, seed: int) -> Arrays:
    made = np.random.default_rng(seed)
    return {name: made.normal(size=(3, 3)) for name in OTHER_KINDS[kind]}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_is_no_plain_product_is_named_and_not_recommended(tmp_path, caplog, kind):
    run = save(tmp_path / "run", *(of_kind(kind, seed) for seed in range(2)))
    with pytest.raises(FormatError, match=f"is a factor of {kind}, not") as caught:
        ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")
    assert "merge each adapter into its model" in str(caught.value)
    ckptavg.average(run, tmp_path / "out.safetensors")
    assert f"that average cannot be computed: {run}/mine-000002.safetensors" in caplog.text
    assert f"is a factor of {kind}, not" in caplog.text
    assert "lora=exact" not in caplog.text


def test_unlike_alphas_of_what_has_no_exact_average(tmp_path):
    states = [{**of_kind("LoKr", seed), "q.alpha": np.array(seed + 1.0)} for seed in range(2)]
    run = save(tmp_path / "run", *states)
    with pytest.raises(MismatchError, match="merge each into its model") as caught:
        ckptavg.average(run, tmp_path / "out.safetensors")
    assert "lora=exact" not in str(caught.value)
    assert "q.alpha: 1.0 in " in str(caught.value)


def test_unlike_alphas_of_peft_s_loha(tmp_path):
    for step, alpha in enumerate((4, 8)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        safetensors.numpy.save_file(of_kind("LoHa", step), folder / "adapter_model.safetensors")
        config = {"peft_type": "LOHA", "r": 3, "alpha": alpha}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"alpha: 4 in .*checkpoint-0, 8 in .*checkpoint-1"):
        ckptavg.average(tmp_path / "run", tmp_path / "out")


WITHOUT_ALPHA = {
    "loralib": ("lora_A", "lora_B"),
    "PEFT in a model": ("q.lora_A.default.weight", "q.lora_B.default.weight"),
    "PEFT alone": ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
    "embeddings": ("e.lora_embedding_A.default", "e.lora_embedding_B.default"),
}  # fmt: skip


@pytest.mark.parametrize(("a", "b"), WITHOUT_ALPHA.values(), ids=WITHOUT_ALPHA)
def test_where_no_scale_is_known_the_products_are_not_averaged(tmp_path, caplog, a, b):
    made = np.random.default_rng(0)
    states = [
        {a: made.normal(size=(2, 5)), b: made.normal(size=(7, 2)), "q.weight": np.ones((7, 5))}
        for _ in range(2)
    ]
    run = save(tmp_path / "run", *states)
    with pytest.raises(FormatError, match="has no alpha"):
        ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")
    ckptavg.average(run, tmp_path / "out.safetensors")
    assert (
        "not the average of what they add to the weights; that average cannot be computed"
        in caplog.text
    )
    assert "lora=exact" not in caplog.text


def test_two_adapters_in_one_model_are_not_joined(tmp_path):
    names = [f"q.lora_{factor}.{each}.weight" for factor in "AB" for each in ("one", "two")]
    made = np.random.default_rng(0)
    run = save(
        tmp_path / "run", *({name: made.normal(size=(2, 2)) for name in names} for _ in range(2))
    )
    with pytest.raises(FormatError, match="belongs to a second adapter"):
        ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")


def test_factors_that_are_the_last_checkpoint_s_are_not_joined(tmp_path):
    run = save(tmp_path / "run", *(factors(KOHYA, seed, alpha=4.0) for seed in range(2)))
    with pytest.raises(MismatchError, match=r"000002") as caught:
        ckptavg.average(run, tmp_path / "out.safetensors", lora="exact", take_last=[r".*\.alpha"])
    assert "all adapters must have the same" in str(caught.value)


def test_a_torch_file_holds_no_joined_factors(tmp_path):
    run = save(tmp_path / "run", *(factors(KOHYA, seed) for seed in range(2)))
    with pytest.raises(OutputError, match=r"end with \.safetensors or a slash"):
        ckptavg.average(run, tmp_path / "out.pt", lora="exact")


def diffusers_metadata(**settings: Any) -> dict[str, str]:
    """As diffusers records the configuration of PEFT for a component."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {}, **settings}
    named = {f"transformer.{name}": value for name, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(named)}


def of_diffusers(folder: Path, *settings: dict[str, Any]) -> list[Arrays]:
    """A run as the scripts of diffusers leave it."""
    names = DOWN_AND_UP["diffusers with PEFT"]
    states = [factors(names, step) for step in range(len(settings))]
    for step, (state, config) in enumerate(zip(states, settings, strict=True)):
        path = folder / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors"
        path.parent.mkdir(parents=True)
        safetensors.numpy.save_file(state, path, diffusers_metadata(**config))
    return states


def test_the_configuration_in_the_metadata_is_heeded_and_written(tmp_path):
    names = DOWN_AND_UP["diffusers with PEFT"]
    states = of_diffusers(tmp_path / "run", {}, {"alpha_pattern": {"blocks.0.to_q": 2}})
    with pytest.raises(MismatchError, match=r"transformer\.alpha_pattern: nothing in "):
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    output = tmp_path / "out.safetensors"
    ckptavg.average(tmp_path / "run", output, lora="exact")
    found, metadata = load(output)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 8
    assert config["transformer.alpha_pattern"] == {}
    expected = (8 / 4 * product(states[0], names) + 2 / 4 * product(states[1], names)) / 2
    np.testing.assert_allclose(product(found, names), expected, rtol=0, atol=5e-6)
    assert ckptavg.verify(output, [tmp_path / "run"]).compared == 2
    metadata["lora_adapter_metadata"] = metadata["lora_adapter_metadata"].replace("8", "4")
    safetensors.numpy.save_file(found, output, metadata)
    with pytest.raises(VerificationError, match="its lora_adapter_metadata is not what"):
        ckptavg.verify(output, [tmp_path / "run"])


def test_metadata_that_are_no_configuration_are_one_line(tmp_path):
    of_diffusers(tmp_path / "run", {}, {"use_dora": True})
    with pytest.raises(FormatError, match=r"checkpoint-1.*: has use_dora"):
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", lora="exact")
    path = tmp_path / "run" / "checkpoint-1" / "pytorch_lora_weights.safetensors"
    for text in ("{", "[]", "[" * 100_000):
        safetensors.numpy.save_file(load(path)[0], path, {"lora_adapter_metadata": text})
        for lora in ("exact", "separate"):
            with pytest.raises(FormatError, match="its lora_adapter_metadata is no"):
                ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", lora=lora)


def test_unlike_ranks_are_averaged_as_products_alone(tmp_path):
    run = save(tmp_path / "run", factors(KOHYA, 0, 4, 1.0), factors(KOHYA, 1, 2, 1.0))
    with pytest.raises(MismatchError) as caught:
        ckptavg.average(run, tmp_path / "out.safetensors")
    for difference in caught.value.differences:
        assert difference.endswith("; `lora=exact` averages products of unlike ranks")
    ckptavg.average(run, tmp_path / "out.safetensors", lora="exact")


def test_unlike_ranks_of_what_has_no_exact_average(tmp_path):
    dora = {f"{KOHYA[0]}.dora_scale": np.ones((5, 1)), "other": np.ones(1), "more": np.ones(1)}
    states = [{**factors(KOHYA, rank, rank, 1.0), **dora} for rank in (4, 2)]
    run = save(tmp_path / "run", *states)
    with pytest.raises(MismatchError, match=r"shape \(4, 6\)") as caught:
        ckptavg.average(run, tmp_path / "out.safetensors")
    assert "`" not in str(caught.value)


def test_an_alpha_is_not_skipped_for_lack_of_it_elsewhere(tmp_path):
    """Without it, the factors of the others would have another scale."""
    run = save(tmp_path / "run", factors(KOHYA, 0, alpha=1.0), factors(KOHYA, 1))
    with pytest.raises(MismatchError, match=r"alpha: missing in .*000004") as caught:
        ckptavg.average(run, tmp_path / "out.safetensors")
    assert "`" not in str(caught.value)


@pytest.mark.parametrize("name", ["q.lora_E." * 20_000 + ".\n", "lora_aaaa" * 20_000 + "/"])
def test_long_names_take_no_quadratic_time(tmp_path, name):
    """A minute, where every part of the name is searched to its end."""
    run = save(tmp_path / "run", *({name: np.full(1, float(step))} for step in range(2)))
    ckptavg.average(run, tmp_path / "out.safetensors")
