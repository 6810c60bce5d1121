"""Read the JSON header of a `.safetensors` file into columns, some entries at a time.

What is wrong with a header is found before it can become many objects: those of 100 MB of brackets
would take gigabytes.
"""

from __future__ import annotations

import json
import math
import re
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.errors import printable
from ckptavg.formats.jsontext import unique
from ckptavg.formats.shapes import is_possible
from ckptavg.formats.table import Table
from ckptavg.formats.tensors import BY_CODE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptavg.formats.runs import Integers
    from ckptavg.formats.table import Kind

_METADATA = "__metadata__"
_MOST_PAIRS = 250_000
"""Of the metadata: more than the names of any model."""
_MOST_TENSORS = 500_000
"""A model of a trillion parameters has 200,000; so many take 200 MB."""
_SLICE = 256 << 10
"""Bytes of a header that become objects at a time: these stay in a core's cache."""
_LONGEST_ENTRY = 1 << 20
_TRIES = 4
"""Of places at which a slice may end: in a name there can be what looks like one."""

_KEYS = ("dtype", "shape", "data_offsets")
_COLONS = 4
"""Of an entry: behind its name, and behind each of its three keys."""

_OPENING = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*")
# Strings to strings, nothing nested, and no way of reading it twice.
_STRING = rb'"(?:[^"\\]|\\.)*+"[ \t\r\n]*+'
_LEADING = re.compile(
    rb'"__metadata__"[ \t\r\n]*:[ \t\r\n]*'
    rb"(null|\{[ \t\r\n]*+(?:%s:[ \t\r\n]*+%s(?:,[ \t\r\n]*+|(?=\})))*+\})"
    rb'[ \t\r\n]*(?:,[ \t\r\n]*(?=")|(?=\}))' % (_STRING, _STRING)
)

_Columns = tuple[list[str], "Integers", "Integers", "Integers"]
"""Names, numbers of their kinds, first bytes, bytes behind the last ones."""


def split_metadata(raw: bytes) -> tuple[dict[str, str] | None, int]:
    """The metadata, where they stand first (as they do), and where the tensors' entries begin.

    Raises:
        ValueError: says what is wrong with them.
    """
    opening = _OPENING.match(raw)
    if opening is None:
        raise ValueError("not an object")
    leading = _LEADING.match(raw, opening.end())
    if leading is None:
        return None, opening.end()
    if raw.count(b'"', *leading.span(1)) > 4 * _MOST_PAIRS:
        raise ValueError(f"metadata of more than {_MOST_PAIRS:,} entries")
    return _checked(json.loads(leading[1], object_pairs_hook=unique)), leading.end()


def parse(raw: bytes, start: int) -> tuple[dict[str, str] | None, Table]:
    """The metadata that stand elsewhere than first, and the tensors in the order of their bytes.

    Args:
        raw: the header without what pads it.
        start: where its first entry begins.

    Raises:
        ValueError: says what is wrong with it.
    """
    parser = _Parser()
    names: list[str] = []
    columns = []
    for text, entries in _slices(raw, start):
        found = parser.quickly(text, entries) or parser.entry_by_entry(text)
        names += found[0]
        if len(names) > _MOST_TENSORS:
            raise ValueError(f"more than {_MOST_TENSORS:,} tensors")
        columns.append(found[1:])
    if len(set(names)) != len(names):
        raise ValueError("the same key twice")
    numbers, begins, ends = map(np.concatenate, zip(*columns, strict=True))
    order = np.lexsort((ends, begins))
    if (order[1:] < order[:-1]).any():
        names = [names[index] for index in order.tolist()]
        begins, ends, numbers = begins[order], ends[order], numbers[order]
    # The format has no gaps and no overlaps: each tensor begins where the last one ended.
    before = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    for place in np.flatnonzero(begins != before)[:1].tolist():
        raise ValueError(
            f"{printable(names[place])}: begins at byte {begins[place]} of the data, not at "
            f"{before[place]}"
        )
    return parser.metadata, Table(names, parser.kinds, numbers, begins)


