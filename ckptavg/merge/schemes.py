"""What `--weights` says: which scheme makes the weights, once the checkpoints are known."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.errors import SelectionError
from ckptavg.merge.weights import (
    Weights,
    by_path,
    check_ema,
    check_shape,
    decay,
    ema,
    explicit,
    linear,
    path_parts,
    power,
    power_exponent,
    short,
    uniform,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KNOWN = (
    "uniform, linear, ema:DECAY, power:SIGMA_REL, decay:linear, decay:cosine, decay:1-sqrt, "
    "a number for each checkpoint (0.2,0.3,0.5), or PATH=NUMBER,..."
)


@dataclass(frozen=True)
class Scheme:
    """What makes weights, once the checkpoints are known.

    Attributes:
        name: for the provenance: as it was asked for, such as `ema:0.9`; `explicit` and `by-path`
            for numbers of one's own, which stand beside the sources there.
        label: for the name of a file: `ema0.9`, `decay-cosine`.
        make: of the steps, the names and whether to normalise.
        needs_steps: the checkpoints must have steps.
        needs_order: it depends on the order of the checkpoints.
    """

    name: str
    label: str
    make: Callable[[Sequence[float], Sequence[str], bool], Weights] = field(
        repr=False, compare=False
    )
    needs_steps: bool = False
    needs_order: bool = True

    def weights(
        self, steps: Sequence[float] | None, names: Sequence[str], *, normalize: bool = True
    ) -> Weights:
        """The weights of these checkpoints.

        Args:
            steps: of training, in order, `[num_checkpoints]`; None where they are not known.
            names: paths of the checkpoints, `[num_checkpoints]`.
            normalize: False takes the weights without a division. Those of `ema`, `power` and
                `decay` sum to 1 as they are.

        Raises:
            SelectionError: the scheme does not fit these checkpoints.
        """
        if self.needs_steps and (steps is None or len(steps) != len(names)):
            raise SelectionError(
                f"{self.name} needs the training step of each checkpoint, and not all have one",
                remedy="ema:DECAY needs their order alone",
            )
        return self.make(() if steps is None else steps, names, normalize)


def schemes_of(weights: str | Sequence[float] | Sequence[Scheme]) -> tuple[Scheme, ...]:
    """The schemes that `weights` asks for.

    Args:
        weights: what `parse` takes or returns, or one number for each checkpoint.

    Raises:
        SelectionError: it says no scheme, or the numbers are no numbers.
    """
    if isinstance(weights, str):
        return parse(weights)
    schemes = tuple(each for each in weights if isinstance(each, Scheme))
    return schemes or (
        _explicit_scheme([float(each) for each in weights if not isinstance(each, Scheme)]),
    )


def parse(text: str) -> tuple[Scheme, ...]:
    """What the option `--weights` says.

    `uniform`, `linear`, `ema:0.9`, `power:0.1`, `decay:cosine`, or several of them with commas
    between; or numbers, which are one scheme together (`0.2,0.3,0.5`); or `a.pt=1,b.pt=2`, which is
    one as well. What follows the last `=` is the number: `epoch=3.ckpt=0.5` is a path and 0.5.

    Raises:
        SelectionError: it says none of these, a mixture, or a scheme twice.
    """
    parts = [part.strip() for part in text.split(",")]
    numbers = [_number(part) for part in parts]
    if all(number is not None for number in numbers):
        return (_explicit_scheme([number for number in numbers if number is not None]),)
    if all("=" in part for part in parts):
        return (_by_path_scheme([_pair(part) for part in parts]),)
    if any("=" in part for part in parts) or any(number is not None for number in numbers):
        raise SelectionError(
            f"weights {text!r} mix schemes, numbers and paths", remedy=f"they are {KNOWN}"
        )
    schemes = tuple(_named_scheme(part) for part in parts)
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
        raise SelectionError(f"the weight of a path is PATH=NUMBER, not {text!r}")
    return path, number


def _explicit_scheme(numbers: Sequence[float]) -> Scheme:
    """One's own numbers.

    Raises:
        SelectionError: they are not finite.
    """
    explicit(numbers, len(numbers), normalize=False)
    return Scheme(
        "explicit",
        "explicit",
        lambda _, names, normalize: explicit(numbers, len(names), normalize=normalize),
        needs_order=len(set(numbers)) > 1,
    )


def _by_path_scheme(pairs: Sequence[tuple[str, float]]) -> Scheme:
    return Scheme(
        "by-path",
        "by-path",
        lambda _, names, normalize: by_path(pairs, names, normalize=normalize),
        needs_order=False,
    )


def _named_scheme(text: str) -> Scheme:
    """A scheme that has a name.

    Raises:
        SelectionError: there is no such scheme, or it does not take this argument.
    """
    name, colon, argument = text.partition(":")
    makers = {"ema": _ema_scheme, "power": _power_scheme, "decay": _decay_scheme}
    if name in makers and argument:
        return makers[name](argument)
    if name == "uniform" and not colon:
        return Scheme(
            name,
            name,
            lambda _, names, normalize: uniform(len(names), normalize=normalize),
            needs_order=False,
        )
    if name == "linear" and not colon:
        return Scheme(
            name, name, lambda _, names, normalize: linear(len(names), normalize=normalize)
        )
    raise SelectionError(f"unknown weights {text!r}", remedy=f"they are {KNOWN}")


def _ema_scheme(argument: str) -> Scheme:
    rate = _argument("ema:DECAY", argument)
    check_ema(rate)
    return Scheme(
        f"ema:{short(rate)}", f"ema{short(rate)}", lambda _, names, __: ema(len(names), rate)
    )


def _power_scheme(argument: str) -> Scheme:
    width = _argument("power:SIGMA_REL", argument)
    power_exponent(width)  # refuses what is out of range, before a checkpoint is opened
    return Scheme(
        f"power:{short(width)}",
        f"power{short(width)}",
        lambda steps, _, __: power(steps, width),
        needs_steps=True,
    )


def _decay_scheme(shape: str) -> Scheme:
    check_shape(shape)
    return Scheme(
        f"decay:{shape}",
        f"decay-{shape}",
        lambda _, names, __: decay(len(names), shape),
        needs_order=shape != "linear",
    )


def _argument(form: str, text: str) -> float:
    """The number after a scheme's colon.

    Raises:
        SelectionError: it is none.
    """
    number = _number(text)
    if number is None:
        raise SelectionError(f"weights {form} have a number, not {text!r}")
    return number
