"""Average LoRA adapters exactly: not A and B apart, but the products that they stand for.

An adapter adds `s * B @ A` to a weight, with `s = alpha / r` (Hu et al. 2021, arXiv 2106.09685) or
`alpha / sqrt(r)` (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). The weighted mean of such products
is one product of higher rank, with the ranks side by side:

    sum_i w_i s_i B_i A_i  =  [w_1 s_1 B_1, ..., w_K s_K B_K] @ [A_1; ...; A_K]

so `r' = sum r_i`, and `alpha' = r'` makes its scale 1.
"""

from __future__ import annotations

import bisect
import re
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ckptavg.errors import FormatError, MismatchError, SelectionError, ValueRangeError, printable
from ckptavg.formats.checkpoint import read_view
from ckptavg.formats.lora_config import Config, joined_config
from ckptavg.formats.tensors import bytes_of, fresh
from ckptavg.merge.arithmetic import accumulator_dtype, rounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.parts import Part
    from ckptavg.formats.tensors import AnyArray, Tensor
    from ckptavg.merge.weights import Weights
    from ckptavg.select.sources import Collection, Source

_FACTOR = re.compile(
    r"(?P<module>.+)\.(lora_(?P<factor>[AB])(?P<bias>\.weight|\.bias)|lora_embedding_(?P<table>[AB]))"
)
_ANY = re.compile(r"(.+\.)?lora_[A-Za-z_]+(\..+)?")
Factor = Literal["A", "B", "bias"]


def is_lora(names: Sequence[str]) -> bool:
    """Whether there are LoRA factors among the tensors."""
    return any(_FACTOR.fullmatch(name) for name in names)


def is_factor(name: str) -> bool:
    """Whether a tensor is a LoRA factor, or its bias."""
    return _FACTOR.fullmatch(name) is not None


def has_rank(name: str) -> bool:
    """Whether a tensor is a LoRA factor whose rank may differ between checkpoints."""
    found = _parse(name)
    return found is not None and found[1] != "bias"


def _parse(name: str) -> tuple[str, Factor] | None:
    """The module that a factor belongs to, and which one it is."""
    found = _FACTOR.fullmatch(name)
    if found is None:
        return None
    if found["bias"] == ".bias":
        return (found["module"], "bias") if found["factor"] == "B" else None
    return found["module"], found["factor"] or found["table"]  # type: ignore[return-value]


@dataclass(frozen=True)
class _Factor:
    """A factor of the average: what is put side by side.

    Attributes:
        kind: which factor.
        name: its name.
        inputs: for each checkpoint the file, the tensor in it and what it is multiplied by.
        groups: of a grouped convolution, whose factors are in as many blocks; else 1.
        output: its description in the average; its place is in the part that joins them.
    """

    kind: Factor
    name: str
    inputs: tuple[tuple[Part, Tensor, float], ...]
    groups: int
    output: Tensor

    def check(self) -> None:
        """Refuse NaN and Inf.

        Raises:
            ValueRangeError: the first checkpoint with some.
        """
        for part, tensor, _ in self.inputs:
            if not np.isfinite(read_view(part, tensor)).all():
                raise ValueRangeError(
                    "has values that are NaN or Inf",
                    path=part.path,
                    tensor=self.name,
                    remedy="--allow-nonfinite lets it pass",
                )

    def make(self) -> AnyArray:
        """The factor as an array `[*shape]`, rounded once."""
        if self.kind == "A":
            blocks = [
                np.split(read_view(part, tensor), self.groups) for part, tensor, _ in self.inputs
            ]
            return np.concatenate([block for group in zip(*blocks, strict=True) for block in group])
        exact = accumulator_dtype(self.output.dtype)
        wide = [
            read_view(part, tensor).astype(exact) * scale for part, tensor, scale in self.inputs
        ]
        joined = sum(wide[1:], wide[0]) if self.kind == "bias" else np.concatenate(wide, axis=1)
        with np.errstate(over="ignore"):
            values = rounded(joined, self.output.dtype, fresh(joined.shape))
        if not np.isfinite(values[np.isfinite(joined)]).all():
            raise ValueRangeError(
                f"the average does not fit {self.output.dtype.name}", tensor=self.name
            )
        return values


