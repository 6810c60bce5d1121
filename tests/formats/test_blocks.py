"""Tensors in pieces, against numpy."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.formats.blocks import Blocks, Box, Pieces, Region, misfit
from ckptavg.formats.parts import Memory, check_unchanged
from ckptavg.formats.tensors import BY_NAME, AnyArray, Tensor

HERE = Path("checkpoint")
# Of 1, 2, 4, 8 and 16 bytes, ml_dtypes' among them.
DTYPES = ("bool", "bfloat16", "float32", "int64", "complex128")


class Counted(Memory):
    """Memory that counts what is read of it."""

    bytes_read = 0

    def read_into(self, offset: int, out: memoryview) -> None:
        self.bytes_read += len(out)
        assert offset + len(out) <= len(self.data)
        super().read_into(offset, out)


def stored(source: Memory, whole: AnyArray, region: Region, order: tuple[int, ...] | None) -> Box:
    """Put a piece into a file, its axes in some order in memory; C order for None."""
    corner, sizes = region
    place = tuple(slice(first, first + size) for first, size in zip(corner, sizes, strict=True))
    piece = whole[place] if place else whole  # whose only element would be no array
    source.data += b"\xa5" * 3  # nothing is aligned
    offset, dtype = len(source.data), BY_NAME[whole.dtype.name]
    if order is None:
        source.data += piece.tobytes()
        return Box(source, corner, Tensor(dtype, sizes, 0, offset))
    source.data += piece.transpose(order).tobytes()
    strides = [0] * whole.ndim
    for position, axis in enumerate(order):
        strides[axis] = math.prod(sizes[other] for other in order[position + 1 :])
    return Box(source, corner, Tensor(dtype, sizes, 0, offset, tuple(strides)))


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Cut a tensor in two again and again, along any axis."""
    found: list[Region] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        number = draw(st.integers(0, len(found) - 1))
        axis = draw(st.integers(0, len(shape) - 1))
        corner, sizes = found[number]
        if sizes[axis] < 2:
            continue
        cut = draw(st.integers(1, sizes[axis] - 1))
        found.pop(number)
        for first, size in ((0, cut), (cut, sizes[axis] - cut)):
            found.append(
                (
                    (*corner[:axis], corner[axis] + first, *corner[axis + 1 :]),
                    (*sizes[:axis], size, *sizes[axis + 1 :]),
                )
            )
    return draw(st.permutations(found))


@st.composite
def tensors(draw: st.DrawFn, source: Memory, *, strided: bool) -> tuple[Pieces, AnyArray]:
    """A tensor in pieces, and the same as an array."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    if draw(st.integers(0, 9)) == 0:
        shape = (*shape, 0)
    dtype = BY_NAME[draw(st.sampled_from(DTYPES))]
    seed = draw(st.integers(0, 1000))
    data = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    whole = np.frombuffer(data, dtype.numpy).reshape(shape)
    cut = draw(regions(shape)) if whole.size else []
    assert misfit(shape, cut) is None
    orders = st.permutations(range(len(shape))).map(tuple)
    boxes = [
        stored(source, whole, region, draw(st.none() | orders) if strided else None)
        for region in cut
    ]
    return Pieces(dtype, shape, boxes), whole


@pytest.mark.parametrize("strided", [False, True])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_range_is_what_numpy_has_there(strided, data):
    source = Counted(HERE, bytearray())
    made = data.draw(st.lists(tensors(source, strided=strided), min_size=1, max_size=4))
    blocks = Blocks(HERE, [pieces for pieces, _ in made])
    expected = b"".join(whole.tobytes() for _, whole in made)
    for _ in range(3):
        first = data.draw(st.integers(0, len(expected)))
        last = data.draw(st.integers(first, len(expected)))
        out = bytearray(last - first)
        source.bytes_read = 0
        blocks.read_into(first, memoryview(out))
        assert bytes(out) == expected[first:last]
        # No byte is read twice, and of contiguous pieces none that is not wanted.
        assert strided or source.bytes_read == last - first


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_piece_too_many_or_too_few_does_not_fit(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    found = data.draw(regions(shape))
    number = data.draw(st.integers(0, len(found) - 1))
    missing = misfit(shape, found[:number] + found[number + 1 :])
    assert missing is not None
    assert "lacks" in missing.message
    twice = misfit(shape, [*found, found[number]])
    assert twice is not None
    assert "overlapping" in twice.message
    assert twice.number == len(found)


def test_pieces_outside_the_tensor_or_of_other_dimensions_do_not_fit():
    assert "outside" in str(misfit((4, 4), [((0, 1), (4, 4))]))
    assert "outside" in str(misfit((4, 4), [((0,), (4,))]))
    assert "overlapping" in str(misfit((), [((), ()), ((), ())]))
    assert misfit((), [((), ())]) is None
    assert misfit((3, 0), []) is None


def test_a_gap_and_an_overlap_of_one_size_do_not_cancel():
    assert "overlapping" in str(misfit((4,), [((0,), (2,)), ((1,), (2,))]))


def test_thousands_of_pieces_are_compared_in_little_time():
    rows = [((number,), (1,)) for number in range(20_000)]
    assert misfit((20_000,), rows) is None
    grid = [((row, column), (1, 1)) for row in range(80) for column in range(80)]
    assert misfit((80, 80), grid) is None
    # Bars along both axes: made to be compared each with each.
    bars = [((0, number), (8_000, 1)) for number in range(8_000)]
    posts = [((number, 8_000), (1, 8_000)) for number in range(8_000)]
    assert "entangled" in str(misfit((8_000, 16_000), bars + posts))


def test_one_of_thousands_of_pieces_is_found_without_a_look_at_the_others():
    whole = np.arange(50_000 * 2, dtype=np.int64).reshape(50_000, 2)
    source = Counted(HERE, bytearray(whole.tobytes()))

    class Watched(Box):
        looked = 0

        def holds(self, axis: int, index: int) -> bool:
            Watched.looked += 1
            return super().holds(axis, index)

    dtype = BY_NAME["int64"]
    boxes = [Watched(source, (row, 0), Tensor(dtype, (1, 2), 0, 16 * row)) for row in range(50_000)]
    blocks = Blocks(HERE, [Pieces(dtype, whole.shape, boxes)])
    out = bytearray(64)
    blocks.read_into(16 * 31_000 + 8, memoryview(out))
    assert bytes(out) == whole.tobytes()[16 * 31_000 + 8 :][:64]
    assert Watched.looked < 20
    assert source.bytes_read == 64


def test_threads_read_at_once():
    source = Memory(HERE, bytearray())
    whole = np.arange(64 * 1000, dtype=np.float32).reshape(64, 1000)
    cut: list[Region] = [((0, first), (64, 250)) for first in range(0, 1000, 250)]
    pieces = Pieces(BY_NAME["float32"], whole.shape, [stored(source, whole, c, None) for c in cut])
    blocks = Blocks(HERE, [pieces])

    def read(first: int) -> bool:
        out = bytearray(5003)
        blocks.read_into(first, memoryview(out))
        return bytes(out) == whole.tobytes()[first : first + 5003]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, whole.nbytes - 5003, 997)))


def test_it_has_no_bytes_of_its_own():
    blocks = Blocks(HERE, [])
    assert (blocks.size, blocks.identity, blocks.path) == (0, None, HERE)
    check_unchanged([blocks])
