"""Changes to an input that leave what surrounds them whole, so that they get far into a reader.

Each takes an input, the most bytes that it may become, a source of chances, and libFuzzer's own
way of changing bytes.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import random
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

from tests.fuzz.containers import (
    Record,
    legacy_of,
    packed,
    safetensors_of,
    safetensors_pieces,
    unpacked,
    zip64_extra,
    zip_of,
    zip_records,
)
from tests.fuzz.words import CODES, PICKLE_WORDS

Mutate = Callable[[bytes, int], bytes]
Mutator = Callable[[bytes, int, random.Random, Mutate], bytes]

_PLAINLY = 0.1
_MOST_BODY = 1 << 12
_NUMBERS = (pickle.BININT1, pickle.BININT2, pickle.BININT, pickle.LONG1)
_ODD: tuple[Any, ...] = (
    *(
        0,
        1,
        2,
        3,
        8,
        -1,
        2**31,
        2**32 - 1,
        2**61,
        2**62,
        2**63 - 1,
        2**64,
        10**30,
        1.5,
        -0.0,
        1e400,
    ),
    *(float("nan"), None, True, False, "", "\0", "\ud800", "..", "/", "F4", "../x", [], {}, [[]]),
)


def safetensors(data: bytes, most: int, chances: random.Random, mutate: Mutate) -> bytes:
    """Change the header, and mostly make its length and the file's right."""
    if chances.random() < _PLAINLY:
        return mutate(data, most)
    header, body = safetensors_pieces(data)
    header = _json(header, max(1, most - 8), chances, mutate)
    if chances.random() < 0.9:
        body = bytes(_end(header, len(body)))
    return safetensors_of(header, body)


def _end(header: bytes, otherwise: int) -> int:
    """Where the last tensor ends, if the header tells and it is near."""
    try:
        entries = json.loads(header)
        end = max(int(entry["data_offsets"][1]) for entry in entries.values() if "dtype" in entry)
    except Exception:  # noqa: BLE001 - whatever the header is
        return otherwise
    return end if 0 <= end < _MOST_BODY else otherwise


def _json(text: bytes, most: int, chances: random.Random, mutate: Mutate) -> bytes:
    """Change some value of it, or its bytes."""
    if chances.random() < 0.5:
        try:
            value = _edited(json.loads(text), chances)
            return json.dumps(value, ensure_ascii=chances.random() < 0.5).encode(
                "utf-8", "surrogatepass"
            )[:most]
        except (ValueError, RecursionError):
            pass
    return mutate(text, most)


def _edited(value: Any, chances: random.Random) -> Any:
    """A value like it, changed in one place."""
    if value and chances.random() < 0.8:
        if isinstance(value, dict):
            return _edited_dict(value, chances)
        if isinstance(value, list):
            return _edited_list(value, chances)
    if type(value) is int and chances.random() < 0.6:
        return value + chances.choice([-8, -4, -1, 1, 4, 8])
    if isinstance(value, str) and chances.random() < 0.5:
        return chances.choice([*CODES, value[:-1], value + "\x1b[31m", value * 100])
    return chances.choice(_ODD)


def _edited_dict(value: dict[str, Any], chances: random.Random) -> dict[str, Any]:
    key = chances.choice(list(value))
    match chances.randrange(8):
        case 0:
            return {name: item for name, item in value.items() if name != key}
        case 1:
            other = chances.choice([key + "x", "", "\ud800", "__metadata__", key * 100])
            return value | {other: value[key]}
        case 2:
            return {name: value[name] for name in chances.sample(list(value), len(value))}
    return value | {key: _edited(value[key], chances)}


def _edited_list(value: list[Any], chances: random.Random) -> list[Any]:
    place = chances.randrange(len(value))
    match chances.randrange(6):
        case 0:
            return value[:place] + value[place + 1 :]
        case 1:
            return [*value, value[place]]
    return [*value[:place], _edited(value[place], chances), *value[place + 1 :]]


def pickled(data: bytes, most: int, chances: random.Random, mutate: Mutate) -> bytes:
    """Change its opcodes as wholes, or its bytes."""
    opcodes = _opcodes(data) if chances.random() < 0.5 else []
    if not opcodes:
        return mutate(data, most)
    for _ in range(chances.choice([1, 1, 2, 4])):
        _shuffle(opcodes, chances)
    return b"".join(opcodes)[:most]


