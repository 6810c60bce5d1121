"""Bootstrap intervals, held against scipy and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ckptavg.evaluation.intervals import _tail, paired_difference
from ckptavg.evaluation.measures import Units


def units(values, counts=None) -> Units:
    values = np.asarray(values, np.float64)
    return Units(values, np.ones(len(values)) if counts is None else np.asarray(counts, float))


def test_is_the_percentile_bootstrap_of_scipy():
    draw = np.random.default_rng(0)
    first, other = draw.exponential(1, 400), draw.exponential(1.2, 400)
    found = paired_difference(units(first), units(other))
    expected = stats.bootstrap(
        (first - other,), np.mean, method="percentile", n_resamples=20_000, random_state=1
    ).confidence_interval
    assert found.value == pytest.approx(np.mean(first - other))
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.04 * width)
    assert found.high == pytest.approx(expected.high, abs=0.04 * width)


@pytest.mark.parametrize("count", [10, 12, 30, 1000])
def test_tails_are_those_of_student(count):
    t = stats.t.ppf(0.975, count - 1) * np.sqrt(count / (count - 1))
    assert _tail(count) == pytest.approx(stats.norm.cdf(-t), rel=0.02)


def test_targets_count_alike_in_examples_of_several():
    """A mean over targets, as of an image's pixels: a ratio of sums over the examples drawn."""
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 50, 300)
    first, other = (draw.normal(size=300) * np.sqrt(counts) for _ in range(2))
    found = paired_difference(units(first, counts), units(other, counts))
    assert found.value == pytest.approx((first - other).sum() / counts.sum())
    resampled = []
    for _ in range(4_000):
        drawn = draw.integers(0, 300, 300)
        resampled.append((first - other)[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_many_units_are_put_together():
    draw = np.random.default_rng(0)
    first, other = draw.normal(size=(2, 60_000))
    found = paired_difference(units(first), units(other))
    error = 1.96 * np.sqrt(2 / 60_000)
    assert (found.high - found.low) / 2 == pytest.approx(error, rel=0.1)
    assert found.units == 60_000


@pytest.mark.parametrize(
    ("first", "other"),
    [([1.0] * 9, [0.0] * 9), ([1.0] * 20, [0.0] * 30), ([np.nan] * 20, [0] * 20)],
)
def test_without_enough_pairs_nothing_is_told_apart(first, other):
    found = paired_difference(units(first), units(other))
    assert np.isnan(found.low)
    assert not found.is_told_apart


def simulated(runs, count, difference):
    """Shares of intervals without 0, and of those that have the true difference.

    Two models whose losses have much in common, and right answers of which some differ.
    """
    draw = np.random.default_rng(0)
    apart = covered = apart_right = 0
    for run in range(runs):
        common = draw.exponential(1, count)
        first, other = common + 0.3 * draw.standard_normal((2, count))
        found = paired_difference(units(first + difference), units(other), seed=run)
        apart += found.is_told_apart
        covered += found.low <= difference <= found.high
        right = draw.random(count) < 0.7
        first, other = (right != (draw.random(count) < 0.15) for _ in range(2))
        apart_right += paired_difference(units(first), units(other), seed=run).is_told_apart
    return apart / runs, covered / runs, apart_right / runs


def test_a_simulation_of_a_few_runs():
    apart, _, apart_right = simulated(40, 50, 0.0)
    assert apart <= 0.15
    assert apart_right <= 0.15
    apart, covered, _ = simulated(40, 50, 0.5)
    assert apart == 1
    assert covered >= 0.85


@pytest.mark.slow
def test_a_simulation_tells_apart_in_5_percent_and_covers_in_95():
    apart, _, apart_right = simulated(400, 200, 0.0)
    assert 0.03 <= apart <= 0.08
    assert 0.03 <= apart_right <= 0.08
    _, covered, _ = simulated(400, 200, 0.1)
    assert 0.92 <= covered <= 0.97
