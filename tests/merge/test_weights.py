"""The schemes against calculations by hand, torch's EMA, the published profile and decayed runs."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ckptavg.errors import SelectionError
from ckptavg.merge import weights as schemes
from ckptavg.merge.schemes import Scheme, parse, schemes_of
from ckptavg.merge.weights import Weights, by_path, decay, ema, explicit, linear, power, uniform

PAGE = Path(__file__).parents[2] / "docs" / "schemes.md"
NAMES = ("run/a.pt", "run/b.pt", "run/c.pt")

# sigma_rel of the exponents 1 and 2: sqrt(2) / (3 * sqrt(4)) and sqrt(3) / (4 * sqrt(5)).
EXPONENT_1 = math.sqrt(2) / 6
EXPONENT_2 = math.sqrt(3 / 80)

NAMED = st.one_of(
    st.sampled_from(["uniform", "linear", "decay:linear", "decay:cosine", "decay:1-sqrt"]),
    st.floats(0, 1).map(lambda rate: f"ema:{rate!r}"),
    st.floats(1e-3, 0.288).map(lambda width: f"power:{width!r}"),
)
STEPS = st.lists(st.integers(1, 10**7), min_size=1, max_size=40, unique=True).map(sorted)


def shares(made: Weights) -> list[float]:
    return [value / made.divisor for value in made.values]


def only(text: str) -> Scheme:
    [scheme] = parse(text)
    return scheme


def close(expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-15)


class TestByHand:
    def test_uniform_is_one_sum_and_one_division(self):
        assert uniform(4) == Weights((1.0, 1.0, 1.0, 1.0), 4.0)

    def test_linear(self):
        assert linear(4) == Weights((1.0, 2.0, 3.0, 4.0), 10.0)

    @pytest.mark.parametrize(
        ("count", "rate", "expected"),
        [
            (4, 0.5, [1 / 8, 1 / 8, 1 / 4, 1 / 2]),
            (3, 0.9, [0.81, 0.09, 0.1]),
            (3, 0, [0, 0, 1]),
            (3, 1, [1, 0, 0]),
            (1, 0.9, [1]),
            (1, 0, [1]),
        ],
    )
    def test_ema(self, count, rate, expected):
        assert shares(ema(count, rate)) == close(expected)

    @pytest.mark.parametrize(
        ("steps", "width", "expected"),
        [
            ([1, 2, 3], EXPONENT_1, [1 / 9, 3 / 9, 5 / 9]),
            ([10, 20, 30], EXPONENT_2, [1 / 27, 7 / 27, 19 / 27]),
            # From step 3 on, not from 0: 16 - 9, 25 - 16, 36 - 25.
            ([4, 5, 6], EXPONENT_1, [7 / 27, 9 / 27, 11 / 27]),
            # 2 - (5 - 2) would be before the start.
            ([2, 5], EXPONENT_1, [4 / 25, 21 / 25]),
            ([700], EXPONENT_1, [1]),
        ],
    )
    def test_power(self, steps, width, expected):
        assert shares(power(steps, width)) == close(expected)

    def test_decay_linear_is_the_mean_to_the_bit(self):
        assert decay(7, "linear") == Weights(uniform(7).values, 7.0)

    def test_decay_cosine(self):
        # w: 1, (1 + sqrt(1/2)) / 2, 1/2, (1 - sqrt(1/2)) / 2, 0.
        half = math.sqrt(0.5)
        expected = [(1 - half) / 2, half / 2, half / 2, (1 - half) / 2]
        assert shares(decay(4, "cosine")) == close(expected)

    def test_decay_1_sqrt(self):
        # w: 1, 1 - 1/2, 1 - sqrt(1/2), 1 - sqrt(3)/2, 0.
        third = math.sqrt(3) / 2
        expected = [0.5, math.sqrt(0.5) - 0.5, third - math.sqrt(0.5), 1 - third]
        assert shares(decay(4, "1-sqrt")) == close(expected)

    def test_one_checkpoint_has_all_of_it(self):
        assert [shares(decay(1, shape)) for shape in ("linear", "cosine", "1-sqrt")] == [[1.0]] * 3

    def test_emulated_decay_is_what_the_later_checkpoints_have(self):
        assert uniform(4).emulated_decay == close((1, 0.75, 0.5, 0.25))
        assert explicit([2, 0, -1], 3).emulated_decay == close((1, -1, -1))
        assert explicit([2, 1], 2, normalize=False).emulated_decay == close((3, 1))

    def test_explicit_numbers_are_normalised_by_their_exact_sum(self):
        assert explicit([0.1] * 10, 10).divisor == math.fsum([0.1] * 10) == 1.0
        assert shares(explicit([3, -1], 2)) == [1.5, -0.5]


class TestEma:
    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
    def test_is_what_torch_makes_during_training(self, rate):
        made = torch.Generator().manual_seed(0)
        states = [torch.randn(3, 4, generator=made, dtype=torch.float64) for _ in range(6)]
        model = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(rate))
        for state in states:
            model.load_state_dict({"weight": state})
            averaged.update_parameters(model)
        weighted = sum(
            share * state for share, state in zip(shares(ema(6, rate)), states, strict=True)
        )
        assert isinstance(weighted, torch.Tensor)
        expected = averaged.module.state_dict()["weight"]
        torch.testing.assert_close(weighted, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
    def test_refuses_what_torch_refuses(self, rate):
        with pytest.raises(SelectionError, match="from 0 to 1"):
            ema(3, rate)


def published_exponent(width: float) -> float:
    """Karras et al. 2024, algorithm 2: the largest root of a cubic."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def integral(exponent: float, start: float, end: float) -> float:
    """Of `t^exponent`, by Gauss and Legendre on many small pieces."""
    nodes, factors = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(start, end, 201)
    middles, halves = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    times = middles[:, None] + halves[:, None] * nodes
    return float((halves[:, None] * factors * times**exponent).sum())


