"""The estimators against closed forms and naive loops in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from ckptavg.norm import statistics
from ckptavg.norm.estimators import make_estimator
from ckptavg.norm.statistics import input_statistics, native_statistics

SPLITS = [(60,), (30, 30), (59, 1), (1, 59), (1,) * 60, (7, 2, 40, 11), (25, 25, 10)]


def draw(mean: float, std: float, *shape: int, seed: int = 0) -> torch.Tensor:
    """Float32 values whose channels (axis 1) have means and standard deviations of their own."""
    made = torch.Generator().manual_seed(seed)
    channels = torch.linspace(0.5, 2, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    return torch.randn(shape, generator=made) * channels * std + mean * channels


def estimate(name, batches):
    estimator = make_estimator(name)
    for batch in batches:
        estimator.update(input_statistics(batch))
    return estimator


def axes_of(values: torch.Tensor) -> list[int]:
    return [axis for axis in range(values.dim()) if axis != 1]


def population(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance by their definition, in float64, two passes."""
    exact = values.double()
    mean = exact.mean(axes_of(values), keepdim=True)
    return mean.flatten(), (exact - mean).square().mean(axes_of(values))


def unbiased(values: torch.Tensor) -> torch.Tensor:
    count = values.numel() // values.shape[1]
    return population(values)[1] * count / (count - 1)


class TestExact:
    @pytest.mark.parametrize("split", SPLITS, ids=str)
    @pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (1e4, 1e-2), (-3, 1e3)])
    def test_is_the_population_however_the_data_is_batched(self, mean, std, split):
        data = draw(mean, std, 60, 3, 4)
        found = estimate("exact", data.split(split))
        expected_mean, expected_variance = population(data)
        # Far within the 1e-4 that is promised: the sums are float64's.
        assert ((found.mean - expected_mean).abs() <= 1e-9 * expected_variance.sqrt()).all()
        torch.testing.assert_close(found.variance, expected_variance, rtol=1e-9, atol=0)
        assert found.calls == len(split)

    def test_is_stored_as_the_nearest_float32(self):
        """What can be promised of a float32 buffer at mean 1e4.

        Its neighbours are 9.8e-4 apart there, so it may be wrong by 4.9e-4 of a standard
        deviation of 1, whoever computes it. The estimate is not; and of all float32 numbers the
        nearest one to the closed form is stored.
        """
        data = draw(1e4, 1, 60, 5, 4)
        found = estimate("exact", data.split(7))
        expected_mean, expected_variance = population(data)
        assert torch.equal(found.mean.float(), expected_mean.float())
        assert torch.equal(found.variance.float(), expected_variance.float())

    def test_takes_calls_of_one_element_per_channel(self):
        data = draw(2, 1, 9, 4)
        found = estimate("exact", data.split(1))
        torch.testing.assert_close((found.mean, found.variance), population(data))

    def test_sees_the_difference_between_the_batches_which_the_others_do_not(self):
        apart = [draw(0, 1, 20, 3), draw(50, 1, 20, 3)]
        expected = population(torch.cat(apart))[1]
        torch.testing.assert_close(estimate("exact", apart).variance, expected)
        assert (estimate("torch", apart).variance < expected / 10).all()


class TestPaper:
    @pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 16, 5), (3, 30, 8, 2)], ids=str)
    def test_is_momentum_b_over_n_plus_b(self, sizes):
        batches = draw(3, 2, sum(sizes), 4, 5).split(sizes)
        mean, variance, seen = torch.zeros(4).double(), torch.ones(4).double(), 0
        for batch in batches:
            momentum = len(batch) / (seen + len(batch))
            mean = (1 - momentum) * mean + momentum * population(batch)[0]
            variance = (1 - momentum) * variance + momentum * unbiased(batch)
            seen += len(batch)
        found = estimate("paper", batches)
        torch.testing.assert_close((found.mean, found.variance), (mean, variance))

    def test_weighs_by_examples_not_by_pixels(self):
        small, large = draw(0, 1, 8, 3, 2, 2), draw(5, 1, 4, 3, 9, 9)
        found = estimate("paper", [small, large])
        expected = (8 * population(small)[0] + 4 * population(large)[0]) / 12
        torch.testing.assert_close(found.mean, expected)


