"""What can be written: each writer lays out a file or a directory from descriptions alone."""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ckptavg.errors import CkptAvgError, OutputError, printable
from ckptavg.formats import SUFFIXES, open_checkpoint
from ckptavg.formats.checkpoint import without_wrappers
from ckptavg.formats.parts import ByteSource
from ckptavg.formats.paths import as_path, is_remote
from ckptavg.write.container import lay_out_container, span
from ckptavg.write.directory import lay_out_directory
from ckptavg.write.pickling import is_writable
from ckptavg.write.safetensors import lay_out_safetensors
from ckptavg.write.torchzip import Extras, lay_out_torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.tensors import Tensor
    from ckptavg.merge.layout import Layout, OutputTensor

log = logging.getLogger("ckptavg")

Kind = Literal["safetensors", "torch", "container", "directory"]
_SAFETENSORS = ".safetensors"
_TORCH = tuple(suffix for suffix in SUFFIXES if suffix != _SAFETENSORS)


@dataclass(frozen=True)
class Destination:
    """Where an output goes, and as what.

    Attributes:
        path: the file or directory.
        kind: `safetensors` and `torch` are a state dict alone in a file; `container` is the last
            checkpoint's torch file with other weights in it; `directory` is Hugging Face's.
        max_shard_size: bytes of tensors in a file of a directory; None for the inputs' own.
    """

    path: Path
    kind: Kind
    max_shard_size: int | None = None


def destination(
    output: str | os.PathLike[str],
    last: Checkpoint,
    *,
    container: str = "weights",
    max_shard_size: int | None = None,
) -> Destination:
    """What an output's name and the options ask for.

    Args:
        output: ends with a file's suffix; a directory ends with a slash, or is there already, or
            has no such suffix where the checkpoints are directories themselves.
        last: the last checkpoint.
        container: `last` for its whole file with other weights, `weights` for them alone.
        max_shard_size: bytes of tensors in a file of a directory.

    Raises:
        OutputError: the name stands for no kind of output, or not for what the options ask for.
    """
    path = _local(output)
    spelled = os.fspath(output)
    known = path.suffix in SUFFIXES
    if container == "last":
        return Destination(_for_container(path, last), "container")
    if path.is_dir() or spelled.endswith(os.sep) or (last.is_of_directories and not known):
        return Destination(path, "directory", max_shard_size)
    if max_shard_size is not None:
        raise OutputError(
            "shards need a directory", path=path, remedy="let the output's name end with a slash"
        )
    if not known:
        raise OutputError(
            f"cannot tell a container from the ending {path.suffix!r}",
            path=path,
            remedy=f"let it end with {_SAFETENSORS}, with one of {' '.join(_TORCH)}, or with a "
            "slash for a directory",
        )
    return Destination(path, "safetensors" if path.suffix == _SAFETENSORS else "torch")


def _local(output: str | os.PathLike[str]) -> Path:
    if not is_remote(output) and os.fspath(output).startswith("file://"):
        output = as_path(output)
    if is_remote(output) or "://" in os.fspath(output):
        raise OutputError(
            "outputs are written on this machine only",
            path=str(output),
            remedy="write a file here and copy it there",
        )
    path = Path(output)
    # `.` and `..` are no names that something could be put beside.
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))  # noqa: PTH100


def _for_container(path: Path, last: Checkpoint) -> Path:
    if last.container != "torch" or not isinstance(last.parts[0], ByteSource):
        raise OutputError(
            f"the last checkpoint, {printable(last.path)}, is no torch file whose weights could "
            "be replaced",
            path=path,
            remedy="leave --container out; a directory's configuration comes along anyway",
        )
    if path.suffix not in _TORCH or path.is_dir():
        raise OutputError(
            "is no name for a torch file", path=path, remedy=f"let it end with {' '.join(_TORCH)}"
        )
    return path


