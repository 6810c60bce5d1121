"""The averages that are made of a run's checkpoints in one read."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any, cast

from ckptavg import __version__
from ckptavg.errors import MismatchError, OutputError, SelectionError, printable
from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.formats.huggingface import read_json
from ckptavg.formats.lora_config import CONFIG, scales_beside
from ckptavg.formats.paths import as_path, is_remote
from ckptavg.formats.pauses import collector_at_rest
from ckptavg.formats.tensors import BY_NAME
from ckptavg.merge.layout import OutputTensor
from ckptavg.merge.lora import is_factor, is_lora, join
from ckptavg.merge.plan import Plan, make_plan
from ckptavg.merge.roles import is_norm_statistic
from ckptavg.merge.update import find_base, fold, folded_sources
from ckptavg.options import Options, default_threads
from ckptavg.select.collect import survey
from ckptavg.select.compare import fingerprints
from ckptavg.select.order import labels
from ckptavg.select.selection import Selection, chosen, select
from ckptavg.summary import Summary, Variant, summarise
from ckptavg.write import digests
from ckptavg.write.directory import to_json
from ckptavg.write.layouts import Destination, destination, lay_out
from ckptavg.write.vacancy import check_parent
from ckptavg.write.writing import (
    check_output,
    encode_provenance,
    provenance_sources,
    refuse_own_input,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
    from ckptavg.merge.layout import Layout
    from ckptavg.merge.schemes import Scheme
    from ckptavg.merge.weights import Weights
    from ckptavg.select.sources import Collection, Source

log = logging.getLogger("ckptavg")


class Averages:
    """The checkpoints of a run, and what is made of them."""

    def __init__(self, inputs: PathLike | Iterable[PathLike], options: Options) -> None:
        self._options, self._select = options, options.select or Selection()
        one = isinstance(inputs, str | os.PathLike) or is_remote(inputs)
        paths = [as_path(path) for path in cast("Iterable[PathLike]", [inputs] if one else inputs)]
        if options.update and (options.exact or not options.normalize):
            raise SelectionError("only a mean of the weights themselves is brought up to date")
        found = survey(
            paths, key=options.key, keep_prefix=options.keep_prefix, any_rank=options.exact,
            # An average that is brought up to date was named, whatever its name.
            wanted=None if options.update else self._select.unwanted,
        )  # fmt: skip
        self._base = find_base(found, self._select.unwanted) if options.update else None
        self._found = found if self._base is None else self._base.others

    def variants(self, last: Sequence[int | None], schemes: Sequence[Scheme]) -> list[Variant]:
        """Every combination of how many are taken and how they are weighted."""
        variants = []
        for count in last:
            rules = dataclasses.replace(self._select, last=count)
            taken = chosen(select(self._found, rules))
            if count is not None and len(taken) < count and rules.every is None:
                log.info("of the last %d there are only %d", count, len(taken))
            sources = tuple(verdict.source for verdict in taken)
            names = labels([source.path for source in sources])
            expected = self._options.expect
            if expected is not None and len(names) != expected:
                found = ", ".join(map(printable, names))
                raise SelectionError(
                    f"expected {expected} checkpoints, found {len(names)}: {found}"
                )
            steps = [verdict.done for verdict in taken if verdict.done is not None]
            for scheme in schemes:
                weights = scheme.weights(
                    steps if len(steps) == len(names) else None,
                    [str(source.path) for source in sources],
                    normalize=self._options.normalize,
                )
                if not any(weights.values):
                    raise SelectionError("all weights are zero, so there is nothing to average")
                label = scheme.label if count is None else f"last{count}-{scheme.label}"
                variants.append(
                    Variant(
                        label, sources, names, weights,
                        needs_order=scheme.needs_order, rules=self._rules(rules, taken[0].unit),
                    )
                )  # fmt: skip
        return variants if self._base is None else [fold(self._base, variants[0])]

    def _rules(self, rules: Selection, unit: str) -> dict[str, Any]:
        """What is said in the provenance of how the checkpoints were chosen."""
        said = rules.as_dict()
        if said.keys() & {"start", "steps", "cycle"}:
            said["unit"] = unit
        return said if self._options.normalize else {**said, "normalized": False}

    def file_name(self, variant: Variant) -> str:
        """The name of one of several outputs: directories make directories."""
        if variant.last.checkpoint.is_of_directories:
            return f"{variant.label}/"
        return variant.label + (".pt" if self._options.container == "last" else ".safetensors")

    def make(
        self, variants: Sequence[Variant], output_of: Callable[[Variant], PathLike]
    ) -> tuple[Summary, ...]:
        """Make all of them from one read."""
        with collector_at_rest():
            return self._make(variants, output_of)

    def _make(
        self, variants: Sequence[Variant], output_of: Callable[[Variant], PathLike]
    ) -> tuple[Summary, ...]:
        options = self._options
        taken = {source for variant in variants for source in variant.sources}
        ordered = self._found.sources if self._base is None else variants[0].sources
        collection = self._found.collection([source for source in ordered if source in taken])
        targets = [
            destination(
                output_of(variant), variant.last.checkpoint, container=options.container,
                max_shard_size=options.max_shard_size,
            )
            for variant in variants
        ]  # fmt: skip
        if len(collection.sources) == 1:
            name = printable(collection.labels()[0])
            log.warning("only one checkpoint: the output is a copy of %s", name)
        collection, replaced = self._join(collection, variants[0].weights, targets[0])
        plan = make_plan(
            collection,
            [_over(collection, variant) for variant in variants],
            ints=options.ints,
            norm_stats=options.norm_stats,
            dtype=BY_NAME[options.dtype] if options.dtype else None,
            joined=frozenset(filter(is_factor, collection.names) if options.exact else ()),
            ordered=any(variant.needs_order for variant in variants),
        )
        if self._base is not None:
            self._base.check(plan)
        for number, target in enumerate(targets):
            _check_order(collection, target, plan.last(number).checkpoint)
        # Of joined factors the last checkpoint's are gone, and such averages are not updated.
        contents = None if options.exact else fingerprints(collection)

        def lay_out_all(hashes: Mapping[Path, str] | None) -> list[Layout]:
            return [
                self._layout(
                    plan, number, variant, target,
                    replaced=replaced, contents=contents, hashes=hashes,
                )
                for number, (variant, target) in enumerate(zip(variants, targets, strict=True))
            ]  # fmt: skip

        read = [source.checkpoint for source in plan.used]
        unknown = {path: "0" * 64 for one in read for path in digests.files(one)}
        layouts = lay_out_all(unknown if options.hash else None)
        for target, layout in zip(targets, layouts, strict=True):
            self._check(target, layout, several=len(targets) > 1)
            if options.hash and not digests.marks(layout):
                raise OutputError(
                    "a file as torch wrote it before 1.6 has no place for digests",
                    path=target.path,
                    remedy="leave --hash out, or --container",
                )
        threads = options.threads or default_threads(plan.used)
        made: Sequence[str | None] = [None] * len(targets)
        hashes: dict[Path, str] = {}
        if not options.dry_run:
            if options.hash:
                hashes = self._hash(read, threads)
                layouts = lay_out_all(hashes)
            made = write(
                plan,
                [(target.path, layout) for target, layout in zip(targets, layouts, strict=True)],
                force=options.force, fsync=options.fsync, threads=threads,
                allow_nonfinite=options.allow_nonfinite, progress=options.progress,
                ranks=options.ranks,
            )  # fmt: skip
        return tuple(
            summarise(
                plan, variant, layout, target.path,
                norm_stats=_norm_stats(plan, number)["state"], written=not options.dry_run,
                threads=threads, sha256=digest, hashes=hashes,
            )
            for number, (variant, layout, target, digest) in enumerate(
                zip(variants, layouts, targets, made, strict=True)
            )
        )  # fmt: skip

    def _hash(self, checkpoints: Sequence[Checkpoint], threads: int) -> dict[Path, str]:
        """The digests of all files that are read; of several processes, each makes its share."""
        options, ranks = self._options, self._options.ranks
        share = checkpoints[ranks.rank :: ranks.size]
        hashes = ranks.gather(digests.of_files(share, threads, options.hash_progress))
        return {path: digest for each in hashes for path, digest in each.items()}

    def _join(
        self, collection: Collection, weights: Weights, target: Destination
    ) -> tuple[Collection, dict[str, bytes]]:
        """Let LoRA factors stand side by side, if that is asked for."""
        if not self._options.exact:
            if len(collection.sources) > 1 and is_lora(collection.names):
                _check_scales(collection)
            return collection, {}
        if target.kind != "directory":
            raise OutputError(
                "the ranks add up, and a file of weights alone does not say so",
                path=target.path,
                remedy="let the output be a directory: end its name with a slash",
            )
        joined, config = join(collection, weights, allow_nonfinite=self._options.allow_nonfinite)
        return joined, {CONFIG: config}

    def _check(self, target: Destination, layout: Layout, *, several: bool) -> None:
        """Find out before the work starts whether an output can be put there."""
        own = self._base.files if self._base is not None and self._options.force else frozenset()
        try:
            inputs = [path for path in self._found.files if path not in own]
            refuse_own_input(target.path, inputs)
            if several and self._options.dry_run and not target.path.parent.exists():
                check_parent(target.path.parent)  # the directory would be made
            else:
                check_output(target.path, layout, force=self._options.force)
        except OutputError as error:
            if not self._options.dry_run:
                raise
            log.warning("it would fail: %s", error)

    def _layout(
        self,
        plan: Plan,
        number: int,
        variant: Variant,
        target: Destination,
        *,
        replaced: dict[str, bytes],
        contents: dict[Source, str] | None,
        hashes: Mapping[Path, str] | None,
    ) -> Layout:
        """An output's layout with its provenance in it."""
        source = plan.last(number)
        last = source.checkpoint
        metadata = {"format": "pt"} | dict(last.metadata)
        outputs = plan.outputs
        if self._options.drop_aliases and target.kind in ("safetensors", "directory"):
            metadata |= {alias: one.names[0] for one in outputs for alias in one.names[1:]}
            outputs = tuple(
                OutputTensor(one.names[:1], one.dtype, one.shape, one.nbytes) for one in outputs
            )
        sources = provenance_sources(variant, contents, hashes)
        if self._base is not None:
            sources = folded_sources(self._base, variant, sources)
        recorded = self._options.recorded
        unknown = digests.unknown(variant.sources) if hashes is not None else None
        metadata[PROVENANCE] = encode_provenance(
            {
                "version": __version__,
                "scheme": variant.weights.scheme,
                "sources": sources,
                "divisor": variant.weights.divisor,
                **({"options": recorded} if recorded else {}),
                **({"sha256": unknown} if unknown else {}),
                "roles": plan.counts,
                **({"selection": variant.rules} if variant.rules else {}),
                "norm_stats": _norm_stats(plan, number),
            }
        )
        if self._options.dtype is not None and target.kind == "directory":
            replaced = _with_dtype(last.path, self._options.dtype) | replaced
        layout = lay_out(
            target, outputs, metadata, last, places=plan.places(source), replaced=replaced,
            mirrored=len(variant.sources) > 1,
        )  # fmt: skip
        return dataclasses.replace(layout, unknown=unknown)


