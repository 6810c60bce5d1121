"""Which checkpoints go into an average: find them, open them, hold them against each other."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptavg.errors import MismatchError, SelectionError, printable
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import Checkpoint, without_wrappers
from ckptavg.formats.lora_config import scales_beside
from ckptavg.formats.pauses import collector_at_rest
from ckptavg.merge.lora import is_lora
from ckptavg.select.compare import Contents
from ckptavg.select.discover import find
from ckptavg.select.order import DIGITS, in_order, labels, natural
from ckptavg.select.sources import Collection, Source, compare, locate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class LeftOut:
    """What was found and is no candidate.

    Attributes:
        path: the checkpoint.
        reason: why not.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Survey:
    """All the checkpoints there are to choose from.

    Attributes:
        sources: in the order of training; copies of one checkpoint count once.
        left_out: copies, and averages made earlier.
        order_is_known: whether the order comes from steps, or is but that of the names.
        files: all files that were opened, those of copies included.
        references: of each model among them the first checkpoint; a run has but one.
        models: which of the models each source is of.
    """

    sources: tuple[Source, ...]
    left_out: tuple[LeftOut, ...]
    order_is_known: bool
    files: tuple[Path, ...]
    references: tuple[Checkpoint, ...]
    models: dict[Source, int]

    def labels(self) -> tuple[str, ...]:
        """The sources' paths below the folder that they have in common."""
        return labels([source.path for source in self.sources])

    def collection(self, chosen: Sequence[Source]) -> Collection:
        """The chosen checkpoints, in the order of training.

        Raises:
            MismatchError: they differ in names, shapes or dtypes.
        """
        models = [self.models[source] for source in chosen]
        if len(set(models)) > 1:
            first = replace(self.references[models[0]], path=chosen[0].path)
            others = (
                replace(self.references[model], path=source.path)
                for model, source in zip(models, chosen, strict=True)
                if model != models[0]
            )
            differences = [line for other in others for line in compare(first, other)]
            raise MismatchError("the checkpoints are not of one model:", differences)
        _mention_what_is_left([source.checkpoint for source in chosen])
        tensors = self.references[models[0]].tensors
        return Collection(tensors, tuple(chosen), self.order_is_known, self.files)


def survey(
    inputs: Sequence[Path],
    *,
    key: str | None = None,
    keep_prefix: bool = False,
    any_rank: bool = False,
    wanted: Callable[[str], str | None] | None = None,
) -> Survey:
    """Find, open, compare and order the checkpoints.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        key: which state dict to take where a file holds several.
        keep_prefix: leave a wrapper's prefix on the names.
        any_rank: let the ranks of LoRA factors differ.
        wanted: given a label, why the checkpoint is not even opened; None if it is.

    Raises:
        SelectionError: there are none.
        FormatError: one of them is damaged or of an unknown kind.
    """
    with collector_at_rest():
        return _survey(inputs, key, keep_prefix, _Gathered(any_rank=any_rank), wanted)


def _survey(
    inputs: Sequence[Path],
    key: str | None,
    keep_prefix: bool,  # noqa: FBT001
    gathered: _Gathered,
    wanted: Callable[[str], str | None] | None,
) -> Survey:
    taken_off: dict[str, int] = defaultdict(int)
    found = find(inputs)
    names = labels([path for path, _ in found]) if found else ()
    for (path, named), name in zip(found, names, strict=True):
        if wanted is not None and (reason := wanted(name)) is not None:
            gathered.left_out.append(LeftOut(path, reason))
            continue
        opened = _open(path, key, named=named)
        if opened is None:
            log.info("%s is an average made earlier: left out", printable(path.name))
            gathered.left_out.append(LeftOut(path, "an average made earlier"))
            continue
        checkpoint, prefix = without_wrappers(opened, keep_prefix=keep_prefix)
        if prefix:
            taken_off[prefix] += 1
        gathered.add(checkpoint)
    for prefix, count in taken_off.items():
        log.info("took the wrapper's prefix %r off all names in %d checkpoints", prefix, count)
    return gathered.finish(inputs)


def collect(
    inputs: Sequence[Path], *, key: str | None = None, keep_prefix: bool = False
) -> Collection:
    """All the checkpoints that there are, without a choice.

    Args:
        inputs: directories of checkpoints, and checkpoints.
        key: which state dict to take where a file holds several.
        keep_prefix: leave a wrapper's prefix on the names.

    Raises:
        SelectionError: there are none.
        FormatError: one of them is damaged or of an unknown kind.
        MismatchError: they differ in names, shapes or dtypes.
    """
    found = survey(inputs, key=key, keep_prefix=keep_prefix)
    return found.collection(found.sources)


