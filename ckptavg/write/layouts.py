"""The kind of an output, and its layout: what stands around the tensors, and where they go."""

from __future__ import annotations

import difflib
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.errors import OutputError, listed, printable, without_notices
from ckptavg.formats import SUFFIXES, torchzip
from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.formats.paths import as_path, is_remote
from ckptavg.write.companions import mention_weights_left_behind
from ckptavg.write.container import BESIDE_AVERAGE, lay_out_container
from ckptavg.write.dcp import lay_out_dcp
from ckptavg.write.directory import lay_out_directory
from ckptavg.write.provenance import encode_provenance
from ckptavg.write.safetensors import lay_out_safetensors
from ckptavg.write.torchzip import lay_out_torch, mention_left_out

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.merge.jobs import Layout, OutputTensor
    from ckptavg.merge.recipe import AverageOptions

log = logging.getLogger("ckptavg")

Kind = Literal["safetensors", "torch", "container", "directory", "dcp"]
_SAFETENSORS = ".safetensors"
# What LoRA trainers record of the last checkpoint alone: hashes of its weights, and its counters.
_UNTRUE = re.compile(r"sshs_\w+|modelspec\.hash_\w+|ss_(epoch|steps)")
# The state dicts that it trains: the second where WeightAveraging keeps its average in the first.
_OF_LIGHTNING = ("state_dict", "current_model_state")
_TORCH = tuple(suffix for suffix in SUFFIXES if suffix != _SAFETENSORS)


@dataclass(frozen=True)
class Destination:
    """Where an output goes, and as what.

    Attributes:
        path: the file or directory.
        kind: `safetensors` and `torch` are a file with a state dict alone; `container` is the last
            checkpoint's torch file with other weights in it; `directory` is what Hugging Face's
            `save_pretrained` writes, and `dcp` one of `torch.distributed.checkpoint`.
    """

    path: Path
    kind: Kind


def destination(
    output: str | os.PathLike[str], last: Checkpoint, options: AverageOptions
) -> Destination:
    """The kind of output that a name and the options ask for.

    Args:
        output: ends with a file's suffix; a directory ends with a slash, or is there already, or
            has no such suffix where the checkpoints are directories themselves.
        last: the last checkpoint.
        options: `container`, `format`, `max_shard_size` and `drop_aliases`.

    Raises:
        OutputError: the name stands for no kind of output, or not for what the options ask for.
    """
    path = _local(output)
    kind = _kind(output, path, last, options)
    if options.max_shard_size is not None and kind not in ("directory", "dcp"):
        raise OutputError(
            "shards need a directory", path=path, remedy="let the output's name end with a slash"
        )
    if options.drop_aliases and kind in ("torch", "container", "dcp"):
        raise OutputError(
            "torch's own layouts have tied tensors once: there are no aliases to drop",
            path=path,
            remedy="leave `drop_aliases` out",
        )
    is_file = last.container == "torch"
    kinds = ("torch", "container") if is_file else ("directory",)
    if last.has_several_models and kind not in kinds:
        places = listed(last.models.values())
        raise OutputError(
            f"only {'a torch file' if is_file else 'a Hugging Face directory'} holds the models in "
            f"{printable(last.name)}: {places}",
            path=path,
            remedy="end its name with .pt, or take one at a time with `key`"
            if is_file
            else "end its name with a slash for such a directory, or name the files of one model",
        )
    return Destination(path, kind)


def with_container(
    target: Destination,
    tensors: Sequence[OutputTensor],
    members: Sequence[Checkpoint],
    options: AverageOptions,
    *,
    mirrored: bool,
    is_copy: bool = False,
) -> Destination:
    """The destination, which is a container by default for a `.ckpt` of Lightning's checkpoints.

    Lightning loads no weights alone. A notice says which of the two the output is, and why.

    Args:
        target: as the name and the options ask for it.
        tensors: what is to be written.
        members: the checkpoints, the last of which would be the container.
        options: those given; `container` leaves no choice.
        mirrored: as in `lay_out`.
        is_copy: the output is a conversion, which writes the weights alone.
    """
    last, name = members[-1], printable(target.path.name)
    if (
        (target.kind, target.path.suffix, options.container) != ("torch", ".ckpt", None)
        or not _is_of_lightning(last)
    ):  # fmt: skip
        return target
    reason = "a conversion has the state dict only"
    if not is_copy:
        reason = _hindrance(target, tensors, members, options, mirrored=mirrored)
    if reason:
        log.info(
            "%s has the weights alone, which Lightning's load_from_checkpoint does not take: %s",
            name,
            reason,
        )
        return target
    if not last.is_average:  # the notice came when it was made
        log.info(
            "%s has everything else (optimizer, epoch, hyper-parameters) from %s; "
            "`container=weights` writes the weights alone",
            name,
            printable(last.name),
        )
    return replace(target, kind="container")


