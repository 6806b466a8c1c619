"""Clocks: how long a callable takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["ClockError", "sample"]

_BACKWARDS = 100


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
            _synchronize(device)
            started = clock()
            for _ in range(calls):
                run()
            _synchronize(device)
            taken = (clock() - started) / 1e6
        if taken > 0:
            return taken / calls
    raise ClockError(f"the clock of {device} did not go forwards in {_BACKWARDS} runs: nothing can be timed")


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
