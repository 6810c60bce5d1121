"""The tensors of an average: their names, shapes and dtypes must be the same in all members.

Exceptions are tensors whose names match `skip`, which are left out, or `take_last`, which come from
the last member whatever the others have.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptavg.errors import MismatchError, SelectionError, listed, printable
from ckptavg.formats.lora_names import has_rank, lora_modules
from ckptavg.merge.lora import reason_against_joining
from ckptavg.merge.patterns import matching, pattern_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import DType, Tensor
    from ckptavg.merge.recipe import AverageOptions

log = logging.getLogger("ckptavg")

_WEIGHT_NORM = re.compile(
    r"(?P<module>.*)\bparametrizations\.(?P<weight>[^.]+)\.original(?P<number>[01])"
)
_MOST_REMEDIES = 16  # more are not shown


def choose_tensors(
    members: Sequence[Checkpoint], last: Collection[Checkpoint], options: AverageOptions
) -> tuple[tuple[Checkpoint, ...], int]:
    """Reduce each member to the tensors that it contributes to an average.

    Args:
        members: the checkpoints that are averaged, in order.
        last: the last member of each average. Only these keep the tensors of `take_last`.
        options: `skip` and `take_last`; with `dtype` floating dtypes may differ, and with
            `lora="exact"` the ranks of LoRA factors may differ.

    Returns:
        The members, and the number of names that `skip` matches.

    Raises:
        MismatchError: names, shapes or dtypes differ otherwise.
        SelectionError: a pattern is not a regular expression, or matches no name, or `skip` matches
            all names.
    """
    alike = with_new_weight_norm(members)
    if count := sum(new is not old for new, old in zip(alike, members, strict=True)):
        log.info(
            "weight_g and weight_v of weight norm have their new names in %d checkpoints", count
        )
    mappings = {id(each): each for m in alike for each in (m.tensors, m.other_entries)}
    names = {name for mapping in mappings.values() for name in mapping}
    skipped = matching("skip", options.skip, names)
    from_last = matching("take_last", options.take_last, names - skipped)
    kept = _without(alike, skipped)
    if skipped and not any(each.tensors for each in kept):
        raise SelectionError("`skip` leaves out all tensors")
    averaged = _without(kept, from_last)
    of_last = [new for new, member in zip(kept, members, strict=True) if member in last]
    problems = [*_mismatches(averaged, options), *_mismatches(of_last, options)]
    if problems:
        raise MismatchError(
            "the checkpoints do not have the same tensors:", [*dict.fromkeys(problems)]
        )
    contributing = tuple(
        new if member in last else other
        for member, new, other in zip(members, kept, averaged, strict=True)
    )
    return contributing, len(skipped)


def with_new_weight_norm(members: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Rename the tensors of torch's older weight norm in members that differ from others by that.

    `weight_g` and `weight_v` become `parametrizations.weight.original0` and `original1`, if some
    members have these. torch renames them in the same way when a model loads them.
    """
    mappings = {id(member.tensors): member.tensors for member in members}.values()
    new_names: dict[str, str] = {}
    for name in {name for mapping in mappings for name in mapping} if len(mappings) > 1 else ():
        if match := _WEIGHT_NORM.fullmatch(name):
            old = match["module"] + match["weight"] + ("_g", "_v")[int(match["number"])]
            new_names[old] = name
    return [
        member.renamed(lambda name: new_names.get(name, name))
        if new_names.keys() & member.tensors.keys()
        else member
        for member in members
    ]


def _without(checkpoints: Sequence[Checkpoint], names: Collection[str]) -> list[Checkpoint]:
    """The checkpoints without these tensors. Checkpoints that share a mapping still share one."""
    if not names:
        return list(checkpoints)
    left: dict[int, Mapping[str, Tensor]] = {}
    shorter = []
    for checkpoint in checkpoints:
        tensors = checkpoint.tensors
        if id(tensors) not in left:
            left[id(tensors)] = {name: each for name, each in tensors.items() if name not in names}
        shorter.append(
            replace(
                checkpoint,
                tensors=left[id(tensors)],
                # Metadata may name the tensor that stands for another one.
                metadata={k: v for k, v in checkpoint.metadata.items() if v not in names},
                other_entries={k: v for k, v in checkpoint.other_entries.items() if k not in names},
            )
        )
    return shorter