class TestPower:
    @pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28, 0.2886])
    def test_exponent_is_the_published_one(self, width):
        expected = pytest.approx(published_exponent(width), rel=1e-9)
        assert schemes.power_exponent(width) == expected

    @pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
    def test_sigma_rel_is_the_standard_deviation_of_the_profile(self, width):
        exponent = schemes.power_exponent(width)
        mass = integral(exponent, 0, 1)
        mean = integral(exponent + 1, 0, 1) / mass
        variance = integral(exponent + 2, 0, 1) / mass - mean**2
        assert math.sqrt(variance) == pytest.approx(width, rel=1e-5)

    @pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
    @pytest.mark.parametrize(
        ("steps", "start"), [([100, 200, 300], 0), ([700, 720, 780, 1000], 680), ([3, 900], 0)]
    )
    def test_weights_are_integrals_of_the_profile_between_checkpoints(self, steps, start, width):
        exponent = published_exponent(width)
        times = np.array([start, *steps]) / steps[-1]
        pieces = [integral(exponent, *times[i : i + 2]) for i in range(len(steps))]
        expected = np.array(pieces) / sum(pieces)
        assert shares(power(steps, width)) == pytest.approx(expected, rel=1e-6)

    def test_equals_the_average_that_is_tracked_during_training(self):
        """Equation 127: `beta = (1 - dt / t)^(g+1)` at each step from the first on."""
        exponent = published_exponent(0.1)
        tracked = np.zeros(50)
        for place, snapshot in enumerate(np.eye(50)):
            beta = (1 - 1 / (place + 1)) ** (exponent + 1)
            tracked = beta * tracked + (1 - beta) * snapshot
        found = shares(power(range(1, 51), 0.1))
        assert found == pytest.approx(tracked, rel=1e-9, abs=1e-15)

    def test_the_first_of_late_checkpoints_does_not_take_the_run_before_it(self):
        assert shares(power([980, 990, 1000], 0.2))[0] < 1 / 3

    def test_the_unit_of_the_steps_does_not_matter(self):
        small, large = power([2, 3, 5], 0.1), power([2e300, 3e300, 5e300], 0.1)
        assert small.values == close(large.values)

    @pytest.mark.parametrize("width", [5e-324, 1e-300, 1e-9])
    def test_a_vanishing_width_takes_the_last(self, width):
        assert power([1, 2, 3], width).values == (0.0, 0.0, 1.0)

    @pytest.mark.parametrize("width", [0, -0.1, 12**-0.5, 0.3, math.nan, math.inf])
    def test_refuses_a_sigma_rel_that_is_no_growing_profile(self, width):
        with pytest.raises(SelectionError, match=r"above 0 and below 0\.2887"):
            power([1, 2], width)

    @pytest.mark.parametrize("steps", [[0, 1], [-1, 1], [1, math.nan], [1, math.inf], [1, 10**400]])
    def test_refuses_steps_that_do_not_count_from_the_start(self, steps):
        with pytest.raises(SelectionError, match="count from 1"):
            power(steps, 0.1)

    @pytest.mark.parametrize("steps", [[1, 1], [2, 1], [2**60, 2**60 + 1]])
    def test_refuses_steps_that_do_not_increase(self, steps):
        with pytest.raises(SelectionError, match="increase"):
            power(steps, 0.1)


