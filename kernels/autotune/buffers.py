"""Data for measuring that no cache holds: windows that move through a buffer larger than the last-level cache."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Pool", "last_level_cache"]

_UNKNOWN = 32 << 20
_MOST = 256 << 20  # bytes of a pool, beyond what one tensor needs: servers have caches of a gigabyte
_WINDOWS = 512  # at most: below a 512th of the pool a tensor is small enough to be in a cache in a network, too


@functools.lru_cache
def last_level_cache(device: torch.device) -> int:
    """Bytes of the last-level cache of ``device``; a guess of 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _UNKNOWN
    if device.type != "cpu":
        return _UNKNOWN
    sizes = {}
    for folder in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = int((folder / "level").read_text()), (folder / "size").read_text().strip()
            sizes[level] = max(sizes.get(level, 0), int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]])
        except (OSError, ValueError, KeyError, IndexError):  # not told, or told in another way
            continue
    return sizes[max(sizes)] if sizes else _UNKNOWN


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements between a tensor's first and its last in memory, both counted."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


class Pool:
    """Normal random numbers on a device, and windows on them of any shape and strides.

    Windows of one shape, strides and dtype are handed out in turn to whoever asks, whatever for: what one measurement
    read, the next one does not. Twice the last-level cache is passed through before a window comes again. The memory is
    one buffer for each dtype, or as much as the largest tensor; global random generators are not touched.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._windows: dict[tuple, Iterator[Tensor]] = {}

    def windows(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """An endless iterator over windows of this shape and stride; the same one for the same arguments.

        Raises:
            torch.OutOfMemoryError: the device cannot hold one.
        """
        key = (tuple(shape), tuple(stride), dtype)
        if key not in self._windows:
            need = extent(shape, stride)
            buffer = self._buffer(dtype, need)
            room = buffer.numel() - need
            count = max(1, min(_WINDOWS, buffer.numel() // max(need, 1)))
            step = room // max(count - 1, 1)
            step -= step % 64 if step > 64 else 0  # as the allocator would align them
            self._windows[key] = itertools.cycle(
                [buffer.as_strided(key[0], key[1], index * step) for index in range(count)]
            )
        return self._windows[key]

    def reserve(self, need: int, dtype: torch.dtype) -> None:
        """Make the memory for windows of ``need`` elements now, rather than when the first is asked for.

        Raises:
            torch.OutOfMemoryError: the device cannot hold it.
        """
        self._buffer(dtype, need)

    def _buffer(self, dtype: torch.dtype, need: int) -> Tensor:
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < need:
            size = max(min(2 * last_level_cache(self.device), _MOST) // dtype.itemsize, need)
            kept = torch.float64 if dtype is torch.float64 else torch.float32
            generator = torch.Generator(self.device).manual_seed(0)
            numbers = torch.randn(size, generator=generator, device=self.device, dtype=kept)
            buffer = self._buffers[dtype] = numbers.to(dtype)
        return buffer
