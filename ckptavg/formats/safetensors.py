"""Read `.safetensors`: a length, a JSON header, and the tensors' bytes without a gap.

https://huggingface.co/docs/safetensors/index#format. The header is validated here in full, as the
reference reader does; equal keys and unknown entries, which it lets pass in silence, are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import weakref
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.checkpoint import STEP_FACTS, Checkpoint
from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats.shapes import is_possible
from ckptavg.parts import open_source
from ckptavg.table import Table
from ckptavg.tensors import BY_CODE, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ckptavg.parts import ByteSource
    from ckptavg.runs import Integers

SUFFIXES = (".safetensors",)
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the reference reader's limit
_METADATA = "__metadata__"
_SPACES = " \t\r\n"  # JSON's; writers pad the header with some
_FIRST_IS_METADATA = re.compile(r'[ \t\r\n]*\{[ \t\r\n]*"__metadata__"[ \t\r\n]*:[ \t\r\n]*')
_NEXT_ENTRY = re.compile(r'[ \t\r\n]*(,[ \t\r\n]*(?=")|(?=\}))')


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


def _split_metadata(text: str) -> tuple[dict[str, str] | None, str]:
    """The metadata, and the header's text without it, where it stands first (as it does)."""
    first = _FIRST_IS_METADATA.match(text)
    if first is None:
        return None, text
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    metadata, end = decoder.raw_decode(text, first.end())
    following = _NEXT_ENTRY.match(text, end)
    if following is None:
        raise ValueError("the metadata is not followed by an entry or the end")
    return _checked(metadata), "{" + text[following.end() :]


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


_STAND_IN = '"":0}'


def _read(file: ByteSource) -> tuple[str, dict[str, str], Table]:
    """The header's digest, the metadata, and the tensors: the very same for the same text.

    What is no longer needed goes at once: a header of 100,000 tensors has 10 MB.

    Raises:
        ValueError: says what is wrong with it.
    """
    global _last  # noqa: PLW0603
    raw = _read_header(file)
    file.start = _LENGTH + len(raw)
    digest = hashlib.sha256(raw).hexdigest()
    raw = raw.rstrip(_SPACES.encode())
    if _last is not None and raw.endswith(_last[0]) and (known := _last[1]()) is not None:
        with contextlib.suppress(ValueError):
            leading, rest = _split_metadata(raw[: -len(_last[0])].decode() + _STAND_IN)
            if rest == "{" + _STAND_IN:
                return digest, leading or {}, known
        del known
    _last = None
    text = raw.decode()
    del raw
    leading, text = _split_metadata(text)
    tensors = _parse_columns(text)
    if tensors is not None:
        _last = text[1:].encode(), weakref.ref(tensors, _forget)
        return digest, leading or {}, tensors
    metadata, tensors = _parse_entries(text)
    if leading is not None and metadata is not None:
        raise ValueError("metadata twice")
    return digest, leading or metadata or {}, tensors


def _forget(gone: weakref.ref[Table]) -> None:
    global _last  # noqa: PLW0603
    if _last is not None and _last[1] is gone:
        _last = None


def _parse_entries(text: str) -> tuple[dict[str, str] | None, Table]:
    """The metadata and the tensors, entry by entry; ValueError says which one is wrong."""
    entries = _parse(text)
    metadata = _checked(entries.pop(_METADATA)) if _METADATA in entries else None
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = 0
    for name, tensor in in_order:
        if tensor.offset != end:
            raise ValueError(
                f"{printable(name)}: begins at byte {tensor.offset} of the data, not at {end}"
            )
        end += tensor.nbytes
    return metadata, Table.of(dict(in_order))


_KEYS = ("dtype", "shape", "data_offsets")
_COLONS = 4
"""Of an entry: behind its name, and behind each of its three keys."""

_SLICE = 256 << 10
"""Characters of a header that become objects at a time: these stay in a core's cache."""

_Kinds = dict[tuple[Any, tuple[Any, ...]], int]


def _parse_columns(text: str) -> Table | None:
    """The tensors, if nothing is wrong with them: column by column, without a step for each entry.

    Returns:
        None where something is unusual: what it is, `_parse_entries` finds out.
    """
    if "\\" in text:
        return None
    names: list[str] = []
    kinds: _Kinds = {}
    columns = []
    try:
        for piece in _slices(text):
            found = _columns(piece, kinds)
            if found is None:
                return None
            names += found[0]
            columns.append(found[1:])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    if len(set(names)) != len(names) or not all(_is_kind(dtype, shape) for dtype, shape in kinds):
        return None
    numbers, begins, ends = map(np.concatenate, zip(*columns, strict=True))
    known = [(BY_CODE[dtype], shape) for dtype, shape in kinds]
    sizes = np.array([dtype.nbytes(math.prod(shape)) for dtype, shape in known], np.int64)
    order = np.lexsort((ends, begins))
    if (order[1:] < order[:-1]).any():  # empty tensors begin where others do
        names = [names[index] for index in order.tolist()]
    begins, ends, numbers = begins[order], ends[order], numbers[order]
    # The format has no gaps and no overlaps: each tensor begins where the last one ended.
    if begins[0] or (ends - begins != sizes[numbers]).any() or (begins[1:] != ends[:-1]).any():
        return None
    return Table(names, known, numbers, begins)


def _slices(text: str) -> Iterator[str]:
    """The header as several, of some entries each.

    Cut elsewhere than between two entries, a slice is no JSON: without escapes, each name and each
    entry has its closing mark in the same slice as its opening one.
    """
    start, opening = 0, ""
    while (cut := text.find('},"', start + _SLICE)) >= 0:
        yield opening + text[start : cut + 1] + "}"
        start, opening = cut + 2, "{"
    yield opening + text[start:]


def _columns(text: str, kinds: _Kinds) -> tuple[list[str], Integers, Integers, Integers] | None:
    """Names, numbers of their kinds, first and last bytes; None where something is unusual."""
    entries = json.loads(text)
    values = entries.values()
    dtypes, shapes, offsets = ([value[key] for value in values] for key in _KEYS)
    places = np.fromiter(chain.from_iterable(offsets), np.int64).reshape(-1, 2)
    named = zip(dtypes, map(tuple, shapes), strict=True)
    numbers = np.array([kinds.setdefault(kind, len(kinds)) for kind in named], np.int32)
    lists = {*map(type, shapes), *map(type, offsets)}
    whole = {*map(type, chain.from_iterable(shapes)), *map(type, chain.from_iterable(offsets))}
    # Each key of the text has a colon, so that with as many as there must be none comes twice.
    if (
        text.count(":") != _COLONS * len(entries)
        or {*map(len, values)} != {_COLONS - 1}
        or lists != {list}
        or whole != {int}
        or {*map(len, offsets)} != {2}
        or places.min() < 0
    ):
        return None
    return list(entries), numbers, places[:, 0], places[:, 1]


def _is_kind(dtype: object, shape: tuple[int, ...]) -> bool:
    """Whether there can be such a tensor, of whole bytes."""
    if not isinstance(dtype, str) or dtype not in BY_CODE or min(shape, default=0) < 0:
        return False
    bits = BY_CODE[dtype].bits
    return is_possible(shape, bits) and not math.prod(shape) * bits % 8


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


def _check_size(file: ByteSource, end: int) -> None:
    """The file ends with the last tensor."""
    if file.start + end != file.size:
        what = "truncated" if file.size < file.start + end else "followed by something else"
        raise FormatError(
            f"is {file.size} bytes long, not {file.start + end}: {what}", path=file.path
        )
