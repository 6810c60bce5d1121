"""Plan an average: the role of each tensor, and the jobs that compute the outputs' bytes.

Everything that can be refused from headers alone is refused here, before any output exists.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptavg.errors import ValueRangeError
from ckptavg.formats.tensors import BY_NAME, is_extra_state, norm_layers
from ckptavg.merge.jobs import Job, Mean, OutputTensor, StoredTensor
from ckptavg.merge.roles import decide_roles, layers_but_moving, refuse_quantised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import DType, Tensor
    from ckptavg.merge.jobs import BadValueError, Layout
    from ckptavg.merge.recipe import AverageOptions, Recipe
    from ckptavg.merge.roles import Role
    from ckptavg.merge.weights import Weights


@dataclass(frozen=True, slots=True)
class PlannedTensor(OutputTensor):
    """A tensor of the outputs, and how it comes from those of the checkpoints.

    Attributes:
        tensor: dtype, shape and place in the last checkpoint.
        role: how it comes from those of the checkpoints.
    """

    tensor: Tensor
    role: Role

    @property
    def is_copied(self) -> bool:
        """Whether its bytes are copied unchecked. The floats of a model are checked for NaN."""
        if self.role == "kept":
            return self.dtype is self.tensor.dtype
        if self.role != "last":
            return False
        return not self.tensor.dtype.averaged or is_extra_state(self.names[0])

    @property
    def is_variance(self) -> bool:
        """Whether its values must not be negative."""
        return self.names[0].rpartition(".")[2] == "running_var"


@dataclass(frozen=True)
class Plan:
    """What is written, and what it is computed from.

    Attributes:
        members: the checkpoints that are read, each with a weight other than 0 in some output.
        weights: those of `members` in each output.
        tensors: the tensors in the order of the outputs; tied tensors are one.
        skipped: the number of names that were skipped.
    """

    members: tuple[Checkpoint, ...]
    weights: tuple[Weights, ...]
    tensors: tuple[PlannedTensor, ...]
    skipped: int = 0

    def _last(self, output: int) -> Checkpoint:
        """The last member of an output."""
        return self.members[self.weights[output].last]

    @property
    def counts(self) -> dict[str, int]:
        """The number of tensors with each role, and of those that were skipped."""
        counts = Counter[str](planned.role for planned in self.tensors)
        return dict(sorted((counts + Counter(skipped=self.skipped)).items()))

    def norm_stats(self, recipe: Recipe) -> dict[str, Any]:
        """The entry on the norm statistics in the provenance of an output.

        The `state` in it is `none` for a model without statistics, and `stale` for an average. It
        is `frozen` where all members have the same statistics; `frozen` beside it names the layers
        of which that is true, if it is not of all. In a copy of one checkpoint the statistics still
        fit the weights: the entry is what that checkpoint records, else the state is `kept`.
        """
        roles = {name: planned.role for planned in self.tensors for name in planned.names}
        layers = norm_layers(roles)
        if not layers:
            return {"state": "none"}
        if len(recipe.members) > 1 or not recipe.weights.sum_to_one:
            moving = [name for name, role in roles.items() if role != "kept"]
            frozen = layers_but_moving(roles, moving)
            if len(frozen) == len(layers):
                return {"state": "frozen"}
            return {"state": "stale", "frozen": frozen} if frozen else {"state": "stale"}
        entry: dict[str, Any] = (recipe.last.provenance or {}).get("norm_stats", {})
        return entry if "state" in entry else {"state": "kept"}

    @property
    def bytes_to_read(self) -> int:
        """Bytes that are read from the checkpoints, for all outputs together."""
        return sum(
            member.tensors[planned.names[0]].nbytes
            for planned in self.tensors
            for member in (self.members if planned.role == "averaged" else self.members[-1:])
        )

    @property
    def largest_strided(self) -> int:
        """Bytes of memory for the largest strided tensor: each output's result is held in full."""
        largest = 0
        for planned in self.tensors:
            tensors = (member.tensors.get(planned.names[0]) for member in self.members)
            if any(tensor is not None and tensor.strides is not None for tensor in tensors):
                largest = max(largest, planned.nbytes)
        return largest * len(self.weights)

    def jobs(self, layouts: Sequence[Layout]) -> Iterator[Job]:
        """The jobs in the order of the outputs' tensors.

        Tensors that are neighbours in all checkpoints and all outputs become one job.

        Args:
            layouts: where each output has the tensors.
        """
        first, count, before = -1, 0, -1
        for position, planned in enumerate(self.tensors):
            if not planned.nbytes:
                continue
            if before < 0 or not self._are_neighbours(before, position, layouts):
                yield from self._jobs_of(first, count, layouts) if count else ()
                first, count = position, 0
            count += planned.nbytes // planned.dtype.itemsize
            before = position
        yield from self._jobs_of(first, count, layouts) if count else ()
        for output, layout in enumerate(layouts):
            for copied, target in layout.copies:
                yield Job.copy_of(copied, target, output)

    def _are_neighbours(self, before: int, after: int, layouts: Sequence[Layout]) -> bool:
        """Whether the same is done with two tensors, of which one follows the other everywhere."""
        one, other = self.tensors[before], self.tensors[after]
        return (
            (one.role, one.dtype, one.is_copied) == (other.role, other.dtype, other.is_copied)
            and not (self._has_negative_weights and one.is_variance != other.is_variance)
            and all(
                _is_followed(member.tensors[one.names[0]], member.tensors[other.names[0]])
                for members in self._inputs[one.role]
                for member in members
            )
            and all(
                layout.targets[after] == tuple(t + one.nbytes for t in layout.targets[before][:1])
                and len(layout.targets[before]) == 1
                and layout.scattered.keys().isdisjoint((before, after))
                for layout in layouts
            )
        )

    @cached_property
    def _has_negative_weights(self) -> bool:
        return any(min(weights.values) < 0 for weights in self.weights)

    @cached_property
    def _inputs(self) -> dict[Role, dict[tuple[Checkpoint, ...], list[int]]]:
        """By role: the outputs, by the checkpoints from which they have such tensors."""
        inputs: dict[Role, dict[tuple[Checkpoint, ...], list[int]]] = {}
        for role in {planned.role for planned in self.tensors}:
            outputs = inputs[role] = {}
            for output in range(len(self.weights)):
                if role == "averaged":
                    members = self.members
                elif role == "kept":
                    members = self.members[-1:]
                else:
                    members = (self._last(output),)
                outputs.setdefault(members, []).append(output)
        return inputs

    def _jobs_of(self, first: int, count: int, layouts: Sequence[Layout]) -> Iterator[Job]:
        """One job for a mean in all outputs; else one for each checkpoint that outputs copy.

        Args:
            first: the position of the first of neighbouring tensors.
            count: the number of their elements.
            layouts: where each output has the tensors.
        """
        planned = self.tensors[first]
        for members, outputs in self._inputs[planned.role].items():
            inputs = []
            for member in members:
                tensor = member.tensors[planned.names[0]]
                inputs.append(StoredTensor(member.parts[tensor.part], tensor))
            yield Job(
                inputs=tuple(inputs),
                count=count,
                copy=planned.is_copied,
                dtype=planned.dtype,
                means=tuple(self._mean(first, output, layouts[output]) for output in outputs),
                number=first,
            )

    def _mean(self, position: int, output: int, layout: Layout) -> Mean:
        planned, weights = self.tensors[position], self.weights[output]
        averaged = planned.role == "averaged"
        return Mean(
            weights=weights.values if averaged else (1.0,),
            divisor=weights.divisor if averaged else 1.0,
            targets=layout.targets[position],
            output=output,
            scattered=layout.scattered.get(position, ()),
            nonnegative=min(weights.values) < 0 and planned.is_variance,
            must_be_finite=planned.role == "last" and weights.count > 1,
        )

    def explain(self, error: BadValueError) -> ValueRangeError:
        """The error of the engine, which knows no names, with the tensor's name."""
        position, element = error.number, error.element
        if element is not None:
            while element >= self.tensors[position].tensor.count:
                element -= self.tensors[position].tensor.count
                position += 1
        where = "" if element is None else f"element {element}: "
        return ValueRangeError(
            where + error.message,
            path=error.path,
            tensor=self.tensors[position].names[0],
            remedy="`allow_nonfinite` accepts it" if error.path is not None else None,
        )


