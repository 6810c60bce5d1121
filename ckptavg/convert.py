"""Convert a checkpoint: read one layout, and write another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptavg.average import write_averages
from ckptavg.errors import SelectionError, listed, printable
from ckptavg.formats import is_checkpoint_directory, open_checkpoint
from ckptavg.formats.paths import as_path, remote_errors
from ckptavg.formats.statedict import as_key
from ckptavg.merge.recipe import COPY, AverageOptions, ConvertOptions, Recipe
from ckptavg.merge.weights import uniform
from ckptavg.options import takes_fields_of
from ckptavg.select.candidates import find_candidates
from ckptavg.select.pieces import is_piece, remedy_by_name
from ckptavg.select.run import Run

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.paths import PathLike
    from ckptavg.formats.statedict import Key
    from ckptavg.write.provenance import Summary


@takes_fields_of(ConvertOptions)
def convert(checkpoint: PathLike, output: PathLike, options: ConvertOptions) -> Summary:
    """Write a checkpoint in another layout, in memory that does not grow with its size.

    Names stay as they are, and so do the bytes of tensors unless `dtype` is given. NaN and Inf are
    accepted. From a training checkpoint only the state dict is written.

    Args:
        checkpoint: a file, a directory or a URL in any layout that `average` reads.
        output: the path of the output; its name tells the layout, as in `average`.
        options: the fields of `ConvertOptions`, as keywords.

    Raises:
        SelectionError: the input holds several checkpoints, or several state dicts and no plain
            one.
        CkptAvgError: it cannot be read, or the output cannot be written. Nothing is left behind.
    """
    opened = _open(as_path(checkpoint), as_key(options.key))
    # Written as an average of one member. Prefixes stay, and so do NaN and Inf.
    averaging = AverageOptions(**vars(options))
    recipe = Recipe(COPY, (opened,), uniform(1))
    [summary] = write_averages(Run((opened,)), [recipe], [output], averaging)
    return summary


def _open(path: Path, key: Key) -> Checkpoint:
    """Open the checkpoint; for a directory of several the error names them."""
    with remote_errors(path):
        if path.is_dir() and not is_checkpoint_directory(path):
            inside = [printable(each) for each in find_candidates([path])]
            names = [name.removeprefix(printable(path)) for name in inside]
            if len(names) > 1 and all(map(is_piece, names)):
                what = f"holds pieces of one model: {listed(inside)}"
                raise SelectionError(what, path=path, remedy=remedy_by_name(names[0]))
            what = f"is a directory of checkpoints: {listed(inside)}"
            raise SelectionError(what, path=path, remedy="convert one of them")
    return open_checkpoint(path, key=key)