def _mismatches(checkpoints: Sequence[Checkpoint], options: AverageOptions) -> Iterator[str]:
    """A line for each group of tensors that differ in the same way, with the option that helps."""
    if len({id(checkpoint.tensors) for checkpoint in checkpoints}) < 2:  # noqa: PLR2004
        return
    names = list(dict.fromkeys(name for each in checkpoints for name in each.tensors))
    of_lora = {tensor.name for tensors in lora_modules(names).values() for tensor in tensors}
    groups = _grouped(names, of_lora, checkpoints, options)
    unlike = sum(len(alike) for (series, *_), alike in groups.items() if series)
    is_of_few = 2 * unlike <= len(names)
    if not is_of_few:
        yield (
            f"{unlike} of {len(names)} tensors differ, as between different models; `include` "
            "takes the checkpoints of one, `skip` and `take_last` choose tensors by name"
        )
        by_series, groups = groups, {}
        for (_, difference, option), alike in by_series.items():
            groups.setdefault(("", difference, option), []).extend(alike)
    can_join = any(
        option == "take_last" and alike[0] in of_lora for (*_, option), alike in groups.items()
    ) and not reason_against_joining(checkpoints)
    for number, ((_, difference, option), alike) in enumerate(groups.items()):
        what, them = printable(alike[0]), "it"
        if len(alike) > 1:
            what, them = f"{len(alike)} tensors such as {what}", "them"
        remedy = ""
        if option.startswith("dtype"):
            remedy = f"; `{option}` averages {them}"
        elif alike[0] in of_lora:  # a factor is useless without the other and the alpha
            remedy = "; merge each adapter into its model, and average the models"
            if option == "take_last" and can_join:
                remedy = "; `lora=exact` averages products of unlike ranks"
        elif is_of_few and number < _MOST_REMEDIES:
            pattern = pattern_of(alike, set(names).difference(alike))
            does = "leaves %s out" if option == "skip" else "takes %s from the last checkpoint"
            remedy = f"; `{option}` {pattern} {does % them}" if pattern else ""
        yield f"{what}: {difference}{remedy}"


def _grouped(
    names: Sequence[str],
    of_lora: Collection[str],
    checkpoints: Sequence[Checkpoint],
    options: AverageOptions,
) -> dict[tuple[str, str, str], list[str]]:
    """The names by their series, how the tensors differ, and the option that helps.

    The series is empty where the option needs no pattern.
    """
    groups: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in names:
        for difference, option in _differences(name, checkpoints, options):
            needs_no_pattern = option.startswith("dtype") or name in of_lora
            series = "" if needs_no_pattern else _series(name, checkpoints)
            groups[series, difference, option].append(name)
    return groups


def _series(name: str, checkpoints: Sequence[Checkpoint]) -> str:
    """What a name has in common with others: a model that some checkpoints lack, else its words."""
    places = {place for each in checkpoints for place in each.models}
    model = max((place for place in places if name.startswith(place)), key=len)
    is_everywhere = all(model in each.models for each in checkpoints)
    return re.sub(r"\d+", "#", name) if is_everywhere else model


def _differences(
    name: str, checkpoints: Sequence[Checkpoint], options: AverageOptions
) -> Iterator[tuple[str, str]]:
    """How the tensors of one name differ, and the option that helps."""
    shapes: defaultdict[str, list[Checkpoint]] = defaultdict(list)
    dtypes: defaultdict[DType, list[Checkpoint]] = defaultdict(list)
    missing, present = [], []
    for checkpoint in checkpoints:
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            missing.append(checkpoint)
        else:
            present.append(checkpoint)
            shapes[f"shape {tensor.shape}"].append(checkpoint)
            dtypes[tensor.dtype].append(checkpoint)
    if missing:
        yield f"missing in {_where(missing)}, present in {_where(present)}", "skip"
    if len(shapes) > 1 and not (options.lora == "exact" and has_rank(name)):
        yield _by_value(shapes), "take_last"
    are_floats = options.lora == "separate" and all(dtype.kind == "float" for dtype in dtypes)
    if len(dtypes) > 1 and not (are_floats and options.dtype):
        bits = max(dtype.bits for dtype in dtypes)
        widest = [dtype.name for dtype in dtypes if dtype.bits == bits]
        # float16 and bfloat16 do not hold each other's values.
        option = f"dtype={widest[0] if len(widest) == 1 else 'float32'}"
        values = {dtype.name: those for dtype, those in dtypes.items()}
        yield _by_value(values), option if are_floats else "take_last"


def _by_value(values: Mapping[str, Sequence[Checkpoint]]) -> str:
    return ", ".join(f"{value} in {_where(those)}" for value, those in values.items())


def _where(checkpoints: Sequence[Checkpoint]) -> str:
    return listed((each.path for each in checkpoints), 1)
