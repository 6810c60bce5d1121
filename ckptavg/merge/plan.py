"""Plan an average: the role of each tensor, and the jobs that compute the outputs' bytes.

Everything that can be refused from headers alone is refused here, before any output exists.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.errors import FormatError, MismatchError, ValueRangeError, printable
from ckptavg.formats.names import is_extra_state, is_lora_factor, is_norm_statistic
from ckptavg.formats.tensors import BY_NAME
from ckptavg.merge.jobs import Combination, Input, Job
from ckptavg.merge.layout import OutputTensor
from ckptavg.select.compare import differing_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import DType, Tensor
    from ckptavg.merge.jobs import BadValueError
    from ckptavg.merge.layout import Layout
    from ckptavg.merge.options import AverageOptions
    from ckptavg.merge.weights import Weights


Role = Literal["averaged", "last", "kept", "joined"]
"""What becomes of a tensor: its mean; the last checkpoint's; what all checkpoints have; or, for the
factors of LoRA adapters, those of all checkpoints side by side."""

_WIDEST_CODE = 8  # bits
_QUANTISED = re.compile(
    r"(.*\.)?(qweight|qzeros|weight_packed|W_q|SCB|absmax|nested_absmax|quant_map|quant_state\..*"
    r"|scaled_fp8)"
)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the output, and what becomes of it.

    Attributes:
        name: of the tensor; of tied tensors, the first in the checkpoints.
        tensor: its description in the last checkpoint.
        role: what becomes of it.
        output: what is written.
    """

    name: str
    tensor: Tensor
    role: Role
    output: OutputTensor

    @property
    def is_copied(self) -> bool:
        """Whether its bytes are copied as they are: floats of a model are checked on the way."""
        return self.role == "kept" or (
            self.role == "last" and (not self.tensor.dtype.averaged or is_extra_state(self.name))
        )

    @property
    def is_variance(self) -> bool:
        """Whether its values must not be negative."""
        return self.output.names[0].rpartition(".")[2] == "running_var"


