"""Clocks: how long a callable takes on a device, and how much that varies on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["ClockError", "machine_noise", "measure", "sample", "spread_of"]

_NOISE_RUNS = 25
_BACKWARDS = 100


class ClockError(RuntimeError):
    """The clock does not go forwards."""


def measure(run: Callable[[], object], repeats: int, device: torch.device | str = "cpu") -> float:
    """Milliseconds of ``run``: the mean of the last m = ``repeats`` of 2m+1 runs (paper, algorithm 1).

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, found {repeats}")
    device = torch.device(device)
    total = 0.0
    for index in range(2 * repeats + 1):
        _synchronise(device)
        started = time.perf_counter()
        run()
        _synchronise(device)
        if index > repeats:
            total += time.perf_counter() - started
    return total * 1e3 / repeats


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


def spread_of(samples: Sequence[float], noise: float = 0.0) -> float:
    """Half the width of the interval in which the median of ``samples`` lies with 95 %, from their median deviation.

    Few samples deviate little by chance: the relative ``noise`` of single samples on this machine is the least assumed.
    """
    middle = statistics.median(samples)
    sigma = max(1.4826 * statistics.median(abs(value - middle) for value in samples), noise * middle)
    # 1.2533 = √(π/2): the median's standard error over the mean's, for normal samples
    return 1.96 * 1.2533 * sigma / math.sqrt(len(samples))


def machine_noise(device: torch.device, clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """How much single samples of one fixed piece of work vary: 1.4826 times the median deviation over the median."""
    x = torch.ones(1 << 18, device=device)
    run = lambda: torch.add(x, 1.0)  # noqa: E731
    calls = max(1, math.ceil(0.2 / max(sample(run, 1, device, clock), 1e-3)))
    values = [sample(run, calls, device, clock) for _ in range(_NOISE_RUNS)]
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values) / middle
