"""Plan an average: the role of each tensor, and the jobs that compute the outputs' bytes.

Everything that can be refused from headers alone is refused here, before any output exists.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.errors import FormatError, MismatchError, ValueRangeError, printable
from ckptavg.formats.checkpoint import differing_tensors
from ckptavg.formats.tensors import (
    BY_NAME,
    is_extra_state,
    is_lora_factor,
    is_norm_statistic,
    power_iteration_vectors,
)
from ckptavg.merge.jobs import Input, Job, Mean, OutputTensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import DType, Tensor
    from ckptavg.merge.jobs import BadValueError, Layout
    from ckptavg.merge.recipe import AverageOptions
    from ckptavg.merge.weights import Weights

log = logging.getLogger("ckptavg")

Role = Literal["averaged", "last", "kept", "joined"]
"""What an output has for a tensor: the `averaged` one, the `last` checkpoint's, the one that all
checkpoints have (`kept`), or the factors of all LoRA adapters side by side (`joined`)."""

_WIDEST_CODE = 8  # bits
_QUANTISED = re.compile(
    r"(.*\.)?(qweight|qzeros|weight_packed|W_q|SCB|absmax|nested_absmax|quant_map|quant_state\..*"
    r"|scaled_fp8)"
)


@dataclass(frozen=True, slots=True)
class PlannedTensor(OutputTensor):
    """A tensor of the outputs, and how it comes from those of the checkpoints.

    Attributes:
        name: its name; of tied tensors the first name in the checkpoints.
        tensor: dtype, shape and place in the last checkpoint.
        role: how it comes from those of the checkpoints.
    """

    name: str
    tensor: Tensor
    role: Role

    @property
    def is_copied(self) -> bool:
        """Whether its bytes are copied unchecked. The floats of a model are checked for NaN."""
        if self.role == "kept":
            return self.dtype is self.tensor.dtype
        return self.role == "last" and (not self.tensor.dtype.averaged or is_extra_state(self.name))

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
    """

    members: tuple[Checkpoint, ...]
    weights: tuple[Weights, ...]
    tensors: tuple[PlannedTensor, ...]

    def last(self, output: int = 0) -> Checkpoint:
        """The last member of an output."""
        return self.members[self.weights[output].last]

    @property
    def counts(self) -> dict[str, int]:
        """The number of tensors with each role."""
        return dict(sorted(Counter(planned.role for planned in self.tensors).items()))

    def norm_stats(self, output: int = 0) -> dict[str, Any]:
        """The entry on the norm statistics in an output's provenance.

        The `state` in it is `none` for a model without statistics, and `stale` for an average. It
        is `frozen` where all members have the same statistics; `frozen` beside it names the layers
        of which that is true, if it is not of all. In a copy of one checkpoint the statistics still
        fit the weights: the entry is what that checkpoint records, else the state is `kept`.
        """
        roles = {name: planned.role for planned in self.tensors for name in planned.names}
        layers = {name.rpartition(".")[0] for name in roles if is_norm_statistic(name)}
        if not layers:
            return {"state": "none"}
        weights = self.weights[output]
        if weights.count > 1 or not weights.sum_to_one:
            frozen = _frozen_layers(layers, roles)
            if len(frozen) == len(layers):
                return {"state": "frozen"}
            return {"state": "stale", "frozen": frozen} if frozen else {"state": "stale"}
        entry = (self.last(output).provenance or {}).get("norm_stats")
        if isinstance(entry, dict) and isinstance(entry.get("state"), str):
            return entry
        return {"state": "kept"}

    @property
    def bytes_to_read(self) -> int:
        """Bytes that are read from the checkpoints, for all outputs together."""
        return sum(
            planned.tensor.nbytes * (len(self.members) if planned.role == "averaged" else 1)
            for planned in self.tensors
        )

    @property
    def largest_strided(self) -> int:
        """Bytes of memory for the largest strided tensor: each output's result is held in full."""
        largest = 0
        for planned in self.tensors:
            if any(member.tensors[planned.name].strides is not None for member in self.members):
                largest = max(largest, planned.nbytes)
        return largest * len(self.weights)

    def jobs(self, layouts: Sequence[Layout]) -> Iterator[Job]:
        """The jobs in the order of the outputs' tensors.

        Tensors that are neighbours in all checkpoints and all outputs become one job.

        Args:
            layouts: where each output has the tensors.
        """
        merged: Job | None = None
        for position, planned in enumerate(self.tensors):
            for job in self._jobs_of(position, layouts) if planned.tensor.count else ():
                if merged is not None and merged.is_continued_by(job):
                    merged = replace(merged, count=merged.count + job.count)
                    continue
                if merged is not None:
                    yield merged
                merged = job
        if merged is not None:
            yield merged
        for output, layout in enumerate(layouts):
            for copied in layout.copies:
                yield Job.copy_of(copied, output)

    def _jobs_of(self, position: int, layouts: Sequence[Layout]) -> Iterator[Job]:
        """One job for a mean in all outputs; else one for each checkpoint that outputs copy."""
        planned = self.tensors[position]
        outputs_by_members: dict[tuple[Checkpoint, ...], list[int]] = {}
        for output in range(len(self.weights)):
            if planned.role == "averaged":
                members = self.members
            elif planned.role == "kept":
                members = self.members[-1:]
            else:
                members = (self.last(output),)
            outputs_by_members.setdefault(members, []).append(output)
        for members, outputs in outputs_by_members.items():
            inputs = []
            for member in members:
                tensor = member.tensors[planned.name]
                inputs.append(Input(member.parts[tensor.part], tensor))
            yield Job(
                inputs=tuple(inputs),
                count=planned.tensor.nbytes // planned.tensor.dtype.itemsize,
                copy=planned.is_copied,
                dtype=planned.dtype,
                means=tuple(self._mean(position, output, layouts[output]) for output in outputs),
                number=position,
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
            remedy="`allow_nonfinite` lets it pass" if error.path is not None else None,
        )


