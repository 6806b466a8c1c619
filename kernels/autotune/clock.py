"""Time callables on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["ClockError", "sample"]

_MAX_ATTEMPTS = 100


class ClockError(RuntimeError):
    """Raised if the clock of a device does not advance."""


def sample(
    run: Callable[[], object],
    calls: int,
    device: torch.device,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> float:
    """Return the milliseconds per call of ``calls`` consecutive calls: CUDA events, else a monotonic clock.

    If the clock did not advance (as when a virtual machine is migrated), the sample is repeated.

    Args:
        run: the callable to be timed.
        calls: how many calls one sample takes the mean of.
        device: synchronized before the clock is read.
        clock: of nanoseconds, for devices without events.

    Raises:
        ClockError: it did not advance in 100 samples.
    """
    for _ in range(_MAX_ATTEMPTS):
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
    raise ClockError(f"the clock of {device} did not advance in {_MAX_ATTEMPTS} samples: nothing can be timed")


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