def lay_out(
    target: Destination,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    last: Checkpoint,
    *,
    places: Sequence[Tensor] = (),
    replaced: Mapping[str, bytes] | None = None,
    mirrored: bool = False,
) -> Layout:
    """Lay out an output.

    Args:
        target: where it goes, and as what.
        tensors: in the order in which they are to stand.
        metadata: strings that describe it.
        last: the last checkpoint, for what else comes along.
        places: where each of the tensors stands in the last checkpoint's file.
        replaced: files of a directory that are not to be as the last checkpoint has them.
        mirrored: write the weights in a container of Lightning's WeightAveraging in the place of
            its own average as well, which is what it loads.

    Raises:
        OutputError: the kind of file cannot hold them.
    """
    if target.kind == "container":
        return _lay_out_container(target.path, tensors, metadata, last, places, mirrored=mirrored)
    entries = _writable(last) if target.kind == "torch" else {}
    if left := [name for name in last.other_entries if name not in entries]:
        log.info("left out what is no tensor: %s", ", ".join(map(printable, left)))
    if target.kind == "torch":
        extras = Extras(entries, last.inner_tensors if entries else {}, last.parts)
        return lay_out_torch(tensors, metadata, last.module_versions, extras)
    if target.kind == "directory":
        return lay_out_directory(
            target.path,
            tensors,
            metadata,
            last,
            max_shard_size=target.max_shard_size,
            replaced=replaced,
        )
    return lay_out_safetensors(target.path, tensors, metadata)


def _writable(last: Checkpoint) -> dict[str, object]:
    """The entries that are no tensors and can go into another pickle."""
    return {
        name: value
        for name, value in last.other_entries.items()
        if is_writable(value, last.inner_tensors)
    }


def _lay_out_container(
    path: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    last: Checkpoint,
    places: Sequence[Tensor],
    *,
    mirrored: bool,
) -> Layout:
    file = last.parts[0]
    if not isinstance(file, ByteSource):
        raise OutputError("its bytes are in no file", path=last.path)
    everywhere: list[tuple[Tensor, ...]] = [(place,) for place in places]
    for name in last.other_keys:
        if not (mirrored and (last.key, name) == ("current_model_state", "state_dict")):
            _mention_other(last, name, places)
            continue
        twins = _as_named(open_checkpoint(last.path, key=name))
        everywhere = [
            (*each, *_same(path, twins, tensor, each[0]))
            for tensor, each in zip(tensors, everywhere, strict=True)
        ]
    return lay_out_container(path, tensors, everywhere, file, metadata)


def _mention_other(last: Checkpoint, name: str, places: Sequence[Tensor]) -> None:
    """Say what becomes of another state dict: torch saves what two of them share but once."""
    with contextlib.suppress(CkptAvgError):
        weights = sorted(span(place) for place in places if place.count)
        others = open_checkpoint(last.path, key=name).tensors.values()
        if not any(tensor.dtype.averaged for tensor in others):
            return  # counters, as in Lightning's `averaging_state`
        if any(_overlaps(weights, *span(tensor)) for tensor in others if tensor.count):
            log.warning(
                "%s in the container shares tensors with the weights, so it has their average too",
                printable(name),
            )
            return
    log.warning("%s in the container stays the last checkpoint's", printable(name))


def _overlaps(spans: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    """Whether something lies in one of the spans, which are sorted and apart."""
    before = bisect.bisect_left(spans, (end, 0)) - 1
    return before >= 0 and spans[before][1] > start


def _as_named(twin: Checkpoint) -> dict[str, Tensor]:
    """Its tensors by their own names, and by those without a wrapper's prefix."""
    return {**without_wrappers(twin, keep_prefix=False)[0].tensors, **twin.tensors}


def _same(
    path: Path, twins: Mapping[str, Tensor], tensor: OutputTensor, like: Tensor
) -> list[Tensor]:
    """The places of a tensor in the state dict that takes the average as well."""
    found = dict.fromkeys(twins[name] for name in tensor.names if name in twins)
    if not found or any((one.dtype, one.shape) != (like.dtype, like.shape) for one in found):
        raise OutputError(
            "is not in its state_dict as it is among its weights",
            path=path,
            tensor=tensor.names[0],
            remedy="write the weights alone, without --container",
        )
    return [place for place in found if place != like]
