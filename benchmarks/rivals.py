"""SpikingJelly's neurons as the benchmarks build them, where SpikingJelly is installed."""

from __future__ import annotations

from torch import nn

try:
    from spikingjelly.activation_based import neuron, surrogate

    MISSING = ""
except ImportError as error:
    MISSING = f"PSN, SlidingPSN and LIF are missing: SpikingJelly cannot be imported ({error})"

__all__ = ["MISSING", "lif", "psn", "reset", "sliding_psn"]


def psn(steps: int) -> nn.Module:
    return neuron.PSN(steps, surrogate_function=surrogate.ATan())


def sliding_psn(order: int) -> nn.Module:
    return neuron.SlidingPSN(order, surrogate_function=surrogate.ATan(), step_mode="m")


def lif() -> nn.Module:
    return neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan())


def reset(module: nn.Module) -> None:
    """Forget the membranes of the last sequence: each step of a benchmark starts one."""
    for child in module.modules():
        if hasattr(child, "reset"):
            child.reset()