def _hindrance(  # noqa: PLR0911 - one for each reason
    target: Destination,
    tensors: Sequence[OutputTensor],
    members: Sequence[Checkpoint],
    options: AverageOptions,
    *,
    mirrored: bool,
) -> str:
    """Why the last of Lightning's checkpoints is no container for the tensors; empty if it is."""
    last = members[-1]
    for option in ("dtype", "skip"):
        if getattr(options, option):
            return f"`{option}` is given"
    if options.key and (last.key not in _OF_LIGHTNING or last.is_trainers_average):
        return "`key` takes another state dict than Lightning's"
    if last.key in BESIDE_AVERAGE and not mirrored:
        return "its state_dict would still be the average that Lightning made"
    if other := next((each for each in members if not _is_of_lightning(each)), None):
        return f"{printable(other.name)} is no checkpoint of Lightning's"
    file = last.parts[0]
    if not torchzip.matches(file.path, file.read(0, 4)):
        return f"{printable(last.name)} is in torch's format from before 1.6"
    try:
        with without_notices():
            lay_out_container(target.path, tensors, {}, last, mirrored=mirrored)
    except OutputError as error:
        return f"{printable(error.tensor)} {error.message}"
    return ""


def _is_of_lightning(checkpoint: Checkpoint) -> bool:
    is_file = checkpoint.container == "torch" and checkpoint.path.suffix == ".ckpt"
    return is_file and checkpoint.training.epochs_from_zero


def _kind(
    output: str | os.PathLike[str], path: Path, last: Checkpoint, options: AverageOptions
) -> Kind:
    is_file_name = path.suffix in SUFFIXES
    if options.container == "last":
        _check_container(path, last)
        return "container"
    ends_with_slash = os.fspath(output).endswith(os.sep)
    is_dcp = options.format == "dcp"
    needs_no_slash = (is_dcp or last.is_of_directories) and not is_file_name
    if path.is_dir() or ends_with_slash or needs_no_slash:
        return "dcp" if is_dcp else "directory"
    if is_dcp:
        raise OutputError(
            "is the name of a file, but dcp is a format of directories",
            path=path,
            remedy="let the output's name end with a slash",
        )
    if not is_file_name:
        alike = difflib.get_close_matches(path.suffix.lower(), SUFFIXES, 1)
        better = Path(f"{path}{_SAFETENSORS}")
        if alike or path.suffix[1:].isalpha():  # `.5` is no ending
            better = path.with_suffix((alike or [_SAFETENSORS])[0])
        raise OutputError(
            f"the ending {path.suffix!r} is not that of a format",
            path=path,
            remedy=f"name it {printable(better)}; {' '.join(_TORCH)} stand for a torch file, and a "
            "slash at the end for a directory",
        )
    return "safetensors" if path.suffix == _SAFETENSORS else "torch"


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
    # Nothing can be written beside `.` and `..`: these are no names.
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))  # noqa: PTH100


def _check_container(path: Path, last: Checkpoint) -> None:
    if last.container != "torch":
        raise OutputError(
            f"the last checkpoint, {printable(last.path)}, is no torch file whose weights could "
            "be replaced",
            path=path,
            remedy="leave `container` out; a directory's configuration is copied anyway",
        )
    if path.suffix not in _TORCH or path.is_dir():
        raise OutputError(
            "is not the name of a torch file",
            path=path,
            remedy=f"let it end with one of {' '.join(_TORCH)}",
        )


def lay_out(
    target: Destination,
    tensors: Sequence[OutputTensor],
    provenance: Mapping[str, Any],
    last: Checkpoint,
    options: AverageOptions,
    *,
    replaced: Mapping[str, bytes] | None = None,
    mirrored: bool = False,
) -> Layout:
    """Lay out an output.

    Args:
        target: where it goes, and as what.
        tensors: in the order of their bytes in the output.
        provenance: the entry on what it is made of, which joins the last checkpoint's metadata.
        last: the last checkpoint: its other content comes along, and a container has each tensor
            in the place that it has there.
        options: `dtype`, `max_shard_size` and `drop_aliases`.
        replaced: files of a directory that are not as the last checkpoint has them, by name.
        mirrored: in a container of Lightning's WeightAveraging, which has an average of its own,
            write the weights in the place of that as well: Lightning loads it.

    Raises:
        OutputError: the kind of output cannot hold the tensors.
    """
    mention_weights_left_behind(last)
    kept = {name: text for name, text in last.metadata.items() if not _UNTRUE.fullmatch(name)}
    metadata = {"format": "pt", **kept, PROVENANCE: encode_provenance(provenance)}
    if target.kind == "container":
        return lay_out_container(target.path, tensors, metadata, last, mirrored=mirrored)
    if target.kind == "torch":
        return lay_out_torch(target.path, tensors, metadata, last)
    if target.kind == "dcp":
        return lay_out_dcp(
            target.path, tensors, metadata, last, max_shard_size=options.max_shard_size
        )
    if last.other_entries:
        mention_left_out(last.other_entries)
    if options.drop_aliases:
        aliases = {alias: each.names[0] for each in tensors for alias in each.names[1:]}
        metadata |= aliases
        tensors = [replace(tensor, names=tensor.names[:1]) for tensor in tensors]
    if target.kind == "directory":
        return lay_out_directory(
            target.path, tensors, metadata, last, dtype=options.dtype,
            max_shard_size=options.max_shard_size, replaced=replaced or {},
        )  # fmt: skip
    return lay_out_safetensors(target.path, tensors, metadata)
