"""Conversions of floats of 16 and 8 bits: held against torch's own, code by code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ckptavg
from ckptavg.formats.tensors import BY_NAME, new_arrays
from ckptavg.merge import arithmetic
from ckptavg.merge.arithmetic import all_finite, nonfinite, rounded, widened
from tests.oracle import save_run

NAMES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(params=["numkong", "numpy"], autouse=True)
def library(request, monkeypatch):
    """Both ways of converting: with the library, and where it is not installed."""
    if request.param == "numpy":
        monkeypatch.setattr(arithmetic, "_numkong", lambda: None)
    else:
        assert arithmetic._numkong() is not None


def codes(name: str) -> np.ndarray:
    bits = BY_NAME[name].bits
    return np.arange(1 << bits, dtype=f"u{bits // 8}").view(BY_NAME[name].numpy)


def by_torch(values: np.ndarray, name: str) -> np.ndarray:
    """Torch's conversion, as codes of the dtype or as float32."""
    size = values.itemsize
    tensor = torch.from_numpy(values.view(f"i{size}").copy())
    source = values.dtype.name
    converted = tensor.view(getattr(torch, source)).to(getattr(torch, name))
    if name == "float32":
        return converted.numpy()
    unsigned = torch.uint8 if converted.itemsize == 1 else torch.int16
    return converted.view(unsigned).numpy().view(BY_NAME[name].numpy)


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    """The same bits, but for those of NaN, of which only the sign has to be the same."""
    nan = np.isnan(one.astype(np.float32))
    assert np.array_equal(nan, np.isnan(other.astype(np.float32)))
    sign, other_sign = (np.signbit(values.astype(np.float32)) for values in (one, other))
    assert np.array_equal(sign, other_sign)
    unsigned = f"u{one.itemsize}"
    assert np.array_equal(one.view(unsigned)[~nan], other.view(unsigned)[~nan])


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy says so of NaN
def test_every_code_is_widened_as_torch_does(name):
    values = codes(name)
    wide = widened(values, new_arrays(values.shape)).astype(np.float32)
    assert_same(wide, by_torch(values, "float32"))


def test_a_single_number_is_converted(name):
    number = np.array(1.5).astype(BY_NAME[name].numpy)
    wide = widened(number, new_arrays(()))
    assert wide == 1.5
    assert rounded(np.array(1.5, np.float32), BY_NAME[name], new_arrays(())) == number


def around(name: str) -> np.ndarray:
    """All numbers, what lies halfway between neighbours, and float32's neighbours of both."""
    values = codes(name).astype(np.float32)
    numbers = np.unique(values[np.isfinite(values)].astype(np.float64))
    both = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]).astype(np.float32)
    near = [np.nextafter(both, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([both, -both, *near])


@pytest.mark.parametrize("random", [False, True])
def test_float32_is_rounded_as_torch_rounds(name, random):
    values = around(name)
    if random:  # NaN, Inf and subnormal values among them
        bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32)
        values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        found = rounded(values, BY_NAME[name], new_arrays(values.shape))
    # What does not fit is no number afterwards: torch makes it the largest number in float8_e4m3fn.
    fits = np.abs(values) <= float(ml_dtypes.finfo(name).max)
    assert_same(found[fits], by_torch(values[fits], name))
    others, expected = found[~fits], by_torch(values[~fits], name)
    no_number = ~np.isfinite(others.astype(np.float32))
    assert_same(others[~no_number], expected[~no_number])
    assert no_number[~np.isfinite(values[~fits])].all()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e39, -1e39])
@pytest.mark.parametrize("payload", [0, 1, (1 << 22) - 1])
def test_what_is_no_number_stays_none_among_numbers(name, number, payload):
    values = np.ones(1000, np.float32)
    with np.errstate(all="ignore"):
        values[500] = number
        values.view(np.uint32)[500] |= payload if np.isnan(number) else 0
        found = rounded(values, BY_NAME[name], new_arrays((1000,)))
    odd = ~np.isfinite(found.astype(np.float32))
    assert odd[500]
    assert odd.sum() == 1


def test_nan_and_inf_are_found(name):
    values, dtype = codes(name), BY_NAME[name]
    numbers = np.isfinite(values.astype(np.float32))
    assert np.array_equal(nonfinite(values, dtype), ~numbers)
    for code in values[~numbers]:
        assert not all_finite(np.array([code, values[0]]), dtype, new_arrays((2,)))
    assert all_finite(values[numbers], dtype, new_arrays((int(numbers.sum()),)))


@pytest.mark.parametrize("count", [2, 7, 100])
def test_averages_are_those_of_float64(name, count, tmp_path):
    values = codes(name).astype(np.float32)
    numbers = torch.from_numpy(values[np.isfinite(values)] / count)
    generator = torch.Generator().manual_seed(count)
    states = [
        {"a": numbers[torch.randint(len(numbers), (999,), generator=generator)]}
        for _ in range(count)
    ]
    states = [{"a": state["a"].to(getattr(torch, name))} for state in states]
    save_run(tmp_path / "run", states)
    ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
    total = states[0]["a"].double()
    for state in states[1:]:
        total += state["a"].double()
    expected = (total / count).float().to(states[0]["a"].dtype)
    assert torch.equal(
        load_file(tmp_path / "o.safetensors")["a"].view(torch.uint8), expected.view(torch.uint8)
    )


def test_minus_zero_is_not_lost(name, tmp_path):
    states = [{"a": torch.full((5,), -0.0).to(getattr(torch, name))} for _ in range(3)]
    save_run(tmp_path / "run", states)
    ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["a"].float().signbit().all()


def test_subnormal_numbers_survive_a_processor_that_flushes_them(name, tmp_path):
    smallest = codes(name)[3].astype(np.float64)
    dtype = getattr(torch, name)
    states = [{"a": torch.full((4,), float(smallest), dtype=torch.float64).to(dtype)}] * 2
    save_run(tmp_path / "run", states)
    if name == "bfloat16":
        pytest.skip("its subnormal numbers are those of float32")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
    finally:
        torch.set_flush_denormal(False)
    found = load_file(tmp_path / "o.safetensors")["a"]
    assert torch.equal(found.view(torch.uint8), states[0]["a"].view(torch.uint8))