REMAINING = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 + 0.5 * np.cos(np.pi * done),
    "1-sqrt": lambda done: 1 - done**0.5,
}


class TestDecay:
    @pytest.mark.parametrize("shape", REMAINING)
    @pytest.mark.parametrize("updates", [1, 2, 9])
    def test_a_constant_rate_run_averages_to_the_decayed_run(self, shape, updates):
        """SGD with frozen gradients: checkpoints 0 to k, and the same with rates `rate * w_j`."""
        made = np.random.default_rng(updates)
        gradients = made.normal(size=(updates, 7))
        start, rate = made.normal(size=7), 0.1
        checkpoints = [start]
        for gradient in gradients:
            checkpoints.append(checkpoints[-1] - rate * gradient)
        decayed = start
        for number, gradient in enumerate(gradients, start=1):
            decayed = decayed - rate * REMAINING[shape](number / (updates + 1)) * gradient
        averaged = np.array(shares(decay(updates + 1, shape))) @ np.array(checkpoints)
        np.testing.assert_allclose(averaged, decayed, rtol=1e-12, atol=1e-14)
        assert not np.allclose(averaged, checkpoints[-1])

    @pytest.mark.parametrize(
        "made", [uniform(5), linear(5), ema(5, 0.7), power([3, 4, 6, 7, 9], 0.2)]
    )
    def test_so_does_the_decay_that_other_weights_emulate(self, made):
        gradients = np.random.default_rng(0).normal(size=(4, 3))
        checkpoints = np.cumsum([np.zeros(3), *gradients], axis=0)
        decayed = np.array(made.emulated_decay[1:]) @ gradients
        np.testing.assert_allclose(np.array(shares(made)) @ checkpoints, decayed, rtol=1e-12)

    @pytest.mark.parametrize("shape", REMAINING)
    def test_emulates_itself(self, shape):
        expected = [REMAINING[shape](place / 6) for place in range(6)]
        assert decay(6, shape).emulated_decay == pytest.approx(expected, rel=1e-12)

    def test_refuses_other_shapes(self):
        with pytest.raises(SelectionError, match="one of linear, cosine, 1-sqrt, not 'square'"):
            decay(3, "square")


