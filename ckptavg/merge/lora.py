"""Average LoRA adapters exactly: the products of their factors, not the factors A and B apart.

An adapter adds `s * B @ A` to a weight, with `s = alpha / r` (Hu et al. 2021, arXiv 2106.09685) or
`alpha / sqrt(r)` (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). The weighted mean of such products
is one product of higher rank, with the ranks side by side:

    sum_i w_i s_i B_i A_i  =  [w_1 s_1 B_1, ..., w_K s_K B_K] @ [A_1; ...; A_K]

so `r' = sum r_i`, and `alpha' = r'` makes its scale 1. Where alpha is a tensor, `alpha'` is a value
that all dtypes can hold, and B makes up for the difference.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ckptavg.errors import (
    CkptAvgError,
    MismatchError,
    ValueRangeError,
    listed,
    printable,
)
from ckptavg.formats.checkpoint import read_view
from ckptavg.formats.lora_adapter import Adapter, recorded_scales
from ckptavg.formats.lora_config import configs_of, joined_settings
from ckptavg.formats.parts import Part
from ckptavg.formats.tensors import bytes_of, new_arrays
from ckptavg.merge.arithmetic import accumulator_dtype, rounded
from ckptavg.merge.jobs import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.lora_names import Factor
    from ckptavg.formats.tensors import AnyArray, Tensor
    from ckptavg.merge.weights import Weights

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class _Factor:
    """A LoRA factor of the average: the factors of all adapters side by side.

    Attributes:
        kind: `A`, `B`, `bias` or `alpha`.
        name: the tensor's name.
        inputs: the factor of each adapter.
        scales: `w_i s_i` of each adapter, divided by the scale of the average.
        alpha: that of the average.
        groups: the number of groups of a convolution; A has one block of rows for each of them.
        output: dtype and shape in the average, and the offset in `Joined`.
    """

    kind: Factor
    name: str
    inputs: tuple[StoredTensor, ...]
    scales: tuple[float, ...]
    alpha: float
    groups: int
    output: Tensor

    def check(self) -> None:
        """Refuse NaN and Inf.

        Raises:
            ValueRangeError: an adapter has such a value.
        """
        for stored, values in zip(self.inputs, self._read(), strict=True):
            if not np.isfinite(values).all():
                raise ValueRangeError(
                    "has values that are NaN or Inf",
                    path=stored.part.path,
                    tensor=self.name,
                    remedy="`allow_nonfinite` accepts it",
                )

    def _read(self) -> Iterator[AnyArray]:
        return (read_view(stored.part, stored.tensor) for stored in self.inputs)

    def values(self) -> AnyArray:
        """The factor as an array, rounded once.

        Raises:
            ValueRangeError: a finite value does not fit the dtype.
        """
        if self.kind == "alpha":
            values = np.full(self.output.shape, self.alpha).astype(self.output.dtype.numpy)
            if (values != self.alpha).any():
                raise ValueRangeError(
                    f"{self.alpha:g} does not fit {self.output.dtype.name}", tensor=self.name
                )
            return values
        if self.kind == "A":
            blocks = [np.split(values, self.groups) for values in self._read()]
            return np.concatenate([block for group in zip(*blocks, strict=True) for block in group])
        exact = accumulator_dtype(self.output.dtype)
        pairs = zip(self._read(), self.scales, strict=True)
        wide = [values.astype(exact) * scale for values, scale in pairs]
        joined = sum(wide[1:], wide[0]) if self.kind == "bias" else np.concatenate(wide, axis=1)
        with np.errstate(over="ignore"):
            values = rounded(joined, self.output.dtype, new_arrays(joined.shape))
        if not np.isfinite(values[np.isfinite(joined)]).all():
            raise ValueRangeError(
                f"the average does not fit {self.output.dtype.name}", tensor=self.name
            )
        return values


class Joined(Part):
    """All factors of the average, which are read like a file and computed on reading.

    The last factor that was read is held in memory.

    Attributes:
        path: the checkpoint that messages name.
        size: 0, since there is no such file on the disk.
    """

    size = 0

    def __init__(self, path: Path, factors: Sequence[_Factor]) -> None:
        self.path = path
        self._factors = factors
        self._starts = [factor.output.offset for factor in factors]
        self._lock = threading.Lock()
        self._held: tuple[int, AnyArray] | None = None

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`, which may reach over several factors."""
        while len(out):
            # Empty factors have the start of the next one: the last with this start has elements.
            number = bisect.bisect_right(self._starts, offset) - 1
            data = self._bytes(number)[offset - self._starts[number] :]
            count = min(len(data), len(out))
            out[:count] = data[:count]
            out, offset = out[count:], offset + count

    def _bytes(self, number: int) -> memoryview:
        with self._lock:
            if self._held is None or self._held[0] != number:
                self._held = None
                self._held = number, np.ascontiguousarray(self._factors[number].values())
            return bytes_of(self._held[1])


