"""Operators that the roll-up recognizes: additions, constructors of zeros, and in-place operators."""

from __future__ import annotations

import operator

import torch

__all__ = ["ADDITIONS", "MAKES_ZEROS", "OUT_OF_PLACE"]

ADDITIONS = (operator.add, torch.add, "add")
MAKES_ZEROS = (torch.zeros_like, torch.zeros, "new_zeros")
OUT_OF_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.iand: operator.and_, operator.ior: operator.or_,
    "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div",
}  # fmt: skip
