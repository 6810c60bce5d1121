"""Weighting schemes, and how the argument `weights` names them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError
from ckptavg.merge import weights as formulas
from ckptavg.merge.weights import Weights, format_number, path_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KNOWN = (
    "uniform, linear, ema:DECAY, power:SIGMA_REL, decay:linear, decay:cosine, decay:1-sqrt, "
    "a number for each checkpoint (0.2,0.3,0.5), or PATH=NUMBER,..."
)


@dataclass(frozen=True)
class Scheme:
    """A way to compute weights for checkpoints.

    Attributes:
        name: the text that names it, such as `ema:0.9`; `explicit` and `by-path` for numbers of the
            user.
        formula: computes the weights from the steps, the paths and whether to normalise.
        needs_steps: whether the weights depend on the checkpoints' steps.
        needs_order: whether the weights depend on the order of the checkpoints.
    """

    name: str
    formula: Callable[[Sequence[float], Sequence[str], bool], Weights] = field(
        repr=False, compare=False
    )
    needs_steps: bool = False
    needs_order: bool = True

    @property
    def label(self) -> str:
        """Its part in a file name: `ema0.9`, `decay-cosine`."""
        return self.name.replace("decay:", "decay-").replace(":", "")

    def weights(
        self, steps: Sequence[float] | None, paths: Sequence[str], *, normalize: bool = True
    ) -> Weights:
        """The weights of checkpoints.

        Args:
            steps: training steps in order, `[num_checkpoints]`; None if unknown.
            paths: the checkpoints' paths, `[num_checkpoints]`.
            normalize: divide by the sum. The weights of `ema`, `power` and `decay` sum to 1 anyway.

        Raises:
            SelectionError: the scheme does not fit these checkpoints.
        """
        if self.needs_steps and (steps is None or len(steps) != len(paths)):
            raise SelectionError(
                f"{self.name} needs the training step of each checkpoint, but not all have one",
                remedy="ema:DECAY needs only their order",
            )
        return self.formula(steps or (), paths, normalize)


def schemes_of(weights: str | Sequence[float] | Sequence[Scheme]) -> tuple[Scheme, ...]:
    """The schemes that the argument `weights` stands for.

    Args:
        weights: a text as in `parse`, schemes, or one number for each checkpoint.

    Raises:
        SelectionError: the text names no scheme, or a weight is not a finite number.
    """
    if isinstance(weights, str):
        return parse(weights)
    schemes = tuple(each for each in weights if isinstance(each, Scheme))
    return schemes or (_explicit([each for each in weights if not isinstance(each, Scheme)]),)


def parse(text: str) -> tuple[Scheme, ...]:
    """The schemes that a text names, separated by commas.

    The text lists names such as `uniform`, `linear`, `ema:0.9`, `power:0.1` and `decay:cosine`. Or
    it is a single scheme: a number for each checkpoint (`0.2,0.3,0.5`), or paths with numbers
    (`a.pt=1,b.pt=2`). A path ends at the last `=`, as in `epoch=3.ckpt=0.5`.

    Raises:
        SelectionError: the text is none of these, a mixture of them, or names a scheme twice.
    """
    parts = [part.strip() for part in text.split(",")]
    numbers = [number for part in parts if (number := _number(part)) is not None]
    if len(numbers) == len(parts):
        return (_explicit(numbers),)
    if "=" in text and all("=" in part for part in parts):
        return (_by_path([_pair(part) for part in parts]),)
    if numbers or "=" in text:
        raise SelectionError(
            f"weights {text!r} mix schemes, numbers and paths", remedy=f"they are {KNOWN}"
        )
    schemes = tuple(map(_named, parts))
    [(scheme, times)] = Counter(schemes).most_common(1)
    if times > 1:
        raise SelectionError(f"weights {text!r} have {scheme.name} twice")
    return schemes


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _pair(text: str) -> tuple[str, float]:
    """A path and its weight.

    Raises:
        SelectionError: one of the two is missing, or the weight is not finite.
    """
    path, _, weight = text.rpartition("=")
    number = _number(weight)
    if number is None or not math.isfinite(number) or not path_parts(path):
        raise SelectionError(f"the weight of a path must be PATH=NUMBER, not {text!r}")
    return path, number


def _explicit(numbers: Sequence[float]) -> Scheme:
    # Refuses what is not a finite number, before a checkpoint is opened.
    values = formulas.explicit(numbers, len(numbers), normalize=False).values
    return Scheme(
        "explicit",
        lambda _, paths, normalize: formulas.explicit(values, len(paths), normalize=normalize),
        needs_order=len(set(values)) > 1,
    )


def _by_path(pairs: Sequence[tuple[str, float]]) -> Scheme:
    return Scheme(
        "by-path",
        lambda _, paths, normalize: formulas.by_path(pairs, paths, normalize=normalize),
        needs_order=False,
    )


def _named(text: str) -> Scheme:
    """The scheme that a text names. Its argument is checked here, before a checkpoint is opened.

    Raises:
        SelectionError: there is no such scheme, or its argument is wrong.
    """
    name, colon, argument = text.partition(":")
    if (name, colon) == ("uniform", ""):
        return Scheme(
            name,
            lambda _, paths, normalize: formulas.uniform(len(paths), normalize=normalize),
            needs_order=False,
        )
    if (name, colon) == ("linear", ""):
        return Scheme(
            name,
            lambda _, paths, normalize: formulas.linear(len(paths), normalize=normalize),
        )
    if name == "ema" and argument:
        rate = _argument("ema:DECAY", argument)
        formulas.ema(1, rate)
        return Scheme(
            f"ema:{format_number(rate)}",
            lambda _, paths, __: formulas.ema(len(paths), rate),
        )
    if name == "power" and argument:
        width = _argument("power:SIGMA_REL", argument)
        formulas.power_exponent(width)
        return Scheme(
            f"power:{format_number(width)}",
            lambda steps, _, __: formulas.power(steps, width),
            needs_steps=True,
        )
    if name == "decay" and argument:
        formulas.decay(1, argument)
        return Scheme(
            f"decay:{argument}",
            lambda _, paths, __: formulas.decay(len(paths), argument),
            needs_order=argument != "linear",
        )
    raise SelectionError(f"unknown weights {text!r}", remedy=f"they are {KNOWN}")


def _argument(form: str, text: str) -> float:
    """The number after the colon of a scheme.

    Raises:
        SelectionError: the text is no number.
    """
    number = _number(text)
    if number is None:
        raise SelectionError(f"weights {form} have a number, not {text!r}")
    return number
