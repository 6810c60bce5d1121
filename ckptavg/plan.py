"""From checkpoints and weights to jobs: these bytes of the output come from those of the inputs.

All validation that headers allow happens here, before any output exists.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ckptavg.compare import differing
from ckptavg.engine import BadValueError, Input, Job
from ckptavg.errors import FormatError, MismatchError, SelectionError, ValueRangeError, printable
from ckptavg.layout import Layout, OutputTensor
from ckptavg.runs import Integers, runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ckptavg.collect import Collection, Source
    from ckptavg.tensors import DType, Tensor
    from ckptavg.weights import Weights

log = logging.getLogger("ckptavg")

Role = Literal["averaged", "last", "kept"]
"""What becomes of a tensor: its mean, the last checkpoint's, or what all of them have."""

_NORM_STATISTICS = ("running_mean", "running_var")
_QUANTISED = re.compile(
    r"(.*\.)?(qweight|qzeros|SCB|absmax|nested_absmax|quant_map|quant_state\..*)"
)
_NARROWEST_PLAIN_FLOAT = 16
_SCALES = ("_scale", "_scale_inv", "_scales", ".scale", ".scales")


def is_norm_statistic(name: str) -> bool:
    """Whether a tensor is a norm layer's running statistic, by its name."""
    return name.rpartition(".")[2] in _NORM_STATISTICS


