"""Calling conventions of stateful neurons of other libraries: their state arguments and their results."""

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
    """The calling convention of a neuron that takes its state as an argument, or runs step by step, or both.

    Attributes:
        states: names of the arguments after the input that carry the state, () if the module keeps it itself.
        outputs: results of a call, in order: ``"spikes"``, ``"membrane"``, ``"state"`` or the name of a state. A
            single result is returned as such, several as a tuple.
        sequence: True if one call runs over all time steps, (T, N, *); False if a call is one step, (N, *).
        reset: resets the state that the module keeps itself; None if it keeps none.
        initial: returns the states of the first step from its input; None: each state is None.
        membrane_of: attribute of the membrane in a ``"state"`` with several fields.
        integrator: makes the parallel module that returns the neuron's membrane without reset; None: from
            ``describe``.
        reads_out: True if the neuron never resets, so that its membrane is exact without a reset.
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
        """Call ``m`` on ``x`` in its initial state."""
        if self.reset is not None:
            self.reset(m)
        if not self.states:
            return m(x)
        return m(x, *(self.initial(x) if self.initial is not None else (None,) * len(self.states)))

    def output(self, result: object, name: str) -> object:
        """Return ``"spikes"`` or ``"membrane"`` from the result of a call."""
        if len(self.outputs) == 1:
            return result
        if name in self.outputs:
            return result[self.outputs.index(name)]
        return getattr(result[self.outputs.index("state")], self.membrane_of)

    def next_states(self, result: object) -> tuple:
        """Return the state arguments of the next call, from the result of a call."""
        if not self.states:
            return ()
        if "state" in self.outputs:
            return (result[self.outputs.index("state")],)
        return tuple(result[self.position(name)] for name in self.states)

    def position(self, state: str) -> int:
        """Return the index in a call's result of what the next call takes as ``state``."""
        if "state" in self.outputs:
            return self.outputs.index("state")
        return self.outputs.index({"mem": "membrane", "spk": "spikes"}.get(state, state))

    def leaky_integrator(self, m: nn.Module) -> LeakyIntegrator:
        """Return the module that computes the membrane of ``m`` without its reset.

        Raises:
            NotAFilterError: the neuron's membrane is not a linear filter that can be read out.
        """
        if self.integrator is not None:
            return self.integrator(m)
        response = describe(m).response
        if not isinstance(response, (Geometric, Taps, TwoPole)):
            raise NotAFilterError(f"its membrane has the response {type(response).__name__}, which cannot be read out")
        return LeakyIntegrator(response)


_STEPPING: dict[str, Callable[[nn.Module], Stepping]] = {}


def register_stepping(*classes: type | str):
    """Register the decorated function, module → :class:`Stepping`, as the calling convention of ``classes``."""
    if not classes:
        raise ValueError("register_stepping needs at least one class")

    def decorate(function: Callable[[nn.Module], Stepping]) -> Callable[[nn.Module], Stepping]:
        for cls in classes:
            _STEPPING[cls if isinstance(cls, str) else qualified_name(cls)] = function
        return function

    return decorate


def unregister_stepping(*classes: type | str) -> None:
    """Remove the calling conventions of ``classes``; unknown ones are ignored."""
    for cls in classes:
        _STEPPING.pop(cls if isinstance(cls, str) else qualified_name(cls), None)


def is_stepping(module: nn.Module) -> bool:
    """Return True if the module's class is registered; no attribute of the module is read, so it is safe in tracing."""
    return qualified_name(type(module)) in _STEPPING


def stepping_of(module: nn.Module) -> Stepping | None:
    """Return the calling convention of ``module``, or None if its class is not registered."""
    function = _STEPPING.get(qualified_name(type(module)))
    return None if function is None else function(module)


def zeros(count: int) -> Callable[[Tensor], tuple]:
    """Return the ``initial`` of ``count`` states that start at zero and have the input's shape."""

    def initial(x: Tensor) -> tuple:
        return tuple(torch.zeros_like(x) for _ in range(count))

    return initial
