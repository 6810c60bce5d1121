"""LoRA adapters: the average of their products, against the products themselves in float64."""

from __future__ import annotations

import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors import safe_open

import ckptavg
from ckptavg.errors import (
    CkptAvgError,
    FormatError,
    MismatchError,
    OutputError,
    SelectionError,
    ValueRangeError,
)
from ckptavg.formats.lora_patterns import Patterns

WRAPPER = "base_model.model."
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def save_adapter(folder: Path, tensors, **config) -> Path:
    folder.mkdir(parents=True)
    named = {WRAPPER + name: np.array(value, order="C") for name, value in tensors.items()}
    safetensors.numpy.save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
    return folder


def random_factors(rank: int, seed: int, modules=("q", "layers.1.v"), dtype=np.float32):
    made = np.random.default_rng(seed)
    return {
        f"{module}.lora_{factor}.weight": made.normal(size=shape).astype(dtype)
        for module in modules
        for factor, shape in (("A", (rank, 5)), ("B", (7, rank)))
    }


def product(tensors, module, scale):
    a, b = (tensors[f"{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return scale * b @ a


def load(folder: Path):
    found = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name.removeprefix(WRAPPER): value for name, value in found.items()}, config


def scale_of(config, module):
    alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
    rank = config["rank_pattern"].get(module, config["r"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def test_the_product_of_the_average_is_the_mean_of_the_products(tmp_path):
    states = [random_factors(2, seed) for seed in range(3)]
    for step, state in enumerate(states):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state)
    summary = ckptavg.average(tmp_path / "run", f"{tmp_path}/out/", lora="exact")
    assert summary.roles == {"joined": 4}
    found, config = load(tmp_path / "out")
    for module in ("q", "layers.1.v"):
        expected = np.mean([product(state, module, 4 / 2) for state in states], axis=0)
        assert scale_of(config, module) == 1
        assert config["r"] == found[f"{module}.lora_A.weight"].shape[0] == 6
        np.testing.assert_allclose(product(found, module, 1.0), expected, rtol=0, atol=2e-6)


def test_ranks_scales_and_weights_of_each_are_heeded(tmp_path):
    kinds: list[tuple[int, float, dict[str, Any]]] = [
        (2, 3.0, {"lora_alpha": 3}),
        (4, 8 / math.sqrt(4), {"r": 4, "lora_alpha": 8, "use_rslora": True}),
        (3, 5.0, {"r": 9, "rank_pattern": {"q": 3}, "alpha_pattern": {"q": 15}}),
    ]
    scales = [3 / 2, 8 / math.sqrt(4), 15 / 3]
    states = [random_factors(rank, rank, modules=("q",)) for rank, _, _ in kinds]
    for step, (state, (_, _, config)) in enumerate(zip(states, kinds, strict=True)):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state, **config)
    weights = [1, 2, -0.5]
    ckptavg.average(tmp_path / "run", f"{tmp_path}/out/", lora="exact", weights=weights)
    found, config = load(tmp_path / "out")
    terms = zip(weights, states, scales, strict=True)
    expected = sum(weight * product(state, "q", scale) for weight, state, scale in terms) / 2.5
    assert config["r"] == 9
    assert config["use_rslora"] is False
    assert scale_of(config, "q") == 1
    np.testing.assert_allclose(product(found, "q", 1.0), expected, rtol=0, atol=5e-6)


def test_modules_of_unlike_ranks_get_patterns_that_tell_them_apart(tmp_path):
    for step in range(2):
        state = random_factors(2, step, modules=("q", "deep.q", "x.deep.q"))
        state |= random_factors(3, step, modules=("deep.q",))
        config = {"rank_pattern": {"^deep.q": 3}}
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state, **config)
    ckptavg.average(tmp_path / "run", f"{tmp_path}/out/", lora="exact")
    _, config = load(tmp_path / "out")
    assert config["rank_pattern"] == config["alpha_pattern"] == {"x.deep.q": 4, "deep.q": 6, "q": 4}
    # The first pattern that fits the end of a name is PEFT's choice.
    assert list(config["rank_pattern"]) == ["x.deep.q", "deep.q", "q"]