class TestOwnNumbers:
    @pytest.mark.parametrize(
        ("values", "complaint"),
        [
            ([1, 2], "2 weights for 3 checkpoints"),
            ([1, -1, 0], "sum to zero"),
            ([0.1, 0.2, -0.3], "sum to zero"),
            ([1, -1, 5e-324], "sum to zero"),
            ([0, 0, 0], "sum to zero"),
            ([1, math.nan, 1], "finite"),
            ([1, math.inf, 1], "finite"),
            ([1, math.inf, -math.inf], "finite"),
            ([1e308, 1e308, 1e308], "finite"),
            ([1, 10**400, 1], "must be numbers"),
            ([1, "x", 1], "must be numbers"),
            ([1, None, 1], "must be numbers"),
        ],
    )
    def test_that_make_no_average_are_refused(self, values, complaint):
        with pytest.raises(SelectionError, match=complaint):
            explicit(values, 3)

    def test_are_taken_as_they_are_without_normalising(self):
        assert explicit([1, -1], 2, normalize=False) == Weights((1.0, -1.0), 1.0)
        assert by_path([("a.pt", 2)], NAMES, normalize=False).divisor == 1.0
        assert linear(3, normalize=False) == Weights((1.0, 2.0, 3.0), 1.0)

    def test_must_be_finite_without_normalising_too(self):
        with pytest.raises(SelectionError, match="finite"):
            explicit([1, math.nan], 2, normalize=False)

    def test_by_path_go_to_whom_they_name_in_any_order(self):
        made = by_path([("run/c.pt", 3), ("./a.pt", 1)], NAMES)
        assert made == Weights((1.0, 0.0, 3.0), 4.0)

    def test_by_path_name_whole_parts_of_a_path(self):
        names = ["run/step_100", "run/step_1000", "run/my_step_100"]
        assert by_path([("step_100", 1)], names).values == (1.0, 0.0, 0.0)

    def test_by_path_prefer_the_path_itself(self):
        assert by_path([("a.pt", 1)], ["b/a.pt", "a.pt"]).values == (0.0, 1.0)

    def test_by_path_find_urls_and_directories(self):
        names = ["s3://bucket/run/checkpoint-1", "s3://bucket/run/checkpoint-2"]
        pairs = [("s3://bucket/run/checkpoint-2/", 1.0), ("checkpoint-1", 0.5)]
        assert by_path(pairs, names).values == (0.5, 1.0)

    @pytest.mark.parametrize(
        ("pairs", "complaint"),
        [
            ([("d.pt", 1)], "d.pt matches none of the checkpoints: run/a.pt, other/a.pt, run/b.pt"),
            ([("a.pt", 1)], "fits 2 checkpoints: run/a.pt, other/a.pt; name the folder too"),
            ([("b.pt", 1), ("run/b.pt", 2)], "run/b.pt has two weights"),
            ([("", 1)], "matches none"),
            ([("b.pt", 0)], "sum to zero"),
            ([("b.pt", math.nan)], "finite"),
        ],
    )
    def test_by_path_must_be_clear(self, pairs, complaint):
        with pytest.raises(SelectionError, match=re.escape(complaint)):
            by_path(pairs, ["run/a.pt", "other/a.pt", "run/b.pt"])