@dataclass(frozen=True)
class Plan:
    """What is to be written, and out of what.

    Attributes:
        collection: the checkpoints.
        used: those with a weight other than 0, the only ones that are read.
        weights: one for each of `used`.
        divisor: of their weighted sum.
        order: indices of the tensors in the order of the output; of tied ones the first.
        outputs: for each of them, what is written.
        roles: for each of them, what becomes of it.
    """

    collection: Collection
    used: tuple[Source, ...]
    weights: tuple[float, ...]
    divisor: float
    order: tuple[int, ...]
    outputs: tuple[OutputTensor, ...]
    roles: tuple[Role, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each role, tied ones once."""
        return dict(sorted(Counter(self.roles).items()))

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the inputs that go into the output."""
        tensors = tuple(self.collection.tensors.values())
        return sum(
            tensors[index].nbytes * (len(self.used) if role == "averaged" else 1)
            for index, role in zip(self.order, self.roles, strict=True)
        )

    @property
    def largest_strided(self) -> int:
        """Bytes of the largest tensor that has to be held in memory whole."""
        strided = {index for source in self.used for index in source.strides}
        return max(
            (
                output.nbytes
                for index, output in zip(self.order, self.outputs, strict=True)
                if index in strided
            ),
            default=0,
        )

    def jobs(self, layout: Layout) -> Iterator[Job]:
        """The jobs in the order of the output; neighbours in every file are joined into one."""
        tensors = tuple(self.collection.tensors.values())
        order = np.array(self.order, np.int64)
        nbytes = np.array([tensors[index].nbytes for index in self.order], np.int64)
        distinct = {id(source.offsets): source for source in self.used}.values()
        places = [(source.parts[order], source.offsets[order]) for source in distinct]
        for first, last in runs(nbytes, places, self._keys(layout)):
            like = tensors[self.order[first]]
            count = int(nbytes[first:last].sum()) // like.dtype.itemsize
            if count:
                yield self._job(first, count, like, layout)

    def _keys(self, layout: Layout) -> Iterator[Integers]:
        """What must not change along a run, beside the inputs' places."""
        tensors = tuple(self.collection.tensors.values())
        strided = {index for source in self.used for index in source.strides}
        written = np.array([output.nbytes for output in self.outputs], np.int64)
        targets = np.array([targets[0] for targets in layout.targets], np.int64)
        yield targets - (np.cumsum(written) - written)
        # Tied and strided tensors go alone: a number of their own.
        yield np.array(
            [
                position if index in strided or len(layout.targets[position]) > 1 else -1
                for position, index in enumerate(self.order)
            ],
            np.int64,
        )
        traits = [
            (tensors[index].dtype, output.dtype, role == "averaged", self._is_variance(output))
            for index, output, role in zip(self.order, self.outputs, self.roles, strict=True)
        ]
        numbers = {trait: number for number, trait in enumerate(dict.fromkeys(traits))}
        yield np.array([numbers[trait] for trait in traits], np.int64)

    def _is_variance(self, output: OutputTensor) -> bool:
        """Whether negative weights might make it a negative variance."""
        return min(self.weights) < 0 and output.names[0].endswith("running_var")

    def _job(self, position: int, count: int, like: Tensor, layout: Layout) -> Job:
        index, output = self.order[position], self.outputs[position]
        averaged = self.roles[position] == "averaged"
        sources = self.used if averaged else self.used[-1:]
        weights = self.weights if averaged else (1.0,)
        inputs = tuple(
            Input(source.checkpoint.parts[source.parts[index]], source.tensor(index, like), weight)
            for source, weight in zip(sources, weights, strict=True)
        )
        return Job(
            inputs=inputs,
            count=count,
            copy=not averaged and like.dtype == output.dtype,
            divisor=self.divisor if averaged else 1.0,
            dtype=output.dtype,
            targets=layout.targets[position],
            number=position,
            nonnegative=self._is_variance(output),
        )

    def name_of(self, error: BadValueError) -> ValueRangeError:
        """The engine's complaint with the tensor's name in it."""
        tensors = tuple(self.collection.tensors.values())
        position, element = error.number, error.element
        if element is not None:
            while element >= tensors[self.order[position]].count:
                element -= tensors[self.order[position]].count
                position += 1
        where = "" if element is None else f"element {element}: "
        about_input = error.path is not None
        return ValueRangeError(
            where + error.message,
            path=error.path,
            tensor=self.outputs[position].names[0],
            remedy="--allow-nonfinite lets it pass" if about_input else None,
        )


def make_plan(
    collection: Collection,
    weights: Weights,
    *,
    roles: Sequence[Role] | None = None,
    ints: str = "equal",
    norm_stats: str = "average",
    dtype: DType | None = None,
) -> Plan:
    """Decide what becomes of every tensor and in which order the output has them.

    Args:
        collection: the checkpoints.
        weights: one for each of them.
        roles: one for each tensor, where they are decided already.
        ints: `equal`, or `last` to take differing integer tensors from the last checkpoint.
        norm_stats: `average`, or `last` to take running statistics from the last checkpoint.
        dtype: of the floating tensors in the output; None for the inputs' own.

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
        if not collection.order_is_known and not (weights.uniform and "last" not in roles):
            raise SelectionError(
                "only some of the checkpoints have a step, and the result depends on their order: "
                + ", ".join(collection.labels()),
                remedy="put the step into every name",
            )
    tensors = tuple(collection.tensors.values())
    order, ties = _order(collection, used)
    outputs = []
    for index in order:
        own = tensors[index].dtype
        target = dtype if dtype is not None and own.kind == "float" else own
        names = tuple(sorted(collection.names[tied] for tied in ties[index]))
        outputs.append(
            OutputTensor(names, target, tensors[index].shape, target.nbytes(tensors[index].count))
        )
    return Plan(
        collection,
        used,
        tuple(value for _, value in pairs),
        weights.divisor,
        order,
        tuple(outputs),
        tuple(roles[index] for index in order),
    )


def _order(
    collection: Collection, used: Sequence[Source]
) -> tuple[tuple[int, ...], Mapping[int, list[int]]]:
    """The order of the output, and which tensors are tied to which.

    As in the files, but with wide element types first, as safetensors has it: each is aligned.
    """
    tensors = tuple(collection.tensors.values())
    ties = find_ties(tensors, used)
    return tuple(sorted(ties, key=lambda index: (-tensors[index].dtype.bits, index))), ties


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


def refuse_quantised(collection: Collection) -> None:
    """Refuse codes with scales beside them: a mean of codes under unlike scales means nothing."""
    for name, tensor in collection.tensors.items():
        scaled = (
            tensor.dtype.kind in ("float", "packed")
            and tensor.dtype.bits < _NARROWEST_PLAIN_FLOAT
            and any(
                name + scale in collection.tensors
                or name.rpartition(".")[0] + scale in collection.tensors
                for scale in _SCALES
            )
        )
        if scaled or tensor.dtype.kind == "packed" or _QUANTISED.fullmatch(name):
            raise FormatError(
                "is quantised: codes and scales do not average apart",
                path=collection.sources[0].path,
                tensor=name,
                remedy="average the checkpoints before they are quantised",
            )


def decide_roles(
    collection: Collection, used: Sequence[Source], *, ints: str, norm_stats: str
) -> list[Role]:
    """What becomes of each tensor: floats are averaged, integers must agree.

    Raises:
        MismatchError: an integer tensor (of more than one element) differs between checkpoints.
    """
    tensors = tuple(collection.tensors.values())
    roles: list[Role] = [
        "last"
        if norm_stats == "last" and is_norm_statistic(name)
        else "averaged"
        if tensor.dtype.averaged
        else "kept"
        for name, tensor in collection.tensors.items()
    ]
    whole = [index for index, tensor in enumerate(tensors) if not tensor.dtype.averaged]
    problems: dict[int, str] = {}
    for source in used[1:]:
        for index in differing(tensors, whole, used[0], source):
            roles[index] = "last"
            if tensors[index].count > 1 and ints != "last":
                problems.setdefault(
                    index,
                    f"{printable(collection.names[index])}: {tensors[index].dtype.name} "
                    f"{tensors[index].shape} differs between {printable(used[0].path)} and "
                    f"{printable(source.path)}",
                )
    if problems:
        raise MismatchError(
            "integer tensors differ, and integers are not averaged "
            "(--ints last takes them from the last checkpoint):",
            list(problems.values()),
        )
    return roles