def test_grouped_convolutions_keep_their_groups_together(tmp_path):
    made = np.random.default_rng(0)
    states = [
        {
            "c.lora_A.weight": made.normal(size=(rank, 3, 2, 2)).astype(np.float32),
            "c.lora_B.weight": made.normal(size=(4, rank // 2, 1, 1)).astype(np.float32),
        }
        for rank in (2, 4)
    ]
    for step, state in enumerate(states):
        rank = len(state["c.lora_A.weight"])
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state, r=rank, lora_alpha=rank)

    def kernel(state):
        """`[out, in, h, w]`, group by group."""
        a, b = (state[f"c.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        halves = zip(np.split(a, 2), np.split(b[:, :, 0, 0], 2), strict=True)
        return np.concatenate(
            [np.einsum("or,rihw->oihw", b_half, a_half) for a_half, b_half in halves]
        )

    ckptavg.average(tmp_path / "run", f"{tmp_path}/out/", lora="exact")
    found, _ = load(tmp_path / "out")
    expected = np.mean([kernel(state) for state in states], axis=0)
    np.testing.assert_allclose(kernel(found), expected, rtol=0, atol=2e-6)


def test_embeddings_biases_and_whole_modules(tmp_path):
    made = np.random.default_rng(0)
    shapes = {
        "e.lora_embedding_A": (2, 9),
        "e.lora_embedding_B": (4, 2),
        "q.lora_A.weight": (2, 5),
        "q.lora_B.weight": (7, 2),
        "q.lora_B.bias": (7,),
        "head.weight": (3, 4),
    }
    states = [
        {name: made.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    ]
    for step, state in enumerate(states):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state)
    summary = ckptavg.average(tmp_path / "run", f"{tmp_path}/out/", lora="exact")
    assert summary.roles == {"averaged": 1, "joined": 5}
    found, _ = load(tmp_path / "out")

    def mean(of):
        return np.mean([of(state) for state in states], axis=0)

    def table(state):
        return state["e.lora_embedding_B"].astype(float) @ state["e.lora_embedding_A"].astype(float)

    np.testing.assert_allclose(table(found), mean(lambda state: 2 * table(state)), atol=2e-6)
    bias = mean(lambda state: 2.0 * state["q.lora_B.bias"])
    np.testing.assert_allclose(found["q.lora_B.bias"], bias, atol=1e-6)
    wide = [state["head.weight"].astype(np.float64) for state in states]
    np.testing.assert_array_equal(
        found["head.weight"], ((wide[0] + wide[1]) / 2).astype(np.float32)
    )


def test_the_same_ranks_by_chunks_smaller_than_a_factor(tmp_path, monkeypatch):
    states = [random_factors(2, seed) for seed in range(3)]
    for step, state in enumerate(states):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state)
    ckptavg.average(tmp_path / "run", f"{tmp_path}/whole/", lora="exact")
    monkeypatch.setattr("ckptavg.merge.jobs.CHUNK", 7)
    ckptavg.average(tmp_path / "run", f"{tmp_path}/pieces/", lora="exact", threads=3)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes()


def test_factors_apart_are_averaged_with_a_warning(tmp_path, caplog):
    states = [random_factors(2, seed) for seed in range(2)]
    for step, state in enumerate(states):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state)
    ckptavg.average(tmp_path / "run", tmp_path / "out")
    assert "lora=exact" in caplog.text
    found, config = load(tmp_path / "out")
    assert config == PLAIN
    for name, value in found.items():
        wide = sum(state[name].astype(np.float64) for state in states) / 2
        np.testing.assert_array_equal(value, wide.astype(np.float32))


REFUSED = [
    ({"use_dora": True}, FormatError, "use_dora"),
    ({"use_qalora": True}, FormatError, "use_qalora"),
    ({"target_parameters": ["experts"]}, FormatError, "target_parameters"),
    ({"peft_type": "IA3"}, FormatError, "of type IA3"),
    ({"peft_type": ["LORA"]}, FormatError, "of type ['LORA']"),
    ({"init_lora_weights": "pissa_niter_4"}, FormatError, "pissa_niter_4"),
    ({"lora_alpha": None}, FormatError, "no lora_alpha"),
]


@pytest.mark.parametrize(("config", "error", "message"), REFUSED, ids=str)
def test_what_is_no_plain_product_is_refused(tmp_path, config, error, message):
    for step in range(2):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", random_factors(2, step), **config)
    with pytest.raises(error, match=re.escape(message)) as caught:
        ckptavg.average(tmp_path / "run", f"{tmp_path}/out/", lora="exact")
    assert "adapter_config.json" in str(caught.value)
    assert not (tmp_path / "out").exists()


def refusal(tmp_path, states, output="out/", **options):
    for step, state in enumerate(states):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state)
    with pytest.raises(CkptAvgError) as caught:
        ckptavg.average(tmp_path / "run", f"{tmp_path}/{output}", lora="exact", **options)
    assert not (tmp_path / output).exists()
    return caught.value


