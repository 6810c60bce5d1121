"""Advice on averages, from what checkpoints record and from a sample of their tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.errors import SelectionError, printable, without_notices
from ckptavg.formats.checkpoint import spread
from ckptavg.formats.tensors import is_norm_state
from ckptavg.select.learning_rates import assumed_reading, rates_and_minima
from ckptavg.select.schedules import nearly_equal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.select.learning_rates import Reading

_DECAYED = 0.5  # of the highest rate: what is below has decayed
_RISE = 1.1  # of a rate that had fallen: what rises so much again is cyclical
_TENSORS, _ELEMENTS = 32, 1024  # of the sample
_CLOSE = 1e-3  # relative distance of members that hardly differ
_STANDS_IN = "There averages stand in for the decay (arXiv 2505.12082, 2507.17634)."
_GAINS_LITTLE = (
    "There averages gain little (arXiv 2604.12374): compare windows, and the last checkpoint, on "
    "held-out data with `ckptavg sweep`."
)
_DRIFT = 2.0  # times the distance from their mean that points around a centre would have


def advice(
    checkpoints: Sequence[Checkpoint],
    members: Sequence[Checkpoint],
    recorded: Reading | None = None,
) -> list[str]:
    """What the learning rates and the distances of the members say, each with its evidence.

    Args:
        checkpoints: all of the run, in the order of training.
        members: those that are averaged.
        recorded: the learning rate that checkpoints record, as in `rates_and_minima`.
    """
    if len(members) < 2:  # noqa: PLR2004
        return []
    return [*filter(None, (_on_rates(checkpoints, members, recorded), _on_distances(members)))]


def _on_rates(
    checkpoints: Sequence[Checkpoint], members: Sequence[Checkpoint], recorded: Reading | None
) -> str:
    """What the recorded learning rates say of the window; nothing where one is not recorded."""
    known = [each.training.learning_rate for each in checkpoints]
    rates = [rate for rate in known if rate is not None]
    if len(rates) < len(known) or max(rates) <= 0:
        return ""
    names = [printable(each.name) for each in checkpoints]
    chosen = {each.path for each in members}
    places = [place for place, each in enumerate(checkpoints) if each.path in chosen]
    first, last = places[0], places[-1]
    highest = max(range(len(rates)), key=rates.__getitem__)
    most, start, end = rates[highest], rates[first], rates[last]
    if all(nearly_equal(rate, most, most) for rate in rates):
        return (
            f"The learning rate is constant: {most:g} in all {len(rates)} checkpoints. {_STANDS_IN}"
        )
    if any(
        _RISE * rates[place - 1] < min(rates[place], max(rates[:place]))
        for place in range(first + 1, last + 1)
    ):
        return _on_cycles(checkpoints, places, recorded)
    if highest <= first and start <= _DECAYED * most:
        return (
            f"The learning rate had decayed before the window: from {most:g} ({names[highest]}) to "
            f"{start:g} ({names[first]}). {_GAINS_LITTLE}"
        )
    if end <= _DECAYED * start:
        return (
            f"The learning rate decays within the window: from {start:g} ({names[first]}) to "
            f"{end:g} ({names[last]}). {_GAINS_LITTLE}"
        )
    return (
        f"The learning rate had not decayed: {start:g} at the beginning of the window, {end:g} at "
        f"its end, {most:g} at most. {_STANDS_IN}"
    )


def _on_cycles(
    checkpoints: Sequence[Checkpoint], places: Sequence[int], recorded: Reading | None
) -> str:
    """What a rate that rises again within the window says."""
    try:
        with without_notices():
            rates, minima = rates_and_minima(checkpoints, recorded)
    except SelectionError as error:
        return f"The learning rate is cyclical, but {error}."
    within = rates[places[0] : places[-1] + 1]
    low = sum(minima[place] for place in places)
    text = (
        f"The learning rate is cyclical: between {min(within):g} and {max(within):g} within the "
        f"window. {low} of {len(places)} members are at its minima"
    )
    # SWA begins after half of the training, or three quarters.
    start = " `start` 50%" if places[0] < len(rates) / 4 else ""
    if low == len(places):
        late = f"; SWA also leaves out the first part of the training: add{start}" if start else ""
        return f"{text}, as in SWA (arXiv 1803.05407){late}."
    assumed = "" if recorded else assumed_reading(checkpoints)
    which = "those of the second half" if start else "these"
    return (
        f"{text}; `lr_minima`{start} takes {which} alone, as in SWA (arXiv 1803.05407)."
        + f" {assumed[:1].upper()}{assumed[1:]}." * bool(assumed)
    )


def _on_distances(members: Sequence[Checkpoint]) -> str:
    """How far the members are from each other and from their mean, by a sample of the tensors."""
    names = [
        name
        for name, tensor in members[-1].tensors.items()
        if tensor.dtype.averaged
        and tensor.count
        and not is_norm_state(name)
        and all(name in each.tensors and each.tensors[name].strides is None for each in members)
    ]
    if not names:
        return ""
    sample = np.stack([_sample(each, spread(names, _TENSORS)) for each in members])
    mean = sample.mean(axis=0)
    norm = float(np.linalg.norm(mean))
    step = float(np.median(np.linalg.norm(np.diff(sample, axis=0), axis=1)))
    apart = float(np.mean(np.linalg.norm(sample - mean, axis=1)))
    if not 0 < norm < math.inf or not math.isfinite(step + apart):
        return ""
    total = sum(members[-1].tensors[name].count for name in names)
    evidence = (
        f"Neighbouring members are {_percent(step / norm)} of their norm apart, and members "
        f"{_percent(apart / norm)} from their mean (by {sample.shape[1]:,} of {total:,} weights)"
    )
    if apart <= _CLOSE * norm:
        return f"The average hardly differs from each member. {evidence}."
    count = len(members)
    if count == 2:  # noqa: PLR2004 - whose distances say nothing else
        return f"{evidence}."
    around = math.sqrt((count - 1) / (2 * count)) * step  # of independent points
    if apart > _DRIFT * around:
        return (
            "The weights still move in one direction, and shorter windows may be better. "
            f"{evidence}, {apart / around:.1f} times as far as if they swung around a centre."
        )
    return (
        "The members move about a centre rather than in one direction. "
        f"{evidence}, about as far as points that swing around one."
    )


def _sample(checkpoint: Checkpoint, names: Sequence[str]) -> np.ndarray:
    """The beginning of each tensor, as real numbers in float64: one request for each file."""
    by_part = defaultdict[int, list[str]](list)
    for name in names:
        by_part[checkpoint.tensors[name].part].append(name)
    found = dict[str, np.ndarray]()
    for part, inside in by_part.items():
        tensors = [checkpoint.tensors[name] for name in inside]
        places = [(t.offset, min(t.count, _ELEMENTS) * t.dtype.itemsize) for t in tensors]
        pieces = checkpoint.parts[part].read_many(places)
        for name, tensor, piece in zip(inside, tensors, pieces, strict=True):
            is_complex = tensor.dtype.kind == "complex"
            values = np.frombuffer(piece, tensor.dtype.numpy)
            wide = values.astype(np.complex128 if is_complex else np.float64)
            found[name] = wide.view(np.float64)
    return np.concatenate([found[name] for name in names])


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 1 else 3}g} %"
