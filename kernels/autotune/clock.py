"""Clocks: how long a callable takes on a device, and what samples of it say of the true time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["ClockError", "estimate", "noise_of", "sample", "spread_of"]

_BACKWARDS = 100
_DOUBT = 5  # so that five samples, the fewest by default, are known to their noise
_LEAST_SPREAD = 0.02  # of the estimate: lowest samples of several runs on a quiet machine differ by about that much


class ClockError(RuntimeError):
    """The clock does not go forwards."""


def sample(
    run: Callable[[], object],
    calls: int,
    device: torch.device,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> float:
    """Milliseconds of one of ``calls`` calls in a row: by events on CUDA devices, else by a monotonic clock.

    A reading that did not go forwards (a virtual machine that was moved) is thrown away and taken again.

    Raises:
        ClockError: it never goes forwards.
    """
    for _ in range(_BACKWARDS):
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                before.record()
                for _ in range(calls):
                    run()
                after.record()
            after.synchronize()
            taken = before.elapsed_time(after)
        else:
            _synchronise(device)
            started = clock()
            for _ in range(calls):
                run()
            _synchronise(device)
            taken = (clock() - started) / 1e6
        if taken > 0:
            return taken / calls
    raise ClockError(f"the clock of {device} did not go forwards in {_BACKWARDS} runs: nothing can be timed")


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def estimate(samples: Sequence[float]) -> float:
    """The lowest of ``samples``: whatever disturbs a run adds time to it, nothing takes time away."""
    return min(samples)


def noise_of(samples: Sequence[float]) -> float:
    """How far the median of ``samples`` lies above the lowest."""
    return statistics.median(samples) - min(samples)


def spread_of(samples: Sequence[float]) -> float:
    """How far below the lowest of n ``samples`` the true time may lie: 5/n times their noise, and at least 2 %.

    Five samples are known to their noise, and with more of them the spread falls, however large the noise. Where all
    runs are delayed, by times that are exponentially distributed, the true time lies lower still in 16 % of cases for 5
    samples and in 5 % for 30. A single sample says nothing of what it hides: its spread is itself.
    """
    lowest = estimate(samples)
    if len(samples) == 1:
        return lowest
    return max(_DOUBT * noise_of(samples) / len(samples), _LEAST_SPREAD * lowest)