def test_magnitudes_are_named(tmp_path):
    states = [
        random_factors(2, step) | {"q.lora_magnitude_vector": np.ones(7, np.float32)}
        for step in range(2)
    ]
    error = refusal(tmp_path, states)
    assert "q.lora_magnitude_vector" in str(error)


def test_a_factor_without_the_other_is_named(tmp_path):
    states = [random_factors(2, step) for step in range(2)]
    for state in states:
        del state["q.lora_B.weight"]
    assert "q: has no LoRA factor B" in str(refusal(tmp_path, states))


def test_factors_of_other_widths_are_a_mismatch(tmp_path):
    states = [random_factors(2, 0), random_factors(2, 1)]
    states[1]["q.lora_A.weight"] = np.ones((2, 6), np.float32)
    error = refusal(tmp_path, states)
    assert isinstance(error, MismatchError)
    assert "A (2, 6) and B (7, 2)" in str(error)


def test_ranks_may_differ_only_if_products_are_averaged(tmp_path):
    for step, rank in enumerate((2, 3)):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", random_factors(rank, step), r=rank)
    with pytest.raises(MismatchError, match="shape"):
        ckptavg.average(tmp_path / "run", tmp_path / "out")
    ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")
    assert load(tmp_path / "out")[1]["r"] == 5


def test_a_nan_is_named_with_its_file(tmp_path):
    states = [random_factors(2, step) for step in range(3)]
    states[1]["q.lora_B.weight"][0, 0] = np.nan
    error = refusal(tmp_path, states)
    assert isinstance(error, ValueRangeError)
    assert "checkpoint-1" in str(error)
    ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact", allow_nonfinite=True)


def test_a_single_file_cannot_say_what_the_ranks_are(tmp_path):
    states = [random_factors(2, step) for step in range(2)]
    assert isinstance(refusal(tmp_path, states, "out.safetensors"), OutputError)


def test_weights_that_are_no_adapters_are_refused(tmp_path):
    for step in range(2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        safetensors.numpy.save_file({"w": np.ones(2)}, folder / "model.safetensors")
    with pytest.raises(SelectionError, match="has no LoRA factors"):
        ckptavg.average(tmp_path / "run", f"{tmp_path}/out/", lora="exact")


def two_adapters(tmp_path, configs, states=None):
    """Adapters of the same shapes under two configurations."""
    states = states or [random_factors(2, seed, modules=("q",)) for seed in range(2)]
    for step, (state, config) in enumerate(zip(states, configs, strict=True)):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", state, **config)
    return states


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 8},
        {"r": 4},
        {"use_rslora": True},
        {"rank_pattern": {"q": 3}},
        {"alpha_pattern": {"q": 16}},
    ],
    ids=str,
)
def test_factors_of_unlike_scales_are_not_averaged_apart(tmp_path, config):
    two_adapters(tmp_path, [{}, config])
    with pytest.raises(MismatchError, match=r"ranks, alphas or .* differ.*lora=exact") as caught:
        ckptavg.average(tmp_path / "run", tmp_path / "out")
    [(name, value)] = config.items()
    [difference] = caught.value.differences
    before, after = (f"{tmp_path}/run/checkpoint-{step}" for step in range(2))
    assert difference == f"{name}: {PLAIN.get(name, 'nothing')} in {before}, {value} in {after}"
    assert not (tmp_path / "out").exists()


def test_equal_factors_under_another_alpha_are_another_adapter(tmp_path):
    state = random_factors(2, 0, modules=("q",))
    two_adapters(tmp_path, [{"lora_alpha": 4}, {"lora_alpha": 8}], [state, state])
    summary = ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")
    assert len(summary.sources) == 2
    found, config = load(tmp_path / "out")
    expected = product(state, "q", (4 / 2 + 8 / 2) / 2)
    np.testing.assert_allclose(
        product(found, "q", scale_of(config, "q")), expected, rtol=0, atol=5e-6
    )