@dataclass(frozen=True)
class Plan:
    """What is written, and what it is computed from.

    Attributes:
        members: the checkpoints that are read: those with a weight other than 0 in some output.
        weights: those of `members` in each output.
        tensors: in the order of the outputs; tied tensors count once.
    """

    members: tuple[Checkpoint, ...]
    weights: tuple[Weights, ...]
    tensors: tuple[PlannedTensor, ...]

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """The tensors of each output, in order."""
        return tuple(planned.output for planned in self.tensors)

    def last(self, output: int = 0) -> Checkpoint:
        """The last member of an output."""
        return self.members[self.weights[output].last]

    @property
    def counts(self) -> dict[str, int]:
        """The number of tensors with each role."""
        return dict(sorted(Counter(planned.role for planned in self.tensors).items()))

    def norm_stats(self, output: int = 0) -> dict[str, Any]:
        """The provenance's entry on the norm statistics of an output.

        Their state is `none` without statistics, and `stale` in an average. The copy of one
        checkpoint has the statistics that belong to its weights: their state is what that
        checkpoint records, or `kept`.
        """
        if not any(is_norm_statistic(planned.name) for planned in self.tensors):
            return {"state": "none"}
        weights = self.weights[output]
        if weights.count > 1 or sum(weights.values) != weights.divisor:
            return {"state": "stale"}
        entry = (self.last(output).provenance or {}).get("norm_stats")
        if isinstance(entry, dict) and isinstance(entry.get("state"), str):
            return entry
        return {"state": "kept"}

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the checkpoints that go into the outputs."""
        return sum(
            planned.tensor.nbytes * (len(self.members) if planned.role == "averaged" else 1)
            for planned in self.tensors
        )

    @property
    def largest_strided(self) -> int:
        """Bytes of the largest tensor that is held in memory in full, for all outputs."""
        sizes = (
            planned.output.nbytes
            for planned in self.tensors
            if any(member.tensors[planned.name].strides is not None for member in self.members)
        )
        return max(sizes, default=0) * len(self.weights)

    def jobs(self, layouts: Sequence[Layout]) -> Iterator[Job]:
        """The jobs in the order of the outputs.

        Tensors that are neighbours in all checkpoints and all outputs become one job.

        Args:
            layouts: where the outputs have the tensors, one for each output.
        """
        run: Job | None = None
        for position, planned in enumerate(self.tensors):
            for job in self._jobs_of(position, layouts) if planned.tensor.count else ():
                if run is not None and run.is_continued_by(job):
                    run = replace(run, count=run.count + job.count)
                    continue
                if run is not None:
                    yield run
                run = job
        if run is not None:
            yield run
        for output, layout in enumerate(layouts):
            for copied in layout.copies:
                yield Job.copy_of(copied, output)

    def _jobs_of(self, position: int, layouts: Sequence[Layout]) -> Iterator[Job]:
        """One job for all outputs, or one for each checkpoint that some of the outputs copy."""
        planned = self.tensors[position]
        outputs_by_members: dict[tuple[Checkpoint, ...], list[int]] = {}
        for output in range(len(self.weights)):
            averaged = planned.role == "averaged"
            members = self.members if averaged else (self._origin(planned, output),)
            outputs_by_members.setdefault(members, []).append(output)
        for members, outputs in outputs_by_members.items():
            yield Job(
                inputs=tuple(_input(member, planned.name) for member in members),
                count=planned.tensor.nbytes // planned.tensor.dtype.itemsize,
                copy=planned.is_copied,
                dtype=planned.output.dtype,
                combinations=tuple(
                    self._combination(position, output, layouts[output]) for output in outputs
                ),
                number=position,
            )

    def _origin(self, planned: PlannedTensor, output: int) -> Checkpoint:
        """The checkpoint from which an output takes a tensor that is not averaged."""
        return self.members[-1] if planned.role == "kept" else self.last(output)

    def _combination(self, position: int, output: int, layout: Layout) -> Combination:
        planned, column = self.tensors[position], self.weights[output]
        averaged = planned.role == "averaged"
        return Combination(
            weights=column.values if averaged else (1.0,),
            divisor=column.divisor if averaged else 1.0,
            targets=layout.targets[position],
            output=output,
            scattered=layout.scattered.get(position, ()),
            nonnegative=planned.is_variance and min(column.values) < 0,
            one_of_several=not averaged and column.count > 1,
        )

    def explain(self, error: BadValueError) -> ValueRangeError:
        """The engine's error with the name of the tensor."""
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
    members: Sequence[Checkpoint],
    columns: Sequence[Weights],
    options: AverageOptions,
    *,
    roles: Mapping[str, Role] | None = None,
) -> Plan:
    """Decide what becomes of each tensor, and in which order the outputs have them.

    Args:
        members: checkpoints of one model, in order; with `lora="exact"`, the factors of the last
            one are those of all, side by side.
        columns: for each output, one weight for each of `members`.
        options: what becomes of integers, norm statistics and dtypes.
        roles: of all tensors, by name, where they are decided already.

    Raises:
        FormatError: the weights are quantised, so that code and scale do not average apart.
        MismatchError: an integer tensor differs between checkpoints.
    """
    places = [place for place in range(len(members)) if any(each.values[place] for each in columns)]
    used = tuple(members[place] for place in places)
    if roles is None:
        refuse_quantised(used[-1])
        roles = decide_roles(used, options)
    dtype = BY_NAME[options.dtype] if options.dtype else None
    return Plan(
        used,
        tuple(each.of(places) for each in columns),
        tuple(_planned_tensors(used, roles, dtype)),
    )


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse codes with scales beside them: a mean of codes under unlike scales means nothing.

    Raises:
        FormatError: a tensor is quantised.
    """
    # The layers that have a scale or a zero point: its name begins with theirs.
    scaled = {
        layer
        for layer, _, last in (name.rpartition(".") for name in checkpoint.tensors)
        if "scale" in last or "zero" in last
    }
    for name, tensor in checkpoint.tensors.items():
        is_scaled = name in scaled or name.rpartition(".")[0] in scaled
        if (
            tensor.dtype.kind == "packed"
            or _QUANTISED.fullmatch(name)
            or (is_scaled and tensor.count > 1 and _may_be_codes(name, tensor))
        ):
            raise FormatError(
                "is quantised: codes and scales do not average apart",
                path=checkpoint.path,
                tensor=name,
                remedy="average the checkpoints before they are quantised",
            )


def _may_be_codes(name: str, tensor: Tensor) -> bool:
    if tensor.dtype.bits > _WIDEST_CODE:
        return False
    return tensor.dtype.averaged or name.rpartition(".")[2].startswith(("weight", "w", "W", "q"))


def decide_roles(members: Sequence[Checkpoint], options: AverageOptions) -> dict[str, Role]:
    """The role of each tensor, by name.

    Args:
        members: checkpoints of one model, in order.
        options: what becomes of integers, norm statistics and LoRA factors.

    Raises:
        MismatchError: an integer tensor of several elements differs between checkpoints.
    """
    first, *others = members
    roles: dict[str, Role] = {}
    for name, tensor in first.tensors.items():
        if is_extra_state(name) or (options.norm_stats == "last" and is_norm_statistic(name)):
            roles[name] = "last"
        elif options.lora == "exact" and is_lora_factor(name):
            roles[name] = "joined"
        else:
            roles[name] = "averaged" if tensor.dtype.averaged else "kept"
    integers = [name for name, role in roles.items() if role == "kept"]
    problems: dict[str, str] = {}
    for other in others:
        for name in differing_tensors(integers, first, other):
            roles[name] = "last"
            tensor = first.tensors[name]
            if tensor.count > 1 and options.ints != "last":
                problems.setdefault(
                    name,
                    f"{printable(name)}: {tensor.dtype.name} {tensor.shape} differs between "
                    f"{printable(first.path)} and {printable(other.path)}",
                )
    if problems:
        raise MismatchError(
            "integer tensors differ, and integers are not averaged "
            "(--ints last takes them from the last checkpoint):",
            list(problems.values()),
        )
    return roles


def _planned_tensors(
    members: Sequence[Checkpoint], roles: Mapping[str, Role], dtype: DType | None
) -> Iterator[PlannedTensor]:
    """The tensors in the order of the output.

    That is the order of the checkpoints, but with wide element types first, as safetensors has it:
    so each tensor is aligned.
    """
    tensors = members[-1].tensors
    for names in sorted(tied_names(members), key=lambda names: -tensors[names[0]].dtype.bits):
        name, tensor = names[0], tensors[names[0]]
        is_cast = dtype is not None and tensor.dtype.kind == "float" and not is_extra_state(name)
        target = dtype if dtype is not None and is_cast else tensor.dtype
        output = OutputTensor(
            tuple(sorted(names)), target, tensor.shape, target.nbytes(tensor.count)
        )  # fmt: skip
        yield PlannedTensor(name, tensor, roles[name], output)


def tied_names(checkpoints: Sequence[Checkpoint]) -> list[list[str]]:
    """The names of the tensors, those together that are the same bytes in every checkpoint.

    Empty tensors are never tied: all of them may have the same offset.
    """
    names_by_place: dict[object, list[str]] = {}
    for name in checkpoints[0].tensors:
        twins = [checkpoint.tensors[name] for checkpoint in checkpoints]
        # Everything but the bytes: dtype, shape, file, offset and strides.
        place = tuple(twins) if twins[0].count else name
        names_by_place.setdefault(place, []).append(name)
    return list(names_by_place.values())


def _input(checkpoint: Checkpoint, name: str) -> Input:
    tensor = checkpoint.tensors[name]
    return Input(checkpoint.parts[tensor.part], tensor)
