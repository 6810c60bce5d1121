"""Read `.safetensors`: a length, a JSON header, and the tensors' bytes without a gap.

https://huggingface.co/docs/safetensors/index#format. The header is validated here in full, as the
reference reader does; equal keys and unknown entries, which it lets pass in silence, are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from ckptavg.checkpoint import STEP_FACTS, Checkpoint
from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats.shapes import is_possible
from ckptavg.parts import open_source
from ckptavg.tensors import BY_CODE, Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.parts import ByteSource

SUFFIXES = (".safetensors",)
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the reference reader's limit
_METADATA = "__metadata__"
_SPACES = " \t\r\n"  # JSON's; writers pad the header with some
_FIRST_IS_METADATA = re.compile(r'[ \t\r\n]*\{[ \t\r\n]*"__metadata__"[ \t\r\n]*:[ \t\r\n]*')
_NEXT_ENTRY = re.compile(r'[ \t\r\n]*(,[ \t\r\n]*(?=")|(?=\}))')

# Checkpoints of one run have the same header but for its metadata: the last one parsed is kept.
_parsed: tuple[str, dict[str, Tensor], dict[str, str] | None] | None = None


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as a safetensors file does."""
    return bool(head) and (head[_LENGTH : _LENGTH + 1] == b"{" or path.suffix in SUFFIXES)


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Describe what a safetensors file holds.

    Raises:
        FormatError: the header breaks the format's rules, or the file was truncated.
    """
    if key is not None:
        raise SelectionError(f"no state dict {key!r} in it: it holds but one", path=path)
    file = open_source(path)
    header = _read_header(file)
    file.start = _LENGTH + len(header)
    try:
        leading, text = _split_metadata(header.decode())
        tensors, inner = _parse_once(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"damaged header: {printable(error)}", path=path) from error
    if leading is not None and inner is not None:
        raise FormatError("damaged header: metadata twice", path=path)
    _check_extent(file, tensors)
    metadata = leading or inner or {}
    return Checkpoint(
        path=path,
        container="safetensors",
        parts=(file,),
        tensors=tensors,
        metadata=metadata,
        digest=hashlib.sha256(header).hexdigest(),
        facts={
            name: int(metadata[name]) for name in STEP_FACTS if _is_count(metadata.get(name, ""))
        },
    )


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19  # noqa: PLR2004 - fits 64 bits


def _read_header(file: ByteSource) -> bytes:
    if file.size < _LENGTH:
        raise FormatError(f"is no safetensors file: {file.size} bytes", path=file.path)
    length = int.from_bytes(file.read(0, _LENGTH), "little")
    if length > min(_LONGEST_HEADER, file.size - _LENGTH):
        raise FormatError(
            f"header of {length} bytes in a file of {file.size}: truncated, or no safetensors file",
            path=file.path,
        )
    return file.read(_LENGTH, length)


def _split_metadata(text: str) -> tuple[dict[str, str] | None, str]:
    """The metadata, and the header's text without it, where it stands first (as it does)."""
    first = _FIRST_IS_METADATA.match(text)
    if first is None:
        return None, text.rstrip(_SPACES)
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    metadata, end = decoder.raw_decode(text, first.end())
    following = _NEXT_ENTRY.match(text, end)
    if following is None:
        raise ValueError("the metadata is not followed by an entry or the end")
    return _checked(metadata), "{" + text[following.end() :].rstrip(_SPACES)


def _checked(metadata: object) -> dict[str, str]:
    """The metadata, if it is strings to strings (or null); ValueError says what else it is."""
    pairs = {} if metadata is None else metadata
    if not isinstance(pairs, dict) or not all(isinstance(value, str) for value in pairs.values()):
        raise ValueError("metadata must be strings")
    for key, value in pairs.items():
        _check_unicode(key + value)
    return pairs


def _check_unicode(text: str) -> None:
    """JSON can spell half of a character pair, which is no text."""
    text.encode()


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


def _parse_once(text: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The header's tensors in the order of their bytes, and its metadata, if it has some.

    For the same text these are the very same objects; ValueError says what is wrong with it.
    """
    global _parsed  # noqa: PLW0603
    kept = _parsed
    if kept is None or kept[0] != text:
        entries = _parse(text)
        metadata = _checked(entries.pop(_METADATA)) if _METADATA in entries else None
        tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
        in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
        kept = _parsed = text, dict(in_order), metadata
    return kept[1:]


def _tensor(name: str, entry: object) -> Tensor:
    """One entry of the header, checked; ValueError says what is wrong with it."""
    _check_unicode(name)
    label = printable(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{label}: not with dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BY_CODE:
        raise ValueError(f"{label}: unknown dtype {printable(dtype)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:  # noqa: PLR2004
        raise ValueError(f"{label}: shape and data_offsets must be whole numbers")
    tensor = Tensor(BY_CODE[dtype], tuple(shape), 0, offsets[0])
    if not is_possible(tensor.shape, tensor.dtype.bits):
        raise ValueError(f"{label}: no tensor has the shape {printable(shape)}")
    if tensor.count * tensor.dtype.bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{label}: {dtype} {shape} does not fill bytes {offsets}")
    return tensor


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _check_extent(file: ByteSource, tensors: dict[str, Tensor]) -> None:
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
