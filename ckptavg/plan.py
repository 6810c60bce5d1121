"""From checkpoints and weights to jobs: these bytes of the output come from those of the inputs.

All validation that headers allow happens here, before any output exists.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.engine import BadValueError, Input, Job
from ckptavg.errors import SelectionError, ValueRangeError, printable
from ckptavg.layout import Layout, OutputTensor
from ckptavg.roles import Role, decide_roles, refuse_quantised
from ckptavg.runs import Integers, runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from ckptavg.collect import Collection, Source
    from ckptavg.tensors import DType, Tensor
    from ckptavg.weights import Weights

log = logging.getLogger("ckptavg")


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the output, and what becomes of it.

    Attributes:
        index: which of the collection's tensors it is; of tied ones the first.
        tensor: its description in the reference.
        role: what becomes of it.
        output: what is written.
    """

    index: int
    tensor: Tensor
    role: Role
    output: OutputTensor

    @property
    def copied(self) -> bool:
        """Whether its bytes stay as they are; a float of the last checkpoint is looked at."""
        return self.role == "kept" or (self.role == "last" and not self.tensor.dtype.averaged)

    @property
    def is_variance(self) -> bool:
        """Whether it must not become negative."""
        return self.output.names[0].rpartition(".")[2] == "running_var"


@dataclass(frozen=True)
class Plan:
    """What is to be written, and out of what.

    Attributes:
        collection: the checkpoints.
        used: those with a weight other than 0, the only ones that are read.
        weights: one for each of `used`.
        divisor: of their weighted sum.
        tensors: in the order of the output, tied ones but once.
    """

    collection: Collection
    used: tuple[Source, ...]
    weights: tuple[float, ...]
    divisor: float
    tensors: tuple[Planned, ...]

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """What is written, in order."""
        return tuple(planned.output for planned in self.tensors)

    @property
    def places_in_last(self) -> tuple[Tensor, ...]:
        """Where each of them stands in the last checkpoint."""
        last = self.used[-1]
        return tuple(last.tensor(planned.index, planned.tensor) for planned in self.tensors)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each role, tied ones once."""
        return dict(sorted(Counter(planned.role for planned in self.tensors).items()))

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the inputs that go into the output."""
        return sum(
            planned.tensor.nbytes * (len(self.used) if planned.role == "averaged" else 1)
            for planned in self.tensors
        )

    @cached_property
    def strided(self) -> frozenset[int]:
        """Indices of the tensors that are not contiguous in every checkpoint."""
        return frozenset(index for source in self.used for index in source.strides)

    @property
    def largest_strided(self) -> int:
        """Bytes of the largest tensor that has to be held in memory whole."""
        sizes = (one.output.nbytes for one in self.tensors if one.index in self.strided)
        return max(sizes, default=0)

    def jobs(self, layout: Layout) -> Iterator[Job]:
        """The jobs in the order of the output; neighbours in every file are joined into one."""
        order = np.array([planned.index for planned in self.tensors], np.int64)
        nbytes = np.array([planned.tensor.nbytes for planned in self.tensors], np.int64)
        distinct = {id(source.offsets): source for source in self.used}.values()
        places = [(source.parts[order], source.offsets[order]) for source in distinct]
        for first, last in runs(nbytes, places, self._keys(layout)):
            itemsize = self.tensors[first].tensor.dtype.itemsize
            count = int(nbytes[first:last].sum()) // itemsize
            if count:
                yield self._job(first, count, layout)
        for copied in layout.copies:
            yield Job.copy_of(copied)

    def _keys(self, layout: Layout) -> Iterator[Integers]:
        """What must not change along a run, beside the inputs' places."""
        written = np.array([planned.output.nbytes for planned in self.tensors], np.int64)
        targets = np.array([targets[0] if targets else -1 for targets in layout.targets], np.int64)
        yield targets - (np.cumsum(written) - written)
        # Tied and strided tensors go alone: a number of their own.
        alone = [
            position
            if planned.index in self.strided or len(targets) > 1 or position in layout.scattered
            else -1
            for position, (planned, targets) in enumerate(
                zip(self.tensors, layout.targets, strict=True)
            )
        ]
        yield np.array(alone, np.int64)
        traits = [
            (one.tensor.dtype, one.output.dtype, one.role, one.is_variance) for one in self.tensors
        ]
        numbers = {trait: number for number, trait in enumerate(dict.fromkeys(traits))}
        yield np.array([numbers[trait] for trait in traits], np.int64)

    def _job(self, position: int, count: int, layout: Layout) -> Job:
        planned = self.tensors[position]
        averaged = planned.role == "averaged"
        sources = self.used if averaged else self.used[-1:]
        weights = self.weights if averaged else (1.0,)
        inputs = tuple(
            Input(
                source.checkpoint.parts[source.parts[planned.index]],
                source.tensor(planned.index, planned.tensor),
                weight,
            )
            for source, weight in zip(sources, weights, strict=True)
        )
        return Job(
            inputs=inputs,
            count=count,
            copy=planned.copied,
            divisor=self.divisor if averaged else 1.0,
            dtype=planned.output.dtype,
            targets=layout.targets[position],
            number=position,
            nonnegative=planned.is_variance and min(self.weights) < 0,
            one_of_several=len(inputs) < len(self.used),
            scattered=layout.scattered.get(position, ()),
        )

    def name_of(self, error: BadValueError) -> ValueRangeError:
        """The engine's complaint with the tensor's name in it."""
        position, element = error.number, error.element
        if element is not None:
            while element >= self.tensors[position].tensor.count:
                element -= self.tensors[position].tensor.count
                position += 1
        where = "" if element is None else f"element {element}: "
        return ValueRangeError(
            where + error.message,
            path=error.path,
            tensor=self.tensors[position].output.names[0],
            remedy="--allow-nonfinite lets it pass" if error.path is not None else None,
        )