class TestParse:
    @pytest.mark.parametrize(
        ("text", "name", "label", "needs_steps", "needs_order"),
        [
            ("uniform", "uniform", "uniform", False, False),
            ("linear", "linear", "linear", False, True),
            ("ema:0.9", "ema:0.9", "ema0.9", False, True),
            (" ema:.90 ", "ema:0.9", "ema0.9", False, True),
            ("ema:1", "ema:1", "ema1", False, True),
            ("power:0.1", "power:0.1", "power0.1", True, True),
            ("decay:linear", "decay:linear", "decay-linear", False, False),
            ("decay:cosine", "decay:cosine", "decay-cosine", False, True),
            ("decay:1-sqrt", "decay:1-sqrt", "decay-1-sqrt", False, True),
            ("0.2,0.3,0.5", "explicit", "explicit", False, True),
            ("1,1,1", "explicit", "explicit", False, False),
            ("a.pt=1,b.pt=2", "by-path", "by-path", False, False),
        ],
    )
    def test_one_scheme(self, text, name, label, needs_steps, needs_order):
        scheme = only(text)
        assert (scheme.name, scheme.label) == (name, label)
        assert (scheme.needs_steps, scheme.needs_order) == (needs_steps, needs_order)

    @pytest.mark.parametrize(
        ("text", "made"),
        [
            ("uniform", uniform(3)),
            ("linear", linear(3)),
            ("ema:0.9", ema(3, 0.9)),
            ("power:0.1", power([5, 7, 9], 0.1)),
            ("decay:cosine", decay(3, "cosine")),
            ("0.2,-0.3,5e-1", explicit([0.2, -0.3, 0.5], 3)),
            ("b.pt=-1, a.pt=2", Weights((2.0, -1.0, 0.0), 1.0)),
        ],
    )
    def test_makes_the_weights_that_its_text_says(self, text, made):
        assert only(text).weights([5, 7, 9], NAMES, normalize=True) == made

    def test_several_schemes_in_their_order(self):
        names = [scheme.name for scheme in parse("uniform, ema:0.9,power:0.1,ema:0.99")]
        assert names == ["uniform", "ema:0.9", "power:0.1", "ema:0.99"]

    def test_the_last_equals_sign_ends_a_path(self):
        scheme = only("epoch=3-val_loss=0.12.ckpt=0.5")
        names = ["run/epoch=3-val_loss=0.12.ckpt"]
        assert scheme.weights(None, names).values == (0.5,)

    @pytest.mark.parametrize("text", ["uniform", "linear", "2,3,4", "a.pt=2"])
    def test_without_normalising_nothing_is_divided(self, text):
        assert only(text).weights(None, NAMES, normalize=False).divisor == 1.0

    @pytest.mark.parametrize("text", ["ema:0.9", "power:0.1", "decay:linear", "decay:cosine"])
    def test_schemes_that_sum_to_one_are_the_same_without_normalising(self, text):
        scheme = only(text)
        one, other = (scheme.weights([1, 2, 3], NAMES, normalize=each) for each in (True, False))
        assert one == other

    def test_the_labels_of_schemes_are_fit_for_file_names(self):
        text = "uniform,linear,ema:0.9,ema:1e-05,power:0.05,decay:linear,decay:cosine,decay:1-sqrt"
        labels = [scheme.label for scheme in parse(text)]
        assert len(set(labels)) == len(labels)
        assert all(re.fullmatch(r"[\w.-]+", label) for label in labels)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "unknown weights ''"),
            ("best", "unknown weights 'best'; they are uniform, linear, ema:DECAY"),
            ("uniform,", "unknown weights ''"),
            ("uniform:1", "unknown weights 'uniform:1'"),
            ("linear:", "unknown weights 'linear:'"),
            ("ema", "unknown weights 'ema'; they are"),
            ("ema:", "unknown weights 'ema:'; they are"),
            ("ema:fast", "ema:DECAY have a number, not 'fast'"),
            ("ema:1.5", "the decay of ema must be from 0 to 1, not 1.5"),
            ("ema:nan", "from 0 to 1"),
            ("power:0.3", "above 0 and below 0.2887, not 0.3; uniform"),
            ("power:0", "above 0 and below 0.2887, not 0"),
            ("decay:exp", "decay must be one of linear, cosine, 1-sqrt, not 'exp'"),
            ("0.5,ema:0.9", "mix schemes, numbers and paths"),
            ("0.5,a.pt=1", "mix schemes, numbers and paths"),
            ("uniform,a.pt=1", "mix schemes, numbers and paths"),
            ("0.5,,0.5", "mix schemes, numbers and paths"),
            ("1,nan", "finite"),
            ("1,1e400", "finite"),
            ("a.pt=", "PATH=NUMBER, not 'a.pt='"),
            ("=1", "PATH=NUMBER, not '=1'"),
            ("a.pt=x,b.pt=1", "PATH=NUMBER, not 'a.pt=x'"),
            ("a.pt=inf", "PATH=NUMBER, not 'a.pt=inf'"),
            ("uniform,linear,uniform", "have uniform twice"),
            ("ema:0.9,ema:0.90", "have ema:0.9 twice"),
        ],
    )
    def test_refuses_the_rest_in_one_line(self, text, complaint):
        with pytest.raises(SelectionError, match=re.escape(complaint)) as raised:
            parse(text)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("steps", [None, [1, 2]])
    def test_power_without_steps_says_what_to_take_instead(self, steps):
        with pytest.raises(SelectionError, match=r"power:0\.1 needs the training step.*ema:DECAY"):
            only("power:0.1").weights(steps, NAMES)

    def test_a_list_of_another_length_is_refused_once_the_checkpoints_are_known(self):
        with pytest.raises(SelectionError, match="2 weights for 3 checkpoints"):
            only("1,2").weights(None, NAMES)

    @pytest.mark.parametrize("values", [[1, "x"], [1, None], [1, 10**400]])
    def test_a_list_of_what_are_no_numbers_is_refused(self, values):
        with pytest.raises(SelectionError, match="weights must be numbers"):
            schemes_of(values)


