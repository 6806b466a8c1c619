"""What the roll-up has to know of single operators: which draw random numbers, make zeros, or add."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

__all__ = ["ADDITIONS", "MAKES_ZEROS", "OUT_OF_PLACE", "is_random"]

ADDITIONS = (operator.add, torch.add, "add")
MAKES_ZEROS = (torch.zeros_like, torch.zeros, "new_zeros")
OUT_OF_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.iand: operator.and_, operator.ior: operator.or_,
    "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div",
}  # fmt: skip
_RANDOM = (
    torch.bernoulli, torch.rand_like, torch.randn_like, torch.poisson, torch.normal, torch.dropout,
    nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d,
    nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout, torch.randint_like, torch.multinomial,
    torch.binomial, nn.functional.gumbel_softmax, "bernoulli", "bernoulli_", "normal_", "uniform_", "multinomial",
    "exponential_", "geometric_", "random_",
)  # fmt: skip


def is_random(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if a node draws random numbers."""
    if node.op == "call_module":
        return any(
            isinstance(m, (nn.modules.dropout._DropoutNd, nn.RReLU)) for m in gm.get_submodule(node.target).modules()
        )
    return node.op in ("call_function", "call_method") and node.target in _RANDOM