def make_plan(
    members: Sequence[Checkpoint],
    weights: Sequence[Weights],
    options: AverageOptions,
    *,
    roles: Mapping[str, Role] | None = None,
    skipped: int = 0,
) -> Plan:
    """Decide the role and the output dtype of each tensor, and their order in the outputs.

    Args:
        members: checkpoints of one model, in order, each with a weight other than 0 in some
            output. With `lora="exact"`, the last one has the joined factors of all.
        weights: for each output, one weight for each of `members`.
        options: how integers, norm statistics, LoRA factors and dtypes are treated.
        roles: the role of each tensor by name; None to decide them here.
        skipped: the number of names that were skipped.

    Raises:
        FormatError: a tensor is quantised.
        MismatchError: an integer tensor differs between checkpoints.
    """
    if roles is None:
        for member in {id(each.tensors): each for each in members}.values():
            refuse_quantised(member)
        is_mean = all(each.sum_to_one for each in weights)
        roles = decide_roles(members, options, is_mean=is_mean)
    dtype = BY_NAME[options.dtype] if options.dtype else None
    tensors = tuple(_planned_tensors(members, roles, dtype))
    return Plan(tuple(members), tuple(weights), tensors, skipped)


def _is_followed(tensor: Tensor, other: Tensor) -> bool:
    """Whether another tensor of the same dtype begins where a contiguous one ends."""
    return (
        (tensor.strides, tensor.part, tensor.dtype) == (other.strides, other.part, other.dtype)
        and tensor.strides is None
        and tensor.offset + tensor.nbytes == other.offset
    )


def _planned_tensors(
    members: Sequence[Checkpoint], roles: Mapping[str, Role], dtype: DType | None
) -> Iterator[PlannedTensor]:
    """The tensors in the order of the outputs.

    Wide element types come first, so that each tensor is aligned, as safetensors orders them.
    Tensors of one width keep the order of the checkpoints.
    """
    tensors = members[-1].tensors
    for tied in sorted(tied_names(members), key=lambda names: -tensors[names[0]].dtype.bits):
        names = tuple(sorted(tied))
        name, tensor = names[0], tensors[names[0]]
        is_cast = dtype is not None and tensor.dtype.kind == "float" and not is_extra_state(name)
        target = dtype if dtype is not None and is_cast else tensor.dtype
        nbytes = tensor.count * target.itemsize
        yield PlannedTensor(names, target, tensor.shape, nbytes, tensor, roles[name])


def tied_names(checkpoints: Sequence[Checkpoint]) -> list[list[str]]:
    """The names of the tensors, in groups: tied tensors are the same bytes in every checkpoint.

    Empty tensors are never tied, though several may have the same offset.
    """
    names_by_place: dict[object, list[str]] = {}
    mappings = {id(each.tensors): each.tensors for each in checkpoints}.values()
    for name, tensor in checkpoints[-1].tensors.items():
        # Everything but the bytes: dtype, shape, file, offset and strides.
        twins = (tensors.get(name) for tensors in mappings)
        place = tuple(twins) if tensor.count else name
        names_by_place.setdefault(place, []).append(name)
    return list(names_by_place.values())
