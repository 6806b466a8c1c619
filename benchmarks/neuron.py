"""One neuron layer, forward and backward in training: our kernels, SpikingJelly's PSN and LIF, and ``clone``.

Run with ``python benchmarks/neuron.py [--quick] [--json FILE] [--device cpu]``. Variants are interleaved in one run;
the table shows medians as ratios to PSN (below 1 is faster). Needs the extra ``spikingjelly``.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from tabulate import tabulate
from tqdm import tqdm

import mfpsn_fx
from mfpsn_fx.kernels import Layout, Problem, kernels

BATCH, CHANNELS, LENGTH = 32, 128, 32


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each variant; two rounds of warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 2):
        for name, run in variants.items():
            _synchronise(device)
            started = time.perf_counter()
            run()
            _synchronise(device)
            if index >= 2:
                samples[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _step(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        module(x).backward(grad)
        functional.reset_net(module)

    return run


def measure(steps: int, order: int, dilation: int, rounds: int, device: torch.device) -> dict[str, float]:
    """One cell of the grid: milliseconds of forward and backward by variant."""
    x = torch.randn(steps, BATCH, CHANNELS, LENGTH, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    arctan = surrogate.ATan()
    variants = {
        "clone": lambda: x.detach().clone(),
        "PSN": _step(neuron.PSN(steps, surrogate_function=arctan).to(device), x, grad),
        "LIF": _step(neuron.LIFNode(step_mode="m", surrogate_function=arctan).to(device), x, grad),
    }
    problem = Problem(tuple(x.shape), Layout.TIME_FIRST, x.dtype, device.type, order, dilation)
    for kernel in kernels("time_first"):
        if kernel.refusal(problem) is None:
            ours = mfpsn_fx.MulFreePSN(CHANNELS, order, dilation, device=device)
            ours.bind(kernel=kernel.name)
            variants[kernel.name] = _step(ours, x, grad)
    return interleaved(variants, rounds, device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="k = 2, d = 1 only, fewer rounds")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    rounds = 5 if options.quick else 11
    cells = [
        (steps, order, dilation)
        for steps in (2, 4, 8, 16, 32)
        for order in ((2,) if options.quick else (2, 4, 8))
        for dilation in ((1,) if options.quick else (1, 3))
        if order <= steps
    ]
    results = []
    for steps, order, dilation in tqdm(cells, desc="cells", disable=None):
        found = measure(steps, order, dilation, rounds, device)
        results.append({"T": steps, "k": order, "d": dilation, "ms": found})
    names = [name for name in results[0]["ms"] if name != "PSN"]
    rows = [
        [r["T"], r["k"], r["d"], f"{r['ms']['PSN']:.2f}", *(f"{r['ms'][n] / r['ms']['PSN']:.2f}" for n in names)]
        for r in results
    ]
    means = [math.exp(statistics.mean(math.log(r["ms"][n] / r["ms"]["PSN"]) for r in results)) for n in names]
    rows.append(["geometric mean", "", "", "", *(f"{m:.2f}" for m in means)])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}; (T, N, C, L) = (T, {BATCH}, {CHANNELS}, {LENGTH}), float32")
    print("forward and backward in training, ratio to PSN\n")
    print(tabulate(rows, ["T", "k", "d", "PSN ms", *names], tablefmt="github", disable_numparse=True))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