def _slices(raw: bytes, start: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Some entries at a time, as an object's text and as that object.

    Cut elsewhere than between two entries, a slice is no JSON: each name and each entry has its
    closing mark in the same slice as its opening one.
    """
    while start >= 0:
        cut = start
        for left in reversed(range(_TRIES)):
            cut = raw.find(b'},"', max(cut + 1, start + _SLICE))
            end = len(raw) if cut < 0 else cut + 1
            if end - start > _SLICE + _LONGEST_ENTRY:
                raise ValueError(f"an entry of more than {_LONGEST_ENTRY} bytes")
            text = "{" + raw[start:end].decode() + ("" if cut < 0 else "}")
            try:
                entries = json.loads(text)
                break
            except ValueError:
                if cut < 0 or not left:
                    raise
        yield text, entries
        start = -1 if cut < 0 else cut + 2


class _Parser:
    """Turns entries into columns.

    Attributes:
        kinds: all the dtypes with shapes that there are.
        metadata: if some stood among the entries.
    """

    def __init__(self) -> None:
        self.kinds: list[Kind] = []
        self.metadata: dict[str, str] | None = None
        self._numbers: dict[tuple[str, tuple[int, ...]], int] = {}
        self._sizes: list[int] = []

    def quickly(self, text: str, entries: dict[str, Any]) -> _Columns | None:
        """Column by column, without a step for each entry; None where something is unusual."""
        if "\\" in text or not entries:
            return None
        try:
            values = entries.values()
            dtypes, shapes, offsets = ([value[key] for value in values] for key in _KEYS)
            places = np.fromiter(chain.from_iterable(offsets), np.int64).reshape(-1, 2)
            named = list(zip(dtypes, map(tuple, shapes), strict=True))
            lists = {*map(type, shapes), *map(type, offsets)}
            whole = {*map(type, chain(*shapes)), *map(type, chain(*offsets))}
            unknown = dict.fromkeys(named).keys() - self._numbers.keys()
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return None
        # Each key of the text has a colon, so that with as many as there must be none comes twice.
        if (
            text.count(":") != _COLONS * len(entries)
            or {*map(len, values)} != {_COLONS - 1}
            or lists != {list}
            or whole != {int}
            or {*map(len, offsets)} != {2}
            or places.min() < 0
            or not all(_is_kind(dtype, shape) for dtype, shape in unknown)
        ):
            return None
        numbers = np.array([self._number(*kind) for kind in named], np.int32)
        begins, ends = places.T
        if (ends - begins != np.array(self._sizes, np.int64)[numbers]).any():
            return None
        return list(entries), numbers, begins, ends

    def entry_by_entry(self, text: str) -> _Columns:
        """The same; ValueError says which entry is wrong."""
        entries = _as_object(json.loads(text, object_pairs_hook=unique))
        if _METADATA in entries:
            if self.metadata is not None:
                raise ValueError("metadata twice")
            self.metadata = _checked(entries.pop(_METADATA))
        checked = [_checked_entry(name, entry) for name, entry in entries.items()]
        return (
            list(entries),
            np.array([self._number(dtype, shape) for dtype, shape, _ in checked], np.int32),
            np.array([begin for _, _, (begin, _) in checked], np.int64),
            np.array([end for _, _, (_, end) in checked], np.int64),
        )

    def _number(self, dtype: str, shape: tuple[int, ...]) -> int:
        kind = dtype, shape
        if kind not in self._numbers:
            self._numbers[kind] = len(self.kinds)
            self.kinds.append((BY_CODE[dtype], shape))
            self._sizes.append(BY_CODE[dtype].nbytes(math.prod(shape)))
        return self._numbers[kind]


def _is_kind(dtype: object, shape: tuple[int, ...]) -> bool:
    """Whether there can be such a tensor, of whole bytes."""
    if not isinstance(dtype, str) or dtype not in BY_CODE or min(shape, default=0) < 0:
        return False
    bits = BY_CODE[dtype].bits
    return is_possible(shape, bits) and not math.prod(shape) * bits % 8


def _checked_entry(name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and offsets of one entry; ValueError says what is wrong with it."""
    _check_unicode(name)
    label = printable(name)
    if not isinstance(entry, dict) or set(entry) != set(_KEYS):
        raise ValueError(f"{label}: not with dtype, shape and data_offsets alone")
    dtype, shape, offsets = (entry[key] for key in _KEYS)
    if not isinstance(dtype, str) or dtype not in BY_CODE:
        raise ValueError(f"{label}: unknown dtype {printable(dtype)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:  # noqa: PLR2004
        raise ValueError(f"{label}: shape and data_offsets must be whole numbers")
    bits = BY_CODE[dtype].bits
    if not is_possible(tuple(shape), bits):
        raise ValueError(f"{label}: no tensor has the shape {printable(shape)}")
    if math.prod(shape) * bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{label}: {dtype} {printable(shape)} does not fill bytes {offsets}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


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


def _as_object(found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004 - a fault of the file, like the others
    return found
