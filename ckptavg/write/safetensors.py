"""Lay out a `.safetensors` file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ckptavg.errors import OutputError
from ckptavg.merge.jobs import FileLayout, Layout, OutputTensor

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

_LENGTH = 8
_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000  # what the reference reader accepts


def lay_out_safetensors(
    path: Path, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> Layout:
    """Lay out the header, and behind it the tensors in the given order.

    Tied tensors are written once for each name, as the format knows no ties.

    Raises:
        OutputError: the format has no such dtype or name, or the header grows too long.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    size = 0
    for tensor in tensors:
        for name in tensor.names:
            _check(path, name, tensor, header)
            header[name] = {
                "dtype": tensor.dtype.code,
                "shape": tensor.shape,
                "data_offsets": (size, size + tensor.nbytes),
            }
            size += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _LONGEST_HEADER:
        raise OutputError(f"its header would be {len(text)} bytes long", path=path)
    begin = _LENGTH + len(text)
    file = FileLayout(begin + size, ((0, len(text).to_bytes(_LENGTH, "little") + text),))
    targets = []
    for tensor in tensors:
        targets.append(tuple(begin + number * tensor.nbytes for number in range(len(tensor.names))))
        begin += tensor.nbytes * len(tensor.names)
    return Layout(path, {"": file}, tuple(targets))


def _check(path: Path, name: str, tensor: OutputTensor, taken: Container[str]) -> None:
    """Refuse what torch files can hold and safetensors cannot."""
    if tensor.dtype.code is None:
        message, remedy = f"safetensors has no {tensor.dtype.name}", "write a .pt"
        raise OutputError(message, path=path, tensor=name, remedy=remedy)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise OutputError("its name is not text", path=path, tensor=name) from error
    if name in taken:
        raise OutputError("its name is reserved in safetensors", path=path, tensor=name)