class TestTorch:
    @pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 16, 5), (3, 30, 8, 2)], ids=str)
    def test_gives_all_calls_the_same_weight(self, sizes):
        batches = draw(3, 2, sum(sizes), 4, 5).split(sizes)
        found = estimate("torch", batches)
        means = torch.stack([population(batch)[0] for batch in batches])
        variances = torch.stack([unbiased(batch) for batch in batches])
        torch.testing.assert_close((found.mean, found.variance), (means.mean(0), variances.mean(0)))

    def test_equals_paper_where_all_batches_are_equal(self):
        batches = draw(3, 2, 40, 4, 5).split(10)
        one, other = estimate("torch", batches), estimate("paper", batches)
        torch.testing.assert_close((one.mean, one.variance), (other.mean, other.variance))


@pytest.mark.parametrize("name", ["paper", "torch", "exact"])
class TestAll:
    def test_leave_what_they_are_given_alone(self, name):
        calls = [input_statistics(draw(3, 2, 8, 4, seed=seed)) for seed in range(3)]
        before = [(call.mean.clone(), call.m2.clone()) for call in calls]
        estimator = make_estimator(name)
        for call in calls:
            estimator.update(call)
        assert all(
            torch.equal(call.mean, mean) and torch.equal(call.m2, m2)
            for call, (mean, m2) in zip(calls, before, strict=True)
        )

    def test_keep_nan(self, name):
        good, bad = draw(0, 1, 8, 4), draw(0, 1, 8, 4)
        bad[3, 2] = torch.nan
        found = estimate(name, [good, bad, good])
        assert found.mean.isnan().tolist() == [False, False, True, False]
        assert found.variance.isnan().tolist() == [False, False, True, False]

    def test_hardly_depend_on_the_order(self, name):
        batches = draw(1e4, 1, 30, 3).split((4, 10, 16))
        found = [estimate(name, order) for order in itertools.permutations(batches)]
        for other in found[1:]:
            torch.testing.assert_close(other.mean, found[0].mean, rtol=1e-12, atol=0)
            torch.testing.assert_close(other.variance, found[0].variance, rtol=1e-9, atol=0)

    def test_are_in_float64(self, name):
        found = estimate(name, [draw(0, 1, 8, 4).bfloat16()])
        assert found.mean.dtype == found.variance.dtype == torch.float64


class TestInputStatistics:
    @pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3), (6, 4, 5, 3, 2)], ids=str)
    @pytest.mark.parametrize("size", [1, 100, 1 << 22])
    def test_are_those_of_the_values_however_they_are_sliced(self, shape, size, monkeypatch):
        monkeypatch.setattr(statistics, "_SLICE", size)
        data = draw(1e4, 1, *shape)
        found = input_statistics(data)
        mean, variance = population(data)
        assert (found.count, found.batch) == (data.numel() // 4, 6)
        torch.testing.assert_close(found.mean, mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(found.m2 / found.count, variance, rtol=1e-9, atol=0)

    def test_do_not_depend_on_the_memory_format(self):
        data = draw(3, 1, 6, 4, 5, 3)
        one = input_statistics(data)
        other = input_statistics(data.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close((one.mean, one.m2), (other.mean, other.m2))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_are_of_the_values_as_they_are(self, dtype):
        data = draw(3, 1, 50, 4).to(dtype)
        found = input_statistics(data)
        torch.testing.assert_close((found.mean, found.m2 / 50), population(data))

    def test_keep_no_graph(self):
        data = draw(3, 1, 6, 4).requires_grad_()
        assert not input_statistics(data).mean.requires_grad


def test_native_statistics_are_the_same_said_otherwise():
    data = draw(3, 2, 8, 4, 5)
    native = native_statistics(population(data)[0], unbiased(data), data)
    found = input_statistics(data)
    assert (native.count, native.batch) == (found.count, found.batch) == (40, 8)
    torch.testing.assert_close((native.mean, native.m2), (found.mean, found.m2))
