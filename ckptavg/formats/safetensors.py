"""Read `.safetensors`: a length, a JSON header, and the tensors' bytes without a gap.

https://huggingface.co/docs/safetensors/index#format. The header is validated here in full, as the
reference reader does, and equal keys, which it lets pass in silence, are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import FormatError
from ckptavg.tensors import BY_CODE, Tensor

if TYPE_CHECKING:
    from ckptavg.parts import File

SUFFIXES = (".safetensors",)
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the reference reader's limit
_METADATA = '{"__metadata__":'
_STEPS = ("global_step", "step", "epoch")

# Checkpoints of one run have the same header but for its metadata: the last one parsed is kept.
_parsed: tuple[str, dict[str, Tensor]] | None = None


def matches(file: File, head: bytes) -> bool:
    """Whether the file begins as a safetensors file does."""
    return head[_LENGTH : _LENGTH + 1] == b"{" or file.path.suffix in SUFFIXES


def open_checkpoint(file: File, key: str | None) -> Checkpoint:
    """Describe what a safetensors file holds.

    Raises:
        FormatError: the header breaks the format's rules, or the file was truncated.
    """
    if key is not None:
        raise FormatError(
            "holds one state dict, so there is no --key to take", path=file.path, tensor=key
        )
    header = _read_header(file)
    metadata, text = _split_metadata(file, header)
    file.start = _LENGTH + len(header)
    tensors = _tensors(file, text)
    return Checkpoint(
        path=file.path,
        container="safetensors",
        parts=(file,),
        tensors=tensors,
        metadata=metadata,
        digest=hashlib.sha256(header).hexdigest(),
        facts={name: int(metadata[name]) for name in _STEPS if _is_count(metadata.get(name, ""))},
    )


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19  # noqa: PLR2004 - fits 64 bits


def _read_header(file: File) -> bytes:
    if file.size < _LENGTH:
        raise FormatError(f"is no safetensors file: {file.size} bytes", path=file.path)
    length = int.from_bytes(file.read(0, _LENGTH), "little")
    if length > min(_LONGEST_HEADER, file.size - _LENGTH):
        raise FormatError(
            f"header of {length} bytes in a file of {file.size}: truncated, or no safetensors file",
            path=file.path,
        )
    return file.read(_LENGTH, length)


def _split_metadata(file: File, header: bytes) -> tuple[dict[str, str], str]:
    """The metadata, and the header's text without it where it stands first (as it does)."""
    try:
        text = header.decode()
        if not text.startswith(_METADATA):
            return _check_metadata(file, _parse(text).get("__metadata__", {})), text
        decoder = json.JSONDecoder(object_pairs_hook=_unique)
        metadata, end = decoder.raw_decode(text, len(_METADATA))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"damaged header: {error}", path=file.path) from error
    return _check_metadata(file, metadata), "{" + text[end:].removeprefix(",")


def _check_metadata(file: File, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise FormatError("damaged header: metadata must be strings", path=file.path)
    return metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same key twice")
    return found


def _parse(text: str) -> dict[str, Any]:
    found = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004 - a fault of the file, like the others
    return found


def _tensors(file: File, text: str) -> dict[str, Tensor]:
    """The header's tensors in the order of their bytes; the very same dict for the same text."""
    global _parsed  # noqa: PLW0603
    if _parsed is None or _parsed[0] != text:
        try:
            entries = _parse(text)
            entries.pop("__metadata__", None)
            tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
        except (ValueError, RecursionError) as error:
            raise FormatError(f"damaged header: {error}", path=file.path) from error
        in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
        _parsed = text, dict(in_order)
    tensors = _parsed[1]
    _check_extent(file, tensors)
    return tensors


def _tensor(name: str, entry: object) -> Tensor:
    """One entry of the header, checked; ValueError says what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r}: no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BY_CODE:
        raise ValueError(f"{name!r}: unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:  # noqa: PLR2004
        raise ValueError(f"{name!r}: shape and data_offsets must be whole numbers")
    tensor = Tensor(BY_CODE[dtype], tuple(shape), 0, offsets[0])
    if math.prod(shape) * tensor.dtype.bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{name!r}: {dtype} {shape} does not fill bytes {offsets}")
    return tensor


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _check_extent(file: File, tensors: dict[str, Tensor]) -> None:
    """The format has no gaps and no overlaps: each tensor begins where the last one ended."""
    end = 0
    for name, tensor in tensors.items():
        if tensor.offset != end:
            raise FormatError(
                f"damaged header: begins at byte {tensor.offset} of the data, not at {end}",
                path=file.path,
                tensor=name,
            )
        end += tensor.nbytes
    if file.start + end != file.size:
        what = "truncated" if file.size < file.start + end else "followed by something else"
        raise FormatError(
            f"is {file.size} bytes long, not {file.start + end}: {what}", path=file.path
        )
