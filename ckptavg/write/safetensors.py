"""Lay out a `.safetensors` file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ckptavg.errors import OutputError
from ckptavg.merge.layout import FileLayout, Layout, OutputTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from ckptavg.formats.tensors import DType

_LENGTH = 8
_ALIGNMENT = 8
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_LONGEST_HEADER = 100_000_000  # what the reference reader accepts


def lay_out_safetensors(
    path: Path, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> Layout:
    """Header first, then the tensors in the given order; tied ones are written once for each name.

    Raises:
        OutputError: the format has no such dtype or name, or the header grows too long.
    """
    entries = [f'"__metadata__":{_to_json(dict(sorted(metadata.items())))}']
    taken = {"__metadata__"}
    kinds: dict[tuple[DType, tuple[int, ...]], str] = {}
    relative: list[list[int]] = []
    end = 0
    for tensor in tensors:
        kind = kinds.get((tensor.dtype, tensor.shape))
        if kind is None:
            kind = kinds[tensor.dtype, tensor.shape] = _encode_kind(path, tensor)
        starts = []
        for name in tensor.names:
            _check_name(path, name, taken)
            taken.add(name)
            starts.append(end)
            # A hundred thousand of them are written twice as fast as json writes dictionaries.
            entries.append(f"{_to_json(name)}:{kind}[{end},{(end := end + tensor.nbytes)}]}}")
        relative.append(starts)
    text = f"{{{','.join(entries)}}}".encode()
    del entries
    padding = b" " * (-len(text) % _ALIGNMENT)
    length = len(text) + len(padding)
    if length > _LONGEST_HEADER:
        raise OutputError(f"its header would be {length} bytes long", path=path)
    begin = _LENGTH + length
    blobs = (
        (0, length.to_bytes(_LENGTH, "little")),
        (_LENGTH, text),
        (begin - len(padding), padding),
    )
    targets = tuple(tuple([begin + start for start in starts]) for starts in relative)
    return Layout({"": FileLayout(begin + end, blobs)}, targets)


def _encode_kind(path: Path, tensor: OutputTensor) -> str:
    """An entry's text up to the offsets."""
    if tensor.dtype.code is None:
        raise OutputError(
            f"safetensors has no {tensor.dtype.name}",
            path=path,
            tensor=tensor.names[0],
            remedy="write a .pt",
        )
    shape = ",".join(map(str, tensor.shape))
    return f'{{"dtype":"{tensor.dtype.code}","shape":[{shape}],"data_offsets":'


def _check_name(path: Path, name: str, taken: AbstractSet[str]) -> None:
    """A torch file can hold names that this format cannot: its own key, and what is no text."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise OutputError("its name is no text", path=path, tensor=name) from error
    if name in taken:
        raise OutputError("its name is taken in safetensors", path=path, tensor=name)