def make_plan(
    members: Sequence[Checkpoint],
    weights: Sequence[Weights],
    options: AverageOptions,
    *,
    roles: Mapping[str, Role] | None = None,
) -> Plan:
    """Decide the role and the output dtype of each tensor, and their order in the outputs.

    Args:
        members: checkpoints of one model, in order, each with a weight other than 0 in some
            output. With `lora="exact"`, the last one has the joined factors of all.
        weights: for each output, one weight for each of `members`.
        options: how integers, norm statistics, LoRA factors and dtypes are treated.
        roles: the role of each tensor by name; None to decide them here.

    Raises:
        FormatError: a tensor is quantised.
        MismatchError: an integer tensor differs between checkpoints.
    """
    if roles is None:
        refuse_quantised(members[-1])
        is_mean = all(each.sum_to_one for each in weights)
        roles = decide_roles(members, options, is_mean=is_mean)
    dtype = BY_NAME[options.dtype] if options.dtype else None
    tensors = tuple(_planned_tensors(members, roles, dtype))
    return Plan(tuple(members), tuple(weights), tensors)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse quantised weights: a mean of codes means nothing if their scales differ.

    Raises:
        FormatError: a tensor is quantised.
    """
    scaled = set()  # layers (or tensors) with a scale or a zero point: `fc`, `fc.weight`
    for name in checkpoint.tensors:
        layer, _, last = name.rpartition(".")
        if "scale" in last or "zero" in last:
            scaled.add(layer)
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


def _frozen_layers(layers: Collection[str], roles: Mapping[str, Role]) -> list[str]:
    """The norm layers whose statistics and counters are the same in all members, sorted."""
    ends = ("running_mean", "running_var", "num_batches_tracked")
    return [
        layer
        for layer in sorted(layers)
        if all(roles.get(f"{layer}.{end}" if layer else end, "kept") == "kept" for end in ends)
    ]


def decide_roles(
    members: Sequence[Checkpoint], options: AverageOptions, *, is_mean: bool
) -> dict[str, Role]:
    """The role of each tensor, by name.

    Integers and norm statistics that are equal in all members are kept. Other integers, and the
    vectors of spectral norm's power iteration, which would shrink in a mean, are the last member's.

    Args:
        members: checkpoints of one model, in order.
        options: how integers, norm statistics and LoRA factors are treated.
        is_mean: whether the weights sum to 1 in all outputs.

    Raises:
        MismatchError: an integer tensor of several elements differs between checkpoints.
    """
    first, *others = members
    vectors = power_iteration_vectors(first.tensors)
    if vectors and others:
        log.info("%d vectors of spectral norm are the last checkpoint's", len(vectors))
    opaque = {name for name in first.tensors if is_extra_state(name) or name in vectors}
    comparable = {
        name
        for name, tensor in first.tensors.items()
        if name not in opaque
        and (not tensor.dtype.averaged or (is_norm_statistic(name) and others and is_mean))
    }
    differing: dict[str, Checkpoint] = {}  # with the first checkpoint that has another value
    for other in others:
        same = [name for name in first.tensors if name in comparable and name not in differing]
        differing |= dict.fromkeys(differing_tensors(same, first, other), other)
    if options.ints != "last":
        _refuse_differing_integers(first, differing)
    roles: dict[str, Role] = {}
    for name, tensor in first.tensors.items():
        if name in opaque:
            roles[name] = "last"
        elif name in comparable and name not in differing:
            roles[name] = "kept"
        elif options.lora == "exact" and is_lora_factor(name):
            roles[name] = "joined"
        elif options.norm_stats == "last" and is_norm_statistic(name):
            roles[name] = "last"
        else:
            roles[name] = "averaged" if tensor.dtype.averaged else "last"
    return roles


def _refuse_differing_integers(first: Checkpoint, differing: Mapping[str, Checkpoint]) -> None:
    """Refuse integer tensors that differ from the first checkpoint's, save for counters.

    Raises:
        MismatchError: there are such tensors.
    """
    problems = [
        f"{printable(name)}: {tensor.dtype.name} {tensor.shape} differs between "
        f"{printable(first.path)} and {printable(other.path)}"
        for name, other in differing.items()
        if not (tensor := first.tensors[name]).dtype.averaged and tensor.count > 1
    ]
    if problems:
        raise MismatchError(
            "integer tensors differ, and integers are not averaged "
            "(`ints=last` takes them from the last checkpoint):",
            problems,
        )


def _planned_tensors(
    members: Sequence[Checkpoint], roles: Mapping[str, Role], dtype: DType | None
) -> Iterator[PlannedTensor]:
    """The tensors in the order of the outputs.

    Wide element types come first, so that each tensor is aligned, as safetensors orders them.
    Tensors of one width keep the order of the checkpoints.
    """
    tensors = members[-1].tensors
    for names in sorted(tied_names(members), key=lambda names: -tensors[names[0]].dtype.bits):
        name, tensor = names[0], tensors[names[0]]
        is_cast = dtype is not None and tensor.dtype.kind == "float" and not is_extra_state(name)
        target = dtype if dtype is not None and is_cast else tensor.dtype
        nbytes = target.nbytes(tensor.count)
        yield PlannedTensor(
            tuple(sorted(names)), target, tensor.shape, nbytes, name, tensor, roles[name]
        )


def tied_names(checkpoints: Sequence[Checkpoint]) -> list[list[str]]:
    """The names of the tensors, in groups: tied tensors are the same bytes in every checkpoint.

    Empty tensors are never tied, though several may have the same offset.
    """
    names_by_place: dict[object, list[str]] = {}
    for name in checkpoints[0].tensors:
        twins = [checkpoint.tensors[name] for checkpoint in checkpoints]
        # Everything but the bytes: dtype, shape, file, offset and strides.
        place = tuple(twins) if twins[0].count else name
        names_by_place.setdefault(place, []).append(name)
    return list(names_by_place.values())