def _check_scales(collection: Collection) -> None:
    """Warn of what averaging LoRA factors apart means, and refuse it under unlike scales.

    Raises:
        MismatchError: the adapters' configurations scale their products differently.
    """
    first, *others = collection.sources
    differences = [
        f"{printable(first.path)} and {printable(other.path)}"
        for other in others
        if scales_beside(other.path) != scales_beside(first.path)
    ]
    if differences:
        raise MismatchError(
            "LoRA adapters of unlike rank or alpha, whose factors do not average apart "
            "(--lora exact averages their products):",
            differences,
        )
    log.warning(
        "averaging the factors A and B of LoRA adapters apart is not averaging their products; "
        "--lora exact does"
    )


def _check_order(collection: Collection, target: Destination, last: Checkpoint) -> None:
    """Refuse what comes along from the last checkpoint, if it is not known which that is.

    Raises:
        SelectionError: it does, and is not.
    """
    along = target.kind == "container" or (target.kind == "torch" and last.other_entries)
    if along and not collection.order_is_known:
        raise SelectionError(
            "only some of the checkpoints have a step, and the output takes along what the last "
            "of them has: " + ", ".join(map(printable, collection.labels())),
            remedy="put the step into every name",
        )


def _over(collection: Collection, variant: Variant) -> Weights:
    """A variant's weights over all the checkpoints that are read, 0 for those it leaves out."""
    own = dict(zip((s.path for s in variant.sources), variant.weights.values, strict=True))
    values = tuple(own.get(source.path, 0.0) for source in collection.sources)
    return dataclasses.replace(variant.weights, values=values)


def _with_dtype(folder: Path, dtype: str) -> dict[str, bytes]:
    """The configuration with the new dtype, in which `from_pretrained` loads the weights."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    stale = {name: dtype for name in config if name in ("dtype", "torch_dtype")}
    return {path.name: to_json({**config, **stale})} if stale else {}


def _norm_stats(plan: Plan, number: int) -> dict[str, Any]:
    """The provenance's entry on the norm statistics of one of the outputs.

    A copy of one checkpoint has the statistics that belong to its weights: it keeps their state.
    """
    if not any(map(is_norm_statistic, plan.collection.names)):
        return {"state": "none"}
    column = plan.columns[number]
    if column.count > 1 or sum(column.weights) != column.divisor:
        return {"state": "stale"}
    entry = (plan.last(number).checkpoint.provenance or {}).get("norm_stats")
    if isinstance(entry, dict) and isinstance(entry.get("state"), str):
        return entry
    return {"state": "kept"}