class Joined:
    """The factors of the average, one after the other, made when they are read.

    A part of a checkpoint like a file; no more than one factor is held in memory.

    Attributes:
        path: the checkpoint that stands for it in messages.
        size: 0, since the bytes on the disk are those of the checkpoints.
        identity: None; it is no file.
    """

    size = 0
    identity = None

    def __init__(self, path: Path, factors: Sequence[_Factor]) -> None:
        self.path = path
        self._factors = factors
        self._starts = [factor.output.offset for factor in factors]
        self._lock = threading.Lock()
        self._made: tuple[int, AnyArray] | None = None

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`, which may reach over several factors."""
        while len(out):
            # Of factors without an element the last one of the same start is none.
            number = bisect.bisect_right(self._starts, offset) - 1
            data = self._bytes(number)[offset - self._starts[number] :]
            count = min(len(data), len(out))
            out[:count] = data[:count]
            out, offset = out[count:], offset + count

    def _bytes(self, number: int) -> memoryview:
        with self._lock:
            if self._made is None or self._made[0] != number:
                self._made = None
                self._made = number, np.ascontiguousarray(self._factors[number].make())
            return bytes_of(self._made[1])

    def check_unchanged(self) -> None:
        """The checkpoints' own files are checked."""


def join(
    collection: Collection, weights: Weights, *, allow_nonfinite: bool = False
) -> tuple[Collection, bytes]:
    """Let the factors stand side by side, in place of the last checkpoint's own.

    Args:
        collection: adapters, whose ranks may differ.
        weights: one for each of them.
        allow_nonfinite: let NaN and Inf pass.

    Returns:
        The collection with the last checkpoint's factors replaced, which are then taken as they
        are, and the configuration to go with them.

    Raises:
        FormatError: they are no plain LoRA, or a factor lacks the other.
        MismatchError: factors differ in more than their ranks.
        SelectionError: there is no configuration beside them, or no factor.
        ValueRangeError: a factor has NaN or Inf.
    """
    used = [
        (source, value / weights.divisor)
        for source, value in zip(collection.sources, weights.values, strict=True)
        if value
    ]
    configs = [Config.read(source.path) for source, _ in used]
    factors, ranks = _factors(collection, used, configs)
    for factor in () if allow_nonfinite else factors:
        factor.check()
    last = used[-1][0]
    part = Joined(last.path, factors)
    by_name = {factor.name: factor.output for factor in factors}
    tensors = {name: by_name.get(name, tensor) for name, tensor in collection.tensors.items()}
    sources = tuple(
        _with_part(source, part, by_name, collection.names) if source is last else source
        for source in collection.sources
    )
    joined = replace(collection, tensors=tensors, sources=sources)
    return joined, joined_config(configs[-1].content, ranks)


def _with_part(
    source: Source, part: Part, factors: Mapping[str, Tensor], names: Sequence[str]
) -> Source:
    """The source with its factors in another part."""
    parts, offsets, strides = source.parts.copy(), source.offsets.copy(), dict(source.strides)
    for index, name in enumerate(names):
        if name in factors:
            parts[index] = len(source.checkpoint.parts)
            offsets[index] = factors[name].offset
            strides.pop(index, None)
    checkpoint = replace(source.checkpoint, parts=(*source.checkpoint.parts, part))
    return replace(
        source, checkpoint=checkpoint, parts=parts, offsets=offsets, strides=strides, shapes={}
    )


def _factors(
    collection: Collection, used: Sequence[tuple[Source, float]], configs: Sequence[Config]
) -> tuple[list[_Factor], dict[str, int]]:
    """All factors of the average, and the rank of each module."""
    modules: dict[str, dict[Factor, int]] = {}
    for index, name in enumerate(collection.names):
        found = _parse(name)
        if found is not None:
            modules.setdefault(found[0], {})[found[1]] = index
        elif _ANY.fullmatch(name):
            raise FormatError(
                "is no factor A or B of a plain LoRA", path=used[-1][0].path, tensor=name
            )
    if not modules:
        raise SelectionError("has no LoRA factors", path=used[-1][0].path)
    factors: list[_Factor] = []
    ranks: dict[str, int] = {}
    offset = 0
    for module, indices in modules.items():
        pair = _Module(collection, used, configs, module, indices)
        ranks[module] = pair.rank
        for factor in pair.factors():
            placed = replace(factor, output=replace(factor.output, offset=offset))
            factors.append(placed)
            offset += placed.output.nbytes
    return factors, ranks


class _Module:
    """The factors of one module in all checkpoints."""

    def __init__(
        self,
        collection: Collection,
        used: Sequence[tuple[Source, float]],
        configs: Sequence[Config],
        module: str,
        indices: Mapping[Factor, int],
    ) -> None:
        self._indices, self._names = indices, collection.names
        for factor in ("A", "B"):
            if factor not in indices:
                raise FormatError(
                    f"has no LoRA factor {factor}", path=used[0][0].path, tensor=module
                )
        self._tensors: dict[Factor, list[tuple[Part, Tensor]]] = {
            factor: [_tensor(collection, source, index) for source, _ in used]
            for factor, index in indices.items()
        }
        self._module, self._used = module, used
        self._groups = self._find_groups()
        self._ranks = [tensor.shape[0] for _, tensor in self._tensors["A"]]
        self.rank = sum(self._ranks)
        self._scales = [
            share * config.scale(module, rank)
            for (_, share), config, rank in zip(used, configs, self._ranks, strict=True)
        ]

    def _find_groups(self) -> int:
        """In how many groups a convolution is; checks that all fits but for the ranks."""
        pairs = list(zip(self._tensors["A"], self._tensors["B"], strict=True))
        traits = {_without_rank(a.shape, b.shape) for (_, a), (_, b) in pairs}
        groups = traits.pop()[-1] if len(traits) == 1 else 0
        if not groups:
            raise MismatchError(
                "LoRA factors differ in more than their ranks:",
                [
                    f"{printable(self._module)}: A {a.shape} and B {b.shape} in "
                    f"{printable(source.path)}"
                    for (source, _), ((_, a), (_, b)) in zip(self._used, pairs, strict=True)
                ],
            )
        return groups

    def factors(self) -> Iterator[_Factor]:
        """The module's factors in the average."""
        for factor, tensors in self._tensors.items():
            like = tensors[-1][1]
            shape = like.shape
            if factor == "A":
                shape = (self.rank, *shape[1:])
            elif factor == "B":
                shape = (shape[0], self.rank // self._groups, *shape[2:])
            inputs = tuple(
                (part, tensor, scale)
                for (part, tensor), scale in zip(tensors, self._scales, strict=True)
            )
            output = replace(like, shape=shape, strides=None)
            yield _Factor(factor, self._names[self._indices[factor]], inputs, self._groups, output)


def _without_rank(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The shapes of a pair without the rank, and how often B's rank goes into A's (0: not)."""
    if min(len(a), len(b)) < 2 or not b[1] or a[0] % b[1]:  # noqa: PLR2004 - matrices at least
        return (*a, *b), 0
    return (*a[1:], b[0], *b[2:]), a[0] // b[1]


def _tensor(collection: Collection, source: Source, index: int) -> tuple[Part, Tensor]:
    """A factor in one checkpoint, in its own shape."""
    tensor = source.tensor(index, collection.described[index])
    return source.checkpoint.parts[tensor.part], tensor
