"""The estimators against closed forms and naive loops in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from ckptavg.batchnorm import moments
from ckptavg.batchnorm.moments import (
    CallStatistics,
    Channels,
    Moments,
    instance_statistics,
    merged,
    observe,
)

SPLITS = [(60,), (30, 30), (59, 1), (1, 59), (1,) * 60, (7, 2, 40, 11), (25, 25, 10)]


def draw(mean: float, std: float, *shape: int, seed: int = 0) -> torch.Tensor:
    """Float32 values whose channels (axis 1) have means and standard deviations of their own."""
    made = torch.Generator().manual_seed(seed)
    channels = torch.linspace(0.5, 2, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    return torch.randn(shape, generator=made) * channels * std + mean * channels


def channels(name, size):
    return Channels(("a",), (size,), (name == "exact",), (0.0,))


def estimate(name, batches):
    found = Moments.empty(channels(name, batches[0].shape[1]))
    for batch in batches:
        found.add(observe([[CallStatistics.of(batch)]], found.channels, name))
    return Estimate(found)


class Estimate:
    def __init__(self, found):
        self.moments, self.mean = found, found.mean
        self.variance, self.calls = found.pooled_variance(), int(found.calls)


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
        calls = [CallStatistics.of(draw(3, 2, 8, 4, seed=seed)) for seed in range(3)]
        before = [(call.mean.clone(), call.variance.clone()) for call in calls]
        found = Moments.empty(channels(name, 4))
        for call in calls:
            found.add(observe([[call]], found.channels, name))
        found.add(observe([calls], found.channels, name))
        assert all(
            torch.equal(call.mean, mean) and torch.equal(call.variance, variance)
            for call, (mean, variance) in zip(calls, before, strict=True)
        )

    def test_hardly_depend_on_the_order(self, name):
        batches = draw(1e4, 1, 30, 3).split((4, 10, 16))
        found = [estimate(name, order) for order in itertools.permutations(batches)]
        for other in found[1:]:
            torch.testing.assert_close(other.mean, found[0].mean, rtol=1e-12, atol=0)
            torch.testing.assert_close(other.variance, found[0].variance, rtol=1e-9, atol=0)

    def test_are_in_float64(self, name):
        found = estimate(name, [draw(0, 1, 8, 4).bfloat16()])
        assert found.mean.dtype == found.variance.dtype == torch.float64


class TestCallStatistics:
    @pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3), (6, 4, 5, 3, 2)], ids=str)
    @pytest.mark.parametrize("size", [1, 100, 1 << 22])
    def test_are_those_of_the_values_however_they_are_sliced(self, shape, size, monkeypatch):
        monkeypatch.setattr(moments, "_SLICE", size)
        data = draw(1e4, 1, *shape)
        found = CallStatistics.of(data)
        assert (found.count, found.batch) == (data.numel() // 4, 6)
        torch.testing.assert_close(found.mean, population(data)[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(found.variance, unbiased(data), rtol=1e-9, atol=0)

    @pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (2, 1, 3), (1,) * 6], ids=str)
    def test_of_pieces_together_are_those_of_the_batch(self, sizes):
        data = draw(1e4, 1, 6, 4, 5)
        found = merged([CallStatistics.of(piece) for piece in data.split(sizes)])
        torch.testing.assert_close(found.mean, population(data)[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(found.variance, unbiased(data), rtol=1e-9, atol=0)
        assert (found.count, found.batch) == (30, 6)

    def test_do_not_depend_on_the_memory_format(self):
        data = draw(3, 1, 6, 4, 5, 3)
        one = CallStatistics.of(data)
        other = CallStatistics.of(data.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close((one.mean, one.variance), (other.mean, other.variance))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_are_of_the_values_as_they_are(self, dtype):
        data = draw(3, 1, 50, 4).to(dtype)
        found = CallStatistics.of(data)
        torch.testing.assert_close(
            (found.mean, found.variance), (population(data)[0], unbiased(data))
        )

    def test_keep_no_graph(self):
        data = draw(3, 1, 6, 4).requires_grad_()
        assert not CallStatistics.of(data).mean.requires_grad

    @pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4, 5, 3), (1, 4, 2)], ids=str)
    def test_of_instances_are_those_that_torch_tracks(self, shape):
        data = draw(3, 2, *shape).double()
        kind = {3: torch.nn.InstanceNorm1d, 4: torch.nn.InstanceNorm2d}[len(shape)]
        layer = kind(4, track_running_stats=True, momentum=1.0).double()
        layer(data)
        found = instance_statistics(data)
        torch.testing.assert_close(
            (found.mean, found.variance), (layer.running_mean, layer.running_var)
        )
        assert found.batch == found.count == shape[0]


@pytest.mark.parametrize("name", ["paper", "torch", "exact"])
class TestMerged:
    @pytest.mark.parametrize("shares", [(1, 9), (5, 5), (0, 10), (3, 0, 7), (1,) * 10], ids=str)
    def test_is_what_one_pass_finds(self, name, shares):
        batches = draw(1e3, 1, 97, 3, 4).split((10, 10, 3, 17, 1, 16, 5, 15, 10, 10))
        whole = estimate(name, batches)
        left, total = list(batches), None
        for share in shares:
            own = Moments.empty(channels(name, 3))
            if share:
                own = estimate(name, left[:share]).moments
                del left[:share]
            total = own if total is None else total.merged(own)
        found = Estimate(total)
        torch.testing.assert_close(found.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(found.variance, whole.variance, rtol=1e-11, atol=0)
        assert found.calls == 10
        for one, other in zip(found.moments.errors(), whole.moments.errors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)

    def test_leaves_a_layer_without_calls_alone(self, name):
        two = Channels(("a", "b"), (2, 3), (name == "exact",) * 2, (0.0, 0.0))
        one, other = Moments.empty(two), Moments.empty(two)
        values = torch.arange(2).double()
        one.add(observe([[CallStatistics(values, values, 2, 2)], []], two, name))
        other.add(observe([[CallStatistics(values + 3, values, 4, 4)], []], two, name))
        found = one.merged(other)
        share = 0.5 if name == "torch" else 2 / 3
        torch.testing.assert_close(found.mean[:2], values + 3 * share)
        assert found.mean[2:].tolist() == [0, 0, 0]
        assert found.calls.tolist() == [2, 0]
        assert found.errors()[0][1] == torch.inf


class TestErrors:
    """Against what many passes over other data of the same kind give."""

    @pytest.mark.parametrize("name", ["paper", "torch", "exact"])
    @pytest.mark.parametrize("shape", [(64,), (64, 2)], ids=str)
    def test_are_not_exceeded_but_now_and_then(self, name, shape):
        exceeded, ratios = [], []
        for seed in range(20):
            data = draw(2, 1, 1280, *shape, seed=seed)
            found = estimate(name, data.split((64, 64, 32, 96) * 5))
            stds = torch.linspace(0.5, 2, 64, dtype=torch.float64)
            mean = (((found.mean - 2 * stds) / stds).square().mean()).sqrt()
            log_std = (found.variance.sqrt() / stds).log().square().mean().sqrt()
            for true, stated in zip((mean, log_std), found.moments.errors(), strict=True):
                exceeded.append(bool(true > stated[0]))
                ratios.append(float(stated[0] / true))
        assert sum(exceeded) / len(exceeded) < 0.12
        assert 1.7 < sum(ratios) / len(ratios) < 2.5  # they are two standard errors

    def test_fall_with_the_root_of_the_number_of_batches(self):
        [few, many] = [
            estimate("paper", draw(2, 1, count, 64).split(32)).moments.errors()
            for count in (1024, 16 * 1024)
        ]
        for one, other in zip(few, many, strict=True):
            assert float(one / other) == pytest.approx(4, rel=0.2)

    def test_of_one_call_are_not_known(self):
        found = estimate("paper", [draw(2, 1, 32, 4)]).moments.errors()
        assert [float(one) for one in found] == [torch.inf] * 2

    def test_of_what_never_changes_are_nothing(self):
        still = CallStatistics(torch.ones(3), torch.zeros(3), 4, 4)
        found = Moments.empty(Channels(("a",), (3,), (False,), (1e-5,)))
        for _ in range(3):
            found.add(observe([[still]], found.channels, "paper"))
        assert [float(one) for one in found.errors()] == [0, 0]
