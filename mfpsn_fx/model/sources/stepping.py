"""How a stateful neuron of another library is called: what it takes beside its input, and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..integrator import LeakyIntegrator
from ..response import Geometric, Taps, TwoPole
from .description import NotAFilterError, describe, qualified_name

__all__ = ["Stepping", "is_stepping", "register_stepping", "stepping_of", "unregister_stepping"]


@dataclasses.dataclass(frozen=True)
class Stepping:
    """The calling convention of a neuron that keeps its state outside, or steps through time, or both.

    Attributes:
        states: names of the arguments after the input that carry the state, () if the module keeps it itself.
        outputs: what a call returns, in order: ``"spikes"``, ``"membrane"``, ``"state"`` or the name of a state; a
            single one comes bare, several come as a tuple.
        sequence: one call runs over all of time, (T, N, *); otherwise a call is one step, (N, *).
        reset: makes the module forget the state that it keeps itself; None where it keeps none.
        initial: states of a first step with an input like the one given; None starts with None for each.
        membrane_of: the membrane in a ``"state"`` that is more than the membrane, by attribute name.
        integrator: makes the parallel module that returns the neuron's membrane without reset; None: from
            ``describe``.
        reads_out: the membrane is exact without a reset: the neuron never resets.
    """

    states: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("spikes",)
    sequence: bool = False
    reset: Callable[[nn.Module], None] | None = None
    initial: Callable[[Tensor], tuple] | None = None
    membrane_of: str | None = None
    integrator: Callable[[nn.Module], LeakyIntegrator] | None = None
    reads_out: bool = False

    def first(self, m: nn.Module, x: Tensor) -> object:
        """Call ``m`` on ``x`` with its state as it is before the first step."""
        if self.reset is not None:
            self.reset(m)
        if not self.states:
            return m(x)
        return m(x, *(self.initial(x) if self.initial is not None else (None,) * len(self.states)))

    def output(self, result: object, name: str) -> object:
        """``"spikes"`` or ``"membrane"`` in what a call returned."""
        if len(self.outputs) == 1:
            return result
        if name in self.outputs:
            return result[self.outputs.index(name)]
        return getattr(result[self.outputs.index("state")], self.membrane_of)

    def next_states(self, result: object) -> tuple:
        """The state arguments of the next call."""
        if not self.states:
            return ()
        if "state" in self.outputs:
            return (result[self.outputs.index("state")],)
        return tuple(result[self.position(name)] for name in self.states)

    def position(self, state: str) -> int:
        """Where a call's result has what the next call takes as ``state``."""
        if "state" in self.outputs:
            return self.outputs.index("state")
        return self.outputs.index({"mem": "membrane", "spk": "spikes"}.get(state, state))

    def leaky_integrator(self, m: nn.Module) -> LeakyIntegrator:
        """The module that returns what the membrane of ``m`` would be without its reset.

        Raises:
            NotAFilterError: the neuron's membrane is no linear filter, or takes up its input a step late.
        """
        if self.integrator is not None:
            return self.integrator(m)
        response = describe(m).response
        if not isinstance(response, (Geometric, Taps, TwoPole)):
            raise NotAFilterError(f"its membrane has the response {type(response).__name__}, which cannot be read out")
        return LeakyIntegrator(response)


_STEPPING: dict[str, Callable[[nn.Module], Stepping]] = {}


def register_stepping(*classes: type | str):
    """Decorator: the function tells how modules of ``classes`` are called, as :func:`register_source` tells what
    they are. It takes the module and returns a :class:`Stepping`."""
    if not classes:
        raise ValueError("register_stepping needs at least one class")

    def decorate(function: Callable[[nn.Module], Stepping]) -> Callable[[nn.Module], Stepping]:
        for cls in classes:
            _STEPPING[cls if isinstance(cls, str) else qualified_name(cls)] = function
        return function

    return decorate


def unregister_stepping(*classes: type | str) -> None:
    """Forget ``classes``; unknown ones are ignored."""
    for cls in classes:
        _STEPPING.pop(cls if isinstance(cls, str) else qualified_name(cls), None)


def is_stepping(module: nn.Module) -> bool:
    """Whether :func:`stepping_of` knows the module's class; it reads nothing of the module, so tracing may ask."""
    return qualified_name(type(module)) in _STEPPING


def stepping_of(module: nn.Module) -> Stepping | None:
    """How ``module`` is called, or None if it is no such neuron."""
    function = _STEPPING.get(qualified_name(type(module)))
    return None if function is None else function(module)


def zeros(count: int) -> Callable[[Tensor], tuple]:
    """``initial`` for ``count`` states that start at zero and have the input's shape."""

    def initial(x: Tensor) -> tuple:
        return tuple(torch.zeros_like(x) for _ in range(count))

    return initial
