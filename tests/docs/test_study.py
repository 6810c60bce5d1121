"""The study's report follows from its figures, and its statistics are those of the textbook."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

STUDY = Path(__file__).parents[2] / "docs" / "study"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("study_report", STUDY / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_committed_follows_from_the_figures(report, tmp_path):
    found = json.loads((STUDY / "results.json").read_text())
    assert {name: len(rows) for name, rows in found.items()} == {"mnist1d": 10, "digits": 10}
    report.write_report(found, tmp_path)
    assert (tmp_path / "results.md").read_text() == (STUDY / "results.md").read_text()


@pytest.mark.parametrize("values", [[1, 2, 3, -1], [0, 0, 1], [-1] * 10, [1, -1], [0.5] * 9 + [-3]])
def test_the_sign_test_is_the_binomial_one(report, values):
    positive, count, p = report.sign_test(values)
    assert (positive, count) == (sum(v > 0 for v in values), sum(v != 0 for v in values))
    assert p == pytest.approx(stats.binomtest(positive, count).pvalue)


def test_the_interval_is_the_percentile_bootstrap(report):
    values = np.random.default_rng(1).standard_normal(10) + 1
    low, high = report.interval(list(values))
    wanted = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, random_state=3
    ).confidence_interval
    assert low == pytest.approx(wanted.low, abs=0.03)
    assert high == pytest.approx(wanted.high, abs=0.03)


@pytest.mark.parametrize(
    ("low", "high", "p", "better", "word"),
    [
        (-1, 1, 0.01, 1, "not told apart"),
        (1, 2, 0.01, 1, "better"),
        (1, 2, 0.1, 1, "not told apart"),
        (1, 2, 0.01, -1, "worse"),
        (-2, -1, 0.01, -1, "better"),
    ],
)
def test_a_verdict_goes_by_the_interval_and_the_sign_test(report, low, high, p, better, word):  # noqa: PLR0917
    assert report.verdict(low, high, p, better) == word


def test_the_page_says_what_the_figures_say(report):
    """The sentences of the page, from the figures."""
    found = json.loads((STUDY / "results.json").read_text())
    page = (STUDY / "README.md").read_text()

    def mean(task, one, other):
        return float(np.mean(report.differences(found[task], one, other, 0)))

    for line in (STUDY / "tuning.txt").read_text().splitlines():
        task, told = line.split(": rate ")
        rate, value = told.split(",")[0], told.split()[-1]
        name = {"mnist1d": "MNIST-1D", "digits": "digits"}[task]
        [row] = [row for row in page.splitlines() if row.startswith(f"| {name}, rate {rate} ")]
        assert f"{float(value):.3f}" in row
    swa = "SWA, refreshed"
    for task, other, text in (
        ("digits", "decayed", "2.8 points (1.7 to 3.9) and 0.09 nats, in 10 of 10 seeds"),
        ("mnist1d", "decayed", "1.1 points (0.9 to 1.3) and 0.04 nats, in"),
    ):
        values = report.differences(found[task], swa, other, 0)
        low, high = sorted(abs(one) for one in report.interval(values))
        nats = np.mean(report.differences(found[task], swa, other, 1))
        assert f"({low:.1f} to {high:.1f}) and {abs(nats):.2f} nats" in text
        assert text.split()[0] == f"{abs(np.mean(values)):.1f}"
        assert report.sign_test(values)[0] in (0, 10)
        assert " ".join(text.split()) in " ".join(page.split())
    for task, other, text in (
        ("mnist1d", "SWA, not refreshed", "+5.9 points on MNIST-1D"),
        ("digits", "SWA, not refreshed", "+3.6 on digits"),
        ("mnist1d", "last iterate", "+5.5 and"),
        ("digits", "last iterate", "+6.3 points over the last one"),
        ("mnist1d", "best by validation", "+2.7 and"),
        ("digits", "best by validation", "+2.6 over the best"),
        ("digits", "decayed", "ahead by 2.8 points"),
        ("mnist1d", "decayed", "1.1 points (0.9 to 1.3)"),
    ):
        assert text in page
        assert f"{abs(mean(task, swa, other)):.1f}" in text


def test_the_windows_follow_from_their_figures_too(report, tmp_path):
    found = json.loads((STUDY / "windows.json").read_text())
    report.write_windows(found, tmp_path)
    assert (tmp_path / "windows.md").read_text() == (STUDY / "windows.md").read_text()