class TestProperties:
    @given(NAMED, STEPS)
    def test_shares_sum_to_one_and_are_not_negative(self, text, steps):
        made = only(text).weights(steps, [str(step) for step in steps])
        assert len(made.values) == len(steps)
        assert math.fsum(shares(made)) == pytest.approx(1, rel=1e-12)
        assert min(made.values) >= 0

    @given(NAMED, STEPS)
    def test_emulated_decay_starts_at_one_and_never_grows(self, text, steps):
        found = only(text).weights(steps, [str(step) for step in steps]).emulated_decay
        assert len(found) == len(steps)
        assert found[0] == 1
        assert all(later <= now for now, later in pairwise(found))

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
    def test_own_numbers_sum_to_one_or_are_refused(self, values):
        try:
            made = explicit(values, len(values))
        except SelectionError:
            assert abs(math.fsum(values)) <= 1e-14 * math.fsum(map(abs, values))
            return
        size = math.fsum(map(abs, shares(made)))
        assert math.fsum(shares(made)) == pytest.approx(1, abs=1e-14 * max(1, size))
        assert made.emulated_decay[0] == 1

    @given(NAMED)
    def test_the_name_of_a_scheme_is_its_text_again(self, text):
        assert only(only(text).name) == only(text)

    @given(st.text("uniformlea:,=.019- nx", max_size=12))
    def test_any_text_is_taken_or_refused(self, text):
        try:
            found = parse(text)
        except SelectionError as error:
            assert "\n" not in str(error)  # noqa: PT017
            return
        assert found


def test_the_table_in_the_documentation_is_true():
    rows = re.findall(
        r"^\| `([^`|]+)` \|((?: *[\d.]+ *\|){5})([\d. ]+)", PAGE.read_text(), re.MULTILINE
    )
    assert len(rows) == 10
    steps, names = [100, 200, 300, 400, 500], [f"step_{number}00.pt" for number in range(1, 6)]
    for text, cells, remaining in rows:
        made = only(text).weights(steps, names)
        rounded = [float(cell) for cell in cells.split("|")[:5]]
        assert rounded == pytest.approx(shares(made), abs=5.01e-4), text
        rounded = [float(number) for number in remaining.split()]
        assert rounded == pytest.approx(made.emulated_decay[1:], abs=5.01e-4), text


def test_the_numbers_in_the_documentation_are_true():
    page = " ".join(PAGE.read_text().split())
    pairs = re.findall(r"([\d.]+) at (?:SIGMA_REL )?(0\.\d+)", page)
    assert [width for _, width in pairs[:4]] == ["0.05", "0.1", "0.2", "0.25"]
    for exponent, width in pairs[:4]:
        assert published_exponent(float(width)) == pytest.approx(float(exponent), abs=5.1e-3)
    for percent, words, count in (
        (83, "five checkpoints", 5),
        (33, "twenty", 20),
        (8, "a hundred", 100),
    ):
        assert f"{percent} % for {words}" in page
        assert round(100 * shares(power(range(1, count + 1), 0.1))[-1]) == percent
