"""Read `.safetensors`: a length, a JSON header, and the tensors' bytes without gaps.

https://huggingface.co/docs/safetensors/index#format. The safetensors library validates the header
and lists the tensors in the order of their bytes; each one's offset is the sum of the sizes before.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats.checkpoint import STEP_NAMES, Checkpoint, TrainingRecord, check_count
from ckptavg.formats.jsontext import from_text
from ckptavg.formats.paths import is_remote
from ckptavg.formats.statedict import ALL, without_names
from ckptavg.formats.tensors import BY_CODE, Place, Tensor, is_possible
from ckptavg.formats.words import parse_shard_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ckptavg.formats.parts import Part
    from ckptavg.formats.statedict import Key

SUFFIXES = (".safetensors",)
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the library's limit
# Bytes of a header, and as many more for each tensor: those of its name, and of all else.
_LARGEST_METADATA, _LONGEST_ENTRY = 16_000_000, 300
_OFFSETS = b'"data_offsets"'
# The headers of 100,000 tensors have fewer. The library takes up to 80 bytes of memory for each.
_MARKS, _MOST_MARKS = (b'"', b",", b"[", b"{"), 2_500_000
_CONTEXT = 100
_SHARDING = "DCP_SHARDING_INFO"
_LARGEST_INDEX = 1 << 60
_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,20})\s*\]')
_STEP = re.compile(r"[0-9]{1,18}")


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as a safetensors file does."""
    return bool(head) and (head[_LENGTH : _LENGTH + 1] == b"{" or path.suffix in SUFFIXES)


def open_checkpoint(file: Part, key: Key) -> Checkpoint:
    """Describe the tensors of a safetensors file.

    Raises:
        FormatError: the header is damaged, or the file is truncated.
        SelectionError: a key is given; the file is a single state dict.
    """
    path = file.path
    if key is not None and key != (ALL,):
        raise without_names(path, *((key,) if isinstance(key, str) else key))
    header = _read_header(file)
    try:
        library = _open_with_library(file, header)
    except SafetensorError as error:
        raise FormatError(
            _explain(error, header, file.size), path=path, remedy="save or download it again"
        ) from error
    except OSError as error:
        raise CkptAvgError(f"cannot read it: {error.strerror or error}", path=path) from error
    names = library.offset_keys()
    check_count(len(names), path)  # their entries may be spelled with escapes
    tensors = _list_tensors(path, library, names, _LENGTH + len(header))
    metadata: dict[str, str] = library.metadata() or {}
    return Checkpoint(
        path=path,
        container="safetensors",
        parts=(file,),
        tensors=tensors,
        metadata=metadata,
        digest=hashlib.sha256(header).hexdigest(),
        training=TrainingRecord(_steps(metadata)),
        shard_places=_shard_places(path, tensors, metadata),
    )


def _shard_places(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Place]:
    """Where the pieces of tensors in a rank's file are, as `torch.distributed.checkpoint` says.

    It says so of whole tensors too, in files of other names.
    """
    if _SHARDING not in metadata:
        return {}
    try:
        sharding = from_text(metadata[_SHARDING])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"has damaged {_SHARDING}: {printable(error)}", path=path) from error
    places = {}
    for name, tensor in tensors.items():
        entry = sharding.get(name) if isinstance(sharding, dict) else None
        match entry:
            case {"saved_offsets": list(corner)} if _is_index(corner, tensor.shape):
                places[name] = Place(tuple(corner))
            case _:
                raise FormatError(f"has no valid place in {_SHARDING}", path=path, tensor=name)
    is_shard = parse_shard_name(path.name) or any(any(place.corner) for place in places.values())
    return places if is_shard else {}


def _is_index(values: list[Any], shape: tuple[int, ...]) -> bool:
    """Whether values may be the index of the first element of a piece of that shape."""
    return len(values) == len(shape) and all(
        type(value) is int and 0 <= value < _LARGEST_INDEX for value in values
    )


def _steps(metadata: Mapping[str, str]) -> dict[str, int]:
    """The steps that the metadata record, of at most 18 digits: they fit 64 bits."""
    texts = {name: metadata.get(name, "") for name in STEP_NAMES}
    return {name: int(text) for name, text in texts.items() if _STEP.fullmatch(text)}


def _read_header(file: Part) -> bytes:
    if file.size < _LENGTH:
        raise FormatError(f"is not a safetensors file: {file.size} bytes", path=file.path)
    length = int.from_bytes(file.read(0, _LENGTH), "little")
    if length > min(_LONGEST_HEADER, file.size - _LENGTH):
        raise FormatError(
            f"header of {length} bytes in a file of {file.size}: truncated, or not a safetensors "
            "file",
            path=file.path,
        )
    header = file.read(_LENGTH, length)
    tensors = header.count(_OFFSETS)
    check_count(tensors, file.path)
    most = _LARGEST_METADATA + tensors * _LONGEST_ENTRY
    if length > most:
        message = f"its header has {length:,} bytes, and for {tensors:,} tensors at most {most:,}"
        raise FormatError(message, path=file.path, remedy="save it without so much metadata")
    if sum(map(header.count, _MARKS)) > _MOST_MARKS:
        raise FormatError("damaged header: more entries than any model has", path=file.path)
    return header


def _open_with_library(file: Part, header: bytes) -> Any:  # noqa: ANN401 - untyped there
    """Open the file with safetensors; for a remote file, a sparse local one with its header."""
    if not is_remote(file.path):
        return safe_open(file.path, "numpy")
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(len(header).to_bytes(_LENGTH, "little") + header)
        copy.truncate(file.size)
        copy.flush()
        return safe_open(copy.name, "numpy")


def _list_tensors(
    path: Path,
    library: Any,  # noqa: ANN401
    names: Iterable[str],
    offset: int,
) -> dict[str, Tensor]:
    """The tensors in the order of their bytes, of which the first is at `offset`."""
    tensors = []
    for name in names:
        entry = library.get_slice(name)
        code, shape = entry.get_dtype(), tuple(entry.get_shape())
        dtype = BY_CODE.get(code)
        if dtype is None:
            raise FormatError(
                f"is of {code}: elements smaller than a byte are not supported",
                path=path,
                tensor=name,
                remedy="average the checkpoints before they are quantised",
            )
        if not is_possible(shape, dtype.itemsize):
            problem = f"damaged header: no tensor of {code} has the shape {printable(shape)}"
            raise FormatError(problem, path=path, tensor=name)
        tensor = Tensor(dtype, shape, 0, offset)
        nbytes = tensor.nbytes
        tensors.append((offset, nbytes, name, tensor))  # no two have the same name
        offset += nbytes
    # The library gives empty tensors at the same place in random order.
    return {name: tensor for *_, name, tensor in sorted(tensors)}


def _explain(error: SafetensorError, header: bytes, file_size: int) -> str:
    """What is wrong with a file, with the sizes and the text that the library's messages lack."""
    reason = str(error).rpartition(" header: ")[2]
    text, is_json, column = reason.partition(" at line 1 column ")
    if is_json:
        before = header[: int(column)][-_CONTEXT:].decode(errors="replace")
        return f"damaged header: {printable(text)} at byte {column}: ...{printable(before)}"
    if not reason.startswith("incomplete metadata"):
        return f"damaged header: {printable(reason)}"
    end = _LENGTH + len(header) + max(map(int, _END.findall(header)), default=0)
    what = "truncated" if file_size < end else "followed by something else"
    return f"is {file_size} bytes long, not {end}: {what}"
