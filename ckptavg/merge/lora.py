"""Average LoRA adapters exactly: the products of their factors, not the factors A and B apart.

An adapter adds `s * B @ A` to a weight, with `s = alpha / r` (Hu et al. 2021, arXiv 2106.09685) or
`alpha / sqrt(r)` (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). The weighted mean of such products
is one product of higher rank, with the ranks side by side:

    sum_i w_i s_i B_i A_i  =  [w_1 s_1 B_1, ..., w_K s_K B_K] @ [A_1; ...; A_K]

so `r' = sum r_i`, and `alpha' = r'` makes its scale 1.
"""

from __future__ import annotations

import bisect
import logging
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import FormatError, MismatchError, SelectionError, ValueRangeError, printable
from ckptavg.formats.checkpoint import read_view
from ckptavg.formats.lora_config import Config, joined_config, scales_beside
from ckptavg.formats.parts import Part
from ckptavg.formats.tensors import bytes_of, is_of_lora, lora_factor, new_arrays
from ckptavg.merge.arithmetic import accumulator_dtype, rounded
from ckptavg.merge.jobs import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import AnyArray, Factor, Tensor
    from ckptavg.merge.weights import Weights

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class _Factor:
    """A LoRA factor of the average: the factors of all adapters side by side.

    Attributes:
        kind: `A`, `B` or `bias`.
        name: the tensor's name.
        inputs: the factor of each adapter.
        scales: `w_i s_i` of each adapter.
        groups: the number of groups of a convolution; A has one block of rows for each of them.
        output: dtype and shape in the average, and the offset in `Joined`.
    """

    kind: Factor
    name: str
    inputs: tuple[StoredTensor, ...]
    scales: tuple[float, ...]
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
                    remedy="`allow_nonfinite` lets it pass",
                )

    def _read(self) -> Iterator[AnyArray]:
        return (read_view(stored.part, stored.tensor) for stored in self.inputs)

    def values(self) -> AnyArray:
        """The factor as an array, rounded once.

        Raises:
            ValueRangeError: a finite value does not fit the dtype.
        """
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


def check_scales(members: Sequence[Checkpoint]) -> None:
    """Warn that LoRA factors are averaged apart, and refuse that if the scales differ.

    Raises:
        MismatchError: the adapters' configurations differ in rank or alpha.
    """
    first, *others = members
    differences = [
        f"{printable(first.path)} and {printable(other.path)}"
        for other in others
        if scales_beside(other.path) != scales_beside(first.path)
    ]
    if differences:
        raise MismatchError(
            "LoRA adapters of unlike rank or alpha, whose factors do not average apart "
            "(`lora=exact` averages their products):",
            differences,
        )
    log.warning(
        "averaging the factors A and B of LoRA adapters apart is not averaging their products; "
        "`lora=exact` does"
    )


def join_factors(
    members: Sequence[Checkpoint], weights: Weights, *, allow_nonfinite: bool = False
) -> tuple[tuple[Checkpoint, ...], bytes]:
    """Put the factors of all adapters side by side, in place of those of the last adapter.

    Args:
        members: adapters, whose ranks may differ.
        weights: one weight for each of `members`.
        allow_nonfinite: let NaN and Inf pass.

    Returns:
        The members, of which the last one with a weight has the joined factors; and the
        configuration of the joined factors (JSON).

    Raises:
        FormatError: a member is no plain LoRA adapter, or a module has only one of A and B.
        MismatchError: factors differ in more than their ranks.
        SelectionError: there is no configuration beside an adapter, or it has no factor.
        ValueRangeError: a factor has NaN or Inf.
    """
    pairs = zip(members, weights.values, strict=True)
    adapters = [
        _Adapter(member, Config.read(member.path), value / weights.divisor)
        for member, value in pairs
        if value
    ]
    last = adapters[-1].checkpoint
    factors: list[_Factor] = []
    ranks: dict[str, int] = {}
    offset = 0
    for module, names in _factors_by_module(last).items():
        for factor in _joined(adapters, module, names):
            factors.append(replace(factor, output=replace(factor.output, offset=offset)))
            offset += factor.output.nbytes
            if factor.kind == "A":
                ranks[module] = factor.output.shape[0]
    for factor in () if allow_nonfinite else factors:
        factor.check()
    part = len(last.parts)
    by_name = {factor.name: replace(factor.output, part=part) for factor in factors}
    joined = replace(
        last,
        parts=(*last.parts, Joined(last.path, factors)),
        tensors={**last.tensors, **by_name},
    )
    replaced = tuple(joined if member is last else member for member in members)
    return replaced, joined_config(adapters[-1].config.content, ranks)


@dataclass(frozen=True)
class _Adapter:
    """An adapter with a weight other than 0.

    Attributes:
        checkpoint: its tensors.
        config: its configuration.
        coefficient: its weight, divided by the divisor.
    """

    checkpoint: Checkpoint
    config: Config
    coefficient: float

    def stored(self, name: str) -> StoredTensor:
        """A tensor of the adapter."""
        tensor = self.checkpoint.tensors[name]
        return StoredTensor(self.checkpoint.parts[tensor.part], tensor)


def _factors_by_module(checkpoint: Checkpoint) -> dict[str, dict[Factor, str]]:
    """The names of the factors of each module."""
    modules: dict[str, dict[Factor, str]] = {}
    for name in checkpoint.tensors:
        factor = lora_factor(name)
        if factor is not None:
            modules.setdefault(factor[0], {})[factor[1]] = name
        elif is_of_lora(name):
            raise FormatError(
                "is no factor A or B of a plain LoRA", path=checkpoint.path, tensor=name
            )
    if not modules:
        raise SelectionError("has no LoRA factors", path=checkpoint.path)
    return modules


def _joined(
    adapters: Sequence[_Adapter], module: str, names: Mapping[Factor, str]
) -> list[_Factor]:
    """The joined factors of a module."""
    for kind in ("A", "B"):
        if kind not in names:
            path = adapters[0].checkpoint.path
            raise FormatError(f"has no LoRA factor {kind}", path=path, tensor=module)
    groups = _groups(adapters, module, names)
    ranks = [adapter.stored(names["A"]).tensor.shape[0] for adapter in adapters]
    scales = tuple(
        adapter.coefficient * adapter.config.scale(module, rank)
        for adapter, rank in zip(adapters, ranks, strict=True)
    )
    factors = []
    for kind, name in names.items():
        inputs = tuple(adapter.stored(name) for adapter in adapters)
        like = inputs[-1].tensor
        shape = like.shape
        if kind == "A":
            shape = (sum(ranks), *shape[1:])
        elif kind == "B":
            shape = (shape[0], sum(ranks) // groups, *shape[2:])
        factors.append(
            _Factor(kind, name, inputs, scales, groups, replace(like, shape=shape, strides=None))
        )
    return factors


def _groups(adapters: Sequence[_Adapter], module: str, names: Mapping[Factor, str]) -> int:
    """The number of groups of a convolution; 1 for other modules.

    Raises:
        MismatchError: the factors differ in more than their ranks.
    """
    shapes = [
        (adapter.stored(names["A"]).tensor.shape, adapter.stored(names["B"]).tensor.shape)
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
    """The sizes of A and B without their ranks, and A's rank divided by B's; 0 if not whole."""
    if min(len(a), len(b)) < 2 or not b[1] or a[0] % b[1]:  # noqa: PLR2004 - matrices at least
        return (*a, *b), 0
    return (*a[1:], b[0], *b[2:]), a[0] // b[1]
