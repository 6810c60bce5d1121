"""The formulas of torch's learning rate schedulers, from the plain values of their state dicts."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

State = Mapping[str, Any]

# The keys of a scheduler's state dict tell its class. The formulas are those of
# https://docs.pytorch.org/docs/stable/optim.html.


def nearly_equal(rate: float, other: float, highest: float) -> bool:
    """Whether two rates differ by rounding only, in a schedule with this highest rate."""
    # Where a cosine should be 0, it is about 1e-17 of the highest rate.
    return math.isclose(rate, other, rel_tol=1e-6, abs_tol=1e-9 * abs(highest))


def steps_taken(scheduler: State | None) -> int | None:
    """The number of steps that a scheduler has taken; None if its state does not tell."""
    steps = (scheduler or {}).get("last_epoch")
    return steps if type(steps) is int and steps >= 0 else None


def follows_formula(scheduler: State | None, position: int, rate: float) -> bool:
    """Whether the scheduler's formula gives this rate at a position, and has one before it."""
    here, before = rate_at(scheduler, position), rate_at(scheduler, position - 1)
    return here is not None and before is not None and nearly_equal(here, rate, max(here, before))


def is_minimum(scheduler: State | None, position: int) -> bool:
    """Whether the scheduler's formula gives higher rates one step before and one step after."""
    around = [rate_at(scheduler, position + offset) for offset in (-1, 0, 1)]
    before, here, after = (math.nan if rate is None else rate for rate in around)
    lower = position > 0 and before > here and here < after
    return lower and not nearly_equal(min(before, after), here, max(before, after))


def rate_at(scheduler: State | None, position: int) -> float | None:
    """The rate of the first parameter group after so many steps; None if unknown."""
    try:
        rate = float(_rate_at(scheduler, position))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    return rate if math.isfinite(rate) else None


def _rate_at(state: object, position: int, levels: int = 10) -> float:
    if not isinstance(state, Mapping) or not levels:
        raise LookupError
    if "_milestones" in state:  # SequentialLR: each scheduler starts at its milestone, from 0
        milestones = state["_milestones"]
        index = bisect.bisect_right(milestones, position)
        start = milestones[index - 1] if index else 0
        return _rate_at(state["_schedulers"][index], position - start, levels - 1)
    keys = {key for key in state if not key.startswith("_")} - {"base_lrs", "last_epoch", "verbose"}
    base = float(state["base_lrs"][0])
    if keys >= {"max_lrs", "total_size", "step_ratio", "mode", "gamma"}:
        return base + (float(state["max_lrs"][0]) - base) * _cyclic(state, position)
    low = float(state.get("eta_min", 0.0))
    return low + (base - low) * _FACTORS[" ".join(sorted(keys))](state, position)


def _cyclic(state: State, n: int) -> float:
    if state.get("_scale_fn_custom") is not None:
        raise ValueError("a scale function of the user's own")
    size, ratio = float(state["total_size"]), float(state["step_ratio"])
    cycle = math.floor(1 + n / size)
    x = 1.0 + n / size - cycle
    height = x / ratio if x <= ratio else (x - 1) / (ratio - 1)
    gamma = float(state["gamma"])
    powers = {"triangular": (1.0, 1), "triangular2": (2.0, 1 - cycle), "exp_range": (gamma, n)}
    scale, exponent = powers[state["mode"]]
    return float(height * scale ** float(exponent))


def _warm_restarts(state: State, position: int) -> float:
    length, factor = int(state["T_0"]), int(state["T_mult"])
    if length < 1 or factor < 1:
        raise ValueError(length, factor)
    if factor == 1:
        position %= length
    while position >= length:
        position, length = position - length, length * factor
    return _cosine(position / length)


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def _milestones(state: State, position: int) -> float:
    return float(sum(times for place, times in state["milestones"].items() if place <= position))


def _share(state: State, position: int) -> float:
    return float(min(position, state["total_iters"]) / state["total_iters"])


def _linear(state: State, position: int) -> float:
    start, end = float(state["start_factor"]), float(state["end_factor"])
    return start + (end - start) * _share(state, position)


# Factors of the base rate by the keys of the state dict. Powers are taken of floats, which
# overflow; powers of huge integers would hang.
_FACTORS: dict[str, Callable[[State, int], float]] = {
    "T_0 T_cur T_i T_mult eta_min": _warm_restarts,
    "T_max eta_min": lambda state, n: _cosine(n / state["T_max"]),
    "gamma step_size": lambda state, n: float(state["gamma"]) ** float(n // state["step_size"]),
    "gamma milestones": lambda state, n: float(state["gamma"]) ** _milestones(state, n),
    "gamma": lambda state, n: float(state["gamma"]) ** float(n),
    "end_factor start_factor total_iters": _linear,
    "factor total_iters": lambda state, n: state["factor"] if n < state["total_iters"] else 1.0,
    "power total_iters": lambda state, n: (1.0 - _share(state, n)) ** float(state["power"]),
}
