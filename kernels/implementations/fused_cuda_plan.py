"""Work partitioning of the CUDA kernels: the dim that threads are placed along, load widths, and steps per thread."""

from __future__ import annotations

import functools
from typing import NamedTuple

__all__ = ["LIMIT", "MAX_ORDER", "MAX_ORDER_FLOAT64", "Geometry", "Plan", "plan"]

MAX_ORDER = 32
# With a window of 32 values in float64, which spilled 1 to 2 KB a thread, backward accessed an illegal address on an
# H200 (time-last, T = 4, order 17). The host emulation finds no error there, and windows of 8 passed.
MAX_ORDER_FLOAT64 = 8
LIMIT = 2**31 - 1  # blocks of a grid; kernels loop over the rest
_BLOCK, _WARP = 128, 32
_SHARED = 48 * 1024  # bytes of shared memory that every device gives a block
_PER_PROCESSOR = 4096  # threads wanted for each multiprocessor: a few waves
# Elements per thread by (along channels, element size) and by the largest order: 16 bytes per load where registers
# allow. csrc/cuda/fused_cuda.cu has the same table. The elements of a thread along positions share the taps of one
# channel; along channels each element has its own.
_VECTORS = {
    (False, 4): {2: 4, 4: 4, 8: 4},
    (True, 4): {2: 4, 4: 4, 8: 2},
    (False, 2): {2: 8, 4: 8, 8: 4},
    (True, 2): {2: 8, 4: 4, 8: 2},
}


class Geometry(NamedTuple):
    """Strides (time, batch, channel, position) in elements, 0 for dims of size 1, and the alignment in bytes."""

    strides: tuple[int, int, int, int]
    aligned: int  # the largest power of two up to 16 that divides the address in bytes

    def loads(self, dim: int, width: int, size: int) -> bool:
        """Return True if ``width`` neighbors along ``dim``, of ``size`` bytes each, can be loaded at once."""
        rest = (stride for other, stride in enumerate(self.strides) if other != dim)
        return self.strides[dim] == 1 and self.aligned >= width * size and all(stride % width == 0 for stride in rest)


class Plan(NamedTuple):
    """Partitioning parameters; csrc/cuda/types.cuh documents the fields of the same names."""

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
    """Return the power of two up to a warp that leaves the fewest threads idle; the largest of these."""
    return min((32, 16, 8, 4, 2, 1), key=lambda w: -(-lanes // w) * w)


def _tile(geometries: tuple[Geometry, ...], steps: int, reach: int, size: int) -> tuple[int, int, int] | None:
    """Return (pitch, elements per load, span) of shared-memory tiles; None if tiles would be mostly overlap."""
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
    """Partition (T, N, C, P) elements of ``size`` bytes for a device with ``processors`` multiprocessors.

    ``geometries`` are those of the input and of the output; in backward those of the input, the gradient and dX.
    """
    steps, batch, channels, positions = shape
    x, reach = geometries[0], (order - 1) * dilation
    # along the dim that is dense in memory; if none is, or two are (one of size 1), along the longer
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
        if threads < wanted // 4:  # phases are preferred to segments, since they read nothing twice
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
