"""The options of an average, and its recipe: the members and their weights."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import SelectionError, listed
from ckptavg.formats.tensors import BY_NAME
from ckptavg.options import SHORT_DTYPES, Options
from ckptavg.select.names import relative_names
from ckptavg.select.rules import Selection, chosen, select

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.schemes import Scheme
    from ckptavg.merge.weights import Weights
    from ckptavg.options import Progress
    from ckptavg.select.rules import Verdict
    from ckptavg.select.run import Run


_RECORDED = (
    *("dtype", "skip", "take_last", "ints", "norm_stats", "lora"),
    *("container", "keep_prefix", "update"),
)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """The options of a conversion.

    Attributes:
        key: name of the state dict to take, where a torch file holds several; a list of names, or
            `*` for all, takes several in one go.
        dtype: torch's name of the output's floating dtype; None to keep that of each tensor.
        skip: regular expressions of the names of tensors that are not in the output.
        format: of an output that is a directory: `huggingface` is what `from_pretrained` takes,
            `dcp` what `torch.distributed.checkpoint` loads.
        max_shard_size: bytes of tensors in a file of a directory; None for the inputs' shards, or
            for one file of `dcp`.
        drop_aliases: write tied tensors once, and record the other names in the metadata.
        force: replace an existing output.
        fsync: wait until the output is on the disk.
        dry_run: write nothing, and return what would be written.
        threads: the number of threads; None for the processors that this process may use, 4 at
            most, or for 8 threads if bytes come over a network.
        progress: called as bytes are written.
    """

    key: str | Sequence[str] | None = None
    dtype: str | None = None
    skip: Sequence[str] = ()
    format: Literal["huggingface", "dcp"] = "huggingface"
    max_shard_size: int | None = None
    drop_aliases: bool = False
    force: bool = False
    fsync: bool = True
    dry_run: bool = False
    threads: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SelectionError: a value is unknown.
        """
        super().__post_init__()
        if self.dtype is not None:
            name = SHORT_DTYPES.get(self.dtype, self.dtype)
            if name not in BY_NAME or BY_NAME[name].kind != "float":
                raise SelectionError(f"unknown floating dtype {self.dtype!r}")
            object.__setattr__(self, "dtype", name)
        self._check_choice("format", "huggingface", "dcp")
        for name in ("threads", "max_shard_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SelectionError(f"`{name}` must be at least 1, not {value}")

    def _check_choice(self, name: str, first: str, second: str) -> None:
        if (value := getattr(self, name)) not in (first, second):
            raise SelectionError(f"{name} is {first!r} or {second!r}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class AverageOptions(ConvertOptions):
    """The options of an average.

    Attributes:
        select: the rules that choose the checkpoints.
        weights: a scheme such as `ema:0.9`, or one number for each checkpoint, in order.
        normalize: divide by the sum of the weights.
        update: fold the other checkpoints into the earlier uniform average among the inputs.
        expect: the number of checkpoints that there must be; None for any.
        keep_prefix: leave the prefix of a wrapper (`module.`, `_orig_mod.`) on the names.
        take_last: regular expressions of the names of tensors that are the last checkpoint's.
        ints: `equal` refuses integer tensors that differ; `last` uses the last checkpoint's.
        norm_stats: `average` averages running statistics; `last` uses the last checkpoint's.
        lora: `separate` averages the factors A and B of LoRA adapters apart. `exact` averages their
            products: the ranks add up. The output is a directory, or a `.safetensors` where no
            configuration has to come along.
        allow_nonfinite: accept NaN and Inf.
        container: `weights` writes a state dict alone. `last` writes the last checkpoint's torch
            file, with the average in place of its weights. None is `last` for a `.ckpt` of
            Lightning's checkpoints, and else `weights`.
        hash: record the SHA-256 of the checkpoints' files.
        hash_progress: called as bytes are hashed.
        ranks: the processes that share the work, on a file system that all of them see; each calls
            the function with the same arguments.
    """

    select: Selection = field(default_factory=Selection)
    weights: str | Sequence[float] | Sequence[Scheme] = "uniform"
    normalize: bool = True
    update: bool = False
    expect: int | None = None
    keep_prefix: bool = False
    take_last: Sequence[str] = ()
    ints: Literal["equal", "last"] = "equal"
    norm_stats: Literal["average", "last"] = "average"
    lora: Literal["separate", "exact"] = "separate"
    allow_nonfinite: bool = False
    container: Literal["weights", "last"] | None = None
    hash: bool = False
    hash_progress: Progress | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SelectionError: a value is unknown, or two values contradict each other.
        """
        super().__post_init__()
        self._check_choice("ints", "equal", "last")
        self._check_choice("norm_stats", "average", "last")
        self._check_choice("lora", "separate", "exact")
        if self.container is not None:
            self._check_choice("container", "weights", "last")
        if self.update and (self.lora == "exact" or not self.normalize):
            raise SelectionError("only a mean of the weights themselves can be updated")
        if self.container == "last" and self.dtype is not None:
            raise SelectionError(
                "the last checkpoint's container keeps its dtypes: leave dtype out"
            )
        if self.container == "last" and self.skip:
            raise SelectionError(
                "the last checkpoint's container keeps all of its tensors",
                remedy="leave `skip` out, or use `take_last`",
            )
        if self.container == "last" and self.max_shard_size is not None:
            raise SelectionError("the last checkpoint's container is one file: no shards")

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that the output's values depend on, without those at their defaults."""
        changed = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name in _RECORDED and getattr(self, each.name) not in (each.default, "weights")
        }
        return {
            k: list(value) if isinstance(value, tuple) else value for k, value in changed.items()
        }


COPY = "none"
"""The scheme of a checkpoint that is written again, with other norm statistics or elsewhere."""


@dataclass(frozen=True)
class Recipe:
    """The members of an average and their weights.

    Attributes:
        scheme: the name of the scheme that gives the weights.
        members: the checkpoints with a weight other than 0, in the order of training.
        weights: one weight for each member.
        needs_order: whether the weights depend on the order of the members.
        rules: the rules that chose the members, for the provenance.
        base: the member that is an earlier average, to be updated with the others.
        label: the name of this average among several of one command, such as `last5-ema0.9`.
        last_count: the number of last checkpoints that the rules choose; None for all.
        notes: further entries of the provenance.
    """

    scheme: str
    members: tuple[Checkpoint, ...]
    weights: Weights
    needs_order: bool = False
    rules: Mapping[str, Any] = field(default_factory=dict)
    base: Checkpoint | None = None
    label: str = ""
    last_count: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> Mapping[Path, str]:
        """The members' paths below the folder that they have in common, without the base."""
        paths = [each.path for each in self.members if each is not self.base]
        return relative_names(paths, revisions=True)

    @property
    def is_copy(self) -> bool:
        """Whether the only member is written as it is."""
        return self.scheme == COPY

    @property
    def last(self) -> Checkpoint:
        """The last member."""
        return self.members[-1]

    def weights_over(self, checkpoints: Sequence[Checkpoint]) -> Weights:
        """The weights of these checkpoints: 0 for those that are no members."""
        weights = dict(zip(self.members, self.weights.values, strict=True))
        values = tuple(weights.get(checkpoint, 0.0) for checkpoint in checkpoints)
        return replace(self.weights, values=values)


def recipes_of(
    run: Run, schemes: Sequence[Scheme], rules: Selection, options: AverageOptions
) -> list[Recipe]:
    """The recipe of each average: one for each number of last checkpoints and each scheme.

    Raises:
        SelectionError: no checkpoint is chosen, their number is not the expected one, or a scheme
            cannot weight them.
    """
    recipes = []
    for count in rules.counts:
        narrowed = replace(rules, last=count)
        verdicts = chosen(select(run, narrowed))
        recipes += [_recipe(verdicts, scheme, narrowed, options) for scheme in schemes]
    return recipes


def _recipe(
    verdicts: Sequence[Verdict], scheme: Scheme, rules: Selection, options: AverageOptions
) -> Recipe:
    steps = [verdict.done for verdict in verdicts if verdict.done is not None]
    weights = scheme.weights(
        steps if len(steps) == len(verdicts) else None,
        [str(verdict.checkpoint.path) for verdict in verdicts],
        normalize=options.normalize,
    )
    used = [
        (verdict.checkpoint, value)
        for verdict, value in zip(verdicts, weights.values, strict=True)
        if value != 0
    ]
    if not used:
        raise SelectionError("all weights are zero, so there is nothing to average")
    members, values = zip(*used, strict=True)
    if options.expect is not None and len(members) != options.expect:
        names = listed(member.name for member in members)
        raise SelectionError(
            f"expected {options.expect} checkpoints, found {len(members)}: {names}"
        )
    recorded_rules = rules.as_dict()
    if recorded_rules.keys() & {"start", "steps", "cycle"}:
        recorded_rules["unit"] = verdicts[0].unit
    if not options.normalize:
        recorded_rules["normalized"] = False
    label = scheme.label if rules.last is None else f"last{rules.last}-{scheme.label}"
    weights = replace(weights, values=values)
    return Recipe(
        scheme.name, members, weights, scheme.needs_order, recorded_rules, label=label,
        last_count=rules.counts[0],
    )  # fmt: skip
