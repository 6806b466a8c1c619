"""What ``convert`` takes in memory beside the network that it is given and the one that it returns.

Run with ``python benchmarks/memory.py [NAME=VALUE …]`` (Linux; options of ``convert``). A spiking VGG-16 of 138 million
parameters on (2, 1, 3, 64, 64); the peak of the process's resident memory, above the source, which has run once, and
the weights of the result. What kernels and layers are measured on is in it: a buffer past the last-level cache, and the
gradients of the largest layer.
"""

from __future__ import annotations

import gc
import pathlib
import sys
import types

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch

import mfpsn_fx

MIB = 2**20


def resident(kind: str) -> float:
    """MiB of this process's memory: ``VmRSS`` now, ``VmHWM`` at its peak since :func:`reset_peak`."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def reset_peak() -> None:
    """Begin a new peak."""
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def network() -> torch.nn.Module:
    """SpikingJelly's VGG-16 with batch norms, in step mode "m"."""
    if "torchvision" not in sys.modules:  # it is asked for weights alone, and its wheels need another torch
        inner = types.ModuleType("torchvision._internally_replaced_utils")
        inner.load_state_dict_from_url = None
        outer = types.ModuleType("torchvision")
        outer._internally_replaced_utils, outer.__path__ = inner, []
        sys.modules |= {"torchvision": outer, "torchvision._internally_replaced_utils": inner}
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import spiking_vgg

    net = spiking_vgg.spiking_vgg16_bn(spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan())
    functional.set_step_mode(net, "m")
    return net


def main(arguments: list[str]) -> None:
    options = dict(argument.split("=", 1) for argument in arguments)
    torch.manual_seed(0)
    net, x = network(), torch.rand(2, 1, 3, 64, 64)
    weights = sum(p.numel() * p.itemsize for p in net.parameters()) / MIB
    small = torch.nn.Sequential(torch.nn.Linear(4, 4), mfpsn_fx.MulFreePSN(4))
    mfpsn_fx.convert(small, torch.randn(4, 2, 4), progress=False)  # libraries are loaded, kernels compiled
    with torch.no_grad():
        net(x)
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()
    gc.collect()
    before = resident("VmRSS")
    reset_peak()
    converted = mfpsn_fx.convert(net, x, progress=False, **options)
    peak = resident("VmHWM")
    assert len(list(converted.parameters())) >= len(list(net.parameters()))
    above = peak - before - weights
    print(
        f"weights {weights:.0f} MiB; peak above source and result {above:.0f} MiB, {above / weights:.2f} of the weights"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