def test_equal_factors_under_one_alpha_are_one_adapter(tmp_path):
    state = random_factors(2, 0, modules=("q",))
    two_adapters(tmp_path, [{}, {}], [state, state])
    assert len(ckptavg.average(tmp_path / "run", tmp_path / "out").sources) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": ["q"]}, "alpha_pattern is not a mapping"),
        ({"alpha_pattern": "q"}, "alpha_pattern is not a mapping"),
        ({"alpha_pattern": {"(": 4}}, r"'\(' is not a regular expression"),
        ({"alpha_pattern": {"q{99999999999}": 4}}, "is not a regular expression"),
        ({"alpha_pattern": {"(" * 400 + ")" * 400: 4}}, "is too complex"),
        ({"alpha_pattern": {"(a+)+c": 4}}, r"'\(a\+\)\+c' is too complex"),
        ({"alpha_pattern": {"a*a*a*a*a*c": 4}}, "is too complex"),
        ({"alpha_pattern": {"a?" * 28 + "a" * 28 + "c": 4}}, "is too complex"),
        ({"alpha_pattern": {"(a|aa)" * 28 + "c": 4}}, "is too complex"),
        ({"alpha_pattern": {"\x1b[31m(": 4}}, r"x1b\[31m\(' is not a regular expression"),
        ({"alpha_pattern": {f"q{n}$": 4 for n in range(1001)}}, "has 1,001 patterns: too many"),
        ({"alpha_pattern": {".*": "4"}}, "no lora_alpha"),
        ({"alpha_pattern": {".*": 10**400}}, "no lora_alpha"),
        ({"lora_alpha": 10**400}, "no lora_alpha"),
        ({"lora_alpha": -(10**400)}, "no lora_alpha"),
        ({"lora_alpha": float("inf")}, "no lora_alpha"),
        ({"lora_alpha": float("nan")}, "no lora_alpha"),
        ({"lora_alpha": "4"}, "no lora_alpha"),
        ({"lora_alpha": [4]}, "no lora_alpha"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_scale_that_makes_no_sense_is_one_line(tmp_path, config, message):
    # Backtracking over such a name takes many seconds, and matches nothing.
    states = [random_factors(2, seed, modules=("a" * 28,)) for seed in range(2)]
    two_adapters(tmp_path, [config, config], states)
    with pytest.raises(FormatError, match=message) as caught:
        ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")
    assert str(caught.value).startswith(f"{tmp_path}/run/checkpoint-0/adapter_config.json: ")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_nobody_hears_what_python_thinks_of_a_pattern(tmp_path):
    two_adapters(tmp_path, [{"alpha_pattern": {"[[q]": 4}}, {}])
    ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")  # warnings are errors here


def test_a_name_too_long_to_be_matched_is_one_line(tmp_path):
    states = [random_factors(2, seed, modules=("." * 500,)) for seed in range(2)]
    two_adapters(tmp_path, [{"alpha_pattern": {".*.*.*z": 4}}, {}], states)
    with pytest.raises(FormatError, match="a module's name is too long for them"):
        ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")


def test_the_first_pattern_that_matches_counts(tmp_path):
    """As `get_pattern_key` of PEFT finds it; a dot matches any character."""
    made = random.Random(0)  # noqa: S311 - not for secrets
    for _ in range(300):
        parts = ["q", "a_q", "1", "x-y", "."]
        names = [".".join(made.choices(parts, k=made.randint(1, 4))) for _ in range(8)]
        patterns = {
            made.choice([name, name.replace("_", "."), name[2:] or "q", "[aq].*", "1|q", "x.+"]): n
            for n, name in enumerate(names)
        }
        found = Patterns(patterns, tmp_path)
        for name in names:
            matches = (n for p, n in patterns.items() if re.match(rf"(.*\.)?({p})$", name))
            assert found.first(name, -1) == next(matches, -1), (patterns, name)


def test_a_hundred_thousand_patterns_take_no_time(tmp_path):
    modules = [f"layers.{number}.q_proj" for number in range(200)]
    states = [random_factors(1, seed, modules) for seed in range(2)]
    patterns = {f"layers.{number}.q_proj": number + 1.0 for number in reversed(range(100_000))}
    two_adapters(tmp_path, [{"alpha_pattern": patterns}] * 2, states)
    started = time.process_time()
    ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")
    assert time.process_time() - started < 30  # minutes, pattern by pattern
    found, config = load(tmp_path / "out")
    expected = np.mean([product(state, modules[7], 8.0) for state in states], axis=0)
    joined = product(found, modules[7], scale_of(config, modules[7]))
    np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-4)


