"""Average checkpoints: the whole way from a directory to one output, or to several."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.averages import Averages
from ckptavg.distributed import ALONE, Ranks
from ckptavg.errors import OutputError, SelectionError
from ckptavg.formats import SUFFIXES
from ckptavg.merge.schemes import Scheme, parse
from ckptavg.merge.weights import Weights, explicit
from ckptavg.options import Options

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptavg.formats.paths import PathLike
    from ckptavg.select.selection import Selection
    from ckptavg.summary import Summary
    from ckptavg.write.writing import Progress


def average(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike,
    *,
    select: Selection | None = None,
    weights: str | Sequence[float] | None = None,
    normalize: bool = True,
    update: bool = False,
    key: str | None = None,
    keep_prefix: bool = False,
    drop_aliases: bool = False,
    dtype: str | None = None,
    ints: Literal["equal", "last"] = "equal",
    norm_stats: Literal["average", "last"] = "average",
    lora: Literal["separate", "exact"] = "separate",
    allow_nonfinite: bool = False,
    expect: int | None = None,
    force: bool = False,
    fsync: bool = True,
    container: Literal["weights", "last"] = "weights",
    max_shard_size: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    hash: bool = False,  # noqa: A002 - the option's name
    hash_progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Summary:
    """Average checkpoints into one, in memory that does not grow with them.

    Floating tensors are summed in float64, divided once and rounded as `torch.Tensor.to` does;
    integers must agree, but for scalars such as `num_batches_tracked`, which are the last
    checkpoint's. The statistics of norm layers are stale afterwards: see `refresh_norm`.

    Args:
        inputs: a directory of checkpoints, a checkpoint, or several of either; URLs such as
            `s3://bucket/run` as well.
        output: ends with `.safetensors`, or with `.pt`, `.pth`, `.bin`, `.ckpt` or `.tar` for a
            torch file, or with a slash for a directory such as `from_pretrained` takes.
        select: which of the checkpoints to take; None for all.
        weights: a scheme such as `ema:0.9`, or one number for each checkpoint, in order of
            training; None for the mean.
        normalize: divide by the sum of the weights.
        update: fold checkpoints into a uniform average that was made earlier and is one of
            the inputs.
        key: which state dict to take where a file holds several.
        keep_prefix: leave a wrapper's prefix (`module.`, `_orig_mod.`) on the names.
        drop_aliases: of tied tensors, write one and name the others in the metadata.
        dtype: of the floating tensors in the output, by torch's name; None for the inputs' own.
        ints: `last` takes differing integer tensors from the last checkpoint.
        norm_stats: `last` takes running statistics from the last checkpoint.
        lora: of LoRA adapters, `separate` averages the factors A and B apart, and `exact` their
            products: the ranks then add up, and the output must be a directory.
        allow_nonfinite: let NaN and Inf pass.
        expect: how many checkpoints there must be.
        force: replace an existing output.
        fsync: have the output on the disk before it gets its name.
        container: `last` writes the last checkpoint's torch file with all that it holds, and the
            average in the place of its weights; `weights` writes a state dict alone.
        max_shard_size: bytes of tensors in a file of a directory; None for the inputs' own.
        threads: how many work at once; None for the processors that this process may use, 4 at
            most, and for 16 where bytes come over a network.
        dry_run: write nothing, only say what would be done.
        progress: hears of the bytes written.
        hash: record SHA-256 of the checkpoints' files and of the output's tensors.
        hash_progress: hears of the bytes hashed.
        ranks: the processes that do it together, on a file system that all of them see; each calls
            this with the same arguments.

    Raises:
        CkptAvgError: the checkpoints do not fit together, hold what cannot be averaged, or the
            output cannot be written. Nothing is left behind then.
    """
    options = Options(
        select=select, normalize=normalize, update=update, key=key, keep_prefix=keep_prefix,
        drop_aliases=drop_aliases, dtype=dtype, ints=ints, norm_stats=norm_stats, lora=lora,
        allow_nonfinite=allow_nonfinite, expect=expect, force=force, fsync=fsync,
        container=container, max_shard_size=max_shard_size, threads=threads, dry_run=dry_run,
        progress=progress, hash=hash, hash_progress=hash_progress, ranks=ranks,
    )  # fmt: skip
    schemes = _schemes(weights)
    if len(schemes) != 1:
        raise SelectionError("several schemes make several averages: see average_many")
    if update and schemes[0].name != "uniform":
        raise SelectionError("only a uniform average can be updated")
    run = Averages(inputs, options)
    last = None if select is None else select.last
    [summary] = run.make(run.variants([last], schemes), lambda _: output)
    return summary


def average_many(
    inputs: PathLike | Iterable[PathLike],
    directory: PathLike,
    *,
    last: Sequence[int] = (),
    weights: str = "uniform",
    select: Selection | None = None,
    **options: Any,  # noqa: ANN401 - `average`'s
) -> tuple[Summary, ...]:
    """Make several averages from one read of the checkpoints: each byte is read once.

    Args:
        inputs: as in `average`.
        directory: where they go, each under a name that tells what it is, such as
            `last5-ema0.9.safetensors`.
        last: how many of the last checkpoints each takes; none for all.
        weights: schemes such as `uniform,ema:0.9`. Each goes with each of `last`.
        select: which of the checkpoints to take beforehand.
        options: the other keywords of `average`.

    Raises:
        CkptAvgError: as `average` does.
    """
    checked = Options(select=select, **options)
    if checked.update or checked.exact:
        raise SelectionError("an update, and exact LoRA averages, are made one at a time")
    if "://" in os.fspath(directory):
        raise OutputError("outputs are written on this machine only", path=str(directory))
    folder = Path(directory)
    if folder.suffix in SUFFIXES and not folder.is_dir():
        raise OutputError(
            "several averages go into a directory", path=folder, remedy="give it another name"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError("several averages go into a directory", path=folder)
    run = Averages(inputs, checked)
    variants = run.variants(
        tuple(last) or (None if select is None else select.last,), _schemes(weights)
    )
    made = not folder.exists() and not checked.dry_run
    if made:
        folder.mkdir(exist_ok=checked.ranks.size > 1)  # another process may be faster
    try:
        return run.make(variants, lambda variant: os.path.join(folder, run.file_name(variant)))  # noqa: PTH118 - keeps the slash
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not empty, or another process was faster
                folder.rmdir()
        raise


def _schemes(weights: str | Sequence[float] | None) -> tuple[Scheme, ...]:
    if weights is None or isinstance(weights, str):
        return parse(weights or "uniform")
    values = list(weights)

    def make(_: Sequence[float], names: Sequence[str], normalize: bool) -> Weights:  # noqa: FBT001
        return explicit(values, len(names), normalize=normalize)

    return (Scheme("explicit", "explicit", make),)
