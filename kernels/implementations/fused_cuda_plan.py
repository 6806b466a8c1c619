"""How the CUDA kernels cut a problem: which dim threads stand along, how wide they load, who walks which steps."""

from __future__ import annotations

import functools
from typing import NamedTuple

__all__ = ["LIMIT", "MOST_ORDER", "MOST_ORDER_FLOAT64", "Geometry", "Plan", "plan"]

MOST_ORDER = 32
# With a window of 32 values in float64, which spilled 1 to 2 KB a thread, backward met an illegal address on an H200
# (time-last, T = 4, order 17). The host emulation finds nothing wrong there, and windows of 8 passed.
MOST_ORDER_FLOAT64 = 8
LIMIT = 2**31 - 1  # blocks of a grid; kernels stride over what is left
_BLOCK, _WARP = 128, 32
_SHARED = 48 * 1024  # bytes of shared memory that every device gives a block
_PER_PROCESSOR = 4096  # threads wanted for each multiprocessor: a few waves
# Elements of a thread by the longest order, for 4-byte and 2-byte elements: 16 bytes a load where registers allow.
# csrc/cuda/fused_cuda.cu has the same table. Threads along positions share their channel, so its taps; along channels
# each element has its own.
_VECTORS = {
    (False, 4): {2: 4, 4: 4, 8: 4},
    (True, 4): {2: 4, 4: 4, 8: 2},
    (False, 2): {2: 8, 4: 8, 8: 4},
    (True, 2): {2: 8, 4: 4, 8: 2},
}


class Geometry(NamedTuple):
    """Strides (time, batch, channel, position) in elements, 0 where a dim has one entry; and the alignment."""

    strides: tuple[int, int, int, int]
    aligned: int  # the largest power of two up to 16 that divides the address in bytes

    def loads(self, dim: int, width: int, size: int) -> bool:
        """Whether ``width`` neighbors along ``dim`` can be loaded at once."""
        rest = (stride for other, stride in enumerate(self.strides) if other != dim)
        return self.strides[dim] == 1 and self.aligned >= width * size and all(stride % width == 0 for stride in rest)


class Plan(NamedTuple):
    """Fields of the same names in csrc/cuda/types.cuh say what each is."""

    lanes: int
    width: int
    vector: int
    tile: int
    wide_tile: int
    chunks: int
    phases: int
    segments: int
    span: int
    partials: int


def _width(lanes: int) -> int:
    """The power of two up to a warp that leaves fewest threads without work; the larger of two."""
    return min((32, 16, 8, 4, 2, 1), key=lambda w: -(-lanes // w) * w)


def _tile(geometries: tuple[Geometry, ...], steps: int, reach: int, size: int) -> tuple[int, int, int] | None:
    """(pitch, elements a load, span) of tiles in shared memory, or None if too little of a tile would be results."""
    arrays = 1 if len(geometries) < 3 else 2
    wide = 16 // size
    if steps % wide or not all(g.loads(0, wide, size) for g in geometries):
        wide = 1
    room = _SHARED // (arrays * _BLOCK * size) - 4 // size - 1
    halo = reach * arrays + 2 * (wide - 1)  # the second array's kernel looks ahead as far as back
    span = min(room - halo, steps) if halo else min(room, steps)
    if steps <= room:
        span = steps
    span = span if span == steps else span // wide * wide
    if span < 1 or (span < steps and span < halo):
        return None
    pitch = min(steps, span + halo)
    words = -(-pitch * size // 4)
    if size < 8:
        pitch = (words + 1 - words % 2) * 4 // size
    else:
        pitch += 1 - pitch % 2
    return pitch, wide, span


@functools.lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, int, int, int],
    order: int,
    dilation: int,
    size: int,
    geometries: tuple[Geometry, ...],
    processors: int,
) -> Plan:
    """Cut (T, N, C, P) of elements of ``size`` bytes for a device of ``processors`` multiprocessors.

    ``geometries`` are those of the input first, and of everything else that is read or written: the output; in
    backward the gradient and its output.
    """
    steps, batch, channels, positions = shape
    x, reach = geometries[0], (order - 1) * dilation
    # along the dim that is dense in memory; where none is, or two are (one entry), along the longer
    dense = [dim for dim in (2, 3) if shape[dim] > 1 and x.strides[dim] == 1]
    along = dense[0] if len(dense) == 1 else 3 if positions >= min(channels, _WARP // 2) else 2
    lanes, rows = shape[along], channels if along == 3 else 1
    columns = batch if along == 3 else batch * positions
    vector, tile, wide, span = 1, 0, 1, steps
    if size < 8 and order <= 8:
        table = _VECTORS[along == 2, size]
        width = next(v for most, v in table.items() if order <= most)
        if lanes % width == 0 and all(g.loads(along, width, size) for g in geometries):
            vector = width
    if not dense and steps > 1 and x.strides[0] == 1 and (found := _tile(geometries, steps, reach, size)):
        tile, wide, span = found
    width = _width(lanes // vector)
    tiles = -(-lanes // (width * vector))
    threads = rows * tiles * width * -(-steps // span)
    wanted = processors * _PER_PROCESSOR
    chunks = max(1, min(columns, -(-wanted // threads)))
    threads *= chunks
    phases = 1
    if not tile:
        if threads < wanted // 4:  # residues of t are worth more than segments: nothing is read twice
            phases = min(dilation, steps)
            threads *= phases
        if threads < wanted // 4:
            span = max(8 * dilation, 4 * reach)
            span = min(steps, max(span, -(-steps // max(1, wanted // 4 // threads))))
    segments = -(-steps // span)
    # partials take at most a twentieth of X, or a megabyte
    each = (order + 2) * channels * phases * segments * (tiles if along == 3 else 1)
    chunks = max(1, min(chunks, max(steps * batch * channels * positions // 20, 2**18) // each))
    partials = chunks * phases * segments * (tiles if along == 3 else 1)
    return Plan(int(along == 2), width, vector, tile, wide, chunks, phases, segments, span, partials)
