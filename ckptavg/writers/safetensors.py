"""Lay out a `.safetensors` file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ckptavg.errors import OutputError
from ckptavg.layout import FileLayout, Layout, OutputTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000  # what the reference reader accepts


def lay_out_safetensors(
    path: Path, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> Layout:
    """Header first, then the tensors in the given order; tied ones are written once for each name.

    Raises:
        OutputError: the format has no such dtype or name, or the header grows too long.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    relative: list[tuple[int, ...]] = []
    end = 0
    for tensor in tensors:
        if tensor.dtype.code is None:
            raise OutputError(
                f"safetensors has no {tensor.dtype.name}",
                path=path,
                tensor=tensor.names[0],
                remedy="write a .pt",
            )
        starts = tuple(end + index * tensor.nbytes for index in range(len(tensor.names)))
        for name, start in zip(tensor.names, starts, strict=True):
            _check_name(path, name, header)
            header[name] = {
                "dtype": tensor.dtype.code,
                "shape": tensor.shape,
                "data_offsets": (start, start + tensor.nbytes),
            }
        relative.append(starts)
        end += len(starts) * tensor.nbytes
    head = _encode(header)
    if len(head) > _LONGEST_HEADER:
        raise OutputError(f"its header would be {len(head)} bytes long", path=path)
    targets = tuple(tuple(len(head) + start for start in starts) for starts in relative)
    return Layout({"": FileLayout(len(head) + end, ((0, head),))}, targets)


def _check_name(path: Path, name: str, taken: Mapping[str, object]) -> None:
    """A torch file can hold names that this format cannot: its own key, and what is no text."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise OutputError("its name is no text", path=path, tensor=name) from error
    if name in taken:
        raise OutputError("its name is taken in safetensors", path=path, tensor=name)


def _encode(header: Mapping[str, object]) -> bytes:
    """The length and the header, padded with spaces so that the tensors are aligned."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
