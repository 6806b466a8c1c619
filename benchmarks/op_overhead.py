"""What a call of the op costs beyond its work: define/impl against ``torch.library.custom_op``, and plain Python.

Run with ``python benchmarks/op_overhead.py``. Variants are interleaved; medians of many short runs, as ratios.
"""

from __future__ import annotations

import functools

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from runner import interleave
from tabulate import tabulate
from torch import Tensor

from mfpsn_fx.kernels import neuron
from mfpsn_fx.kernels.constants import NeuronConstants
from mfpsn_fx.kernels.op import _neuron


def plain(*tensors: Tensor | None, **keywords: object) -> tuple[Tensor, Tensor, Tensor]:
    return _neuron(*tensors, constants=NeuronConstants.checked(**keywords))


@torch.library.custom_op("mfpsn_bench::neuron", mutates_args=())
def convenient(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-5,
    surrogate: str = "atan",
    alpha: float = 2.0,
    gradient: str = "straight-through",
    min_exponent: int = -126,
    max_exponent: int = 127,
    training: bool = False,
    dilation: int = 1,
    layout: str = "time_first",
    method: str = "",
    layer: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    return plain(
        x, weight, gamma, beta, running_mean, running_var, scale, shift, mask, eps=eps, surrogate=surrogate,
        alpha=alpha, gradient=gradient, min_exponent=min_exponent, max_exponent=max_exponent, training=training,
        dilation=dilation, layout=layout, method=method, layer=layer,
    )  # fmt: skip


def main(rounds: int = 60, calls: int = 50) -> None:
    x = torch.zeros(0, 1, 2)  # nothing to compute: what remains is the way to the kernel
    one = torch.ones(2)
    arguments = (x, torch.ones(2, 2), one, -one, 0 * one, one)
    functions = {"plain Python call": plain, "define/impl (ours)": neuron, "torch.library.custom_op": convenient}

    def several(function) -> None:
        for _ in range(calls):
            function(*arguments, dilation=1, layer="lif")

    variants = {name: functools.partial(several, function) for name, function in functions.items()}
    with torch.no_grad():
        found = interleave(variants, torch.device("cpu"), 0.0, least=rounds, most=rounds)
    medians = {name: ms / calls * 1e3 for name, ms in found.ms.items()}
    base = medians["plain Python call"]
    print(f"torch {torch.__version__}, CPU with {torch.get_num_threads()} threads")
    print(tabulate([[n, f"{m:.1f}", f"{m / base:.2f}"] for n, m in medians.items()],
                   ["way", "us per call", "ratio"]))  # fmt: skip


if __name__ == "__main__":
    main()