def check_adapters(members: Sequence[Checkpoint]) -> None:
    """Refuse adapters of unlike settings; warn where averages of tensors are none of adapters.

    Raises:
        MismatchError: the adapters differ in rank, alpha or other settings.
    """
    configs = configs_of(members[-1])
    is_linear = bool(configs) and all(config.is_linear for config in configs)
    reason = "" if is_linear else reason_against_joining(members)
    differences = _differing_scales(members)
    if differences:
        remedy = "`lora=exact` averages what they add to the weights"
        if reason or is_linear:
            remedy = "merge each into its model, and average the models"
        raise MismatchError(
            "adapters are not averaged if their ranks, alphas or other settings differ "
            f"({remedy}):",
            differences,
        )
    if not is_linear:
        log.warning(
            "adapters are averaged tensor by tensor, which is not the average of what they add to "
            "the weights; %s",
            f"that average cannot be computed: {reason}"
            if reason
            else "`lora=exact` computes that average",
        )


def _differing_scales(members: Sequence[Checkpoint]) -> list[str]:
    """A line for each difference in the settings that two adapters record."""
    first, *others = members
    recorded = recorded_scales(first)
    groups: defaultdict[tuple[str, str, Path], list[str]] = defaultdict(list)
    for other in others:
        scales = recorded_scales(other)
        for name in {**recorded, **scales}:
            values = (recorded.get(name, "nothing"), scales.get(name, "nothing"))
            if values[0] != values[1]:
                groups[(*values, other.path)].append(name)
    return [
        f"{listed(names, 1)}: {printable(value)} in {printable(first.path)}, "
        f"{printable(another)} in {printable(path)}"
        for (value, another, path), names in groups.items()
    ]


def reason_against_joining(members: Sequence[Checkpoint]) -> str:
    """Why the products of adapters have no exact average; empty where they have one."""
    try:
        adapters = [Adapter.read(member) for member in members]
        _joined_factors(adapters, [1.0] * len(members))
    except CkptAvgError as error:
        return str(error)
    return ""


def join_factors(
    members: Sequence[Checkpoint], weights: Weights, *, allow_nonfinite: bool = False
) -> tuple[tuple[Checkpoint, ...], dict[str, bytes]]:
    """Put the factors of all adapters side by side, in place of those of the last adapter.

    Args:
        members: adapters, whose ranks may differ.
        weights: one weight for each of `members`.
        allow_nonfinite: let NaN and Inf pass.

    Returns:
        The members, of which the last one with a weight has the joined factors and metadata that
        record them; and the files that an output needs beside the weights, by name.

    Raises:
        FormatError: a member is not a plain LoRA adapter, or a module has only one of A and B.
        MismatchError: factors differ in more than their ranks.
        SelectionError: an adapter records no alpha, or has no factor.
        ValueRangeError: a factor has NaN or Inf.
    """
    pairs = [pair for pair in zip(members, weights.values, strict=True) if pair[1]]
    adapters = [Adapter.read(member) for member, _ in pairs]
    coefficients = [value / weights.divisor for _, value in pairs]
    last = adapters[-1].checkpoint
    factors: list[_Factor] = []
    ranks: dict[str, int] = {}
    offset = 0
    for module, of_module in _joined_factors(adapters, coefficients).items():
        for factor in of_module:
            factors.append(replace(factor, output=replace(factor.output, offset=offset)))
            offset += factor.output.nbytes
            if factor.kind == "A":
                ranks[module] = factor.output.shape[0]
    for factor in () if allow_nonfinite else factors:
        factor.check()
    if not all(map(adapters[-1].records_alpha, adapters[-1].modules)):
        log.warning("no alpha is recorded: the rank counts as alpha, as it does for loaders")
    files, metadata = joined_settings(last, adapters[-1].configs, ranks)
    part = len(last.parts)
    by_name = {factor.name: replace(factor.output, part=part) for factor in factors}
    joined = replace(
        last,
        parts=(*last.parts, Joined(last.path, factors)),
        tensors={**last.tensors, **by_name},
        metadata=metadata,
    )
    return tuple(joined if member is last else member for member in members), files