def _opcodes(data: bytes) -> list[bytes]:
    """The opcodes with their arguments; none where the pickle is damaged."""
    try:
        starts = [place or 0 for _, _, place in pickletools.genops(data)]
    except Exception:  # noqa: BLE001 - whatever bytes can make it trip over
        return []
    return [data[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _shuffle(opcodes: list[bytes], chances: random.Random) -> None:
    if not opcodes:
        return
    place, other = chances.randrange(len(opcodes)), chances.randrange(len(opcodes))
    numbers = [at for at, opcode in enumerate(opcodes) if opcode[:1] in _NUMBERS]
    match chances.randrange(8):
        case 6 | 7 if numbers:
            number = chances.choice([one for one in _ODD if type(one) is int])
            opcodes[chances.choice(numbers)] = pickle.dumps(number, 2)[2:-1]
        case 0:
            del opcodes[place]
        case 1:
            opcodes.insert(place, opcodes[other])
        case 2:
            opcodes[place] = opcodes[other]
        case 3:
            opcodes[place:place] = opcodes[other : other + chances.randrange(1, 12)]
        case 4:
            opcodes[place] = chances.choice(PICKLE_WORDS)
        case _:
            opcodes.insert(place, chances.choice(PICKLE_WORDS))


def torch_zip(data: bytes, most: int, chances: random.Random, mutate: Mutate) -> bytes:
    """Change a record or what the directory says of it, and zip them anew."""
    if chances.random() < _PLAINLY:
        return mutate(data, most)
    try:
        records = zip_records(data)
        place = chances.randrange(len(records))
    except Exception:  # noqa: BLE001 - whatever the zip is
        return mutate(data, most)
    if chances.random() < 0.5:
        place = next((n for n, one in enumerate(records) if one.name.endswith(b".pkl")), place)
    record = records[place]
    match chances.randrange(12):
        case 0:
            records[place : place + 1] = []
        case 1:
            records.append(record)
        case 2:
            records[place] = replace(record, name=mutate(record.name or b"x", 200))
        case 3 | 4 | 5:
            records[place] = _mislaid(record, len(data), chances)
        case 6:
            records[place] = replace(record, data=mutate(record.data or b"\0", 1000))
        case _:
            inner = pickled(record.data or b"N.", most, chances, mutate)
            records[place] = replace(record, data=inner)
    return zip_of(records)[:most]


def _mislaid(record: Record, length: int, chances: random.Random) -> Record:
    """The same, with something else in the directory."""
    odd = chances.choice([0, 1, 64, length - 40, 2**31, 2**32 - 1])
    match chances.randrange(5):
        case 0:
            return replace(record, size=odd)
        case 1:
            return replace(record, offset=odd)
        case 2:
            return replace(record, method=chances.choice([8, 12, 99]))
        case 3:
            return replace(record, flags=1 << chances.randrange(16))
    extra = zip64_extra(chances.choice([odd, 2**63, 2**64 - 1]), odd)
    return replace(record, size=2**32 - 1, offset=2**32 - 1, extra=extra)


def legacy(data: bytes, most: int, chances: random.Random, mutate: Mutate) -> bytes:
    """Change the pickle of the state dict, and mostly lay out the storages that it then names."""
    try:
        pieces = _pickles(data)
    except Exception:  # noqa: BLE001 - whatever the file is
        return mutate(data, most)
    if chances.random() < 2 * _PLAINLY:
        place = chances.randrange(len(pieces))
        pieces[place] = pickled(pieces[place] or b"N.", most, chances, mutate)
        return b"".join(pieces)[:most]
    return legacy_of(pickled(pieces[3], most, chances, mutate), _MOST_BODY)[:most]


def _pickles(data: bytes) -> list[bytes]:
    """The five pickles, and what follows them."""
    stream, pieces = BytesIO(data), []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        pieces.append(data[start : stream.tell()])
    return [*pieces, data[stream.tell() :]]


def _of_two(mutator: Mutator) -> Mutator:
    """Change one of two files with the mutator of its kind."""

    def changed(data: bytes, most: int, chances: random.Random, mutate: Mutate) -> bytes:
        files = unpacked(data, 2)
        place = chances.randrange(2)
        room = max(1, most - 2 - len(files[1 - place]))
        files[place] = mutator(files[place] or b"N.", room, chances, mutate)[:0xFFFF]
        return packed(*files)[:most]

    return changed


def dcp(data: bytes, most: int, chances: random.Random, mutate: Mutate) -> bytes:
    """Change one of the two files, which mostly is the metadata."""
    metadata, shard = unpacked(data, 2)
    if chances.random() < 0.7:
        metadata = pickled(metadata or b"N.", max(1, most - len(shard)), chances, mutate)
    elif shard:
        shard = _same_length(shard, chances, mutate)
    return packed(metadata[:0xFFFF], shard)[:most]


def _same_length(data: bytes, chances: random.Random, mutate: Mutate) -> bytes:
    """Change a few bytes and leave the others in their places, where the metadata has them."""
    place = chances.randrange(len(data))
    piece = mutate(data[place : place + 16], 16)[: len(data) - place]
    return data[:place] + piece + data[place + len(piece) :]


def index(data: bytes, most: int, chances: random.Random, mutate: Mutate) -> bytes:
    """Change one of the files."""
    pieces = data.split(b"\0", 3)
    place = chances.randrange(len(pieces))
    changed = pickled if place == 3 else _json
    pieces[place] = changed(pieces[place] or b"{}", most, chances, mutate)
    return b"\0".join(pieces)[:most]


MUTATORS: dict[str, Mutator] = {
    "safetensors": safetensors,
    "zip": torch_zip,
    "pickle": pickled,
    "legacy": legacy,
    "shards": _of_two(safetensors),
    "ranks": _of_two(pickled),
    "zero": _of_two(pickled),
    "dcp": dcp,
    "index": index,
}
