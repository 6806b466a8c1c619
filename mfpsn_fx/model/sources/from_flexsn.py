"""SpikingJelly's FlexSN as a filter: its dynamics, a function of the user's, are probed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .description import NotAFilterError, SourceNeuron, register_source
from .from_spikingjelly import class_names, require_multi_step

__all__ = ["Recurrence"]

_SCALES = 2.0 ** torch.arange(-24, 25, dtype=torch.float64)
_HINT = "describe it with mfpsn_fx.register_source if it is a filter"


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The response of s[t] = A·s[t−1] + b·x[t], H[t] = c·s[t−1] + d·x[t]: d at lag 0, c·A^(j−1)·b at lag j."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    def __call__(self, lags: Tensor) -> Tensor:
        """Return the taps at ``lags`` (k,), as (k,) in float64."""
        state, response = self.b, [self.d]
        for _ in range(int(lags.max()) if lags.numel() else 0):
            response.append(self.c @ state)
            state = self.a @ state
        return torch.stack(response)[lags.to(self.d.device)]


@register_source(*class_names("FlexSN", "flexsn"))
def flexible(m: nn.Module) -> SourceNeuron:
    """Describe a core of one input and one output that is linear in input and states unless it fires.

    The core is called on small vectors in float64: along each axis the smallest value that fires is bisected, which
    gives the hyperplane at which it fires; the states' update is measured below it; both are verified at random
    points.
    """
    require_multi_step(m)
    core = _core(m)
    fires_at, sign = _thresholds(core, m.num_states)
    plane = torch.where(sign == 0, 0.0, sign / fires_at)
    small = torch.where(sign == 0, 1.0, fires_at) / 4
    _, moved = core(torch.diag(small))
    update = (moved / small[:, None]).T  # (states, 1 + states): next states from (input, states)
    _check_at_random(core, plane, small, update)
    response = Recurrence(update[:, 1:], update[:, 0], plane[1:], plane[0])
    notes = ("reset dropped", "its core was probed", "surrogate unknown, replaced by ATan(2)")
    return SourceNeuron("FlexSN", response, torch.ones((), dtype=torch.float64), notes=notes)


def _core(m: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function from points (P, 1 + states) of input and states to outputs (P,) and next states (P, states)."""
    if (m._num_inputs, m._num_outputs) != (1, 1):
        raise NotAFilterError(
            f"its core has {m._num_inputs} inputs and {m._num_outputs} outputs, where a neuron has one of each"
        )
    static = [tensor.detach().double().cpu() for tensor in m.static_inputs]
    if any(tensor.numel() != 1 for tensor in static):
        raise NotAFilterError(f"its static inputs differ from element to element; {_HINT}")

    def call(points: Tensor) -> tuple[Tensor, Tensor]:
        try:
            with torch.no_grad():
                found = m.core(*points.unbind(1), *(tensor.reshape(1) for tensor in static))
        except Exception as error:
            raise NotAFilterError(f"its core cannot be probed ({type(error).__name__}: {error}); {_HINT}") from error
        output, *states = (found,) if isinstance(found, Tensor) else tuple(found)
        if not bool(((output == 0) | (output == 1)).all()):
            raise NotAFilterError("its core returns other values than 0 and 1")
        return output.double(), torch.stack([s.double() for s in states], 1) if states else points[:, :0]

    return call


def _thresholds(core: Callable, states: int) -> tuple[Tensor, Tensor]:
    """Return for each axis the smallest value that fires and its sign; sign 0 for an axis that does not fire."""
    axes = 1 + states
    output, moved = core(torch.zeros(1, axes, dtype=torch.float64))
    if bool(output.any()) or bool(moved.any()):
        raise NotAFilterError(
            f"its core fires or changes its states without input, so that it is no linear filter; {_HINT}"
        )
    fires_at, signs = torch.ones(axes, dtype=torch.float64), torch.zeros(axes, dtype=torch.float64)
    for axis in range(axes):
        for sign in (1.0, -1.0):
            points = torch.zeros(len(_SCALES), axes, dtype=torch.float64)
            points[:, axis] = sign * _SCALES
            fired = core(points)[0].bool()
            if not bool(fired.any()):
                continue
            first = int(fired.int().argmax())
            if signs[axis] != 0 or first == 0 or not bool(fired[first:].all()):
                raise NotAFilterError(f"its core does not fire at a threshold of something linear; {_HINT}")
            signs[axis], fires_at[axis] = sign, _bisect(core, axis, sign, _SCALES[first - 1], _SCALES[first], axes)
    if not bool(signs.any()):
        raise NotAFilterError(f"its core did not fire on any probe; {_HINT}")
    return fires_at, signs


def _bisect(core: Callable, axis: int, sign: float, low: Tensor, high: Tensor, axes: int) -> Tensor:
    while low < (middle := (low + high) / 2) < high:
        point = torch.zeros(1, axes, dtype=torch.float64)
        point[0, axis] = sign * middle
        low, high = (low, middle) if bool(core(point)[0]) else (middle, high)
    return high


def _check_at_random(core: Callable, plane: Tensor, small: Tensor, update: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(512, len(plane), generator=generator, dtype=torch.float64) * 4 * small
    output, moved = core(points)
    h = points @ plane
    clear = (h - 1).abs() > 1e-5
    if not torch.equal(output[clear] == 1, h[clear] >= 1):
        raise NotAFilterError(f"its core does not fire at a threshold of something linear; {_HINT}")
    silent = output == 0
    expected = (points @ update.T)[silent]
    if not torch.allclose(moved[silent], expected, rtol=1e-5, atol=1e-7 * float(small.max())):
        raise NotAFilterError(f"its core's states do not change linearly where it does not fire; {_HINT}")