def _joined_factors(
    adapters: Sequence[Adapter], coefficients: Sequence[float]
) -> dict[str, list[_Factor]]:
    """The joined factors of each module."""
    return {module: _joined(adapters, coefficients, module) for module in adapters[-1].modules}


def _joined(
    adapters: Sequence[Adapter], coefficients: Sequence[float], module: str
) -> list[_Factor]:
    """The joined factors of a module.

    Raises:
        MismatchError: adapters lack some of them, or they differ in more than their ranks.
    """
    factors = adapters[-1].modules[module]
    lacking = [each for each in adapters if each.modules.get(module) != factors]
    if lacking:
        raise MismatchError(
            "all adapters must have the same LoRA factors:",
            [f"{printable(module)}: not in {printable(each.checkpoint.path)}" for each in lacking],
        )
    groups = _groups(adapters, module)
    ranks = [adapter.tensor(module, "A").shape[0] for adapter in adapters]
    rank = sum(ranks)
    alpha = float(ml_dtypes.bfloat16(rank)) if "alpha" in factors else float(rank)
    scales = tuple(
        coefficient * adapter.scale(module, each) * rank / alpha
        for adapter, coefficient, each in zip(adapters, coefficients, ranks, strict=True)
    )
    joined = []
    for kind, tensor in factors.items():
        inputs = tuple(_stored(adapter.checkpoint, tensor.name) for adapter in adapters)
        like = inputs[-1].tensor
        shape = like.shape
        if kind == "A":
            shape = (rank, *shape[1:])
        elif kind == "B":
            shape = (shape[0], rank // groups, *shape[2:])
        output = replace(like, shape=shape, strides=None)
        joined.append(_Factor(kind, tensor.name, inputs, scales, alpha, groups, output))
    return joined


def _stored(checkpoint: Checkpoint, name: str) -> StoredTensor:
    tensor = checkpoint.tensors[name]
    return StoredTensor(checkpoint.parts[tensor.part], tensor)


def _groups(adapters: Sequence[Adapter], module: str) -> int:
    """The number of groups of a convolution; 1 for other modules.

    Raises:
        MismatchError: the factors differ in more than their ranks.
    """
    shapes = [
        (adapter.tensor(module, "A").shape, adapter.tensor(module, "B").shape)
        for adapter in adapters
    ]
    without_rank = {_without_rank(a, b) for a, b in shapes}
    groups = without_rank.pop()[-1] if len(without_rank) == 1 else 0
    if not groups:
        raise MismatchError(
            "LoRA factors differ in more than their ranks:",
            [
                f"{printable(module)}: A {a} and B {b} in {printable(adapter.checkpoint.path)}"
                for adapter, (a, b) in zip(adapters, shapes, strict=True)
            ],
        )
    return groups


def _without_rank(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The sizes of A and B without their ranks, and A's rank divided by B's; 0 if no integer."""
    if min(len(a), len(b)) < 2 or not b[1] or a[0] % b[1]:  # noqa: PLR2004 - matrices at least
        return (*a, *b), 0
    return (*a[1:], b[0], *b[2:]), a[0] // b[1]
