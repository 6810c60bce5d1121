"""Floats of 16 and 8 bits: held against ml_dtypes' and numpy's own conversions, code by code."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ckptavg
from ckptavg.formats.tensors import BY_NAME, new_arrays
from ckptavg.merge.arithmetic import FORMATS, Sum, all_finite, rounded
from tests.oracle import save_run

pytestmark = pytest.mark.parametrize("name", FORMATS)


def _codes(name: str) -> np.ndarray:
    bits = FORMATS[name].bits
    return np.arange(1 << bits, dtype=f"u{bits // 8}").view(BY_NAME[name].numpy)


def _finite(name: str) -> np.ndarray:
    values = _codes(name)
    return values[np.isfinite(values.astype(np.float64))]


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    unsigned = f"u{one.itemsize}"
    return np.array_equal(one.view(unsigned), other.view(unsigned))


def test_every_number_is_widened_exactly(name):
    form, values = FORMATS[name], _finite(name)
    wide, largest = form.widen(values, np.empty(len(values), np.float32))
    expected = values.astype(np.float64) * form.scale
    assert np.array_equal(wide.astype(np.float64), expected)
    assert np.array_equal(np.signbit(wide), np.signbit(expected))
    assert largest == np.abs(expected).max()
    assert not (expected / form.spacing % 1).any()


def test_what_is_no_number_stays_none_and_is_not_bounded(name):
    form, values = FORMATS[name], _codes(name)
    with np.errstate(invalid="ignore"):
        wide, largest = form.widen(values, np.empty(len(values), np.float32))
        expected = values.astype(np.float64) * form.scale
    assert largest == np.inf
    assert np.array_equal(wide, expected, equal_nan=True)
    assert not all_finite(values, BY_NAME[name], new_arrays(values.shape))
    assert all_finite(_finite(name), BY_NAME[name], new_arrays(_finite(name).shape))


def _around(name: str) -> np.ndarray:
    """All numbers, what lies halfway between neighbours, and float32's neighbours of both."""
    numbers = np.unique(_finite(name).astype(np.float64))
    both = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]).astype(np.float32)
    near = [np.nextafter(both, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([both, *near])


@pytest.mark.parametrize("random", [False, True])
def test_float32_is_rounded_as_a_cast_rounds(name, random):
    values = _around(name)
    if random:
        bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 21, np.uint32)
        values = bits.view(np.float32)
    # A part at a time: where a large value is near, all of them take the libraries' way.
    numbers = values[np.abs(values) < np.abs(_finite(name).astype(np.float32)).max() / 2]
    assert len(numbers) > len(values) / 4
    for part in (numbers, values, -numbers):
        with np.errstate(all="ignore"):
            found = rounded(part, BY_NAME[name], new_arrays(part.shape))
            expected = part.astype(BY_NAME[name].numpy)
        assert _same_bits(found, expected)


@pytest.mark.parametrize("largest", [0.01, 1.0, None], ids=["small", "one", "all"])
@pytest.mark.parametrize("count", [2, 7, 100])
def test_sums_are_those_of_float64(name, largest, count):
    """With small values they are held in float32; with large ones they go over to float64."""
    form, numbers = FORMATS[name], _finite(name)
    if largest is not None:
        numbers = numbers[np.abs(numbers.astype(np.float64)) <= largest]
    generator = np.random.default_rng(count)
    terms = [generator.choice(numbers, 999) for _ in range(count)]
    for target in (name, "float32", "float64"):
        whole = Sum(np.empty(999), form)
        expected = np.zeros(999)
        for term in terms:
            whole.add(*form.widen(term, np.empty(999, np.float32)))
            expected += term.astype(np.float64)
        found = whole.mean(count, BY_NAME[target], new_arrays((999,)))
        expected /= count
        if target != "float64":
            expected = expected.astype(np.float32)
        assert np.array_equal(found, expected.astype(BY_NAME[target].numpy))


def test_minus_zero_is_not_lost(name):
    form, zeros = FORMATS[name], np.full(5, -0.0).astype(BY_NAME[name].numpy)
    total = Sum(np.empty(5), form)
    for _ in range(3):
        total.add(*form.widen(zeros, np.empty(5, np.float32)))
    assert np.signbit(total.mean(3, BY_NAME[name], new_arrays((5,))).astype(np.float32)).all()


def test_divisors_that_float32_does_not_have(name):
    form, numbers = FORMATS[name], _finite(name)
    numbers = numbers[np.abs(numbers.astype(np.float32)) < 1]
    total = Sum(np.empty(len(numbers)), form)
    total.add(*form.widen(numbers, np.empty(len(numbers), np.float32)))
    found = total.mean(0.001, BY_NAME["float32"], new_arrays(numbers.shape))
    assert np.array_equal(found, (numbers.astype(np.float64) / 0.001).astype(np.float32))


def test_subnormal_numbers_survive_a_processor_that_flushes_them(name, tmp_path):
    dtype = getattr(torch, name)
    smallest = torch.full((4,), 3.0, dtype=torch.float64) * FORMATS[name].spacing
    states = [{"a": (smallest / FORMATS[name].scale).to(dtype)} for _ in range(2)]
    save_run(tmp_path / "run", states)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
    finally:
        torch.set_flush_denormal(False)
    found = load_file(tmp_path / "o.safetensors")["a"]
    assert torch.equal(found.view(torch.uint8), states[0]["a"].view(torch.uint8))
