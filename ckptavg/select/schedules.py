"""Learning rates computed from a scheduler's saved state, by the formulas of torch's classes.

https://docs.pytorch.org/docs/stable/optim.html. A state dict does not name its class, but its
attributes tell which it is; that the formula gives the rate that was recorded confirms it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Any

Form = Callable[[int], float]
"""The rate of the first parameter group after so many steps of its scheduler."""

_Formula = Callable[[Mapping[str, Any], float, int], float]
"""The same by a scheduler's state and its base rate."""

_RELATIVE = 1e-6
# Of the highest rate: a cosine's zero is some 1e-17 of it.
_ABSOLUTE = 1e-9
_DEEPEST = 10
_COMMON = {"base_lrs", "last_epoch", "verbose"}


def close(one: float, other: float, highest: float) -> bool:
    """Whether two rates are the same but for rounding.

    Args:
        one: a rate.
        other: another.
        highest: what counts as a high rate beside them.
    """
    return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE * abs(highest))


def schedule(scheduler: Mapping[str, Any] | None, position: int, rate: float) -> Form | None:
    """The schedule that a state dict describes, if it can be told.

    Args:
        scheduler: the state dict.
        position: how often the scheduler has stepped, at least once.
        rate: what it has set then, which the formula must give too.
    """
    form = _form(scheduler, _DEEPEST)
    if form is None:
        return None
    here, before = value_at(form, position), value_at(form, position - 1)
    fits = here is not None and before is not None and close(here, rate, max(here, before))
    return form if fits else None


def value_at(form: Form, position: int) -> float | None:
    """The rate at a position; None where the state makes no sense, as a hostile file's may."""
    try:
        rate = form(position)
        return rate if math.isfinite(rate) else None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _form(scheduler: object, depth: int) -> Form | None:
    if not isinstance(scheduler, Mapping) or not depth:
        return None
    if isinstance(scheduler.get("_milestones"), list):
        return _sequential(scheduler, depth)
    own = {key for key in scheduler if not str(key).startswith("_")} - _COMMON
    for marks, formula in _FORMULAS:
        if own == marks or (formula is _cyclic and own >= marks):
            return _bound(formula, scheduler)
    return None


def _bound(formula: _Formula, state: Mapping[str, Any]) -> Form:
    return lambda position: float(formula(state, float(state["base_lrs"][0]), position))


def _sequential(scheduler: Mapping[str, Any], depth: int) -> Form | None:
    """SequentialLR: each scheduler begins at its milestone with position 0."""
    inner, milestones = scheduler.get("_schedulers"), scheduler["_milestones"]
    if not isinstance(inner, list) or len(inner) != len(milestones) + 1:
        return None
    forms = [_form(one, depth - 1) for one in inner]

    def rate(position: int) -> float:
        index = bisect.bisect_right(milestones, position)
        form = forms[index]
        if form is None:
            raise LookupError(index)
        return form(position - (milestones[index - 1] if index else 0))

    return rate


def _warm_restarts(state: Mapping[str, Any], base: float, position: int) -> float:
    length, factor = int(state["T_0"]), int(state["T_mult"])
    if length < 1 or factor < 1:
        raise ValueError(length, factor)
    if factor == 1:
        position %= length
    while position >= length:
        position, length = position - length, length * factor
    return _cosine_part(float(state["eta_min"]), base, position / length)


def _cosine(state: Mapping[str, Any], base: float, position: int) -> float:
    return _cosine_part(float(state["eta_min"]), base, position / state["T_max"])


def _cosine_part(low: float, high: float, part: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * part)) / 2


def _cyclic(state: Mapping[str, Any], base: float, position: int) -> float:
    if state.get("_scale_fn_custom") is not None:
        raise ValueError("a scale of the user's own")
    size, ratio = float(state["total_size"]), float(state["step_ratio"])
    cycle = math.floor(1 + position / size)
    x = 1.0 + position / size - cycle
    height = float(state["max_lrs"][0]) - base
    height *= x / ratio if x <= ratio else (x - 1) / (ratio - 1)
    scale = {"triangular": 1.0, "triangular2": 2.0, "exp_range": float(state["gamma"])}
    power = {"triangular": 1, "triangular2": 1 - cycle, "exp_range": position}
    mode = state["mode"]
    return float(base + height * scale[mode] ** float(power[mode]))


def _steps_down(state: Mapping[str, Any], base: float, position: int) -> float:
    return float(base * float(state["gamma"]) ** float(position // state["step_size"]))


def _milestones_down(state: Mapping[str, Any], base: float, position: int) -> float:
    passed = sum(times for place, times in state["milestones"].items() if place <= position)
    return float(base * float(state["gamma"]) ** float(passed))


def _exponential(state: Mapping[str, Any], base: float, position: int) -> float:
    return float(base * float(state["gamma"]) ** float(position))


def _linear(state: Mapping[str, Any], base: float, position: int) -> float:
    start, end = float(state["start_factor"]), float(state["end_factor"])
    part = min(position, state["total_iters"]) / state["total_iters"]
    return float(base * (start + (end - start) * part))


def _constant(state: Mapping[str, Any], base: float, position: int) -> float:
    return float(base * (float(state["factor"]) if position < state["total_iters"] else 1.0))


def _polynomial(state: Mapping[str, Any], base: float, position: int) -> float:
    part = min(position, state["total_iters"]) / state["total_iters"]
    return float(base * (1.0 - part) ** float(state["power"]))


_FORMULAS: tuple[tuple[set[str], _Formula], ...] = (
    ({"T_0", "T_i", "T_mult", "eta_min", "T_cur"}, _warm_restarts),
    ({"max_lrs", "total_size", "step_ratio", "mode", "gamma"}, _cyclic),
    ({"T_max", "eta_min"}, _cosine),
    ({"step_size", "gamma"}, _steps_down),
    ({"milestones", "gamma"}, _milestones_down),
    ({"gamma"}, _exponential),
    ({"start_factor", "end_factor", "total_iters"}, _linear),
    ({"factor", "total_iters"}, _constant),
    ({"total_iters", "power"}, _polynomial),
)
