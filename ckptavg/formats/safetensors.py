"""Read `.safetensors`: a length, a JSON header, and the tensors' bytes without a gap.

https://huggingface.co/docs/safetensors/index#format. The header is validated here in full, as the
reference reader does; equal keys and unknown entries, which it lets pass in silence, are refused.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats.checkpoint import STEP_FACTS, Checkpoint
from ckptavg.formats.parts import open_source
from ckptavg.formats.safetensorsheader import parse, split_metadata

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.formats.parts import ByteSource
    from ckptavg.formats.table import Table

SUFFIXES = (".safetensors",)
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the reference reader's limit
_SPACES = b" \t\r\n"  # JSON's; writers pad the header with some

# Checkpoints of one run have the same header but for its metadata: of the last one, as long as a
# checkpoint has its tensors, the bytes that follow the metadata.
_last: tuple[bytes, weakref.ref[Table]] | None = None


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
    try:
        digest, metadata, tensors = _read(file)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"damaged header: {printable(error)}", path=path) from error
    _check_size(file, tensors.end)
    return Checkpoint(
        path=path,
        container="safetensors",
        parts=(file,),
        tensors=tensors,
        metadata=metadata,
        digest=digest,
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


def _read(file: ByteSource) -> tuple[str, dict[str, str], Table]:
    """The header's digest, the metadata, and the tensors: the very same for the same text.

    Raises:
        ValueError: says what is wrong with it.
    """
    global _last  # noqa: PLW0603
    raw = _read_header(file)
    file.start = _LENGTH + len(raw)
    digest = hashlib.sha256(raw).hexdigest()
    raw = raw.rstrip(_SPACES)
    leading, start = split_metadata(raw)
    if _last is not None and (tensors := _last[1]()) is not None:
        if len(_last[0]) == len(raw) - start and raw.endswith(_last[0]):
            return digest, leading or {}, tensors
        del tensors
    _last = None
    metadata, tensors = parse(raw, start)
    if metadata is None:
        _last = raw[start:], weakref.ref(tensors, _forget)
    elif leading is not None:
        raise ValueError("metadata twice")
    return digest, leading or metadata or {}, tensors


def _forget(gone: weakref.ref[Table]) -> None:
    global _last  # noqa: PLW0603
    if _last is not None and _last[1] is gone:
        _last = None


def _check_size(file: ByteSource, end: int) -> None:
    """The file ends with the last tensor."""
    if file.start + end != file.size:
        what = "truncated" if file.size < file.start + end else "followed by something else"
        raise FormatError(
            f"is {file.size} bytes long, not {file.start + end}: {what}", path=file.path
        )