def gather(checkpoints: Sequence[Checkpoint], *, any_rank: bool = False) -> Collection:
    """Checkpoints that are known already, in the order given; copies count like others.

    Args:
        checkpoints: opened, without wrappers' prefixes.
        any_rank: let the ranks of LoRA factors differ.

    Raises:
        MismatchError: they differ in names, shapes or dtypes.
    """
    with collector_at_rest():
        gathered = _Gathered(any_rank=any_rank)
        for checkpoint in checkpoints:
            gathered.add(checkpoint)
        return gathered.as_given()


def _open(path: Path, key: str | None, *, named: bool) -> Checkpoint | None:
    """Open a checkpoint; None if it is an average of ours that nobody named."""
    try:
        opened = open_checkpoint(path, key=key)
    except SelectionError:
        # An average of ours is a state dict without a key, which is no reason to stop.
        if named or key is None or not open_checkpoint(path).is_average:
            raise
        return None
    if opened.is_average and named:
        log.info("%s is an average made earlier: taken, since it was named", printable(path.name))
    return None if opened.is_average and not named else opened


class _Gathered:
    """What has been opened so far."""

    def __init__(self, *, any_rank: bool) -> None:
        self._any_rank = any_rank
        self._references: list[Checkpoint] = []
        self._sources: list[list[Source]] = []
        self.left_out: list[LeftOut] = []

    def add(self, checkpoint: Checkpoint) -> None:
        """Put it with those of the same model."""
        for reference, sources in zip(self._references, self._sources, strict=True):
            if next(compare(reference, checkpoint, any_rank=self._any_rank), None) is None:
                sources.append(locate(reference.tensors, checkpoint))
                return
        self._references.append(checkpoint)
        self._sources.append([locate(checkpoint.tensors, checkpoint)])

    def as_given(self) -> Collection:
        """All of them, as they were added."""
        first, *others = self._references
        if others:
            differences = [line for other in others for line in compare(first, other)]
            raise MismatchError("the checkpoints are not of one model:", differences)
        [sources] = self._sources
        return Collection(first.tensors, tuple(sources), order_is_known=True)

    def finish(self, inputs: Sequence[Path]) -> Survey:
        """Count copies once, and bring the rest into order."""
        if not self._sources:
            where = ", ".join(printable(path) for path in inputs) or "no input"
            what = f" but {self.left_out[0].reason}" if self.left_out else ""
            raise SelectionError(f"no checkpoint found in {where}{what}")
        files = tuple(
            part.path
            for sources in self._sources
            for source in sources
            for part in source.checkpoint.parts
        )
        models: dict[Source, int] = {}
        for model, (reference, sources) in enumerate(
            zip(self._references, self._sources, strict=True)
        ):
            distinct, copies = _without_duplicates(reference, sources)
            models |= dict.fromkeys(distinct, model)
            self.left_out += copies
        ordered, known = in_order(list(models))
        return Survey(
            tuple(ordered), tuple(self.left_out), known, files, tuple(self._references), models
        )


def _mention_what_is_left(checkpoints: Sequence[Checkpoint]) -> None:
    last = checkpoints[-1]
    if last.other_keys:
        log.info(
            "took %s; there is also %s, to be taken with --key",
            f"the state dict {printable(last.key)!r}" if last.key else "the tensors at the top",
            ", ".join(printable(name) or "the top ('')" for name in last.other_keys),
        )
    keys = sorted(
        {
            printable(checkpoint.key) or "the whole file"
            for checkpoint in checkpoints
            if not checkpoint.is_average  # which is a state dict alone
        }
    )
    if len(keys) > 1:
        log.warning("the checkpoints' state dicts are not of one name: %s", ", ".join(keys))


def _without_duplicates(
    reference: Checkpoint, sources: list[Source]
) -> tuple[list[Source], list[LeftOut]]:
    """Hard links, symlinks and copies of one checkpoint count once.

    A copy has the same recorded step and the same bytes in every tensor. Of several names the one
    with a number in it stays: `checkpoint-12`, not `last`.
    """
    by_name = sorted(
        sources,
        key=lambda source: (
            not DIGITS.search(source.path.name),
            source.path.is_symlink(),
            natural(str(source.path)),
        ),
    )
    own = dict(zip(sources, labels([source.path for source in sources]), strict=True))
    content = Contents(tuple(reference.tensors.values()))
    by_file: dict[object, Source] = {}
    by_step: defaultdict[object, list[Source]] = defaultdict(list)
    copies: list[LeftOut] = []
    lora = is_lora(tuple(reference.tensors))
    for source in by_name:
        files = tuple(part.identity for part in source.checkpoint.parts)
        # Equal factors under another alpha are another adapter.
        scales = scales_beside(source.path) if lora else ()
        alike = by_step[source.checkpoint.step, scales]
        twin = by_file.get(files) or next(
            (other for other in alike if content.same(other, source)), None
        )
        if twin is None:
            by_file[files] = source
            alike.append(source)
        else:
            names = printable(own[source]), printable(own[twin])
            log.info("%s is the same checkpoint as %s: counted once", *names)
            copies.append(LeftOut(source.path, f"the same checkpoint as {names[1]}"))
    return list(by_file.values()), copies
