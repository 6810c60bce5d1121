"""From checkpoints and weights to jobs: these bytes of the output come from those of the inputs.

All validation that headers allow happens here, before any output exists.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import SelectionError, ValueRangeError, printable
from ckptavg.formats.runs import Integers, run_edges
from ckptavg.formats.tensors import Tensor
from ckptavg.merge.gathered import SMALL, Gathered
from ckptavg.merge.jobs import BadValueError, Input, Job, Share
from ckptavg.merge.layout import Layout, OutputTensor
from ckptavg.merge.roles import Role, decide_roles, refuse_quantised

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from ckptavg.formats.tensors import DType
    from ckptavg.merge.weights import Weights
    from ckptavg.select.sources import Collection, Source

_Pieces = tuple[Integers | slice, tuple[Integers, Integers]]
"""Indices of tensors, and where each begins and ends if they stand one after the other."""

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
class Column:
    """The weights of one output.

    Attributes:
        weights: one for each of the checkpoints that are read, 0 for those that it leaves out.
        divisor: of their weighted sum.
    """

    weights: tuple[float, ...]
    divisor: float

    @cached_property
    def last(self) -> int:
        """Which of the checkpoints is the last that it has a part of."""
        return max(index for index, weight in enumerate(self.weights) if weight != 0)

    @cached_property
    def count(self) -> int:
        """How many checkpoints it is made of."""
        return sum(weight != 0 for weight in self.weights)


@dataclass(frozen=True)
class Plan:
    """What is to be written, and out of what.

    Attributes:
        collection: the checkpoints.
        used: those with a weight other than 0 in some output, the only ones that are read.
        columns: for each output, the weights of `used`.
        tensors: in the order of the outputs, tied ones but once.
    """

    collection: Collection
    used: tuple[Source, ...]
    columns: tuple[Column, ...]
    tensors: tuple[Planned, ...]

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """What is written into each output, in order."""
        return tuple(planned.output for planned in self.tensors)

    def last(self, output: int = 0) -> Source:
        """The last of the checkpoints that an output is made of."""
        return self.used[self.columns[output].last]

    def places(self, source: Source) -> tuple[Tensor, ...]:
        """Where each of the tensors stands in a checkpoint."""
        return tuple(source.tensor(planned.index, planned.tensor) for planned in self.tensors)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each role, tied ones once."""
        return dict(sorted(Counter(planned.role for planned in self.tensors).items()))

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the inputs that go into the outputs."""
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
        """Bytes of the largest tensor that has to be held in memory whole, for each output."""
        sizes = (one.output.nbytes for one in self.tensors if one.index in self.strided)
        return max(sizes, default=0) * len(self.columns)

    def jobs(self, layouts: Sequence[Layout]) -> Iterator[Job]:
        """The jobs in the order of the outputs; neighbours in every file are joined into one."""
        order = np.array([planned.index for planned in self.tensors], np.int64)
        nbytes = np.array([planned.tensor.nbytes for planned in self.tensors], np.int64)
        wholes, pieces = self._edges(order, nbytes, layouts)
        for first, last in itertools.pairwise(wholes.tolist()):
            one, other = np.searchsorted(pieces, (first, last)).tolist()
            size = int(nbytes[first:last].sum())
            if other - one > 1 and size < SMALL * (other - one):
                ends = np.cumsum(nbytes[first:last])
                gathered = _as_slice(order[first:last]), (ends - nbytes[first:last], ends)
                yield from self._jobs(first, size, layouts, gathered)
                continue
            for begin, end in itertools.pairwise(pieces[one : other + 1].tolist()):
                if count := int(nbytes[begin:end].sum()):
                    yield from self._jobs(begin, count, layouts)
        for output, layout in enumerate(layouts):
            for copied in layout.copies:
                yield Job.copy_of(copied, output)

    def _edges(
        self, order: Integers, nbytes: Integers, layouts: Sequence[Layout]
    ) -> tuple[Integers, Integers]:
        """Edges of what is alike, and, among these, of neighbours in every checkpoint too."""
        distinct = {id(source.offsets): source for source in self.used}.values()
        rows = _as_slice(order)
        places = ((source.parts[rows], source.offsets[rows]) for source in distinct)
        keys = list(self._keys(layouts))
        return run_edges(nbytes, (), keys), run_edges(nbytes, places, keys)

    def _keys(self, layouts: Sequence[Layout]) -> Iterator[Integers]:
        """What must not change along a run, beside the inputs' places."""
        written = np.array([planned.output.nbytes for planned in self.tensors], np.int64)
        # Strided tensors go alone: a number of their own.
        numbers = np.arange(len(self.tensors))
        strided = [planned.index in self.strided for planned in self.tensors]
        yield np.where(np.array(strided, bool), numbers, -1)
        for layout in layouts:
            targets = [each[0] if each else -1 for each in layout.targets]
            yield np.array(targets, np.int64) - (np.cumsum(written) - written)
            # So do those with several places, as tied ones have.
            alone = [
                len(each) > 1 or position in layout.scattered
                for position, each in enumerate(layout.targets)
            ]
            yield np.where(np.array(alone, bool), numbers, -1)
        traits = [
            (one.tensor.dtype, one.output.dtype, one.role, one.is_variance) for one in self.tensors
        ]
        known = {trait: number for number, trait in enumerate(dict.fromkeys(traits))}
        yield np.array([known[trait] for trait in traits], np.int64)

    def _jobs(
        self,
        position: int,
        size: int,
        layouts: Sequence[Layout],
        gathered: _Pieces | None = None,
    ) -> Iterator[Job]:
        """One job for all outputs, or one for each checkpoint that some of them copy.

        Args:
            position: of the first tensor.
            size: bytes of an input.
            layouts: of the outputs.
            gathered: the tensors, if these are no neighbours in the inputs.
        """
        planned = self.tensors[position]
        everything = range(len(self.columns))
        if planned.role == "averaged":
            by_sources = {tuple(range(len(self.used))): list(everything)}
        elif planned.role == "kept":
            by_sources = {(len(self.used) - 1,): list(everything)}
        else:
            by_sources = {}
            for output in everything:
                by_sources.setdefault((self.columns[output].last,), []).append(output)
        for sources, outputs in by_sources.items():
            yield Job(
                inputs=tuple(self._input(self.used[index], planned, gathered) for index in sources),
                count=size // planned.tensor.dtype.itemsize,
                copy=planned.copied,
                dtype=planned.output.dtype,
                shares=tuple(self._share(position, output, layouts[output]) for output in outputs),
                number=position,
            )

    @staticmethod
    def _input(source: Source, planned: Planned, gathered: _Pieces | None) -> Input:
        if gathered is not None:
            indices, extents = gathered
            parts, dtype = source.checkpoint.parts, planned.tensor.dtype
            numbers, offsets = source.parts[indices], source.offsets[indices]
            together = Gathered(parts, numbers, offsets, extents, source.path)
            return Input(together, Tensor(dtype, (together.size // dtype.itemsize,), 0, 0))
        part = source.checkpoint.parts[source.parts[planned.index]]
        return Input(part, source.tensor(planned.index, planned.tensor))

    def _share(self, position: int, output: int, layout: Layout) -> Share:
        planned, column = self.tensors[position], self.columns[output]
        averaged = planned.role == "averaged"
        return Share(
            weights=column.weights if averaged else (1.0,),
            divisor=column.divisor if averaged else 1.0,
            targets=layout.targets[position],
            output=output,
            scattered=layout.scattered.get(position, ()),
            nonnegative=planned.is_variance and min(column.weights) < 0,
            one_of_several=not averaged and column.count > 1,
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
    columns: Sequence[Weights],
    *,
    roles: Sequence[Role] | None = None,
    ints: str = "equal",
    norm_stats: str = "average",
    dtype: DType | None = None,
    joined: AbstractSet[str] = frozenset(),
    ordered: bool = False,
) -> Plan:
    """Decide what becomes of every tensor and in which order the outputs have them.

    Args:
        collection: the checkpoints.
        columns: for each output, one weight for each of them.
        roles: one for each tensor, where they are decided already.
        ints: `equal`, or `last` to take differing integer tensors from the last checkpoint.
        norm_stats: `average`, or `last` to take running statistics from the last checkpoint.
        dtype: of the floating tensors in the outputs; None for the inputs' own.
        joined: names of the tensors that the last checkpoint has of all of them already.
        ordered: whether the weights depend on the order of the checkpoints.

    Raises:
        FormatError: the weights are quantised, so that code and scale do not average apart.
        MismatchError: an integer tensor differs between checkpoints.
        SelectionError: the result depends on the order of the checkpoints, which is unknown.
    """
    indices = [
        index
        for index in range(len(collection.sources))
        if any(column.values[index] != 0 for column in columns)
    ]
    used = tuple(collection.sources[index] for index in indices)
    if roles is None:
        refuse_quantised(collection)
        roles = decide_roles(collection, used, ints=ints, norm_stats=norm_stats)
        roles = [
            "joined" if name in joined else role
            for name, role in zip(collection.names, roles, strict=True)
        ]
        if (ordered or "last" in roles) and not collection.order_is_known:
            raise SelectionError(
                "only some of the checkpoints have a step, and the result depends on their order: "
                + ", ".join(map(printable, collection.labels())),
                remedy="put the step into every name",
            )
    return Plan(
        collection,
        used,
        tuple(
            Column(tuple(column.values[index] for index in indices), column.divisor)
            for column in columns
        ),
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


def _as_slice(indices: Integers) -> Integers | slice:
    """The same indices as a slice if they are one: what it takes of an array is no copy."""
    if not len(indices):
        return indices
    first, last = int(indices[0]), int(indices[-1])
    if np.array_equal(indices, np.arange(first, last + 1)):
        return slice(first, last + 1)
    return indices


def find_ties(tensors: Sequence[Tensor], sources: Sequence[Source]) -> dict[int, list[int]]:
    """Tensors that are the same bytes in every checkpoint, by the first of them.

    Empty tensors are never tied: they all are at the same place, which is none.
    """
    if not sources[0].strides and len(np.unique(sources[0].offsets)) == len(tensors):
        return {index: [index] for index in range(len(tensors))}
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
