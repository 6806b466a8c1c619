"""Random inputs for measurements with cold caches: windows that move through a buffer larger than the last cache."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Pool", "last_level_cache"]

_ASSUMED_CACHE_BYTES = 32 << 20
# Some servers have caches of a gigabyte; a pool exceeds this only if one tensor needs more
_MAX_POOL_BYTES = 256 << 20
# A tensor below a 512th of the pool is small enough that a network finds it in a cache, too
_MAX_WINDOWS = 512


@functools.lru_cache
def last_level_cache(device: torch.device) -> int:
    """Return the size of the last-level cache of ``device`` in bytes; 32 MiB where the system does not report it."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _ASSUMED_CACHE_BYTES
    if device.type != "cpu":
        return _ASSUMED_CACHE_BYTES
    sizes = {}
    for folder in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = int((folder / "level").read_text()), (folder / "size").read_text().strip()
            sizes[level] = max(sizes.get(level, 0), int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]])
        except (OSError, ValueError, KeyError, IndexError):  # not reported, or in an unknown format
            continue
    return sizes[max(sizes)] if sizes else _ASSUMED_CACHE_BYTES


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements of memory that a tensor spans, from its first element to its last inclusive."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


class Pool:
    """Buffers of normal random numbers on a device, and windows on them of any shape and strides.

    All callers that ask for the same shape, strides and dtype share one iterator, so that consecutive measurements read
    different memory. Before a window repeats, the others have covered twice the last-level cache (at most 256 MiB).
    There is one buffer for each dtype, at least as large as the largest tensor asked for. Global random generators are
    not used.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._windows: dict[tuple, Iterator[Tensor]] = {}

    def windows(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """Return an endless iterator over windows of this shape and stride; the same one for the same arguments.

        Raises:
            torch.OutOfMemoryError: the device cannot hold a window.
        """
        key = (tuple(shape), tuple(stride), dtype)
        if key not in self._windows:
            elements = extent(shape, stride)
            buffer = self._buffer(dtype, elements)
            last_offset = buffer.numel() - elements
            count = max(1, min(_MAX_WINDOWS, buffer.numel() // max(elements, 1)))
            step = last_offset // max(count - 1, 1)
            step -= step % 64 if step > 64 else 0  # aligned as the allocator aligns tensors
            self._windows[key] = itertools.cycle(
                [buffer.as_strided(key[0], key[1], index * step) for index in range(count)]
            )
        return self._windows[key]

    def reserve(self, elements: int, dtype: torch.dtype) -> None:
        """Allocate the buffer for windows of up to ``elements`` elements now rather than on first use.

        Raises:
            torch.OutOfMemoryError: the device cannot hold the buffer.
        """
        self._buffer(dtype, elements)

    def _buffer(self, dtype: torch.dtype, elements: int) -> Tensor:
        """Return the buffer of ``dtype``, allocated or enlarged to hold at least ``elements``."""
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < elements:
            size = max(min(2 * last_level_cache(self.device), _MAX_POOL_BYTES) // dtype.itemsize, elements)
            drawn = torch.float64 if dtype is torch.float64 else torch.float32
            generator = torch.Generator(self.device).manual_seed(0)
            numbers = torch.randn(size, generator=generator, device=self.device, dtype=drawn)
            buffer = self._buffers[dtype] = numbers.to(dtype)
        return buffer
