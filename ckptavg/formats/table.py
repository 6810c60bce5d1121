"""Tensors of a file that are described by columns: a hundred thousand of them are not objects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.formats.tensors import DType, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from ckptavg.formats.runs import Integers

Kind = tuple[DType, tuple[int, ...]]
"""Dtype and shape."""


class Table(Mapping[str, Tensor]):
    """Contiguous tensors of one file, by name.

    Args:
        names: in the order of the bytes.
        kinds: all the dtypes with shapes that there are.
        numbers: which of those each tensor has, `[num_tensors]`.
        offsets: of their first bytes, `[num_tensors]`.
    """

    def __init__(
        self,
        names: Sequence[str],
        kinds: Sequence[Kind],
        numbers: Integers,
        offsets: npt.NDArray[np.int64],
    ) -> None:
        self._names, self._kinds, self._numbers, self._offsets = names, kinds, numbers, offsets

    @property
    def end(self) -> int:
        """Where the last tensor ends, in bytes; 0 if there is none."""
        if not self._names:
            return 0
        dtype, shape = self._kinds[int(self._numbers[-1])]
        return int(self._offsets[-1]) + dtype.nbytes(math.prod(shape))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _tensors(self) -> list[Tensor]:
        kinds = map(self._kinds.__getitem__, self._numbers.tolist())
        return [
            Tensor(dtype, shape, 0, offset)
            for (dtype, shape), offset in zip(kinds, self._offsets.tolist(), strict=True)
        ]

    @cached_property
    def _places(self) -> dict[str, int]:
        return dict(zip(self._names, range(len(self._names)), strict=True))

    def offsets_like(self, other: Table) -> npt.NDArray[np.int64] | None:
        """The offsets in the order of another's names; None if the tensors are not alike."""
        if len(other) != len(self):
            return None
        try:
            places = np.array(list(map(self._places.__getitem__, other)), np.int64)
        except KeyError:
            return None
        known = {kind: number for number, kind in enumerate(other._kinds)}
        theirs = np.array([known.get(kind, -1) for kind in self._kinds], np.int64)
        if (theirs[self._numbers[places]] != other._numbers).any():
            return None
        return self._offsets[places]