def test_an_integer_of_too_many_digits_is_one_line(tmp_path):
    two_adapters(tmp_path, [{}, {}])
    path = tmp_path / "run" / "checkpoint-1" / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": ' + "9" * 5000 + "}")
    for lora in ("exact", "separate"):
        with pytest.raises(FormatError, match=r"adapter_config\.json: is not valid JSON"):
            ckptavg.average(tmp_path / "run", tmp_path / "out", lora=lora)


def test_control_codes_in_a_configuration_are_not_shown(tmp_path):
    config = {"init_lora_weights": "pissa\x1b[31m\n"}
    two_adapters(tmp_path, [config, config])
    with pytest.raises(FormatError, match=r"was initialised with pissa\\x1b\[31m\\n, which"):
        ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")


def test_biases_of_other_widths_are_a_mismatch(tmp_path):
    states = [
        random_factors(2, step) | {"q.lora_B.bias": np.ones(7 - step, np.float32)}
        for step in range(2)
    ]
    error = refusal(tmp_path, states)
    assert isinstance(error, MismatchError)
    assert "q.lora_B.bias: shape (7,)" in str(error)


@pytest.mark.parametrize(
    ("a", "b"),
    [((), ()), ((5,), (7,)), ((2, 5), (7,)), ((0, 5), (7, 0)), ((3, 5), (7, 2))],
    ids=["scalars", "vectors", "a vector", "rank 0", "unlike ranks"],
)
def test_factors_that_make_no_product_are_a_mismatch(tmp_path, a, b):
    made = np.random.default_rng(0)
    states = [
        {
            f"q.lora_{factor}.weight": np.asarray(made.normal(size=shape), np.float32)
            for factor, shape in (("A", a), ("B", b))
        }
        for _ in range(2)
    ]
    error = refusal(tmp_path, states)
    assert isinstance(error, MismatchError)
    assert f"q: A {a} and B {b}" in str(error)


def test_complex_factors_are_not_cut_to_their_real_parts(tmp_path):
    made = np.random.default_rng(0)
    shapes = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (7, 2)}
    states = []
    for step in range(2):
        folder = save_adapter(tmp_path / "run" / f"checkpoint-{step}", {})
        states.append(
            {
                name: (made.normal(size=shape) + 1j * made.normal(size=shape)).astype(np.complex64)
                for name, shape in shapes.items()
            }
        )
        named = {WRAPPER + name: torch.from_numpy(value) for name, value in states[-1].items()}
        (folder / "adapter_model.safetensors").unlink()
        torch.save(named, folder / "adapter_model.bin")
    ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        a, b = (
            file.get_tensor(f"{WRAPPER}q.lora_{factor}.weight").numpy().astype(np.complex128)
            for factor in "AB"
        )
    expected = np.mean(
        [
            2 * state["q.lora_B.weight"].astype(np.complex128) @ state["q.lora_A.weight"]
            for state in states
        ],
        axis=0,
    )
    np.testing.assert_allclose(b @ a, expected, rtol=0, atol=5e-6)


def test_an_overflow_is_the_average_s_and_not_an_input_s(tmp_path):
    states = [random_factors(2, step, modules=("q",), dtype=np.float16) for step in range(2)]
    for state in states:
        state["q.lora_B.weight"][0, 0] = 60_000
    two_adapters(tmp_path, [{"lora_alpha": 16}] * 2, states)
    with pytest.raises(ValueRangeError) as caught:
        ckptavg.average(tmp_path / "run", tmp_path / "out", lora="exact")
    assert str(caught.value) == (f"{WRAPPER}q.lora_B.weight: the average does not fit float16")
    assert not (tmp_path / "out").exists()
