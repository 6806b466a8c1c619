"""How long a kernel takes: device-synchronised, warmed up, on data of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from .op import neuron
from .registry import Problem

__all__ = ["Times", "measure", "time_kernel"]


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds; forward (training) and backward are None where a channel has a single value."""

    forward_ms: float | None
    backward_ms: float | None
    eval_ms: float


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


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_kernel(
    problem: Problem, name: str, repeats: int, *, alpha: float = 2.0, device: torch.device | None = None
) -> Times:
    """Time kernel ``name`` on random data of ``problem``; the global random generators are not touched.

    Args:
        problem: shape, dtype, device type, order, dilation and so on.
        name: a registered kernel.
        repeats: m; each time is the mean of the last m of 2m+1 runs.
        alpha: of the surrogate.
        device: where there are several of the problem's type.

    Raises:
        Whatever the kernel raises.
    """
    device = torch.device(problem.device) if device is None else device
    generator = torch.Generator(device).manual_seed(0)
    kept = torch.float64 if problem.dtype is torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = kept) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=kept).to(dtype)

    x, grad = normal(*problem.shape, dtype=problem.dtype), normal(*problem.shape, dtype=problem.dtype)
    weight = normal(problem.channels, problem.order)
    ones, zeros = torch.ones(problem.channels, device=device, dtype=kept), weight.new_zeros(problem.channels)
    mask = None
    if problem.masked:
        mask = torch.ones(problem.steps, problem.batch, dtype=torch.bool, device=device)
    constants = {
        "surrogate": problem.surrogate,
        "alpha": alpha,
        "gradient": problem.gradient,
        "dilation": problem.dilation,
        "layout": str(problem.layout),
        "method": name,
    }
    affine = (ones, zeros) if problem.affine else (None, None)

    def forward(training: bool):
        return neuron(x, weight, ones, -ones, zeros, ones, *affine, mask, training=training, **constants)

    with torch.no_grad():
        evaluation = measure(lambda: forward(False), repeats, device)
        if x.numel() <= problem.channels:
            return Times(None, None, evaluation)
        _, mean, var = forward(True)
        training = measure(lambda: forward(True), repeats, device)
        backward = measure(
            lambda: torch.ops.mfpsn.neuron_backward(
                grad, x, weight, ones, -ones, mean, var, *affine, mask, training=True, **constants
            ),
            repeats,
            device,
        )
    return Times(training, backward, evaluation)
