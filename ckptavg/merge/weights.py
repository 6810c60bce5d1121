"""Formulas for the weights of an average: a number for each checkpoint, and a divisor.

Each formula is a pure function of the number of checkpoints, their steps or their paths.
`docs/schemes.md` says when to use which.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda place: 1 - place,
    "cosine": lambda place: (1 + math.cos(math.pi * place)) / 2,
    "1-sqrt": lambda place: 1 - math.sqrt(place),
}
# The sigma_rel of a constant profile (exponent 0). With more, older checkpoints would weigh more.
_MOST_SIGMA_REL = 12**-0.5


@dataclass(frozen=True)
class Weights:
    """The average is `sum(values[i] * x[i]) / divisor`.

    Attributes:
        values: a weight for each checkpoint, `[num_checkpoints]`.
        divisor: the number that the weighted sum is divided by.
    """

    values: tuple[float, ...]
    divisor: float

    @property
    def count(self) -> int:
        """The number of checkpoints with a weight other than 0."""
        return len(self.values) - self.values.count(0)

    @property
    def sum_to_one(self) -> bool:
        """Whether the average is a mean: the weights sum to the divisor."""
        return math.isclose(math.fsum(self.values), self.divisor)

    @property
    def last(self) -> int:
        """The index of the last checkpoint with a weight other than 0."""
        return max(place for place, value in enumerate(self.values) if value != 0)

    @property
    def emulated_decay(self) -> tuple[float, ...]:
        """The learning-rate decay that averaging emulates: `w_j = c_j + ... + c_k`.

        Let a run at a constant rate scale its updates between checkpoints j-1 and j by `w_j`. If
        the gradients stay the same, it ends at the average (WSM, Tian et al. 2025, arXiv
        2507.17634).

        Returns:
            `w_0, ..., w_k`, `[num_checkpoints]`, from the shares `c_i = values[i] / divisor`.
            `w_0` is the factor of the first checkpoint: 1 where the weights are normalised.
        """
        values = self.values
        return tuple(math.fsum(values[place:]) / self.divisor for place in range(len(values)))


def uniform(count: int, *, normalize: bool = True) -> Weights:
    """The mean: `(x_1 + ... + x_K) / K` (Izmailov et al. 2018, equation in Algorithm 1)."""
    return Weights((1.0,) * count, float(count) if normalize else 1.0)


def linear(count: int, *, normalize: bool = True) -> Weights:
    """Weight i for checkpoint i: `c_i = i / (1 + ... + K)`.

    The WMA of PMA (Li et al. 2025, arXiv 2505.12082).
    """
    values = tuple(float(number) for number in range(1, count + 1))
    return Weights(values, math.fsum(values) if normalize else 1.0)


def ema(count: int, decay: float) -> Weights:
    """An exponential moving average of the checkpoints.

    `avg_1 = x_1`, `avg_i = d * avg_(i-1) + (1 - d) * x_i`, as
    `torch.optim.swa_utils.get_ema_multi_avg_fn` has it. Written out: `c_1 = d^(K-1)` and
    `c_i = (1 - d) * d^(K-i)`, which sum to 1.

    Raises:
        SelectionError: the decay is not in [0, 1].
    """
    if not 0 <= decay <= 1:
        raise SelectionError(f"the decay of ema must be from 0 to 1, not {format_number(decay)}")
    values = [(1 - decay) * decay ** (count - number) for number in range(1, count + 1)]
    values[0] = decay ** (count - 1)
    return _summing_to_one(values)


def power(steps: Sequence[float], sigma_rel: float) -> Weights:
    """The power-function EMA (Karras et al. 2024, arXiv 2312.02696), over raw checkpoints.

    Its profile is `p(t) ~ t^g` for t in [0, t_K] (equation 121, with t_K as the time). Checkpoint k
    stands for the steps since the one before: `c_k ~ t_k^(g+1) - t_(k-1)^(g+1)`. The first one
    stands for as many steps as the second: `t_0 = max(0, t_1 - (t_2 - t_1))`. With `t_0 = 0` it
    would have the share of the whole run before it.

    Args:
        steps: of training, in any unit that counts from its start, `[num_checkpoints]`.
        sigma_rel: standard deviation of the profile, relative to the length of the training.

    Raises:
        SelectionError: sigma_rel is not in (0, 12^-0.5), or the steps are not positive, finite and
            increasing.
    """
    exponent = power_exponent(sigma_rel) + 1
    times = _increasing(steps)
    before = max(0.0, times[0] - (times[1] - times[0])) if len(times) > 1 else 0.0
    # Relative to the last: powers of steps themselves overflow.
    powers = [(time / times[-1]) ** exponent for time in (before, *times)]
    total = 1 - powers[0]
    values = [(later - earlier) / total for earlier, later in pairwise(powers)]
    return _summing_to_one(values)


def power_exponent(sigma_rel: float) -> float:
    """The exponent g of the profile `t^g` that has this relative standard deviation.

    The largest real root of `sigma_rel = (g+1)^(1/2) (g+2)^(-1) (g+3)^(-1/2)` (Karras et al. 2024,
    equation 123; their algorithm 2 solves it as a cubic). The right side falls with g where g > 0,
    so the root is found there by bisection.

    Raises:
        SelectionError: sigma_rel is not in (0, 12^-0.5), where g > 0.
    """
    if not 0 < sigma_rel < _MOST_SIGMA_REL:
        raise SelectionError(
            f"the sigma_rel of power must be above 0 and below {_MOST_SIGMA_REL:.4f}, "
            f"not {format_number(sigma_rel)}",
            remedy="uniform gives all the same weight" if sigma_rel >= _MOST_SIGMA_REL else None,
        )
    low, high = 0.0, 1 / sigma_rel
    while low < (middle := (low + high) / 2) < high:
        narrower = math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) < sigma_rel
        low, high = (low, middle) if narrower else (middle, high)
    return high


def _increasing(steps: Sequence[float]) -> list[float]:
    """The steps as floats, checked.

    Raises:
        SelectionError: they are not positive, finite and strictly increasing.
    """
    times = [_total([step]) for step in steps]  # an integer of a file may exceed all floats
    if not all(0 < time < math.inf for time in times):
        wrong = next(time for time in times if not 0 < time < math.inf)
        raise SelectionError(
            f"power needs steps that count from 1, not a checkpoint at step {wrong:g}",
            remedy="leave that checkpoint out, or use ema:DECAY",
        )
    for earlier, later in pairwise(times):
        if earlier >= later:
            raise SelectionError(
                f"power needs steps that increase, not {later:g} after {earlier:g}",
                remedy="leave one of the two out, or use ema:DECAY",
            )
    return times


def decay(count: int, shape: str) -> Weights:
    """Emulate a decay of the learning rate (WSM, Tian et al. 2025, arXiv 2507.17634).

    With `w_j` the decay at `j / (k + 1)`, for checkpoints 0 to k: `c_0 = 1 - w_1`,
    `c_j = w_j - w_(j+1)`, `c_k = w_k`. They sum to 1. The decay begins at the first checkpoint and
    would reach 0 one interval after the last.

    Args:
        count: number of checkpoints, k + 1.
        shape: `linear` for `w(s) = 1 - s`, which makes all weights equal; `cosine` for
            `(1 + cos(pi s)) / 2`; `1-sqrt` for `1 - sqrt(s)`.

    Raises:
        SelectionError: there is no such shape.
    """
    if shape not in _DECAYS:
        raise SelectionError(f"decay must be one of {', '.join(_DECAYS)}, not {shape!r}")
    if shape == "linear":
        # All differences are 1 / (k + 1). A mean does not round them.
        return Weights((1.0,) * count, float(count))
    remaining = [_DECAYS[shape](place / count) for place in range(count + 1)]
    return _summing_to_one([now - later for now, later in pairwise(remaining)])


def explicit(values: Sequence[float], count: int, *, normalize: bool = True) -> Weights:
    """The given numbers, of which some may be negative.

    Args:
        values: one for each checkpoint.
        count: the number of checkpoints.
        normalize: divide by the sum.

    Raises:
        SelectionError: a number is missing or not finite, or the sum to divide by is zero.
    """
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise SelectionError(f"weights must be numbers: {error}") from error
    if len(numbers) != count:
        what = f"{len(numbers)} weights for {count} checkpoints"
        raise SelectionError(what, remedy="give a weight for each checkpoint, in their order")
    return _checked(numbers, normalize=normalize)


def by_path(
    pairs: Sequence[tuple[str, float]], paths: Sequence[str], *, normalize: bool = True
) -> Weights:
    """The given weights of the checkpoints that are named, and 0 for the others.

    Args:
        pairs: paths and their weights. A path names the checkpoint that has this path, else the
            one whose path ends with it: `a.pt` names `run/a.pt`, but not `run/data.pt`.
        paths: the checkpoints' paths, `[num_checkpoints]`.
        normalize: divide by the sum.

    Raises:
        SelectionError: a path names no checkpoint, or several, or one that has a weight already. Or
            a weight is not finite, or the sum to divide by is zero.
    """
    weights: dict[int, float] = {}
    for path, weight in pairs:
        place = _place_of(path, paths)
        if place in weights:
            raise SelectionError(f"{printable(paths[place])} has two weights")
        weights[place] = float(weight)
    values = tuple(weights.get(place, 0.0) for place in range(len(paths)))
    return _checked(values, normalize=normalize)


def _place_of(path: str, paths: Sequence[str]) -> int:
    """The index of the checkpoint that a path names.

    Raises:
        SelectionError: it names none, or several.
    """
    wanted = path_parts(path)
    parts = [path_parts(each) for each in paths]
    exact = [place for place, each in enumerate(parts) if each == wanted]
    places = exact or [place for place, each in enumerate(parts) if each[-len(wanted) :] == wanted]
    if len(places) == 1:
        return places[0]
    some = [paths[place] for place in places] or paths
    listed = printable(", ".join(some))
    if places:
        raise SelectionError(
            f"the weight of {printable(path)} fits {len(places)} checkpoints: {listed}",
            remedy="name the folder too",
            choices=some,
        )
    raise SelectionError(
        f"the weight of {printable(path)} matches none of the checkpoints: {listed}", choices=some
    )


def path_parts(path: str) -> list[str]:
    """The parts of a path, without empty ones and dots."""
    return [part for part in path.split("/") if part not in ("", ".")]


def _checked(numbers: tuple[float, ...], *, normalize: bool) -> Weights:
    """Weights from numbers of the user.

    Raises:
        SelectionError: a number is not finite, or the sum to divide by is zero.
    """
    size = _total([abs(number) for number in numbers])
    if not math.isfinite(size):
        raise SelectionError("weights must be finite numbers")
    if not normalize:
        return Weights(numbers, 1.0)
    total = _total(numbers)
    # 0.1, 0.2 and -0.3 sum to 2.8e-17, a rounding error.
    if abs(total) <= len(numbers) * sys.float_info.epsilon * size:
        raise SelectionError(
            "weights sum to zero, so there is nothing to divide by",
            remedy="`normalize=False` does not divide",
        )
    return Weights(numbers, total)


def _total(numbers: Sequence[float]) -> float:
    """The exact sum of the numbers, rounded once; infinity if it is too large."""
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf


def _summing_to_one(values: Sequence[float]) -> Weights:
    """Weights that sum to 1 in exact arithmetic. The divisor corrects for their rounding."""
    return Weights(tuple(values), math.fsum(values))


def format_number(number: float) -> str:
    """A number as a user types it: 1, not 1.0."""
    return repr(float(number)).removesuffix(".0")