def make_plan(
    collection: Collection,
    weights: Weights,
    *,
    roles: Sequence[Role] | None = None,
    ints: str = "equal",
    norm_stats: str = "average",
    dtype: DType | None = None,
    joined: AbstractSet[str] = frozenset(),
) -> Plan:
    """Decide what becomes of every tensor and in which order the output has them.

    Args:
        collection: the checkpoints.
        weights: one for each of them.
        roles: one for each tensor, where they are decided already.
        ints: `equal`, or `last` to take differing integer tensors from the last checkpoint.
        norm_stats: `average`, or `last` to take running statistics from the last checkpoint.
        dtype: of the floating tensors in the output; None for the inputs' own.
        joined: names of the tensors that the last checkpoint has of all of them already.

    Raises:
        FormatError: the weights are quantised, so that code and scale do not average apart.
        MismatchError: an integer tensor differs between checkpoints.
        SelectionError: the result depends on the order of the checkpoints, which is unknown.
    """
    pairs = [
        (source, value)
        for source, value in zip(collection.sources, weights.values, strict=True)
        if value != 0
    ]
    used = tuple(source for source, _ in pairs)
    if roles is None:
        refuse_quantised(collection)
        roles = decide_roles(collection, used, ints=ints, norm_stats=norm_stats)
        roles = [
            "joined" if name in joined else role
            for name, role in zip(collection.names, roles, strict=True)
        ]
        if not collection.order_is_known and not (weights.uniform and "last" not in roles):
            raise SelectionError(
                "only some of the checkpoints have a step, and the result depends on their order: "
                + ", ".join(map(printable, collection.labels())),
                remedy="put the step into every name",
            )
    return Plan(
        collection,
        used,
        tuple(value for _, value in pairs),
        weights.divisor,
        tuple(_planned(collection, used, roles, dtype)),
    )


def _planned(
    collection: Collection, used: Sequence[Source], roles: Sequence[Role], dtype: DType | None
) -> Iterator[Planned]:
    """The tensors in the order of the output.

    That of the files, but with wide element types first, as safetensors has it: each is aligned.
    """
    tensors = collection.described
    ties = find_ties(tensors, used)
    for index in sorted(ties, key=lambda index: (-tensors[index].dtype.bits, index)):
        tensor = tensors[index]
        target = dtype if dtype is not None and tensor.dtype.kind == "float" else tensor.dtype
        names = tuple(sorted(collection.names[tied] for tied in ties[index]))
        output = OutputTensor(names, target, tensor.shape, target.nbytes(tensor.count))
        yield Planned(index, tensor, roles[index], output)


def find_ties(tensors: Sequence[Tensor], sources: Sequence[Source]) -> dict[int, list[int]]:
    """Tensors that are the same bytes in every checkpoint, by the first of them.

    Empty tensors are never tied: they all are at the same place, which is none.
    """
    ties: dict[int, list[int]] = {}
    by_place: defaultdict[object, list[int]] = defaultdict(list)
    reference = sources[0]
    for index, tensor in enumerate(tensors):
        place = (reference.parts[index], reference.offsets[index], reference.strides.get(index))
        candidates = by_place[(*place, tensor.dtype, tensor.shape)] if tensor.count else []
        for first in candidates:
            if all(source.same_place(first, index) for source in sources):
                ties[first].append(index)
                break
        else:
            candidates.append(index)
            ties[index] = [index]
    return ties
