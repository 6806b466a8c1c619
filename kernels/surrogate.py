"""Surrogate gradients: the Heaviside step Θ in forward, a smooth derivative in backward."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["ATan", "Rational", "Sigmoid", "Surrogate", "get_surrogate", "register_surrogate", "spike", "surrogates"]

_SURROGATES: dict[str, type[Surrogate]] = {}


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """Base class of surrogates with one shape parameter α. Forward is Θ(x) = 1 for x ≥ 0, else 0 (fires at equality).

    To add one, derive from this class, define ``derivative`` and decorate with :func:`register_surrogate`.
    """

    alpha: float
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"{type(self).__name__}: alpha must be finite and positive, found {self.alpha}")

    def derivative(self, x: Tensor) -> Tensor:
        """Return the replacement of dΘ/dx in backward, elementwise."""
        raise TypeError(f"{type(self).__name__} defines no derivative")


def register_surrogate(name: str):
    """Class decorator: register a :class:`Surrogate` for the op under ``name``.

    Raises:
        ValueError: the name is taken by another class.
        TypeError: the class is not a ``Surrogate`` or has no ``derivative`` of its own.
    """

    def decorate(cls: type[Surrogate]) -> type[Surrogate]:
        if not (isinstance(cls, type) and issubclass(cls, Surrogate)) or cls.derivative is Surrogate.derivative:
            raise TypeError(f"{cls!r} must derive from Surrogate and define derivative(x)")
        known = _SURROGATES.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"the surrogate name {name!r} is taken by {known.__qualname__}")
        cls.name = name
        _SURROGATES[name] = cls
        get_surrogate.cache_clear()  # the class may have been redefined
        return cls

    return decorate


@functools.lru_cache(maxsize=256)
def get_surrogate(name: str, alpha: float) -> Surrogate:
    """Return the surrogate registered as ``name`` with shape parameter ``alpha``; ``ValueError`` if there is none."""
    if name not in _SURROGATES:
        raise ValueError(f"unknown surrogate {name!r}: choose one of {', '.join(map(repr, _SURROGATES))}")
    return _SURROGATES[name](alpha)


def surrogates() -> tuple[str, ...]:
    """Return the names of all registered surrogates."""
    return tuple(_SURROGATES)


@register_surrogate("atan")
@dataclasses.dataclass(frozen=True)
class ATan(Surrogate):
    """Arctangent, Θ'(x) ≈ α / (2 (1 + (παx/2)²)); the paper uses α = 2 (CIFAR) and α = 5 (SHD)."""

    alpha: float = 2.0

    def derivative(self, x: Tensor) -> Tensor:
        return (x * (math.pi * self.alpha / 2)).square_().add_(1).reciprocal_().mul_(self.alpha / 2)


@register_surrogate("rational")
@dataclasses.dataclass(frozen=True)
class Rational(Surrogate):
    """Rational function, Θ'(x) ≈ 1 / (1 + αx²); the paper uses α = 10 on DVS-Lip."""

    alpha: float = 10.0

    def derivative(self, x: Tensor) -> Tensor:
        return x.square().mul_(self.alpha).add_(1).reciprocal_()


@register_surrogate("sigmoid")
@dataclasses.dataclass(frozen=True)
class Sigmoid(Surrogate):
    """Sigmoid, Θ'(x) ≈ α s(αx) (1 − s(αx)) with the logistic s; SpikingJelly's default, with α = 4."""

    alpha: float = 4.0

    def derivative(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(x * self.alpha)
        return s.mul(self.alpha).mul_(1 - s)


class _Spike(torch.autograd.Function):
    """Θ in forward, the surrogate's derivative in backward."""

    @staticmethod
    def forward(x, surrogate):
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.surrogate.derivative(x), None


def spike(x: Tensor, surrogate: Surrogate | None = None) -> Tensor:
    """Return Θ(x) elementwise, differentiable by ``surrogate`` (default ``ATan(2.0)``); any shape."""
    return _Spike.apply(x, ATan() if surrogate is None else surrogate)
